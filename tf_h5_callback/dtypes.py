"""How the elements of a tensor are stored: NumPy dtypes <-> HDF5 datatypes.

Numbers are stored as themselves, little-endian; complex numbers and booleans in the way h5py and
PyTables agreed on (a compound of ``r`` and ``i``; an enumeration of ``FALSE`` and ``TRUE``).
bfloat16 and float8_e5m2, unknown to HDF5 by name, are described to it as the floating-point types
they are, so that every HDF5 tool shows numbers. Byte strings get the length of the longest one,
padded with NULs.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

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


class StoredStrings(NamedTuple):
    """Byte strings as a NUL-padded array, and their lengths where padding alone loses them."""

    padded: np.ndarray
    lengths: Optional[List[int]]


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


def pad_strings(values: np.ndarray) -> StoredStrings:
    """An object array of byte strings -> fixed-length strings, of any shape.

    The length is rounded up to four significant bits, so that a string whose size varies a little
    from save to save (the state of an input pipeline) keeps the layout of its file.

    Raises:
      TypeError: an element is neither ``bytes`` nor ``str``.
    """
    flat = [v.encode("utf-8") if isinstance(v, str) else v for v in values.reshape(-1).tolist()]
    for v in flat:
        if not isinstance(v, bytes):
            raise TypeError("an array of objects may hold only byte strings, not {!r}".format(v))
    longest = max([1] + [len(v) for v in flat])
    unit = 1 << max(0, longest.bit_length() - 4)
    padded = np.array(flat, dtype="S{}".format(-(-longest // unit) * unit)).reshape(values.shape)
    ambiguous = any(v.endswith(b"\0") for v in flat)
    return StoredStrings(padded, [len(v) for v in flat] if ambiguous else None)


def unpad_strings(padded: np.ndarray, lengths: Optional[List[int]]) -> np.ndarray:
    """The way back: an object array of ``bytes``, which is what TensorFlow takes for strings.

    Raises:
      ValueError: ``lengths`` does not fit the array.
    """
    values = np.empty(padded.size, dtype=object)
    if lengths is None:
        values[:] = padded.reshape(-1).tolist()
    else:
        size = padded.dtype.itemsize
        if len(lengths) != padded.size or not all(0 <= n <= size for n in lengths):
            raise ValueError("the lengths of its strings do not fit it")
        raw = padded.tobytes()
        for i, n in enumerate(lengths):
            values[i] = raw[i * size : i * size + n]
    return values.reshape(padded.shape)
