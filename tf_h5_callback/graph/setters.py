"""What a graph has to save: one item for each tensor, and one setter to put it back.

A setter is the pair of the blog post this package grew from: a placeholder and an operation that
assigns it. Setters are made once for a graph and found again by a second hook or session, since a
graph that a ``MonitoredSession`` has finalised takes no new nodes.
"""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import tensorflow.compat.v1 as tf

from tf_h5_callback.graph._compat import (
    is_ref_variable,
    is_saveable,
    is_variable,
    name_of,
    parts_of,
    slice_of,
)
from tf_h5_callback.restoring.matching import Spec
from tf_h5_callback.restoring.restore import Restore, map_rows

Setter = Tuple[Any, Any]
Setters = Dict[str, Setter]
VarList = Union[None, Iterable[Any], Mapping[str, Any], Callable[[Any], bool]]


class Part(NamedTuple):
    """A variable or tensor, and which part of the saved one it is (None: all of it)."""

    fetch: Any
    slices: Optional[Tuple[slice, ...]]


class Item(NamedTuple):
    """One tensor of the file: its name there, what the graph wants it to be, where it is."""

    name: str
    dtype: Any
    shape: Any
    parts: List[Part]

    @property
    def spec(self) -> Spec:
        """The same without TensorFlow."""
        shape = None if self.shape.rank is None else tuple(self.shape.as_list())
        return Spec(self.dtype.name, shape)


def select(graph: Any, var_list: VarList) -> Tuple[Dict[str, List[Any]], List[Any]]:
    """What `var_list` names: ``{name in file: [variable]}``, and saveables.

    Several variables under one name are the parts of one partitioned variable. A callable chooses
    among variables only; saveables (lookup tables, ...) then all belong to it.
    """
    if var_list is None or callable(var_list):
        chosen: Any = graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
        if var_list is not None:
            chosen = filter(var_list, chosen)
        saveables = graph.get_collection(tf.GraphKeys.SAVEABLE_OBJECTS)
    else:
        chosen, saveables = var_list, []
    named = chosen.items() if isinstance(chosen, Mapping) else ((None, v) for v in chosen)
    variables: Dict[str, List[Any]] = {}
    for name, value in named:
        if is_saveable(value):
            saveables = saveables + [value]
            continue
        for v in parts_of(value):
            if not is_variable(v):
                raise TypeError("var_list holds {!r}, which is not a variable".format(v))
            members = variables.setdefault(name_of(v) if name is None else name, [])
            if not any(v is m for m in members):
                members.append(v)
    return variables, list(dict.fromkeys(saveables))


def items_of(variables: Mapping[str, Sequence[Any]]) -> List[Tuple[Item, Sequence[Any]]]:
    """What `select` found -> items, each with its variables."""
    return [(_item(name, members), members) for name, members in variables.items()]


def _item(name: str, members: Sequence[Any]) -> Item:
    first = members[0]
    slices = [slice_of(v) for v in members]
    if slices[0] is None:
        if len(members) > 1:
            raise ValueError("two variables would be saved as {!r}".format(name))
        return Item(name, first.dtype.base_dtype, first.shape, [Part(first, None)])
    shape = slices[0].shape
    if sum(v.shape.num_elements() for v in members) != shape.num_elements():
        raise ValueError(
            "var_list has only some parts of the partitioned variable {!r}".format(name)
        )
    parts = [Part(v, part and part.slices) for v, part in zip(members, slices)]
    return Item(name, first.dtype.base_dtype, shape, parts)


def nodes_of(graph: Any) -> Dict[Any, Any]:
    """The nodes we have made in a graph. They live on the graph, so that they die with it."""
    if not hasattr(graph, "_tf_h5_callback_nodes"):
        graph._tf_h5_callback_nodes = {}
    return graph._tf_h5_callback_nodes


def _key(value: Any) -> Tuple[str, int]:
    return type(value).__name__, id(value)


def has_setters(graph: Any, saveable: Any) -> bool:
    """Whether `saveable_setters` were made for this one."""
    return _key(saveable) in nodes_of(graph)


