"""The journey of a packet, from files to a report, on one page.

Every step is a function from plain data to plain data; this module only puts them in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nattrace.errors import UsageError
from nattrace.ingest import Bookmark, ReadOptions, open_capture, parse_sources, unique_names
from nattrace.ingest.archive import Member
from nattrace.ingest.capture import FileCapture
from nattrace.match.intake import Intake

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from nattrace.ingest import Capture, Source
    from nattrace.match.clock.compare import Clocks
    from nattrace.match.clock.corrected import Corrected
    from nattrace.match.intake import LayerInfo
    from nattrace.match.pair import PairState
    from nattrace.match.windows import Matcher
    from nattrace.report_object import Report
    from nattrace.rewrites import Spool

_DAY_NS = 86_400 * 10**9


def analyze(
    *sources: str | os.PathLike[str] | BinaryIO,
    dissector: str = "native",
    rows: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Say what NAT did to the packets in the given captures.

    Parameters
    ----------
    sources
        Paths, ``NAME=PATH`` strings, ``-`` for standard input, or open binary files; see CONTRACT's SOURCE.
    dissector
        ``native``, or ``tshark`` for link layers that only tshark knows.
    rows
        Keep matched packets so that `Report.rewrites` can tell them one by one. Without, it is empty.
    progress
        Called now and then with bytes done and bytes in total.

    Raises
    ------
    NattraceError
        When a source cannot be read at all; damage inside a source is reported, not raised.
    """
    if dissector not in ("native", "tshark"):
        raise UsageError(f"unknown dissector {dissector!r}: native or tshark")
    notes: list[str] = []
    parsed = parse_sources(sources, notes)
    bookmark = Bookmark(parsed)
    read = _read(parsed, dissector, progress, keep_rows=rows)
    clocks = read.intake.compare_clocks(read.matcher, read.names)
    uncorrected: list[str] = []
    if clocks is not None and any(clocks.corrections):
        if bookmark.rewind():
            del read
            read = _read(parsed, dissector, progress, keep_rows=rows, clocks=clocks)
        else:
            uncorrected = bookmark.lost
    from nattrace.conclusion import conclude  # noqa: PLC0415 - loaded while workers read, by `_read`

    return conclude(read, clocks, uncorrected, notes)


@dataclass(slots=True)
class Read:
    """All captures, read to their ends and matched. Lists are by layer, see `match.prepare`."""

    options: ReadOptions
    intake: Intake
    matcher: Matcher
    spool: Spool
    corrected: Corrected | None
    layers: list[LayerInfo]
    names: list[str]


def _read(
    sources: Sequence[Source],
    dissector: str,
    progress: Callable[[int, int], None] | None,
    *,
    keep_rows: bool,
    clocks: Clocks | None = None,
) -> Read:
    """Read and match the sources; with `clocks`, for the second time and on the reference clock's time."""
    options = ReadOptions(dissector=dissector)
    opened = [(open_capture(source, options), source) for source in sources]
    # the result must not depend on the order of the arguments
    opened.sort(key=lambda item: [(point.name, point.file) for point in item[0].points[:1]])
    captures, sizes = [capture for capture, _ in opened], [_size_bytes(source) for _, source in opened]
    own_clocks = [None if source.facts is None else source.facts.clock for _, source in opened]
    options.comparable_bytes = min(capture.comparable_bytes() for capture in captures)
    options.comparable_content = not any(getattr(capture, "printed", False) for capture in captures)
    options.day_ns = _first_day_ns(captures)
    corrected: Corrected | None = None
    if clocks is not None:
        from nattrace.match.clock.corrected import Corrected as Corrections  # noqa: PLC0415 - of several clocks only

        corrected = Corrections(clocks.corrections)

    with Intake(captures, sizes, options, own_clocks, corrected) as intake:
        # Workers read large files from here on; what this process needs later is loaded meanwhile.
        import nattrace.conclusion  # noqa: F401, PLC0415
        from nattrace.match.windows import Matcher  # noqa: PLC0415
        from nattrace.rewrites import Spool  # noqa: PLC0415

        spool, matcher = Spool(), Matcher(options.book)
        if keep_rows:
            _keep_rows(matcher, spool)
        total = sum(sizes)
        told = None if progress is None else _Progress(progress, total, 0 if clocks is None else total)
        layers = intake.run(matcher, told)
    homes = [number for number, each in enumerate(layers) if each.home == number]
    home_names = dict(zip(homes, unique_names([layers[n].info for n in homes]), strict=True))
    names = [home_names[each.home] for each in layers]
    return Read(options, intake, matcher, spool, corrected, layers, names)


def _keep_rows(matcher: Matcher, spool: Spool) -> None:
    """Have everything that the matcher decides about packets put aside for `Report.rewrites`."""

    def on_pair(i: int, j: int, pair: PairState) -> None:
        pair.on_match = lambda a, b, edge, flags: spool.add_matched((i, j), a, b, edge, flags)
        pair.on_unmatched = lambda side, rows, near: spool.add_unmatched(
            (i, j)[side], (i, j)[1 - side], rows, near
        )

    matcher.on_pair = on_pair
    matcher.on_compact = spool.renumber
    matcher.on_lonely = lambda point, rows: spool.add_unmatched(point, point, rows, None)


def _first_day_ns(captures: Sequence[Capture]) -> int:
    """Return the day on which the earliest capture with dates begins; 0 when there is none."""
    times = [
        int(records.time_ns[0])
        for capture in captures
        if isinstance(capture, FileCapture)
        for records in capture.first_records()
        if records.time_ns.size and records.time_ns[0] > 0
    ]
    return min(times, default=0) // _DAY_NS * _DAY_NS


def _size_bytes(source: Source) -> int:
    """Return the size of a source's files, 0 where there is none to know."""
    files = [file for file in source.files if isinstance(file, Path)]
    members = sum(file.size_bytes for file in source.files if isinstance(file, Member))
    return members + sum(file.stat().st_size for file in files if file.is_file())


class _Progress:
    """Adds up the bytes of chunks for a progress bar, which wants (done, total).

    `before_bytes` were read when the captures were read for the first time.
    """

    def __init__(self, report: Callable[[int, int], None], total_bytes: int, before_bytes: int) -> None:
        self._report = report
        self._total = total_bytes + before_bytes
        self._done = before_bytes

    def __call__(self, size_bytes: int) -> None:
        self._done += size_bytes
        # compressed files hold more than their size: the bar then simply stays full
        self._report(min(self._done, self._total), self._total)
