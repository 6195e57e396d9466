"""A progress bar for a person who waits: on a terminal only, and only when the work takes longer than 2 s."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

#: Seconds before the bar appears: work that is done by then needs no bar.
DELAY_S: Final = 2.0


@contextmanager
def progress_bar(stream: TextIO | None) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that takes bytes done and bytes in total, or None when `stream` is no terminal.

    The bar is removed at the end of the block, however it ends.
    """
    if stream is None or not stream.isatty():
        yield None
        return
    bar: Any = None

    def show(bytes_done: int, bytes_total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _bar(stream, bytes_total)
        bar.total = bytes_total
        bar.update(bytes_done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _bar(stream: TextIO, bytes_total: int) -> Any:
    from tqdm import tqdm  # noqa: PLC0415 - not needed where nobody watches

    class Bar(tqdm):  # type: ignore[misc]
        # tqdm's monitor is a thread, and a process that forks workers must not have threads.
        monitor_interval = 0

    return Bar(
        total=bytes_total, unit="B", unit_scale=True, leave=False, delay=DELAY_S, file=stream, desc="nattrace"
    )
