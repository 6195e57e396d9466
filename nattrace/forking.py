"""Forking: when a second process is worth it, and text made by one.

A fork shares everything and costs a few milliseconds; it is safe only in a program without threads.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def may_fork() -> bool:
    """Say whether a second process would be safe (no threads) and of use (a second processor)."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and threading.active_count() == 1


def lines_of_both(first: Callable[[], Iterator[str]], second: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Give the lines of `first`, then those of `second`, which another process makes in the meantime.

    Lines are ASCII and contain no line break. A process that fails costs time only: its lines are then
    made here.
    """
    store = os.memfd_create("nattrace")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(store, "w", encoding="ascii", newline="\n", closefd=False) as stream:
                for line in second():
                    stream.write(line)
                    stream.write("\n")
            code = 0
        finally:
            os._exit(code)
    try:
        yield from first()
        _, status = os.waitpid(child, 0)
        child = 0
        if status != 0:
            yield from second()
            return
        os.lseek(store, 0, os.SEEK_SET)
        with open(store, encoding="ascii", newline="\n", closefd=False) as stream:
            for line in stream:
                yield line[:-1]
    finally:
        os.close(store)
        if child:  # nobody wants the lines any more
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
