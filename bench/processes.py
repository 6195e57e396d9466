"""Runs whole processes and says what they cost: wall clock, processor time, memory.

The interpreter that uses this must stay small (no numpy): a child's peak memory is counted from the moment of
the fork, so it can never be less than its parent's.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: How often the memory of a family of processes is looked at.
SAMPLING_S = 0.01


class RunFailedError(Exception):
    """A measured command ended with an error."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run cost; of several processes run one after the other, the sum and the largest peak."""

    wall_s: float
    cpu_s: float  #: user and system, waited-for children included
    peak_bytes: int  #: resident set of the largest single process (getrusage(2), ru_maxrss)


def run(commands: Sequence[Sequence[str]], folder: Path) -> Cost:
    """Run the commands one after the other in `folder`, output thrown away, and return their cost.

    Raises RunFailedError when one does not end with 0.
    """
    wall_s = cpu_s = 0.0
    peak_bytes = 0
    for command in commands:
        began = time.perf_counter()
        _, status, usage = os.wait4(_start(command, folder), 0)
        wall_s += time.perf_counter() - began
        _expect_success(command, status)
        cpu_s += usage.ru_utime + usage.ru_stime
        peak_bytes = max(peak_bytes, usage.ru_maxrss * 1024)  # Linux counts in KiB
    return Cost(wall_s, cpu_s, peak_bytes)


def peak_of_family(command: Sequence[str], folder: Path) -> int:
    """Run a command and return the most memory that it and its children had at one time, in bytes.

    Counts the proportional set size (proc(5), smaps_rollup), so that shared pages count once. Looking
    slows the command down: its time is worth nothing.
    """
    child = _start(command, folder)
    peak_bytes = 0
    while True:
        ended, status, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        peak_bytes = max(peak_bytes, sum(_pss_bytes(process) for process in _family(child)))
        time.sleep(SAMPLING_S)
    _expect_success(command, status)
    return peak_bytes


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def _start(command: Sequence[str], folder: Path) -> int:
    # posix_spawn knows no working directory, and a fork of this small process costs nothing.
    child = os.fork()
    if child:
        return child
    try:
        os.chdir(folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        # set where containers are built, it has every run compile all modules anew; who installs has them compiled
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.execvp(command[0], list(command))  # noqa: S606 - the benchmark chose the command
    finally:
        os._exit(127)


def _expect_success(command: Sequence[str], status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise RunFailedError(f"exit {code}: {' '.join(command)}")


def _family(process: int) -> list[int]:
    """Return a process and all that descend from it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return [process]
    return [process, *(member for child in children for member in _family(int(child)))]


def _pss_bytes(process: int) -> int:
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has just ended
        pass
    return 0
