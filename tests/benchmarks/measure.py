"""Rounds of several sides in turn, and what comes of them: figures with their spread."""

import os
import random
import statistics
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
      claim: what is measured.
      values: one for each round: ratios, or what ``unit`` says.
      unit: of the values; "" for ratios.
      limit: ``("at most", 1.0)`` or ``("at least", 20)``; None where nothing is promised.
      sides: side -> what each round measured, in seconds; what the ratios are made of.
    """

    claim: str
    values: List[float]
    unit: str = ""
    limit: Optional[Tuple[str, float]] = None
    sides: Dict[str, List[float]] = {}

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> Optional[bool]:
        if self.limit is None:
            return None
        kind, limit = self.limit
        return self.median <= limit if kind == "at most" else self.median >= limit


def ratio(claim, limit, sides, above, below):
    """The figure of one side over another, round by round."""
    values = [a / b for a, b in zip(sides[above], sides[below])]
    return Figure(claim, values, "", limit, sides)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(sides: Dict[str, Callable[[], Optional[float]]], rounds: int) -> Dict[str, List[float]]:
    """Runs all sides once each round, in random order, after one round that does not count.

    Args:
      sides: name -> action; what it returns counts, or the seconds it takes if that is None.
    """
    rng, taken = random.Random(0), {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in rng.sample(sorted(sides), len(sides)):
            start = time.perf_counter()
            value = sides[name]()
            if i:
                taken[name].append(time.perf_counter() - start if value is None else value)
    return taken


def memory(what: str) -> int:
    """Bytes of this process: ``VmRSS`` now, or ``VmHWM``, the most so far."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(what + ":"))
    return int(line.split()[1]) << 10


def have_memory(size: int) -> None:
    """Touches memory and frees it again.

    The host of a virtual machine gives memory when it is first touched, which may take half a
    second for 400 MB (the second time: 0.02 s), and falls upon whoever comes first.
    """
    array = np.empty(size, np.uint8)
    array[::4096] = 1


def plain_output(path: str, arrays) -> None:
    """The limit of what a disk can do: ``os.write`` of the same bytes, and fsync."""
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for array in arrays:
        view = memoryview(array).cast("B") if array.ndim else memoryview(array.tobytes())
        while view:
            view = view[os.write(handle, view[: 16 << 20]) :]
    os.fsync(handle)
    os.close(handle)
