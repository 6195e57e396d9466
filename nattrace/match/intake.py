"""Intake: captures read in step with each other and handed to the matcher, window by window.

The capture that is furthest behind in time is read next, so that packets of one instant meet in one window
however different the captures' rates are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.fragments import FirstFragments
from nattrace.match.keys import icmp_error_rows, icmp_query_rows
from nattrace.table import ICMP, ICMPV6, PacketTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nattrace.ingest.source import Batch, Capture, PointInfo, ReadOptions
    from nattrace.match.windows import Matcher

_PCAP_RECORD_HEADER = 16


@dataclass(slots=True)
class _Reading:
    """One capture while it is read."""

    capture: Capture
    batches: Iterator[Batch]
    #: index of each of its points among all points
    numbers: dict[int, int] = field(default_factory=dict)
    newest_ns: int = -(2**62)
    done: bool = False


class Intake:
    """Reads captures into a matcher; afterwards tells their points and what it set aside, by reason."""

    def __init__(self, captures: Sequence[Capture], options: ReadOptions, matcher: Matcher) -> None:
        self._readings = [_Reading(capture, capture.batches(options)) for capture in captures]
        self._matcher = matcher
        self._order: list[tuple[_Reading, int]] = []
        self._first_fragments: list[FirstFragments] = []
        self.set_aside: list[Counter[str]] = []

    def run(self, progress: Callable[[int], None] | None) -> None:
        """Read everything; `progress` is told the bytes of every batch."""
        active = list(self._readings)
        while active:
            reading = min(active, key=lambda r: r.newest_ns)
            batch = next(reading.batches, None)
            if batch is None:
                reading.done = True
                active.remove(reading)
                continue
            self._take(reading, batch)
            if progress is not None:
                progress(int(batch.table.captured_length.sum()) + _PCAP_RECORD_HEADER * len(batch.table))
            if self._matcher.full():
                self._matcher.advance(min((r.newest_ns for r in active), default=None))
        for reading in self._readings:
            # points without a decoded packet are points all the same
            for local in range(len(reading.capture.points)):
                self._number(reading, local)
        self._matcher.finish()

    def points(self) -> list[PointInfo]:
        """Return the points in the numbers that the matcher knows them by."""
        return [reading.capture.points[local] for reading, local in self._order]

    def _number(self, reading: _Reading, local: int) -> int:
        number = reading.numbers.get(local)
        if number is None:
            number = reading.numbers[local] = len(self._order)
            self._order.append((reading, local))
            self._first_fragments.append(FirstFragments())
            self.set_aside.append(Counter())
            self._matcher.add(number, PacketTable.empty())
        return number

    def _take(self, reading: _Reading, batch: Batch) -> None:
        number = self._number(reading, batch.point)
        table = batch.table
        if not len(table):
            return
        reading.newest_ns = max(reading.newest_ns, int(table.time_ns.max()))
        reasons = self.set_aside[number]
        orphan = self._first_fragments[number].fill(table)
        icmp = (table.protocol == ICMP) | (table.protocol == ICMPV6)
        aside = orphan
        if icmp.any():
            error = icmp & icmp_error_rows(table) & ~orphan
            other = icmp & ~icmp_query_rows(table) & ~error & ~orphan
            for reason, rows in (("icmp-error", error), ("icmp-other", other)):
                if count := int(rows.sum()):
                    reasons[reason] += count
            aside = orphan | error | other
        if aside.any():
            if count := int(orphan.sum()):
                reasons["fragment-without-first"] += count
            table = table.take(np.flatnonzero(~aside))
        self._matcher.add(number, table)
