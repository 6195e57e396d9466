"""The journey of a packet, from files to a report, on one page.

Every step is a function from plain data to plain data; this module only puts them in order.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from nattrace import __version__
from nattrace.errors import UsageError
from nattrace.ingest import ReadOptions, open_capture, parse_sources, unique_names
from nattrace.ingest.capture import FileCapture
from nattrace.match.intake import Intake
from nattrace.model import Accounting, Clock, Point

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from nattrace.ingest import Capture, PointInfo, Source
    from nattrace.match.intake import LayerInfo
    from nattrace.match.pair import PairState
    from nattrace.match.windows import Matcher
    from nattrace.nat.assemble import Assembly
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
    parsed = parse_sources(sources)
    options = ReadOptions(dissector=dissector)
    opened = [(open_capture(source, options), _size_bytes(source)) for source in parsed]
    # the result must not depend on the order of the arguments
    opened.sort(key=lambda item: [(point.name, point.file) for point in item[0].points[:1]])
    captures, sizes = [capture for capture, _ in opened], [size for _, size in opened]
    options.comparable_bytes = min(capture.comparable_bytes() for capture in captures)
    options.comparable_content = not any(getattr(capture, "printed", False) for capture in captures)
    options.day_ns = _first_day_ns(captures)

    with Intake(captures, sizes, options) as intake:
        # Workers read large files from here on; what this process needs later is loaded meanwhile.
        from nattrace.diagnose import diagnose  # noqa: PLC0415
        from nattrace.match.windows import Matcher  # noqa: PLC0415
        from nattrace.nat.assemble import assemble  # noqa: PLC0415
        from nattrace.report_object import FlowSequence, Report  # noqa: PLC0415
        from nattrace.rewrites import Rewrites, Spool  # noqa: PLC0415

        spool, matcher = Spool(), Matcher(options.book)
        if rows:
            _keep_rows(matcher, spool)
        told = None if progress is None else _Progress(progress, sum(sizes))
        layers = intake.run(matcher, told)
    infos = [each.info for each in layers]
    homes = [number for number, each in enumerate(layers) if each.home == number]
    home_names = dict(zip(homes, unique_names([infos[n] for n in homes]), strict=True))
    names = [home_names[each.home] for each in layers]
    found = assemble(matcher, layers, options.book)

    points = tuple(_point(infos[n], home_names[n], min(names)) for n in homes)
    order = sorted(range(len(points)), key=lambda n: points[n].name)
    flows = FlowSequence(found.conversations, names, options.book)
    in_order = tuple(points[n] for n in order)
    return Report(
        version=__version__,
        points=in_order,
        flows=flows,
        findings=tuple(diagnose(in_order, flows)),
        accounting=_accounting(layers, found),
        rewrites=Rewrites(
            spool=spool,
            conversations=found.conversations,
            names=names,
            dated=[info.dated for info in infos],
            book=options.book,
            edges=found.edges,
            reasons=found.reasons,
            flow_rows=found.flow_rows,
            merged_flow=found.merged_flow,
        ),
    )


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


def _point(info: PointInfo, name: str, reference: str) -> Point:
    return Point(
        name=name,
        file=info.file,
        interface=info.interface,
        link_type=info.link_type,
        snaplen=info.snaplen,
        packets=info.packets,
        decoded=info.decoded,
        skipped=dict(info.skipped),
        first=info.first_ns,
        last=info.last_ns,
        truncated=info.truncated,
        dropped_by_kernel=info.dropped_by_kernel,
        clock=Clock(reference=reference),
        comments=tuple(info.comments),
        dated=info.dated,
    )


def _accounting(layers: Sequence[LayerInfo], found: Assembly) -> Accounting:
    """Add up where every packet of every point went."""
    unmatched: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    points = [each.info for number, each in enumerate(layers) if each.home == number]
    for info in points:
        skipped.update(info.skipped)
    for counter in (*(each.set_aside for each in layers), *found.unmatched):
        unmatched.update(counter)
    return Accounting(
        packets=sum(info.packets for info in points),
        matched=int(np.sum(found.matched)) if len(found.matched) else 0,
        unmatched=dict(unmatched),
        skipped=dict(skipped),
    )


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
    return sum(file.stat().st_size for file in files if file.is_file())


class _Progress:
    """Adds up the bytes of chunks for a progress bar, which wants (done, total)."""

    def __init__(self, report: Callable[[int, int], None], total_bytes: int) -> None:
        self._report = report
        self._total = total_bytes
        self._done = 0

    def __call__(self, size_bytes: int) -> None:
        self._done += size_bytes
        # compressed files hold more than their size: the bar then simply stays full
        self._report(min(self._done, self._total), self._total)
