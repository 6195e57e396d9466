"""Corrected: readings of other clocks turned into the reference clock's time while packets pass on to matching.

Everything behind this sees corrected times only. What the files recorded is kept here, to the ns, for the few
places that tell it to a reader: rounding makes a correction impossible to undo. It costs 12 bytes a packet, and
only for captures that are corrected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.roll import Lives

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.source import PointInfo
    from nattrace.match.clock.compare import Correction
    from nattrace.match.flows import Flows
    from nattrace.match.prepare import Prepared
    from nattrace.table import PacketTable

#: A packet without a time (pcapng's simple packet block) has this one, which is nobody's reading.
NO_TIME_NS = 0


@dataclass(slots=True)
class Corrected:
    """The corrections of all captures, and what they were applied to. Points are numbered as the matcher's."""

    corrections: Sequence[Correction | None]  #: by capture
    _frames: dict[int, list[NDArray[np.uint32]]] = field(default_factory=dict)
    _times: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)
    _spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    _partly: set[int] = field(default_factory=set)
    _lives: dict[int, Lives] = field(default_factory=dict)

    def apply(self, capture: int, point: int, chunk: Prepared) -> None:
        """Put the reference clock's time into a chunk of a capture's point, where it has another clock."""
        correction = self.corrections[capture]
        if correction is None:
            return
        table = chunk.rows.table
        self._frames.setdefault(point, []).append(table.frame.copy())
        self._times.setdefault(point, []).append(table.time_ns.copy())
        time_ns = correction.reference_time(table.frame, table.time_ns)
        table.time_ns = np.where(table.time_ns == NO_TIME_NS, NO_TIME_NS, time_ns)
        lives = self._lives.setdefault(point, Lives())
        lives.note(chunk.rows.flow, table.time_ns, chunk.rows.backward)
        timed = table.time_ns[table.time_ns != NO_TIME_NS]
        if timed.size:
            first, last = self._spans.get(point, (2**62, -(2**62)))
            self._spans[point] = min(first, int(timed.min())), max(last, int(timed.max()))
        if not correction.whole:
            self._partly.add(point)

    def apply_to_flows(self, point: int, flows: Flows) -> None:
        """Make a point's flows begin and end with their corrected packets."""
        if point in self._lives:
            self._lives[point].tell(flows)

    def apply_to_errors(self, capture: int, point: int, table: PacketTable) -> None:
        """Put the reference clock's time into the ICMP errors of a capture's point."""
        correction = self.corrections[capture]
        if correction is None:
            return
        self._frames.setdefault(point, []).append(table.frame)
        self._times.setdefault(point, []).append(table.time_ns)
        time_ns = correction.reference_time(table.frame, table.time_ns)
        table.time_ns = np.where(table.time_ns == NO_TIME_NS, NO_TIME_NS, time_ns)

    def span(self, point: int, info: PointInfo) -> tuple[int | None, int | None]:
        """Return when a point's first and last packet were seen, on the reference clock; None where some are unknown."""
        if point in self._partly:
            return None, None
        return self._spans.get(point, (info.first_ns, info.last_ns))

    def recorded(self) -> dict[int, Recorded]:
        """Return what the files recorded, by point; points that were not corrected are missing."""
        return {
            point: Recorded(np.concatenate(frames), np.concatenate(self._times[point]))
            for point, frames in self._frames.items()
        }


class Recorded:
    """The times of one point's packets as they stand in the file, by frame."""

    def __init__(self, frame: NDArray[np.uint32], time_ns: NDArray[np.int64]) -> None:
        if (frame[1:] < frame[:-1]).any():
            order = np.argsort(frame, kind="stable")
            frame, time_ns = frame[order], time_ns[order]
        self._frame, self._time_ns = frame, time_ns

    def times(self, frame: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the recorded time of each frame, all of which the point has."""
        return self._time_ns[np.searchsorted(self._frame, frame)]
