"""One checkpoint file <-> ``{name: ndarray}`` and metadata. The format: ``docs/format.rst``.

Writing is atomic: a temporary file in the same folder, fsync, rename, fsync of the folder. Under
its final name a file is whole. Reading verifies: every tensor has a CRC-32 in the file.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union
from urllib.parse import quote

import h5py
import numpy as np

from tf_h5_callback import dtypes, file_layout
from tf_h5_callback._compat import H5PY_ERRORS, open_h5, read_at
from tf_h5_callback.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)

FORMAT = "tf_h5_callback"
FORMAT_VERSION = 1
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_ALIGNMENT = 64  # TensorFlow adopts a buffer with this alignment instead of copying it
_READERS = 2

PathLike = Union[str, "os.PathLike[str]"]


class _Encoded(NamedTuple):
    """Tensors as they go into the file, and what a reader needs to get them back."""

    tensors: Dict[str, np.ndarray]
    encoding: Dict[str, Dict[str, Any]]


def write_checkpoint(
    path: PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    global_step: Optional[int] = None,
    tensorflow_version: Optional[str] = None,
    metadata: Union[None, Mapping[str, Any], str] = None,
) -> None:
    """Writes a checkpoint; when it returns, the file is durable under its name.

    Args:
      path: the file; one that exists is replaced, atomically.
      tensors: name -> array of any shape; numbers, booleans, bfloat16, or objects of type bytes.
      global_step: stored as an attribute.
      tensorflow_version: stored as an attribute.
      metadata: a dict of anything JSON can hold, or what `metadata_to_json` made of it.

    Raises:
      CheckpointError: the file could not be written (disk full, no permission, ...) or a tensor's
        dtype has no place in HDF5. No temporary file is left, an earlier file of this name stays.
      TypeError: the metadata is not JSON.
    """
    path = os.path.abspath(os.fspath(path))
    folder, name = os.path.split(path)
    attributes: Dict[str, Any] = {
        "metadata": metadata if isinstance(metadata, str) else metadata_to_json(metadata),
        "tensorflow_version": tensorflow_version,
        "global_step": None if global_step is None else np.int64(global_step),
    }
    temporary = os.path.join(folder, ".{}.{}.tmp".format(name, uuid.uuid4().hex))
    try:
        encoded = _encode(tensors)
        specs = tuple(
            file_layout.DatasetSpec(key, value.shape, value.dtype)
            for key, value in encoded.tensors.items()
        )
        layout = file_layout.plan(specs, folder)
        with open(temporary, "xb", buffering=0) as f:
            crcs = file_layout.write(f, layout, encoded.tensors)
            _set_attributes(temporary, attributes, encoded.encoding, crcs)
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except (*H5PY_ERRORS, TypeError) as error:
        raise CheckpointError("cannot save checkpoint {}: {}".format(path, error)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def metadata_to_json(metadata: Optional[Mapping[str, Any]]) -> str:
    """The text in which metadata is stored; NumPy scalars become numbers, arrays lists.

    Raises:
      TypeError: it holds something that JSON cannot hold.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            return value.tolist()
        raise TypeError("metadata holds {!r}, which JSON cannot hold".format(value))

    return json.dumps(dict(metadata or {}), default=convert)


def _encode(tensors: Mapping[str, np.ndarray]) -> _Encoded:
    encoded: Dict[str, np.ndarray] = {}
    names: Dict[str, str] = {}
    string_lengths: Dict[str, List[int]] = {}
    for name, value in tensors.items():
        key = dataset_name(name)
        if true_name(key) != name:
            names[key] = name
        value = np.asarray(value, order="C")
        if value.dtype.kind == "O":
            value, lengths = dtypes.pad_strings(value)
            if lengths is not None:
                string_lengths[key] = lengths
        elif value.dtype.byteorder == ">":
            value = value.astype(value.dtype.newbyteorder("<"))
        encoded[key] = value
    encoding: Dict[str, Dict[str, Any]] = {"names": names, "string_lengths": string_lengths}
    return _Encoded(encoded, {key: value for key, value in encoding.items() if value})


def _set_attributes(
    path: str,
    attributes: Mapping[str, Any],
    encoding: Mapping[str, Any],
    crcs: Mapping[str, int],
) -> None:
    """Completes the file. Text has a fixed length: HDF5 keeps no checksum of the other kind."""
    encoding_json = json.dumps(encoding) if encoding else ""
    in_name_order = [crcs[key] for key in sorted(crcs, key=_utf8)]
    values = {
        "format": FORMAT,
        "format_version": np.int64(FORMAT_VERSION),
        "written_at": datetime.datetime.now(datetime.timezone.utc).strftime(_TIME_FORMAT),
        **attributes,
        "encoding": encoding_json or None,
        "attributes_crc32": np.uint32(
            zlib.crc32((attributes["metadata"] + encoding_json).encode("ascii"))
        ),
        "crc32": np.array(in_name_order, dtype="<u4"),
    }
    with open_h5(path, "r+") as f:
        for key, value in values.items():
            if isinstance(value, str):
                raw = value.encode("utf-8")
                f.attrs.create(key, raw, dtype=h5py.string_dtype("utf-8", len(raw)))
            elif value is not None:
                f.attrs.create(key, value)


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _sync_folder(folder: str) -> None:
    """Makes a rename durable; Windows has no such call and needs none."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def dataset_name(name: str) -> str:
    """A tensor's name -> its dataset's: slashes become spaces; what that would lose is escaped.

    HDF5 would make groups of slashes. Names of graph variables have neither spaces nor percent
    signs and so are never escaped; Keras allows almost anything.
    """
    if name in ("", ".") or any(c in name for c in " %\0"):
        name = "%" + quote(name, safe="/:", errors="surrogatepass")
    return name.replace("/", " ")


def true_name(key: str) -> str:
    """A dataset's name -> the name of its tensor, where nothing was escaped."""
    return key.replace(" ", "/")


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
            self.written_at = datetime.datetime.strptime(text("written_at"), _TIME_FORMAT).replace(
                tzinfo=datetime.timezone.utc
            )
        self.tensorflow_version = text("tensorflow_version") or None
        self.step = int(attributes["global_step"]) if "global_step" in attributes else None
        self._string_lengths = encoding.get("string_lengths", {})
        names = encoding.get("names", {})
        extents = sorted(extents, key=lambda extent: _utf8(extent.name))
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
