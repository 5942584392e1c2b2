"""Which checkpoints of a folder are kept: the newest, one of every n hours, the best.

The rules depend on nothing but the files, so a restarted run keeps what the one before it kept.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from tf_h5_callback.errors import CheckpointError
from tf_h5_callback.file.format import Monitored
from tf_h5_callback.file.reader import Checkpoint

_log = logging.getLogger("tf_h5_callback")

_NOT_READ = "%s; it is neither counted nor deleted"


class _Facts(NamedTuple):
    """What a checkpoint says of itself."""

    written_at: datetime.datetime
    monitored: Optional[Monitored]


class Retention:
    """Decides which checkpoints may go.

    Args:
      max_to_keep: how many of the newest are kept; None keeps all.
      keep_checkpoint_every_n_hours: besides, one of every so many hours of training is kept for
        good, beginning with the oldest; None: no others.
      keep_best: besides, the one with the best monitored value is kept.

    Raises:
      ValueError: ``max_to_keep`` is below 1, or the hours are not above 0.
    """

    def __init__(
        self,
        max_to_keep: Optional[int] = None,
        keep_checkpoint_every_n_hours: Optional[float] = None,
        keep_best: bool = False,
    ):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(
                "max_to_keep is {!r}; it must be at least 1, or None to keep all".format(
                    max_to_keep
                )
            )
        if keep_checkpoint_every_n_hours is not None and keep_checkpoint_every_n_hours <= 0:
            raise ValueError(
                "keep_checkpoint_every_n_hours is {!r}; it must be above 0, or None".format(
                    keep_checkpoint_every_n_hours
                )
            )
        self._max_to_keep = max_to_keep
        self._hours = keep_checkpoint_every_n_hours
        self._keep_best = keep_best
        # Of the files that were there the last time, with their time of modification.
        self._facts: Dict[Tuple[str, int], Optional[_Facts]] = {}

    def surplus(self, paths: Sequence[str]) -> List[str]:
        """Those of the checkpoints, given oldest first, that are not kept."""
        if self._max_to_keep is None or len(paths) <= self._max_to_keep:
            return []
        kept = set(paths[-self._max_to_keep :])
        if self._hours is not None or self._keep_best:
            facts = self._read(paths)
            # What cannot be read is never deleted.
            kept.update(path for path, fact in facts.items() if fact is None)
            readable = {path: fact for path, fact in facts.items() if fact is not None}
            if self._hours is not None:
                kept.update(_hourly(readable, datetime.timedelta(hours=self._hours)))
            if self._keep_best:
                kept.update(best_first({p: f.monitored for p, f in readable.items()})[:1])
        return [path for path in paths if path not in kept]

    def _read(self, paths: Sequence[str]) -> Dict[str, Optional[_Facts]]:
        """What the files say, None for those that cannot be read. Each is read once."""
        facts: Dict[str, Optional[_Facts]] = {}
        there: Dict[Tuple[str, int], Optional[_Facts]] = {}
        for path in paths:
            try:
                key = path, os.stat(path).st_mtime_ns
            except FileNotFoundError as error:
                _log.warning(_NOT_READ, error)
                facts[path] = None
            else:
                facts[path] = self._facts[key] if key in self._facts else _read_one(*key)
                there[key] = facts[path]
        self._facts = there
        return facts


def _read_one(path: str, mtime_ns: int) -> Optional[_Facts]:
    try:
        with Checkpoint(path) as checkpoint:
            written_at = checkpoint.written_at or datetime.datetime.fromtimestamp(
                mtime_ns / 1e9, datetime.timezone.utc
            )
            return _Facts(written_at, checkpoint.monitored)
    except CheckpointError as error:
        _log.warning(_NOT_READ, error)
        return None


def _hourly(facts: Dict[str, _Facts], distance: datetime.timedelta) -> Iterator[str]:
    """The oldest, the first that is n hours younger than that one, and so on."""
    last = None
    for path, fact in facts.items():
        if last is None or fact.written_at - last >= distance:
            last = fact.written_at
            yield path


def best_first(monitored: Dict[str, Optional[Monitored]]) -> List[str]:
    """Paths sorted by their monitored value, the best first, equal ones oldest first.

    Args:
      monitored: path -> value, oldest first. Values that are None, NaN or of another monitor than
        the newest one are left out.
    """
    values = {path: m for path, m in monitored.items() if m is not None}
    if not values:
        return []
    newest = list(values.values())[-1]
    rows = [
        (path, m.value)
        for path, m in values.items()
        if (m.name, m.mode) == (newest.name, newest.mode) and not math.isnan(m.value)
    ]
    return [path for path, _ in sorted(rows, key=lambda r: r[1] if newest.mode == "min" else -r[1])]
