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


#: Bytes of the other process's text taken at a time: whole, it would cost page faults and time.
_PIECE_BYTES = 1 << 18


def texts_of_both(first: Callable[[], Iterator[str]], second: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Give the texts of `first`, then those of `second`, which another process makes in the meantime.

    Texts are ASCII; those of the other process come in pieces of their own. A process that fails costs time
    only: its texts are then made here.
    """
    store = os.memfd_create("nattrace")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(store, "wb", closefd=False) as stream:
                stream.writelines(text.encode("ascii") for text in second())
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
        with open(store, "rb", buffering=0, closefd=False) as stored:
            while piece := stored.read(_PIECE_BYTES):
                yield piece.decode("ascii")
    finally:
        os.close(store)
        if child:  # nobody wants the texts any more
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
