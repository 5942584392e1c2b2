"""``{name: ndarray}`` and metadata -> one checkpoint file. The format: ``docs/format.rst``.

Writing is atomic (`atomic`): under its final name a file is whole.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from typing import IO, Any, Dict, Mapping, NamedTuple, Optional, Union

import numpy as np

from tf_h5_callback._compat import H5PY_ERRORS
from tf_h5_callback.errors import CheckpointError
from tf_h5_callback.file import dtypes, plan
from tf_h5_callback.file.atomic import atomic_write
from tf_h5_callback.file.format import (
    FORMAT,
    FORMAT_VERSION,
    TIME_FORMAT,
    Monitored,
    PathLike,
    attributes_crc32,
    dataset_name,
    true_name,
    utf8,
)

_ATTRIBUTES_SIZE = 8192  # what HDF5 needs for the others, at most


class _Encoded(NamedTuple):
    """What goes into the file: its datasets, and what a reader needs to get the tensors back.

    Numbers stay where they are until they are written; ``names`` tells their names.
    """

    specs: Dict[str, plan.DatasetSpec]
    names: Dict[str, str]
    strings: Dict[str, np.ndarray]
    encoding: Dict[str, Dict[str, Any]]


def write_checkpoint(
    path: PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    global_step: Optional[int] = None,
    tensorflow_version: Optional[str] = None,
    metadata: Union[None, Mapping[str, Any], str] = None,
    monitored: Optional[Monitored] = None,
    stall_seconds: Optional[float] = None,
) -> int:
    """Writes a checkpoint; when it returns, the file is durable under its name.

    Args:
      path: the file; one that exists is replaced, atomically.
      tensors: name -> array of any shape; numbers, booleans, objects of type bytes, and the dtypes
        that TensorFlow has besides those of NumPy. Each is looked up twice, to plan the file and to
        write it, and let go in between: a mapping may make them when they are asked for.
      global_step: stored as an attribute.
      tensorflow_version: stored as an attribute.
      metadata: a dict of anything JSON can hold, or what `metadata_to_json` made of it.
      monitored: stored in the attribute ``metrics``.
      stall_seconds: how long training waited for the tensors, likewise. What it takes to write them
        is measured here.

    Returns:
      The size of the file in bytes.

    Raises:
      CheckpointError: the file could not be written (disk full, no permission, too little memory,
        ...) or a tensor's dtype has no place in HDF5. No temporary file is left, an earlier file of
        this name stays.
      TypeError: the metadata is not JSON.
    """
    path = os.path.abspath(os.fspath(path))
    given: Dict[str, Any] = {
        "metadata": metadata if isinstance(metadata, str) else metadata_to_json(metadata),
        "tensorflow_version": tensorflow_version,
        "global_step": None if global_step is None else np.int64(global_step),
    }
    metrics: Dict[str, Any] = {"stall_seconds": stall_seconds}
    if monitored is not None:
        metrics["monitor"] = monitored._asdict()
    start = time.monotonic()

    def attributes(crcs: Mapping[str, int]) -> Dict[str, Any]:
        metrics.update(write_seconds=time.monotonic() - start, bytes=layout.size)
        given["metrics"] = json.dumps({k: v for k, v in metrics.items() if v is not None})
        return _attributes(given, encoded, crcs)

    def write(file: IO[bytes]) -> int:
        return plan.write(
            file, layout, size, lambda key: _stored(tensors, encoded, key), attributes
        )

    try:
        encoded = _encode(tensors)
        layout = plan.plan(tuple(encoded.specs.values()))
        size = layout.size + len(given["metadata"]) + 4 * len(encoded.specs) + _ATTRIBUTES_SIZE
        return atomic_write(path, size, write)
    except MemoryError as error:
        raise CheckpointError(
            "cannot save checkpoint {}: not enough memory{}".format(
                path, " ({})".format(error) if str(error) else ""
            )
        ) from error
    except (*H5PY_ERRORS, TypeError) as error:
        raise CheckpointError("cannot save checkpoint {}: {}".format(path, error)) from error


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
    encoded = _Encoded({}, {}, {}, {})
    for name in tensors:
        _encode_one(encoded, name, np.asarray(tensors[name]))
    return encoded


def _encode_one(encoded: _Encoded, name: str, value: np.ndarray) -> None:
    key = dataset_name(name)
    encoded.names[key] = name
    said: Dict[str, Any] = {"names": name if true_name(key) != name else None}
    if value.dtype.kind == "O":
        value, said["string_lengths"], said["string_shapes"] = dtypes.store_strings(value)
        encoded.strings[key] = value
    else:
        value, said["dtypes"] = dtypes.store_numbers(value)
    encoded.specs[key] = plan.DatasetSpec(key, value.shape, value.dtype)
    for member, what in said.items():
        if what is not None:
            encoded.encoding.setdefault(member, {})[key] = what


def _stored(tensors: Mapping[str, np.ndarray], encoded: _Encoded, key: str) -> np.ndarray:
    """The array that goes into a dataset."""
    if key in encoded.strings:
        return encoded.strings[key]
    value, _ = dtypes.store_numbers(np.asarray(tensors[encoded.names[key]], order="C"))
    if (value.shape, value.dtype) != encoded.specs[key][1:]:
        raise ValueError("{!r} has changed while it was saved".format(encoded.names[key]))
    return value


def _attributes(
    given: Mapping[str, Any], encoded: _Encoded, crcs: Mapping[str, int]
) -> Dict[str, Any]:
    """All attributes of the root group; those that are None are missing."""
    # Datasets without bytes are not written.
    in_name_order = [crcs.get(key, 0) for key in sorted(encoded.specs, key=utf8)]
    attributes = {
        "format": "{} {}".format(FORMAT, FORMAT_VERSION),
        "crc32": np.array(in_name_order, dtype="<u4"),
        "written_at": datetime.datetime.now(datetime.timezone.utc).strftime(TIME_FORMAT),
        **given,
        "encoding": json.dumps(encoded.encoding) if encoded.encoding else None,
    }
    attributes = {key: value for key, value in attributes.items() if value is not None}
    raw = {
        key: value.encode("utf-8") if isinstance(value, str) else value.tobytes()
        for key, value in attributes.items()
    }
    crc32 = np.array([*in_name_order, attributes_crc32(raw)], dtype="<u4")
    return {**attributes, "crc32": crc32}
