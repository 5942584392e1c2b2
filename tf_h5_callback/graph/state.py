"""The state of a graph, copied out of a session and assigned to it, each with one run."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from tf_h5_callback.errors import CheckpointMismatchError
from tf_h5_callback.folder.directory import read_verified
from tf_h5_callback.graph._compat import initial_value_of
from tf_h5_callback.graph.setters import (
    Item,
    Setter,
    Setters,
    VarList,
    assign,
    has_setters,
    items_of,
    iterator_saveable,
    saveable_setters,
    select,
    variable_setter,
    with_names,
)
from tf_h5_callback.graph.snapshot import Copies, LazySnapshot, Snapshots, in_groups
from tf_h5_callback.restoring import matching
from tf_h5_callback.restoring.restore import EVERYTHING, Restore
from tf_h5_callback.saving.save import Save

# What TensorFlow raises for the state of another iterator. Not all of its errors: some tell that
# the connection is lost.
_REFUSALS = (
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.UnimplementedError,
)


class GraphState:
    """All that is saved of a graph and restored into it.

    Args:
      var_list: see `H5CheckpointHook`.
      iterators: ``tf.data`` iterators to save with their position.
      graph: by default the default graph.

    Raises:
      ValueError: two variables would have one name in the file, or some parts of a partitioned
        variable are missing.
      TypeError: something in ``var_list`` is not a variable.
    """

    def __init__(self, var_list: VarList = None, iterators: Iterable[Any] = (), graph: Any = None):
        self._graph = graph or tf.get_default_graph()
        self._var_list = var_list
        self._items: Dict[str, Item] = {}
        self._setters: Setters = {}
        self._iterators: List[str] = []  # their names in the file
        self._session: Any = None  # the one that _snapshots are of
        self._snapshots: Optional[Snapshots] = None
        self._copies = Copies(self._graph, ())
        with self._graph.as_default():
            variables, saveables = select(self._graph, var_list)
            step = tf.train.get_global_step()
            if step is not None and not any(step is v for vs in variables.values() for v in vs):
                variables.setdefault(step.name, []).append(step)
            for item, members in items_of(variables):
                setter = variable_setter(self._graph, item, members)
                self._add(item, setter)
            self._variables = list(self._items.values())
            for saveable in saveables:
                for item, setter in saveable_setters(self._graph, saveable):
                    self._add(item, setter)
            for iterator in iterators:
                saveable = iterator_saveable(self._graph, iterator)
                for item, setter in saveable_setters(self._graph, saveable):
                    # Its spec is named differently from version to version of TensorFlow.
                    self._add(item._replace(name=saveable.name), setter)
                    self._iterators.append(saveable.name)

    def _add(self, item: Item, setter: Setter) -> None:
        if item.name in self._items:
            raise ValueError("two variables would be saved as {!r}".format(item.name))
        self._items[item.name] = item
        self._setters[item.name] = setter

    def add_copies(self) -> None:
        """Adds the nodes that make snapshots cheap, while the graph is not finalised."""
        self._copies = Copies(self._graph, self._variables)

    def add_late_variables(self) -> None:
        """Takes up variables that came after this object, without adding nodes to the graph.

        They are restored through their initialisers.

        Raises:
          RuntimeError: one of them can only be restored with new nodes.
        """
        if self._var_list is not None and not callable(self._var_list):
            return
        variables, saveables = select(self._graph, self._var_list)
        known = {id(part.fetch) for item in self._items.values() for part in item.parts}
        refused = [s.name for s in saveables if not has_setters(self._graph, s)]
        late = {name: vs for name, vs in variables.items() if id(vs[0]) not in known}
        for item, members in items_of(late):
            value = initial_value_of(members[0])
            if len(members) > 1 or value is None:
                refused.append(item.name)
            else:
                self._add(item, (members[0].initializer, value))
        if refused:
            raise RuntimeError(
                "created after H5CheckpointHook.begin(), too late to be saved: {}. Create them "
                "earlier, or place H5CheckpointHook after the hook that creates them".format(
                    ", ".join(refused)
                )
            )

    def snapshot(
        self, session: Any, owner: Save, *extra: Any
    ) -> Tuple[Dict[str, np.ndarray], List[Any]]:
        """Copies everything out of the session with one ``session.run``.

        Args:
          session: the session.
          owner: see `Snapshots.take`.
          extra: more tensors; the same ones for all snapshots of one session.

        Returns:
          ``{name: ndarray}``, and the values of the ``extra`` tensors, of the same moment. The next
          snapshot overwrites the arrays.
        """
        if self._snapshots is None or self._session is not session:
            self.forget_session()
            self._snapshots = Snapshots(session, self._items.values(), self._copies, extra)
            self._session = session
        return self._snapshots.take(owner)

    def forget_session(self) -> None:
        """Frees the memory that is kept for the next snapshot."""
        self._session = self._snapshots = None

    def lazy_snapshot(self, session: Any) -> Mapping[str, np.ndarray]:
        """The state of a session in which nothing runs, copied piece by piece when it is asked for.

        For state that does not fit into memory a second time.
        """
        return LazySnapshot(session, self._items.values(), self._copies)

    def match(
        self, checkpoint: Any, restore: Restore = EVERYTHING, ignore_extra: bool = False
    ) -> Dict[str, str]:
        """What of a checkpoint belongs where in the graph; see `matching.match`."""
        specs = {name: item.spec for name, item in self._items.items()}
        return matching.match(specs, checkpoint, with_names(restore), ignore_extra)

    def restore(
        self,
        session: Any,
        checkpoint: Any,
        restore: Restore = EVERYTHING,
        *,
        ignore_extra: bool = False,
        at_once: bool = True,
    ) -> None:
        """Compares a checkpoint with the graph, verifies it, and only then assigns it.

        Args:
          session: the session.
          checkpoint: an open one.
          restore: what goes where.
          ignore_extra: tensors of the file that the graph does not have are no difference.
          at_once: read the file once, and have it in memory as a whole; False: read it twice, to
            verify it and to assign one part after the other.

        Raises:
          CheckpointCorruptError: it is damaged.
          CheckpointMismatchError: it does not fit, or see `assign`.
        """
        names = self.match(checkpoint, restore, ignore_extra)
        if at_once:
            self.assign(session, read_verified(checkpoint, names))
        else:
            checkpoint.verify()
            changing, groups = in_groups(self._items[name] for name in names)
            for group in filter(None, [changing, *groups]):
                wanted = {item.name: names[item.name] for item in group}
                self.assign(session, read_verified(checkpoint, wanted))
        if restore.run_local_init:
            session.run([v.initializer for v in tf.local_variables()])

    def assign(self, session: Any, tensors: Mapping[str, np.ndarray]) -> None:
        """Assigns tensors that passed `match`, with one ``session.run``, after iterators.

        Args:
          session: the session.
          tensors: name in the graph -> array. TensorFlow may adopt it as the buffer of a variable:
            do not write to it again, and give no array twice.

        Raises:
          CheckpointMismatchError: TensorFlow refuses the state of an iterator. Nothing else was
            assigned.
        """
        rest = {k: _cast(v, self._items[k].dtype) for k, v in tensors.items()}
        # First and alone: only TensorFlow can tell whether it understands their state.
        for name in self._iterators:
            if name in rest:
                self._assign_iterator(session, name, rest.pop(name))
        assign(session, self._setters, rest)

    def _assign_iterator(self, session: Any, name: str, state: np.ndarray) -> None:
        try:
            assign(session, self._setters, {name: state})
        except _REFUSALS as error:
            raise CheckpointMismatchError(
                "TensorFlow {} refuses the state of the iterator {}; nothing was restored. Such a "
                "state belongs to its dataset and to the version of TensorFlow that saved it. To "
                "restore everything else, leave out H5CheckpointHook's argument iterators and give "
                "restore=tf_h5_callback.Restore(strict=False)".format(tf.VERSION, name)
            ) from error


def scalar_tensor(tensor: Any) -> Any:
    """A scalar tensor of the default graph, given itself or its name (with or without ``:0``).

    Raises:
      ValueError: there is no such tensor, or it is not a scalar number.
    """
    if isinstance(tensor, str):
        name = tensor if ":" in tensor else tensor + ":0"
        try:
            tensor = tf.get_default_graph().get_tensor_by_name(name)
        except KeyError as error:
            raise ValueError("monitor: the graph has no tensor {!r}".format(name)) from error
    if tensor.shape.rank not in (0, None) or tensor.dtype.base_dtype in (tf.string, tf.variant):
        raise ValueError("monitor: {!r} is not a scalar number".format(tensor))
    return tensor


def _cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    if value.dtype == object or value.dtype == dtype.as_numpy_dtype:
        return value
    return value.astype(dtype.as_numpy_dtype)
