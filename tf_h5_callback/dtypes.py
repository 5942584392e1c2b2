"""How the elements of a tensor are stored: NumPy dtypes <-> HDF5 datatypes.

Numbers are stored as themselves, little-endian; complex numbers and booleans in the way h5py and
PyTables agreed on (a compound of ``r`` and ``i``; an enumeration of ``FALSE`` and ``TRUE``).
bfloat16 and float8_e5m2, unknown to HDF5 by name, are described to it as the floating-point types
they are, so that every HDF5 tool shows numbers. Byte strings get the length of the longest one,
padded with NULs.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

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
        size, fields, bias = SHORT_FLOATS[dtype.name]
        type_id = h5py.h5t.IEEE_F32LE.copy()
        type_id.set_fields(*fields)
        type_id.set_size(size)
        type_id.set_precision(8 * size)
        type_id.set_ebias(bias)
        return type_id
    if dtype.kind not in "biufcS":
        raise TypeError("no HDF5 datatype for dtype {}".format(dtype))
    return h5py.h5t.py_create(dtype.newbyteorder("<"), logical=True)


def numpy_type(type_id: h5py.h5t.TypeID) -> Tuple[np.dtype, str]:
    """The NumPy dtype of an HDF5 datatype's bytes, and the name of what they mean.

    The two differ only for short floats on a machine on which no package brings the type: there
    the bytes are unsigned integers, which `widen` turns into float16 or float32.
    """
    if isinstance(type_id, h5py.h5t.TypeFloatID):
        for name, (size, fields, bias) in SHORT_FLOATS.items():
            if (type_id.get_size(), type_id.get_fields(), type_id.get_ebias()) == (
                size, fields, bias
            ):  # fmt: skip
                dtype = extension_dtype(name)
                return (dtype if dtype is not None else np.dtype("<u{}".format(size))), name
    dtype = np.dtype(type_id.dtype)
    return dtype, dtype.name


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
