"""One checkpoint file -> ``{name: ndarray}`` and metadata. The format: ``docs/format.rst``.

Nothing that a file says is believed before it is checked: every tensor has a CRC-32, sizes must fit
the file, and what is not laid out as a checkpoint is refused.
"""

from __future__ import annotations

import datetime
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from tf_h5_callback import dtypes, file_layout
from tf_h5_callback._compat import H5PY_ERRORS, open_h5, read_at
from tf_h5_callback.checkpoint_file import (
    FORMAT,
    FORMAT_VERSION,
    TIME_FORMAT,
    PathLike,
    true_name,
    utf8,
)
from tf_h5_callback.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

_ALIGNMENT = 64  # TensorFlow adopts a buffer with this alignment instead of copying it
_READERS = 2


class Checkpoint(Mapping[str, np.ndarray]):
    """A checkpoint file, read lazily: a read-only mapping name -> ndarray.

    Names are those of the graph (``rnn/cell/kernel:0``), in the order of their names in the file.
    Each access reads the tensor anew, verifies its CRC-32 and returns a fresh array. Strings come
    as arrays of ``bytes`` objects, bfloat16 and float8_e5m2 as themselves where ``ml_dtypes`` or
    TensorFlow is installed, otherwise widened to float32 and float16, exactly.

    Plain files of datasets that another program wrote (the loop of the blog post, say) can be read
    too; they have no checksums.

    The file stays open until `close`, or the end of a ``with`` block, so that it can be read to the
    end even if it is deleted meanwhile.

    Attributes:
      path: the file, a str.
      step: the global step, an int, or None where the file does not tell.
      metadata: the user's metadata, a dict.
      tensorflow_version: a str, or None.
      written_at: a datetime in UTC, or None.
      format_version: an int, or None for a file of another program.

    Raises:
      CheckpointNotFoundError: there is no such file.
      CheckpointCorruptError: it is damaged, incomplete, not HDF5 or not laid out as a checkpoint.
      CheckpointError: it was written by a newer version of this package.
    """

    def __init__(self, path: PathLike):
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError("no such checkpoint: {}".format(self.path)) from error
        try:
            file_size = os.fstat(self._file.fileno()).st_size
            with open_h5(self.path, "r") as f:
                extents = file_layout.locate(f, file_size)
                attributes = {key: f.attrs[key] for key in f.attrs}
            self._read_attributes(attributes, extents)
        except CheckpointError:
            self._file.close()
            raise
        except H5PY_ERRORS as error:
            self._file.close()
            raise self._corrupt(str(error)) from error

    def _read_attributes(
        self, attributes: Dict[str, Any], extents: List[file_layout.Extent]
    ) -> None:
        def text(key: str) -> str:
            value = attributes.get(key, "")
            return value.decode("utf-8") if isinstance(value, bytes) else str(value)

        encoding: Dict[str, Any] = {}
        crcs: List[Optional[int]] = [None] * len(extents)
        self.format_version = None
        self.metadata: Dict[str, Any] = {}
        self.written_at = None
        if text("format") == FORMAT:
            self.format_version = int(attributes["format_version"])
            if self.format_version > FORMAT_VERSION:
                raise CheckpointError(
                    "{} has format version {}; this version of tf_h5_callback reads up to {}: "
                    "please upgrade".format(self.path, self.format_version, FORMAT_VERSION)
                )
            crcs = attributes["crc32"].tolist()
            if len(crcs) != len(extents):
                raise ValueError(
                    "it has {} tensors where there should be {}".format(len(extents), len(crcs))
                )
            json_crc = zlib.crc32(text("metadata").encode() + text("encoding").encode())
            if json_crc != attributes["attributes_crc32"]:
                raise ValueError("the checksum of its metadata is wrong")
            self.metadata = json.loads(text("metadata"))
            encoding = json.loads(text("encoding") or "{}")
            self.written_at = datetime.datetime.strptime(text("written_at"), TIME_FORMAT).replace(
                tzinfo=datetime.timezone.utc
            )
        self.tensorflow_version = text("tensorflow_version") or None
        self.step = int(attributes["global_step"]) if "global_step" in attributes else None
        self._string_lengths = encoding.get("string_lengths", {})
        names = encoding.get("names", {})
        extents = sorted(extents, key=lambda extent: utf8(extent.name))
        self._tensors: Dict[str, Tuple[file_layout.Extent, Optional[int]]] = {
            names.get(extent.name, true_name(extent.name)): (extent, crc)
            for extent, crc in zip(extents, crcs)
        }

    def _corrupt(self, why: str) -> CheckpointCorruptError:
        return CheckpointCorruptError("checkpoint {} is damaged: {}".format(self.path, why))

    def __getitem__(self, name: str) -> np.ndarray:
        extent, crc = self._tensors[name]
        if self._file.closed:
            raise ValueError("checkpoint {} is closed".format(self.path))
        try:
            return self._read(extent, crc)
        except H5PY_ERRORS as error:
            raise self._corrupt("{!r}: {}".format(name, error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "<Checkpoint {!r}: step {}, {} tensors>".format(self.path, self.step, len(self))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading a tensor afterwards raises ValueError."""
        self._file.close()

    def shape(self, name: str) -> Tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._tensors[name][0].shape

    def dtype(self, name: str) -> str:
        """The name of a tensor's dtype as NumPy and TensorFlow spell it, without reading it."""
        extent, _ = self._tensors[name]
        return "string" if extent.dtype.kind in "SO" else extent.meaning

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together, in the file."""
        return sum(max(extent.nbytes, 0) for extent, _ in self._tensors.values())

    def read_all(self) -> Dict[str, np.ndarray]:
        """Reads and verifies all tensors, with two threads.

        Returns:
          name -> ndarray, in the order of the mapping.

        Raises:
          CheckpointCorruptError: a tensor is damaged; the text names it.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            largest_first = sorted(self, key=lambda name: -self._tensors[name][0].nbytes)
            values = dict(zip(largest_first, pool.map(self.__getitem__, largest_first)))
        return {name: values[name] for name in self}

    def verify(self) -> None:
        """Reads everything and compares all checksums.

        Raises:
          CheckpointCorruptError: a tensor is damaged; the text names it.
        """
        for name in self:
            self[name]

    def _read(self, extent: file_layout.Extent, crc: Optional[int]) -> np.ndarray:
        if extent.offset is None:
            values = self._read_through_hdf5(extent)
        else:
            values = _aligned_empty(extent.shape, extent.dtype)
            actual = self._read_block(values.reshape(-1).view(np.uint8), extent.offset)
            if crc is not None and actual != crc:
                raise ValueError("its checksum is wrong")
        if values.dtype.kind == "S":
            return dtypes.unpad_strings(values, self._string_lengths.get(extent.name))
        values = dtypes.widen(values, extent.meaning)
        if not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        return values

    def _read_block(self, data: np.ndarray, offset: int) -> int:
        """Fills an array of bytes from the file; returns the CRC-32."""
        crc, view = 0, memoryview(data)
        while view:
            n = read_at(self._file, view[: file_layout.BLOCK_SIZE], offset)
            if not n:
                raise ValueError("the file ends before it does")
            crc = zlib.crc32(view[:n], crc)
            view, offset = view[n:], offset + n
        return crc

    def _read_through_hdf5(self, extent: file_layout.Extent) -> np.ndarray:
        """Empty and compact datasets and strings of variable length, which only HDF5 can find."""
        if not extent.nbytes:
            return np.zeros(extent.shape, extent.dtype)
        with open_h5(self.path, "r") as f:
            values = np.array(f[extent.name][()], dtype=extent.dtype)
        return dtypes.pad_strings(values).padded if extent.dtype.hasobject else values


def _aligned_empty(shape: Tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes."""
    count = int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
