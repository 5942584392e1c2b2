"""Items of a graph -> ``{name: ndarray}``: what to fetch, and what to make of the values."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Iterator, List, Mapping, Sequence

import numpy as np
import tensorflow.compat.v1 as tf

from tf_h5_callback.setters import Item

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
    if item.parts[0].slices is None:
        value = values[0]
        tensor = np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)
    else:
        tensor = np.empty(item.shape.as_list(), values[0].dtype)
        for part, value in zip(item.parts, values):
            tensor[part.slices] = value
    # Quantised integers come as plain ones, which would have another name in the file.
    return tensor.view(item.dtype.as_numpy_dtype) if item.dtype.is_quantized else tensor


class LazySnapshot(Mapping[str, np.ndarray]):
    """Items of a graph, copied out of a session some at a time; only the last ones are kept.

    Those whose size may change (tables, the position of iterators) are copied at once: it must not
    change between planning a file and writing it.
    """

    def __init__(self, session: Any, items: Iterable[Item]):
        self._session = session
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
        return assemble(items, self._session.run(fetches(items)))

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
