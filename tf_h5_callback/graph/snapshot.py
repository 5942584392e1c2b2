"""Items of a graph -> ``{name: ndarray}``: what to fetch, and what to make of the values."""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
import tensorflow.compat.v1 as tf

from tf_h5_callback.file.memory import aligned_empty
from tf_h5_callback.graph.setters import Item, Part, nodes_of
from tf_h5_callback.saving.save import Save

_LARGE = 1 << 20  # bytes
_GROUP_SIZE = 64 << 20  # bytes
# Those that can be copied into an array, and those that can be joined on all devices.
_COPIED_DTYPES = (
    *(tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool),
    *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16),
)
_JOINED_DTYPES = (tf.float16, tf.float32, tf.float64)
_QUANTISED = {
    dtype: dtype.as_numpy_dtype for dtype in (tf.qint8, tf.quint8, tf.qint16, tf.quint16, tf.qint32)
}


def fetches(items: Iterable[Item]) -> List[Any]:
    """The tensors that `assemble` needs the values of."""
    return [part.fetch for item in items for part in item.parts]


def assemble(items: Iterable[Item], values: Iterable[Any]) -> Dict[str, np.ndarray]:
    """Items, and what `fetches` of them became -> the tensors to be stored."""
    rest = iter(values)
    return {item.name: _assemble_one(item, (next(rest) for _ in item.parts)) for item in items}


def _assemble_one(item: Item, values: Iterable[Any]) -> np.ndarray:
    """The values of the parts of an item, one after the other -> the tensor to be stored."""
    if item.parts[0].slices is not None:
        tensor = np.empty(item.shape.as_list(), item.dtype.as_numpy_dtype)
        for part, value in zip(item.parts, values):
            tensor[part.slices] = value
        return tensor
    (value,) = values
    tensor = np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)
    # Quantised integers come as plain ones, which would have another name in the file.
    as_numpy_dtype = _QUANTISED.get(item.dtype)
    return tensor if as_numpy_dtype is None else tensor.view(as_numpy_dtype)


def in_groups(items: Iterable[Item]) -> Tuple[List[Item], List[List[Item]]]:
    """Those whose size may change (tables, iterators); the others, in groups of 64 MB or of one."""
    changing: List[Item] = []
    groups: List[List[Item]] = []
    room = 0
    for item in items:
        if item.dtype == tf.string or not item.shape.is_fully_defined():
            changing.append(item)
            continue
        size = item.shape.num_elements() * item.dtype.size
        if size > room or not groups:
            groups.append([])
            room = _GROUP_SIZE
        groups[-1].append(item)
        room -= size
    return changing, groups


class _Copy(NamedTuple):
    """An operation that copies a variable into the array that ``place`` is fed with."""

    place: Any
    op: Any


class Copies:
    """Nodes that make snapshots of variables cheap.

    What ``session.run`` fetches of a variable it copies in Python, with one thread, into memory
    that the system has to find and clear first, page by page; and each fetch costs a hundredth of a
    millisecond, however small it is. So large variables are copied by TensorFlow, with all its
    threads, into arrays of ours that are used again and again, and small ones of one dtype are
    joined.

    TensorFlow has no operation that writes into an array of Python's. But it does not copy what it
    is fed with, where its alignment allows that, and ``InplaceUpdate`` changes its input in place,
    whoever it belongs to.

    Args:
      graph: gets the nodes, once.
      items: of variables.

    Attributes:
      large: id of a variable -> the operation that copies it.
      joined: tensors that hold small variables together.
      places: id of a variable -> in which of those, where, and its shape.
    """

    def __init__(self, graph: Any, items: Iterable[Item]):
        self.large: Dict[int, _Copy] = {}
        self.joined: List[Any] = []
        self.places: Dict[int, Tuple[int, slice, List[int]]] = {}
        small: Dict[Any, List[Any]] = {}
        for variable in (part.fetch for item in items for part in item.parts):
            dtype, size = variable.dtype.base_dtype, variable.shape.num_elements()
            if size is None:
                continue
            if size * dtype.size >= _LARGE and dtype in _COPIED_DTYPES:
                self.large[id(variable)] = _node(graph, [variable], _copy)
            elif size * dtype.size < _LARGE and dtype in _JOINED_DTYPES:
                small.setdefault(dtype, []).append(variable)
        for variables in small.values():
            if len(variables) > 1:
                start = 0
                for v in variables:
                    end = start + v.shape.num_elements()
                    place = len(self.joined), slice(start, end), v.shape.as_list()
                    self.places[id(v)] = place
                    start = end
                self.joined.append(_node(graph, variables, _join))


def _node(graph: Any, variables: List[Any], make: Callable[[List[Any]], Any]) -> Any:
    """What is made of variables, made once: a finalised graph takes no new nodes."""
    key, nodes = (make.__name__, *(v.name for v in variables)), nodes_of(graph)
    if key not in nodes:
        with graph.as_default(), tf.control_dependencies(None), tf.name_scope("snapshot"):
            nodes[key] = make(variables)
    return nodes[key]


def _copy(variables: List[Any]) -> _Copy:
    (variable,) = variables
    row = [1, variable.shape.num_elements()]
    with tf.device(None), tf.device("/cpu:0"):  # where arrays of Python are
        place = tf.placeholder(variable.dtype.base_dtype, row)
        v = tf.reshape(variable.value(), row)
        return _Copy(place, tf.raw_ops.InplaceUpdate(x=place, i=[0], v=v).op)


def _join(variables: List[Any]) -> Any:
    return tf.concat([tf.reshape(v.value(), [-1]) for v in variables], axis=0)


