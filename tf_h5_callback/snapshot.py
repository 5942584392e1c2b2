"""Items of a graph -> ``{name: ndarray}``: what to fetch, and what to make of the values."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import tensorflow.compat.v1 as tf

from tf_h5_callback.setters import Item, Part, nodes_of

_LARGE = 1 << 18  # elements
_COPIED_DTYPES = (tf.float16, tf.float32, tf.float64)  # on all devices
_QUANTISED = {
    dtype: dtype.as_numpy_dtype for dtype in (tf.qint8, tf.quint8, tf.qint16, tf.quint16, tf.qint32)
}
_GROUP_SIZE = 64 << 20  # bytes that a lazy snapshot copies at once, unless one tensor has more


def fetches(items: Iterable[Item]) -> List[Any]:
    """The tensors that `assemble` needs the values of."""
    return [part.fetch for item in items for part in item.parts]


def assemble(items: Iterable[Item], values: Iterable[Any]) -> Dict[str, np.ndarray]:
    """Items, and what `fetches` of them became -> the tensors to be stored."""
    rest = iter(values)
    return {item.name: _assemble_one(item, [next(rest) for _ in item.parts]) for item in items}


def _assemble_one(item: Item, values: Sequence[Any]) -> np.ndarray:
    """What ``session.run`` returned for the parts of an item -> the tensor to be stored."""
    if item.parts[0].slices is not None:
        tensor = np.empty(item.shape.as_list(), values[0].dtype)
        for part, value in zip(item.parts, values):
            tensor[part.slices] = value
        return tensor
    (value,) = values
    tensor = np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)
    # Quantised integers come as plain ones, which would have another name in the file.
    as_numpy_dtype = _QUANTISED.get(item.dtype)
    return tensor if as_numpy_dtype is None else tensor.view(as_numpy_dtype)


class Copies:
    """Nodes that copy variables in the graph, so that fetching them is cheap.

    What ``session.run`` fetches of a variable it copies in Python, with one thread, into memory
    that the system has to find first; and each fetch costs a hundredth of a millisecond, however
    small it is. A tensor that nobody else holds is not copied again. So large variables are copied
    by TensorFlow, with all its threads, in memory that it has, and small ones of one dtype are
    joined.

    Args:
      graph: gets the nodes, once.
      items: of variables.
    """

    def __init__(self, graph: Any, items: Iterable[Item]):
        self._copied: Dict[int, Any] = {}  # id of a variable -> its copy
        self._joined: List[Any] = []
        self._places: Dict[int, Tuple[int, slice, List[int]]] = {}  # id -> in which, where, shape
        small: Dict[Any, List[Any]] = {}
        for variable in (part.fetch for item in items for part in item.parts):
            dtype, size = variable.dtype.base_dtype, variable.shape.num_elements()
            if size is None or dtype not in _COPIED_DTYPES:
                continue
            if size < _LARGE:
                small.setdefault(dtype, []).append(variable)
            else:
                self._copied[id(variable)] = _node(graph, [variable], _copy)
        for variables in small.values():
            if len(variables) > 1:
                start = 0
                for v in variables:
                    end = start + v.shape.num_elements()
                    place = len(self._joined), slice(start, end), v.shape.as_list()
                    self._places[id(v)] = place
                    start = end
                self._joined.append(_node(graph, variables, _join))

    def fetches(self, items: Iterable[Item]) -> List[Any]:
        """The tensors that `assemble` needs the values of."""
        alone = [p for item in items for p in item.parts if id(p.fetch) not in self._places]
        return [*self._joined, *map(self.of, alone)]

    def of(self, part: Part) -> Any:
        """What to fetch for a part by itself."""
        return self._copied.get(id(part.fetch), part.fetch)

    def assemble(self, items: Iterable[Item], values: Sequence[Any]) -> Dict[str, np.ndarray]:
        """What was fetched -> the tensors to be stored."""
        joined, rest = values[: len(self._joined)], iter(values[len(self._joined) :])

        def value(part: Part) -> Any:
            place = self._places.get(id(part.fetch))
            if place is None:
                return next(rest)
            which, where, shape = place
            return joined[which][where].reshape(shape)

        return {item.name: _assemble_one(item, [value(p) for p in item.parts]) for item in items}


def _node(graph: Any, variables: List[Any], make: Callable[[List[Any]], Any]) -> Any:
    """What is made of variables, made once: a finalised graph takes no new nodes."""
    key, nodes = (make.__name__, *(v.name for v in variables)), nodes_of(graph)
    if key not in nodes:
        with graph.as_default(), tf.control_dependencies(None), tf.name_scope("snapshot"):
            nodes[key] = make(variables)
    return nodes[key]


def _copy(variables: List[Any]) -> Any:
    (variable,) = variables
    with tf.get_default_graph().colocate_with(variable.op, ignore_existing=True):
        return tf.raw_ops.DeepCopy(x=variable.value())


def _join(variables: List[Any]) -> Any:
    return tf.concat([tf.reshape(v.value(), [-1]) for v in variables], axis=0)


class LazySnapshot(Mapping[str, np.ndarray]):
    """Items of a graph, copied out of a session some at a time; only the last ones are kept.

    Those whose size may change (tables, the position of iterators) are copied at once: it must not
    change between planning a file and writing it.
    """

    def __init__(self, session: Any, items: Iterable[Item], copies: Copies):
        self._session = session
        self._copies = copies
        self._names = [item.name for item in items]
        self._groups: Dict[str, List[Item]] = {}
        self._current: Dict[str, np.ndarray] = {}
        changing: List[Item] = []
        group: List[Item] = []
        room = 0
        for item in items:
            if item.dtype == tf.string or not item.shape.is_fully_defined():
                changing.append(item)
                continue
            size = item.shape.num_elements() * item.dtype.size
            if size > room:
                group, room = [], _GROUP_SIZE
            group.append(item)
            room -= size
            self._groups[item.name] = group
        self._changing = self._copy(changing)

    def _copy(self, items: Sequence[Item]) -> Dict[str, np.ndarray]:
        wanted = [self._copies.of(part) for item in items for part in item.parts]
        return assemble(items, self._session.run(wanted))

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
