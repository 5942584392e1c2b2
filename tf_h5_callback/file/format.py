"""What writer and reader agree on. The format is specified in ``docs/format.rst``."""

from __future__ import annotations

import os
import re
from typing import Mapping, NamedTuple, Union
from urllib.parse import quote

from tf_h5_callback._compat import crc32

PathLike = Union[str, "os.PathLike[str]"]

FORMAT = "tf_h5_callback"
FORMAT_VERSION = 1
# In the order in which their checksum covers them. HDF5 would store more than eight in structures
# that have no checksums, and that HDF5 1.10 does not survive when they are damaged.
ATTRIBUTES = (
    *("format", "crc32", "global_step", "tensorflow_version"),
    *("written_at", "metadata", "metrics", "encoding"),
)
_TO_ESCAPE = re.compile("[ %\0]")
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Monitored(NamedTuple):
    """The value of a monitored scalar at the step of a checkpoint.

    ``mode`` is ``"min"`` or ``"max"``: which values are better.
    """

    name: str
    mode: str
    value: float


def attributes_crc32(raw: Mapping[str, bytes]) -> int:
    """The checksum of the attributes' bytes, in the order of the table in the format.

    HDF5 itself keeps none for attributes above 64 KB; and where a disk leaves an old block in place
    of a new one, each with its good checksum, this one tells that they do not belong together.

    Args:
      raw: name -> bytes; those of ``crc32`` without this very checksum, its last element.
    """
    return crc32(b"".join(raw[key] for key in ATTRIBUTES if key in raw))


def utf8(name: str) -> bytes:
    """The bytes by which names are sorted."""
    return name.encode("utf-8", "surrogatepass")


def dataset_name(name: str) -> str:
    """A tensor's name -> its dataset's: slashes become spaces; what that would lose is escaped.

    HDF5 would make groups of slashes. Names of graph variables have neither spaces nor percent
    signs and so are never escaped; Keras allows almost anything.
    """
    if name in ("", ".") or _TO_ESCAPE.search(name):
        name = "%" + quote(name, safe="/:", errors="surrogatepass")
    return name.replace("/", " ")


def true_name(key: str) -> str:
    """A dataset's name -> the name of its tensor, where nothing was escaped."""
    return key.replace(" ", "/")
