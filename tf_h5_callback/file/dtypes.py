"""How the elements of a tensor are stored: NumPy dtypes <-> HDF5 datatypes.

Numbers are stored as themselves, little-endian; complex numbers and booleans in the way h5py and
PyTables agreed on (a compound of ``r`` and ``i``; an enumeration of ``FALSE`` and ``TRUE``).
bfloat16 and float8_e5m2, unknown to HDF5 by name, are described to it as the floating-point types
they are, so that every HDF5 tool shows numbers. What HDF5 cannot describe is stored as integers,
and the file keeps the dtype's name. Byte strings get the length of the longest one, padded with
NULs; where that would be a waste of space they are joined.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import h5py
import numpy as np

from tf_h5_callback._compat import extension_dtype

# name -> (size in bytes, H5Tset_fields: sign, exponent position and size, mantissa position and
# size; exponent bias). The values are those of IEEE-style formats cut short: bfloat16 is the upper
# half of a float32, float8_e5m2 that of a float16.
SHORT_FLOATS = {
    "bfloat16": (2, (15, 7, 8, 0, 7), 127),
    "float8_e5m2": (1, (7, 2, 5, 0, 2), 15),
}

# Stored as integers, with the dtype's name in the file. As values, where they are integers:
_NAMED_INTEGERS = {"int2": "i1", "int4": "i1", "uint2": "u1", "uint4": "u1"}
# As bits: floats without infinities, or with their special values in places that HDF5 cannot
# describe (it would show the largest float8_e4m3fn, 448, as NaN).
_NAMED_FLOATS = dict.fromkeys(
    "float4_e2m1fn float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2fnuz".split(), "u1"
)
# TensorFlow's quantised integers, which NumPy sees as structures of one field of that name.
_QUANTISED = {"qint8": "i1", "quint8": "u1", "qint16": "<i2", "quint16": "<u2", "qint32": "<i4"}
_NAMED = {**_NAMED_INTEGERS, **_NAMED_FLOATS, **_QUANTISED}
_VIEWED = {*_NAMED_FLOATS, *_QUANTISED}  # the same bits

# Padded strings may take this many times as much as the strings themselves, and so much more.
_PADDING_FACTOR = 4
_PADDING_ALLOWED = 1 << 20


class StoredStrings(NamedTuple):
    """Byte strings as an array that HDF5 can hold, and what a reader needs to get them back.

    The array is of the strings' shape, padded with NULs, and there are lengths where padding alone
    loses them; or it is the bytes of all strings, one after the other, and there are lengths and a
    shape.
    """

    values: np.ndarray
    lengths: Optional[List[int]] = None
    shape: Optional[Tuple[int, ...]] = None


def h5_type(dtype: np.dtype) -> h5py.h5t.TypeID:
    """The HDF5 datatype in which values of a NumPy dtype are stored.

    Raises:
      TypeError: HDF5 has no such type.
    """
    if dtype.name in SHORT_FLOATS:
        return _short_float(dtype.name)
    if dtype.kind not in "biufcS":
        raise TypeError("no HDF5 datatype for dtype {}".format(dtype))
    return h5py.h5t.py_create(dtype.newbyteorder("<"), logical=True)


def _short_float(name: str) -> h5py.h5t.TypeID:
    size, fields, bias = SHORT_FLOATS[name]
    type_id = h5py.h5t.IEEE_F32LE.copy()
    type_id.set_fields(*fields)
    type_id.set_size(size)
    type_id.set_precision(8 * size)
    type_id.set_ebias(bias)
    return type_id


def _known_types() -> Dict[Tuple[int, int], List[Tuple[h5py.h5t.TypeID, np.dtype, str]]]:
    """All types of numbers in files, by class and size: with NumPy's dtype and the name."""
    types: Dict[Tuple[int, int], List[Tuple[h5py.h5t.TypeID, np.dtype, str]]] = {}

    def add(type_id: h5py.h5t.TypeID, dtype: np.dtype, name: str) -> None:
        types.setdefault((type_id.get_class(), type_id.get_size()), []).append(
            (type_id, dtype, name)
        )

    for order in "<>":  # other programs write big-endian numbers, too
        for code in "i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 ?".split():
            dtype = np.dtype(order + code)
            add(h5py.h5t.py_create(dtype, logical=True), dtype, dtype.name)
    for name, (size, _, _) in SHORT_FLOATS.items():
        add(_short_float(name), np.dtype("<u{}".format(size)), name)
    return types


_KNOWN_TYPES = _known_types()


