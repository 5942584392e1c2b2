"""One checkpoint file -> ``{name: ndarray}`` and metadata. The format: ``docs/format.rst``.

Nothing that a file says is believed before it is checked: every tensor has a CRC-32, sizes must fit
the file, and what is not laid out as a checkpoint is refused.
"""

from __future__ import annotations

import datetime
import json
import operator
import os
from concurrent.futures import ThreadPoolExecutor
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
)

import numpy as np

from tf_h5_callback._compat import H5PY_ERRORS, crc32, open_h5, read_at
from tf_h5_callback.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)
from tf_h5_callback.file import dtypes
from tf_h5_callback.file.extents import Extent, locate, read_attribute
from tf_h5_callback.file.format import (
    ATTRIBUTES,
    FORMAT,
    FORMAT_VERSION,
    TIME_FORMAT,
    Monitored,
    PathLike,
    attributes_crc32,
    true_name,
    utf8,
)
from tf_h5_callback.file.global_heap import GlobalHeap
from tf_h5_callback.file.memory import aligned_empty, count

_READERS = 2
_MAX_DIGITS = 4300  # the limit that Python has by itself since 3.11
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_COMPARED_SIZE = 1 << 20  # bytes that stay in the processor's cache
_READ_WHOLE = ("bool", "string")  # there is more to be verified than the checksum
_WRONG_CHECKSUM = "its checksum is wrong"
_BLOCK_SIZE = 16 << 20  # reading gives the GIL away and may wait 5 ms to get it back

T = TypeVar("T")


class _Tensor(NamedTuple):
    """A tensor, and the dataset that holds it.

    ``lengths`` and ``joined`` are those of strings; see `dtypes.StoredStrings`.
    """

    extent: Extent
    crc: Optional[int]
    shape: Tuple[int, ...]
    dtype: str
    lengths: Optional[List[int]]
    joined: bool


