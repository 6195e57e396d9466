"""The last steps of the journey: from all that was read and matched to the report.

Apart from `pipeline`, because nothing of this is needed before the last packet was read: it is loaded while workers read.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from nattrace import __version__
from nattrace.diagnose import diagnose
from nattrace.model import Accounting, Clock, ClockStep, Finding, Point
from nattrace.nat.assemble import assemble
from nattrace.report_object import FlowSequence, Report
from nattrace.rewrites import Rewrites
from nattrace.table import ALL_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.ingest import PointInfo
    from nattrace.match.clock.compare import Clocks
    from nattrace.match.intake import LayerInfo
    from nattrace.nat.assemble import Assembly
    from nattrace.pipeline import Read


def conclude(read: Read, clocks: Clocks | None, uncorrected: Sequence[str], notes: Sequence[str]) -> Report:
    """Put the report together.

    `uncorrected` are files with another clock that could be read only once, `notes` what bundles say of themselves.
    """
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


def _by_severity(*findings: Finding) -> tuple[Finding, ...]:
    order = ("error", "warning", "info")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def _incomplete(notes: Sequence[str]) -> list[Finding]:
    """Return a finding for each thing that bundles say is wrong with them."""
    return [Finding(code="incomplete-bundle", severity="warning", message=note) for note in sorted(notes)]