def _placeholder(dtype: Any, shape: Any, name: str) -> Any:
    with tf.name_scope(None):
        return tf.placeholder(dtype, shape, name=name.split(":")[0] + "_setter")


def variable_setter(graph: Any, item: Item, members: Sequence[Any]) -> Setter:
    """The setter of a variable, or of the parts of a partitioned one together."""
    key = tuple(v.name for v in members)
    cache = nodes_of(graph)
    if key not in cache:
        with graph.as_default(), tf.control_dependencies(None):
            # Named after the variable even where the file calls it something else.
            name = members[0].name if len(members) == 1 else item.name
            placeholder = _placeholder(item.dtype, item.shape, name)
            if len(members) == 1:
                op = _assign_op(members[0], placeholder)
            else:
                op = tf.group(
                    *[
                        _assign_op(v, placeholder[part.slices])
                        for v, part in zip(members, item.parts)
                    ]
                )
        cache[key] = op, placeholder
    return cache[key]


def _assign_op(variable: Any, value: Any) -> Any:
    if variable.shape.is_fully_defined() or not is_ref_variable(variable):
        return variable.assign(value, read_value=False)
    return tf.assign(variable, value, validate_shape=False).op


def saveable_setters(graph: Any, saveable: Any) -> List[Tuple[Item, Setter]]:
    """One item for each tensor of a saveable's save specs; they share one restore operation."""
    cache = nodes_of(graph)
    if _key(saveable) not in cache:
        items, placeholders, values = [], [], []
        with graph.as_default(), tf.control_dependencies(None):
            for spec in saveable.specs:
                fetch = spec.tensor
                if fetch.dtype == tf.variant:
                    fetch = tf.io.serialize_tensor(fetch)
                placeholder = _placeholder(fetch.dtype.base_dtype, None, spec.name)
                placeholders.append(placeholder)
                value = placeholder
                if spec.tensor.dtype == tf.variant:
                    # The shape tells TensorFlow 1 and 2 apart. Each of them takes the state of the
                    # other for granted, and aborts the process.
                    value = tf.io.parse_tensor(placeholder, tf.variant)
                    value = tf.ensure_shape(value, spec.tensor.shape)
                values.append(value)
                items.append(
                    Item(spec.name, placeholder.dtype, placeholder.shape, [Part(fetch, None)])
                )
            op = saveable.restore(values, None)
        # The saveable itself is kept: while it lives its id cannot be another's.
        cache[_key(saveable)] = saveable, [(item, (op, p)) for item, p in zip(items, placeholders)]
    return cache[_key(saveable)][1]


def iterator_saveable(graph: Any, iterator: Any) -> Any:
    """The saveable object of a ``tf.data`` iterator."""
    cache = nodes_of(graph)
    if _key(iterator) not in cache:
        with graph.as_default(), tf.name_scope(None):
            saveable = tf.data.experimental.make_saveable_from_iterator(iterator)
        cache[_key(iterator)] = iterator, saveable
    return cache[_key(iterator)][1]


def assign(session: Any, setters: Setters, tensors: Mapping[str, Any]) -> None:
    """Assigns ``{name: ndarray}``, with one ``session.run``."""
    # Variables of one saveable share an operation, which must run once.
    ops = list(dict.fromkeys(setters[name][0] for name in tensors))
    session.run(ops, {setters[name][1]: value for name, value in tensors.items()})


def with_names(restore: Restore) -> Restore:
    """The same, with the names of the variables that its assignment map holds instead of them."""
    rows = restore.assignment_map
    if rows is None or callable(rows):
        return restore
    named: List[Tuple[str, str]] = []
    for key, value in map_rows(rows):
        if isinstance(value, str):
            named.append((key, value))
            continue
        variables = value if isinstance(value, (list, tuple)) else parts_of(value)
        named += [(key, name) for name in dict.fromkeys(map(name_of, variables))]
    return restore._replace(assignment_map=named)
