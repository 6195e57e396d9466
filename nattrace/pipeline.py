"""The journey of a packet, from files to a report, on one page.

Every step is a function from plain data to plain data; this module only puts them in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from nattrace import __version__
from nattrace.errors import UsageError
from nattrace.ingest import Bookmark, ReadOptions, open_capture, parse_sources, unique_names
from nattrace.ingest.archive import Member
from nattrace.ingest.capture import FileCapture
from nattrace.match.intake import Intake
from nattrace.model import Accounting, Clock, ClockStep, Finding, Point
from nattrace.table import ALL_BYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from nattrace.ingest import Capture, PointInfo, Source
    from nattrace.match.clock.compare import Clocks
    from nattrace.match.clock.corrected import Corrected
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
    return _report(read, clocks, uncorrected, notes)


@dataclass(slots=True)
class _Read:
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
) -> _Read:
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
        import nattrace.diagnose  # noqa: PLC0415
        import nattrace.nat.assemble  # noqa: PLC0415
        import nattrace.report_object  # noqa: F401, PLC0415
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
    return _Read(options, intake, matcher, spool, corrected, layers, names)


def _report(read: _Read, clocks: Clocks | None, uncorrected: Sequence[str], notes: Sequence[str]) -> Report:
    """Put the report together.

    `uncorrected` are files with another clock that could be read only once, `notes` what bundles say of themselves.
    """
    from nattrace.diagnose import diagnose  # noqa: PLC0415
    from nattrace.nat.assemble import assemble  # noqa: PLC0415
    from nattrace.report_object import FlowSequence, Report  # noqa: PLC0415
    from nattrace.rewrites import Rewrites  # noqa: PLC0415

    layers, names, book, corrected = read.layers, read.names, read.options.book, read.corrected
    infos = [each.info for each in layers]
    capture = read.intake.capture_of_layer

    def clock_bound(first: int, second: int) -> int | None:
        if clocks is None:
            return 0
        bound = clocks.between(capture[first], capture[second])
        return None if uncorrected and bound != 0 else bound

    spans = [
        (info.first_ns, info.last_ns) if corrected is None else corrected.span(n, info)
        for n, info in enumerate(infos)
    ]
    cut_off = read.options.comparable_bytes < ALL_BYTES
    found = assemble(read.matcher, layers, book, spans, clock_bound, cut_off=cut_off)
    if found.errors is not None and read.matcher.on_pair is not None:  # as `_keep_rows` has set it
        read.spool.add_errors(found.errors)
    errors = (found.errors, found.conversations.hops, names, book) if found.errors is not None else None
    points = tuple(
        _point(infos[n], names[n], _clock(names, clocks, capture, capture[n]))
        for n, each in enumerate(layers)
        if each.home == n
    )
    order = sorted(range(len(points)), key=lambda n: points[n].name)
    flows = FlowSequence(found.conversations, names, book)
    in_order = tuple(points[n] for n in order)
    openings = [(names[n], infos[n].openings) for n, each in enumerate(layers) if each.home == n]
    return Report(
        version=__version__,
        points=in_order,
        flows=flows,
        findings=_by_severity(
            *_incomplete(notes),
            *diagnose(
                in_order,
                flows,
                uncorrected,
                openings=openings,
                book=book,
                errors=errors,
                shifts=found.shifts,
                names=names,
            ),
        ),
        accounting=_accounting(layers, found),
        rewrites=Rewrites(
            spool=read.spool,
            conversations=found.conversations,
            names=names,
            dated=[info.dated for info in infos],
            book=book,
            edges=found.edges,
            reasons=found.reasons,
            flow_rows=found.flow_rows,
            merged_flow=found.merged_flow,
            recorded={} if corrected is None else corrected.recorded(),
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


def _clock(names: Sequence[str], clocks: Clocks | None, captures: Sequence[int], capture: int) -> Clock:
    """Return what is known of a capture's clock; `captures` says which one each name belongs to."""
    if clocks is None:
        return Clock(min(names))
    measure = clocks.reference[capture]
    reference = min(name for name, of in zip(names, captures, strict=True) if of == measure)
    correction = clocks.corrections[capture]
    if correction is None:
        return Clock(reference)
    first, *others = correction.lines
    return Clock(
        reference=reference,
        offset_ns=first.offset_ns,
        drift_ppm=first.drift * 1e6,
        bound_ns=clocks.bounds_ns[capture],
        at=first.at_ns,
        steps=tuple(ClockStep(each.at_ns, each.offset_ns, each.drift * 1e6) for each in others),
    )


def _point(info: PointInfo, name: str, clock: Clock) -> Point:
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
        clock=clock,
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


def _by_severity(*findings: Finding) -> tuple[Finding, ...]:
    order = ("error", "warning", "info")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _incomplete(notes: Sequence[str]) -> list[Finding]:
    """Return a finding for each thing that bundles say is wrong with them."""
    return [Finding(code="incomplete-bundle", severity="warning", message=note) for note in sorted(notes)]


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