def numpy_type(type_id: h5py.h5t.TypeID) -> Tuple[np.dtype, str]:
    """The NumPy dtype of an HDF5 datatype's bytes, and the name of what they mean.

    The two differ only for short floats on a machine on which no package brings the type: there
    the bytes are unsigned integers, which `widen` turns into float16 or float32. Strings of
    variable length, which only other programs write, are objects.

    A type must be equal to one of those known. What NumPy would make of any other, of compounds of
    compounds or integers of five bits, is neither needed nor always what it says.

    Raises:
      TypeError: it is none of the types of tensors.
    """
    kind, size = type_id.get_class(), type_id.get_size()
    if kind == h5py.h5t.STRING:
        if type_id.is_variable_str():
            return np.dtype(object), "object"
        if type_id.get_strpad() == h5py.h5t.STR_NULLPAD:
            dtype = np.dtype("S{}".format(size))
            return dtype, dtype.name
    for known, dtype, name in _KNOWN_TYPES.get((kind, size), ()):
        if type_id == known:
            return (extension_dtype(name) if name in SHORT_FLOATS else None) or dtype, name
    raise TypeError("class {}, {} bytes".format(kind, size))


def widen(values: np.ndarray, name: str) -> np.ndarray:
    """Short floats read as integers -> the next wider IEEE type, exactly."""
    if name not in SHORT_FLOATS or values.dtype.kind != "u":
        return values
    wider = {1: np.uint16, 2: np.uint32}[values.dtype.itemsize]
    shifted = values.astype(wider) << wider(8 * values.dtype.itemsize)
    return shifted.view({1: np.float16, 2: np.float32}[values.dtype.itemsize])


def store_numbers(values: np.ndarray) -> Tuple[np.ndarray, Optional[str]]:
    """An array of numbers -> one that HDF5 can hold, and the dtype's name where that loses it."""
    stored, name = _stored_as(values.dtype)
    if stored == values.dtype:
        return values, name
    return (values.view(stored) if name in _VIEWED else values.astype(stored)), name


@functools.lru_cache(maxsize=None)  # NumPy takes long to make the name of a dtype
def _stored_as(dtype: np.dtype) -> Tuple[np.dtype, Optional[str]]:
    name = dtype.names[0] if dtype.names and len(dtype.names) == 1 else dtype.name
    if name in _NAMED:
        return np.dtype(_NAMED[name]), name
    return (dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype), None


def load_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """The way back, given the dtype's name.

    Where no installed package has the dtype: integers as they are, floats that HDF5 knows in the
    next wider IEEE type, exactly, and other floats as their bits.
    """
    if name in _QUANTISED:
        values = values.view([(name, _QUANTISED[name])])
    elif name in _NAMED:
        dtype = extension_dtype(name)
        if dtype is not None:
            values = values.astype(dtype) if name in _NAMED_INTEGERS else values.view(dtype)
    elif name in SHORT_FLOATS:
        values = widen(values, name)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def can_be_stored_as(name: Any, stored: np.dtype) -> bool:
    """Whether what a file gives as the name of a dtype is one, and fits the dataset."""
    return isinstance(name, str) and name in _NAMED and np.dtype(_NAMED[name]) == stored


def store_strings(values: np.ndarray) -> StoredStrings:
    """An object array of byte strings, of any shape -> what HDF5 can hold.

    The length is rounded up to four significant bits, so that a string whose size varies a little
    from save to save (the state of an input pipeline) keeps the layout of its file.

    Raises:
      TypeError: an element is neither ``bytes`` nor ``str``.
    """
    flat = [v.encode("utf-8") if isinstance(v, str) else v for v in values.reshape(-1).tolist()]
    for v in flat:
        if not isinstance(v, bytes):
            raise TypeError("an array of objects may hold only byte strings, not {!r}".format(v))
    lengths = [len(v) for v in flat]
    longest = max([1] + lengths)
    unit = 1 << max(0, longest.bit_length() - 4)
    length = -(-longest // unit) * unit
    if length * len(flat) > _PADDING_FACTOR * (sum(lengths) + len(flat)) + _PADDING_ALLOWED:
        # One long string among a million short ones would make a file of terabytes.
        return StoredStrings(np.frombuffer(b"".join(flat), np.uint8), lengths, values.shape)
    padded = np.array(flat, dtype="S{}".format(length)).reshape(values.shape)
    ambiguous = any(v.endswith(b"\0") for v in flat)
    return StoredStrings(padded, lengths if ambiguous else None)


def load_strings(stored: StoredStrings) -> np.ndarray:
    """The way back: an object array of ``bytes``, which is what TensorFlow takes for strings.

    Raises:
      ValueError: the lengths do not fit the array.
    """
    values, lengths, shape = stored
    strings = np.empty(values.size if shape is None else len(lengths or ()), dtype=object)
    if lengths is None:
        strings[:] = values.reshape(-1).tolist()
        return strings.reshape(values.shape)
    raw, size = values.tobytes(), values.dtype.itemsize
    if shape is None:
        fits = len(lengths) == values.size and all(0 <= n <= size for n in lengths)
        starts: Iterable[int] = range(0, len(raw), size)
    else:
        fits = sum(lengths) == len(raw) and all(n >= 0 for n in lengths)
        starts = itertools.accumulate([0] + lengths)
    if not fits:
        raise ValueError("the lengths of its strings do not fit it")
    for i, (start, n) in enumerate(zip(starts, lengths)):
        strings[i] = raw[start : start + n]
    return strings.reshape(values.shape if shape is None else shape)
