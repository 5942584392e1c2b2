"""Runs many cases in a child process that may crash, hang or ask for too much memory.

One child handles case after case and reports after each; it is replaced when it does not survive.
"""

import os
import resource
import select
import signal
import sys
import tempfile
from collections import Counter, namedtuple

Outcome = namedtuple("Outcome", "case kind detail")

SECONDS = 20  # of a processor, for a case; the slowest takes less than one
PATIENCE = 10  # times as long by the clock: the machine may be busy
MEMORY = 256 << 20  # more than the child needs for an honest file

FATAL = ("wrong", "escaped", "memory", "crash", "hang")


def run(function, cases):
    """Yields an outcome for each case.

    Args:
      function: (case, folder) -> (kind, detail); an exception is of the kind "escaped".
      cases: what the function takes.
    """
    cases = list(cases)
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        while done < len(cases):
            for outcome in _run_in_child(function, cases[done:], folder):
                done += 1
                yield outcome


def _run_in_child(function, cases, folder):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _child(function, cases, folder, writer)
    os.close(writer)
    try:
        received = b""
        for case in cases:
            while b"\n" not in received:
                if not select.select([reader], [], [], PATIENCE * SECONDS)[0]:
                    os.kill(pid, signal.SIGKILL)
                    yield Outcome(case, "hang", "")
                    return
                part = os.read(reader, 1 << 16)
                if not part:
                    why = _why(os.waitpid(pid, 0)[1])
                    pid = None
                    yield Outcome(case, "hang" if why == "SIGPROF" else "crash", why)
                    return
                received += part
            line, _, received = received.partition(b"\n")
            kind, _, detail = line.decode("utf-8").partition(" ")
            yield Outcome(case, kind, detail)
            if kind == "memory":
                return  # the child ends, too: it cannot be measured again
    finally:
        os.close(reader)
        if pid is not None:
            os.waitpid(pid, 0)


def _why(status):
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "exit {}".format(os.WEXITSTATUS(status))


def _child(function, cases, folder, writer):
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # the complaints of glibc and libhdf5
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    # Threads reserve 64 MB of addresses each.
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY + (512 << 20),) * 2)
    used = _peak()
    for case in cases:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
        try:
            kind, detail = function(case, folder)
        except BaseException as error:
            kind, detail = "escaped", repr(error)
        if _peak() - used > MEMORY:
            kind, detail = "memory", "{} MB".format((_peak() - used) >> 20)
        detail = " ".join(detail.split())[:200]
        line = "{} {}\n".format(kind, detail).encode("utf-8", "backslashreplace")
        while line:
            line = line[os.write(writer, line) :]
        if kind == "memory":
            break
    os._exit(0)


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def table(outcomes, columns, group):
    """Counts outcomes by group and kind, as text; the columns that are empty are left out."""
    counts = Counter((group(outcome), outcome.kind) for outcome in outcomes)
    groups = list(dict.fromkeys(group(outcome) for outcome in outcomes))
    lines = [("kind", "cases", *columns)]
    for name in [*groups, "all"]:
        row = [
            sum(n for (g, k), n in counts.items() if name in (g, "all") and k == c) for c in columns
        ]
        total = sum(n for (g, _), n in counts.items() if name in (g, "all"))
        lines.append((name, total, *row))
    return "\n".join(
        "{:<28}".format(line[0]) + "".join("{:>10}".format(cell) for cell in line[1:])
        for line in lines
    )


def finish(outcomes):
    """Prints what must not happen; returns the exit status."""
    bad = [outcome for outcome in outcomes if outcome.kind in FATAL]
    for outcome in bad[:40]:
        print("{o.kind}: case {o.case}: {o.detail}".format(o=outcome))
    if len(bad) > 40:
        print("... and {} more".format(len(bad) - 40))
    sys.stdout.flush()
    return 1 if bad else 0