def _run_into(run: Callable[[], Any], arrays: Collection[np.ndarray]) -> Tuple[Any, bool]:
    """Runs operations that write into arrays.

    Returns:
      What ``run`` returns, and whether all arrays were written to. They are not if TensorFlow gets
      copies of them: in a session of another process, or where it wants another alignment.
    """
    heads = [array.reshape(-1).view(np.uint8)[:64] for array in arrays]
    for head in heads:
        np.invert(head, out=head)
    before = [head.tobytes() for head in heads]
    values = run()
    return values, all(head.tobytes() != old for head, old in zip(heads, before))


class Snapshots:
    """Snapshots of all items of a session, each taken with one ``session.run``.

    Args:
      session: the session.
      items: what is copied.
      copies: nodes for these items.
      extra: more tensors to be fetched.
    """

    def __init__(self, session: Any, items: Iterable[Item], copies: Copies, extra: Sequence[Any]):
        self._session = session
        self._items = list(items)
        self._extra = list(extra)
        self._owner: Optional[Save] = None  # of the last snapshot
        self._joined = copies.joined
        self._places = copies.places
        self._prepare(copies.large)

    def _prepare(self, large: Mapping[int, _Copy]) -> None:
        alone: List[Any] = []
        used: List[_Copy] = []
        self._arrays: Dict[int, np.ndarray] = {}  # id of a variable -> its copy
        for variable in fetches(self._items):
            if id(variable) in self._arrays:
                continue  # under two names
            if id(variable) in large:
                shape = tuple(variable.shape.as_list())
                dtype = np.dtype(variable.dtype.as_numpy_dtype)
                self._arrays[id(variable)] = aligned_empty(shape, dtype)
                used.append(large[id(variable)])
            elif id(variable) not in self._places:
                alone.append(variable)
        wanted = [*self._extra, *self._joined, *alone, *(copy.op for copy in used)]
        # Made once: what session.run() would find out each time takes 0.01 s for 1,000 tensors.
        run = self._session.make_callable(wanted, [copy.place for copy in used] or None)
        rows = [array.reshape(1, -1) for array in self._arrays.values()]
        self._run = lambda: run(*rows)

    def take(self, owner: Save) -> Tuple[Dict[str, np.ndarray], List[Any]]:
        """Copies everything out of the session.

        Args:
          owner: the arrays are its own, once it has handed them over and until it is over.

        Returns:
          ``{name: ndarray}``, and the values of the extra tensors, of the same moment. The next
          snapshot overwrites the arrays.

        Raises:
          RuntimeError: the last snapshot is still being written.
        """
        if self._owner is not None and self._owner.owns_memory:
            raise RuntimeError(
                "step {} is still being written; its snapshot must not be overwritten".format(
                    self._owner.step
                )
            )
        self._owner = owner
        values, written = _run_into(self._run, self._arrays.values())
        if not written:
            self._prepare({})
            values = self._run()
        rest = iter(values)
        extra = [next(rest) for _ in self._extra]
        joined = [next(rest) for _ in self._joined]

        def value(part: Part) -> Any:
            if id(part.fetch) in self._arrays:
                return self._arrays[id(part.fetch)]
            if id(part.fetch) not in self._places:
                return next(rest)
            which, where, shape = self._places[id(part.fetch)]
            return joined[which][where].reshape(shape)

        tensors = {item.name: _assemble_one(item, map(value, item.parts)) for item in self._items}
        return tensors, extra


class LazySnapshot(Mapping[str, np.ndarray]):
    """Items of a graph, copied out of a session some at a time; only the last ones are kept.

    Those whose size may change (tables, the position of iterators) are copied at once: it must not
    change between planning a file and writing it. An array of the others may be overwritten when
    the next one is asked for.

    Args:
      session: one in which nothing else runs meanwhile.
      items: what is copied.
      copies: nodes for these items.
    """

    def __init__(self, session: Any, items: Iterable[Item], copies: Copies):
        self._session = session
        self._large = copies.large
        self._names = [item.name for item in items]
        self._current: Dict[str, np.ndarray] = {}
        self._buffer = np.empty(0, np.uint8)  # for one large variable
        alone: List[Item] = []
        rest: List[Item] = []
        for item in items:
            is_large = any(id(variable) in self._large for variable in fetches([item]))
            (alone if is_large else rest).append(item)
        changing, groups = in_groups(rest)
        groups += [[item] for item in alone]
        self._groups = {item.name: group for group in groups for item in group}
        self._changing = self._copy(changing)

    def _copy(self, items: Sequence[Item]) -> Dict[str, np.ndarray]:
        if len(items) == 1:
            return {items[0].name: _assemble_one(items[0], map(self._value, items[0].parts))}
        return assemble(items, self._session.run(fetches(items)))

    def _value(self, part: Part) -> Any:
        copy = self._large.get(id(part.fetch))
        if copy is not None:
            shape, dtype = part.fetch.shape.as_list(), copy.place.dtype
            size = part.fetch.shape.num_elements() * dtype.size
            if len(self._buffer) < size:
                self._buffer = np.empty(0, np.uint8)  # first, to make room
                self._buffer = aligned_empty((size,), np.dtype(np.uint8))
            row = self._buffer[:size].view(dtype.as_numpy_dtype).reshape(1, -1)
            _, written = _run_into(lambda: self._session.run(copy.op, {copy.place: row}), [row])
            if written:
                return row.reshape(shape)
        return self._session.run(part.fetch)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._changing:
            return self._changing[name]
        if name not in self._current:
            self._current = {}  # first, to make room
            self._current = self._copy(self._groups[name])
        return self._current[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