class Checkpoint(Mapping[str, np.ndarray]):
    """A checkpoint file, read lazily: a read-only mapping name -> ndarray.

    Names are those of the graph (``rnn/cell/kernel:0``), in the order of their names in the file.
    Each access reads the tensor anew, verifies its CRC-32 and returns a fresh array. Strings come
    as arrays of ``bytes`` objects, quantised integers in TensorFlow's structured dtypes, bfloat16
    and the like as themselves where ``ml_dtypes`` or TensorFlow is installed. Otherwise bfloat16
    and float8_e5m2 are widened to float32 and float16, exactly, short integers come as int8 and
    uint8, and other short floats as their bits, in uint8; `dtype` always tells the true one.

    Plain files of datasets that another program wrote (the loop of the blog post, say) can be read
    too; they have no checksums.

    The file stays open until `close`, or the end of a ``with`` block, so that it can be read to the
    end even if it is deleted meanwhile.

    Attributes:
      path: the file, a str.
      step: the global step, an int, or None where the file does not tell.
      metadata: the user's metadata, a dict.
      tensorflow_version: a str, or None.
      monitored: the monitored scalar at this step, with its name and mode, or None.
      metrics: what was measured while it was saved, a dict: ``stall_seconds``, for which training
        waited, ``write_seconds``, after which the last tensor was on its way, and ``bytes``.
      written_at: a datetime in UTC, or None.
      format_version: an int, or None for a file of another program.

    Raises:
      CheckpointNotFoundError: there is no such file.
      CheckpointCorruptError: it is damaged, incomplete, not HDF5 or not laid out as a checkpoint.
      CheckpointError: it was written by a newer version of this package, or cannot be opened.
    """

    def __init__(self, path: PathLike):
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb", buffering=0)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError("no such checkpoint: {}".format(self.path)) from error
        except OSError as error:
            raise CheckpointError("cannot open checkpoint {}".format(error)) from error
        try:
            file_size = os.fstat(self._file.fileno()).st_size
            # HDF5 would look for it further on, too: in the bytes of a tensor, perhaps.
            if self._file.read(len(_SIGNATURE)) != _SIGNATURE:
                raise ValueError("it does not begin as an HDF5 file")
            with open_h5(self.path) as f:
                extents = locate(f, file_size)
                attributes = {key: read_attribute(f, key, file_size) for key in ATTRIBUTES}
            heap = GlobalHeap(self._file, file_size)
            self._strings = {
                e.name: heap.strings(e.offset, count(e.shape)) if e.offset is not None else []
                for e in extents
                if e.dtype.hasobject
            }
            self._read_attributes(attributes, extents)
        except CheckpointError:
            self._file.close()
            raise
        except H5PY_ERRORS as error:
            self._file.close()
            raise self._corrupt(str(error) or repr(error)) from error
        except MemoryError as error:
            # What it claims has been checked against its size: not the file is at fault.
            self._file.close()
            raise CheckpointError("no memory to open {}".format(self.path)) from error

    def _read_attributes(
        self, attributes: Mapping[str, Optional[np.ndarray]], extents: List[Extent]
    ) -> None:
        values = {key: value for key, value in attributes.items() if value is not None}

        def text(key: str) -> str:
            value = values.get(key, np.array(b""))
            return (
                value.item().decode("utf-8") if not value.shape and value.dtype.kind == "S" else ""
            )

        encoding: Dict[str, Any] = {}
        crcs: List[Optional[int]] = [None] * len(extents)
        self.format_version = None
        self.metadata: Dict[str, Any] = {}
        self.metrics: Dict[str, Any] = {}
        self.monitored: Optional[Monitored] = None
        self.written_at = None
        name, _, version = text("format").partition(" ")
        if name == FORMAT:
            self.format_version = _integer(version)
            if self.format_version > FORMAT_VERSION:
                raise CheckpointError(
                    "{} has format version {}; this version of tf_h5_callback reads up to {}: "
                    "please upgrade".format(self.path, self.format_version, FORMAT_VERSION)
                )
            *crcs, expected = values["crc32"].tolist()
            values["crc32"] = values["crc32"][:-1]
            if attributes_crc32({key: v.tobytes() for key, v in values.items()}) != expected:
                raise ValueError("the checksum of its attributes is wrong")
            if len(crcs) != len(extents):
                raise ValueError(
                    "it has {} tensors where there should be {}".format(len(extents), len(crcs))
                )
            self.metadata = _json_object(text("metadata"))
            encoding = _json_object(text("encoding") or "{}")
            self.metrics = _json_object(text("metrics") or "{}")
            if "monitor" in self.metrics:
                self.monitored = Monitored(**_object(self.metrics.pop("monitor")))
            self.written_at = datetime.datetime.strptime(text("written_at"), TIME_FORMAT).replace(
                tzinfo=datetime.timezone.utc
            )
        self.tensorflow_version = text("tensorflow_version") or None
        self.step = int(values["global_step"]) if "global_step" in values else None
        members = {key: _object(value) for key, value in encoding.items()}
        names = members.get("names", {})
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("one of its names is no text")
        extents = sorted(extents, key=lambda extent: utf8(extent.name))
        self._tensors = {
            names.get(extent.name, true_name(extent.name)): _tensor(extent, crc, members)
            for extent, crc in zip(extents, crcs)
        }
        if len(self._tensors) != len(extents):
            raise ValueError("two of its tensors have the same name")

    def _corrupt(self, why: str) -> CheckpointCorruptError:
        return CheckpointCorruptError("checkpoint {} is damaged: {}".format(self.path, why))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._checked(name, self._read)

    def _checked(self, name: str, read: Callable[[_Tensor], T]) -> T:
        tensor = self._tensors[name]
        if self._file.closed:
            raise ValueError("checkpoint {} is closed".format(self.path))
        try:
            return read(tensor)
        except H5PY_ERRORS as error:
            raise self._corrupt("{!r}: {}".format(name, error)) from error
        except MemoryError as error:
            # Its size has been checked: not the file is at fault.
            raise CheckpointError(
                "no memory for the {} bytes of {!r} of {}".format(
                    tensor.extent.nbytes, name, self.path
                )
            ) from error

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
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The name of a tensor's dtype as NumPy and TensorFlow spell it, without reading it."""
        return self._tensors[name].dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together, in the file."""
        return sum(tensor.extent.nbytes for tensor in self._tensors.values())

    def read_all(self, names: Optional[Iterable[str]] = None) -> Dict[str, np.ndarray]:
        """Reads and verifies tensors, with two threads.

        Args:
          names: which; None: all.

        Returns:
          name -> ndarray, in the order of the mapping.

        Raises:
          CheckpointCorruptError: a tensor is damaged; the text names it.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            wanted = set(self if names is None else names)
            largest_first = sorted(wanted, key=lambda name: -self._tensors[name].extent.nbytes)
            values = dict(zip(largest_first, pool.map(self.__getitem__, largest_first)))
        return {name: values[name] for name in self if name in wanted}

    def verify(self) -> None:
        """Reads everything and compares all checksums, with two threads.

        Raises:
          CheckpointCorruptError: a tensor is damaged; the text names it.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(lambda name: self._checked(name, self._compare), self):
                pass

    def _compare(self, tensor: _Tensor) -> None:
        """Verifies a tensor, without memory for all of a large one."""
        extent = tensor.extent
        if extent.nbytes <= _COMPARED_SIZE or tensor.crc is None or tensor.dtype in _READ_WHOLE:
            self._read(tensor)
            return
        assert extent.offset is not None
        block, crc = np.empty(_COMPARED_SIZE, np.uint8), 0
        for start in range(0, extent.nbytes, _COMPARED_SIZE):
            part = block[: extent.nbytes - start]
            crc = self._read_block(part, extent.offset + start, crc)
        if crc != tensor.crc:
            raise ValueError(_WRONG_CHECKSUM)

    def _read(self, tensor: _Tensor) -> np.ndarray:
        extent = tensor.extent
        if extent.dtype.hasobject:
            strings = np.empty(extent.shape, object)
            strings.reshape(-1)[:] = self._strings[extent.name]
            return strings
        values = aligned_empty(extent.shape, extent.dtype)
        data = values.reshape(-1).view(np.uint8)
        if extent.offset is not None:
            actual = self._read_block(data, extent.offset)
        else:
            data[:] = np.frombuffer(extent.data, np.uint8)
            actual = crc32(extent.data)
        if tensor.crc is not None and actual != tensor.crc:
            raise ValueError(_WRONG_CHECKSUM)
        if tensor.dtype == "string":
            shape = tensor.shape if tensor.joined else None
            return dtypes.load_strings(dtypes.StoredStrings(values, tensor.lengths, shape))
        if values.dtype == bool and data.max(initial=0) > 1:
            raise ValueError("it holds booleans that are neither true nor false")
        return dtypes.load_numbers(values, tensor.dtype)

    def _read_block(self, data: np.ndarray, offset: int, crc: int = 0) -> int:
        """Fills an array of bytes from the file; returns their CRC-32, or continues one."""
        view = memoryview(data)
        while view:
            n = read_at(self._file, view[:_BLOCK_SIZE], offset)
            if not n:
                raise ValueError("the file ends before it does")
            crc = crc32(view[:n], crc)
            view, offset = view[n:], offset + n
        return crc


def _tensor(
    extent: Extent, crc: Optional[int], encoding: Mapping[str, Mapping[str, Any]]
) -> _Tensor:
    """A dataset, and what the attribute ``encoding`` says of it -> the tensor it holds.

    Raises:
      ValueError: the two do not fit.
    """

    def said(member: str) -> Any:
        return encoding.get(member, {}).get(extent.name)

    shape, dtype = extent.shape, "string" if extent.dtype.kind in "SO" else extent.meaning
    true_dtype, lengths, true_shape = said("dtypes"), said("string_lengths"), said("string_shapes")
    fits = True
    if true_shape is not None:
        dtype, shape = "string", tuple(operator.index(n) for n in true_shape)
        fits = extent.dtype == np.uint8 and min(shape, default=0) >= 0
        fits = fits and count(shape) == len(lengths)
    elif true_dtype is not None:
        dtype = true_dtype
        fits = dtypes.can_be_stored_as(true_dtype, extent.dtype)
    if not fits:
        raise ValueError("{!r:.1000} does not hold what its encoding says".format(extent.name))
    return _Tensor(extent, crc, shape, dtype, lengths, true_shape is not None)


def _json_object(text: str) -> Dict[str, Any]:
    return _object(json.loads(text, parse_int=_integer))


def _integer(digits: str) -> int:
    # Python before 3.11 takes hours for a million of them.
    if len(digits) > _MAX_DIGITS:
        raise ValueError("its attributes hold a number of {} digits".format(len(digits)))
    return int(digits)


def _object(value: Any) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("its metadata, metrics or encoding are not made of JSON objects")
    return value
