"""Pieces: packets of two points that share bytes without being of one size, n to m, and what they add up to.

Data and sums only; which packets share bytes is decided elsewhere (`streams`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.outcome import Matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(slots=True)
class Pieces:
    """Pairs of packets that share bytes: indices into the rows of both sides, in which one row may come often."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    shared_bytes: NDArray[np.int64]
    whole_a: NDArray[np.int64]  #: bytes that the packet has in all, in the same sense
    whole_b: NDArray[np.int64]
    flags: NDArray[np.uint16]  #: evidence
    tied_a: NDArray[np.int64]  #: rows that have several such partners for the same bytes
    tied_b: NDArray[np.int64]

    @classmethod
    def none(cls) -> Pieces:
        """Return no pieces."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing, nothing, nothing, np.empty(0, np.uint16), nothing, nothing)

    @classmethod
    def concatenate(cls, parts: Sequence[Pieces]) -> Pieces:
        """Return the pieces of all parts, which must be about different rows."""
        joined = [cls.none(), *parts]
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in joined]) for f in fields(cls)})

    def say_shifted(self, moved: NDArray[np.bool_]) -> None:
        """Put right the evidence of those pairs whose numbers were not equal as they stand in the packets."""
        self.flags[moved] &= ~np.uint16(evidence.TCP_SEQ | evidence.TCP_ACK)
        self.flags[moved] |= np.uint16(evidence.SHIFTED)

    def of_rows(self, rows_a: NDArray[np.int64], rows_b: NDArray[np.int64]) -> Pieces:
        """Return the same pieces with row r of side a called rows_a[r], and of side b rows_b[r]."""
        return Pieces(
            rows_a[self.a], rows_b[self.b], self.shared_bytes, self.whole_a, self.whole_b, self.flags,
            rows_a[self.tied_a], rows_b[self.tied_b],
        )  # fmt: skip

    def without(self, chosen: NDArray[np.int64]) -> Pieces:
        """Return the same less the chosen pairs, whose packets are tied instead."""
        kept = np.setdiff1d(np.arange(self.a.size), chosen)
        return Pieces(
            self.a[kept], self.b[kept], self.shared_bytes[kept], self.whole_a[kept], self.whole_b[kept],
            self.flags[kept],
            np.setdiff1d(np.concatenate([self.tied_a, self.a[chosen]]), self.a[kept]),
            np.setdiff1d(np.concatenate([self.tied_b, self.b[chosen]]), self.b[kept]),
        )  # fmt: skip

    def split(self) -> tuple[Matches, Pieces]:
        """Return the pairs of packets that have all their bytes in common, and the other pieces."""
        same = (self.shared_bytes == self.whole_a) & (self.shared_bytes == self.whole_b)
        cut = ~same
        pieces = Pieces(
            self.a[cut], self.b[cut], self.shared_bytes[cut], self.whole_a[cut], self.whole_b[cut],
            self.flags[cut], self.tied_a, self.tied_b,
        )  # fmt: skip
        return Matches(self.a[same], self.b[same], self.flags[same]), pieces


@dataclass(slots=True)
class Resized:
    """What pieces add up to, by partial edge and direction, and the latencies of either side's packets.

    A packet counts once however many pieces it has. `frames_a` and `bytes_a` are of first point's packets that
    were at least partly found, `bytes` of them were found at the second point; `frames_b` and `bytes_b` alike.
    """

    lane: NDArray[np.int64]  #: twice the partial edge index, plus one for backward packets
    pairs: NDArray[np.int64]
    frames_a: NDArray[np.int64]
    frames_b: NDArray[np.int64]
    bytes_a: NDArray[np.int64]
    bytes_b: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sample_lane_a: NDArray[np.int64]  #: one for each of first point's packets
    sample_delta_a: NDArray[np.int64]  #: second point's time of its earliest piece less its own time, ns
    sample_time_a: NDArray[np.int64]  #: its own time
    sample_lane_b: NDArray[np.int64]  #: one for each of second point's packets
    sample_delta_b: NDArray[np.int64]  #: its own time less first point's time of its earliest piece, ns
    sample_time_b: NDArray[np.int64]  #: that time

    @classmethod
    def of(
        cls,
        pieces: Pieces,
        lane: NDArray[np.int64],
        time_a: NDArray[np.int64],
        time_b: NDArray[np.int64],
    ) -> Resized:
        """Add up pieces in the given lanes; times (ns) are of the rows of both sides."""
        lanes, member = np.unique(lane, return_inverse=True)
        member = member.reshape(-1)
        frames, first = zip(
            *(np.unique(side, return_index=True) for side in (pieces.a, pieces.b)), strict=True
        )
        when_a = np.full(int(frames[0].max(initial=-1)) + 1, 2**62, np.int64)
        when_b = np.full(int(frames[1].max(initial=-1)) + 1, 2**62, np.int64)
        np.minimum.at(when_a, pieces.a, time_b[pieces.b])
        np.minimum.at(when_b, pieces.b, time_a[pieces.a])

        def total(values: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.int64]:
            sums = np.zeros(lanes.size, np.int64)
            np.add.at(sums, of, values)
            return sums

        of_a, of_b = member[first[0]], member[first[1]]
        return cls(
            lane=lanes,
            pairs=np.bincount(member, minlength=lanes.size),
            frames_a=np.bincount(of_a, minlength=lanes.size),
            frames_b=np.bincount(of_b, minlength=lanes.size),
            bytes_a=total(pieces.whole_a[first[0]], of_a),
            bytes_b=total(pieces.whole_b[first[1]], of_b),
            bytes=total(pieces.shared_bytes, member),
            sample_lane_a=lanes[of_a],
            sample_delta_a=when_a[frames[0]] - time_a[frames[0]],
            sample_time_a=time_a[frames[0]],
            sample_lane_b=lanes[of_b],
            sample_delta_b=time_b[frames[1]] - when_b[frames[1]],
            sample_time_b=when_b[frames[1]],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Resized]) -> Resized:
        """Return all rows in order."""
        none = [np.empty(0, np.int64)]
        return cls(
            **{f.name: np.concatenate(none + [getattr(p, f.name) for p in parts]) for f in fields(cls)}
        )

    def follow_edges(self, member: NDArray[np.int64]) -> None:
        """Give everything its new lane after edge e has become edge member[e]."""
        for name in ("lane", "sample_lane_a", "sample_lane_b"):
            lane = getattr(self, name)
            setattr(self, name, (member[lane >> 1] << 1) | (lane & 1))
