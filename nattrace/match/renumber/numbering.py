"""Numbering: one point's TCP numbers written as the other point's, where anchors said by how much they differ.

Packets that segmentation offload cut or merged as well share bytes with packets of the other point, under other
numbers. Here a direction's shift is a function of its numbers: it changes where a helper rewrote a payload
(kernel: nf_ct_seq_offset). This module rewrites columns; it matches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.renumber.anchors import legible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.renumber.anchors import Anchors
    from nattrace.match.rows import Rows

_HALF = np.int64(1 << 31)


@dataclass(slots=True)
class Numbering:
    """What is known of the second point's numbers: from which one on they are shifted by how much, in order.

    A stream is a direction, as the first point has it, of a lane: twice the lane, plus one for backward.
    """

    flow_b: NDArray[np.int64]  #: merged flow at the second point, by lane
    swap: NDArray[np.bool_]
    place: NDArray[np.int64]  #: stream and number (less the stream's reference), ascending
    shift: NDArray[np.uint32]  #: from there on, and before it where the stream begins
    reference: NDArray[np.uint32]  #: a number by stream, from which others are less than 2**31 away

    @classmethod
    def of(
        cls,
        rows_b: Rows,
        anchors: Anchors,
        lane: NDArray[np.int64],
        flow_b: NDArray[np.int64],
        swap: NDArray[np.bool_],
        unshifted: NDArray[np.bool_],
    ) -> Numbering:
        """Learn from anchors; `lane` are theirs, the other columns by lane: `unshifted` before its first anchor."""
        table, b = rows_b.table, anchors.b
        seq = np.where(anchors.back, anchors.backward, anchors.forward)
        ack = np.where(anchors.back, anchors.forward, anchors.backward)
        own, other = lane * 2 + anchors.back, lane * 2 + ~anchors.back
        stream = np.concatenate([own, own, other])
        number = np.concatenate([table.seq[b], table.seq[b] + table.payload_length[b], table.ack[b]])
        shift = np.concatenate([seq, seq + anchors.growth, ack])
        reference = np.zeros(2 * flow_b.size, np.uint32)
        reference[stream[::-1]] = number[::-1]
        place = _place(stream, number, reference)
        early = np.flatnonzero(unshifted.repeat(2))
        place = np.concatenate([place, early << 32])
        shift = np.concatenate([shift, np.zeros(early.size, np.uint32)])
        order = np.argsort(place, kind="stable")
        return cls(flow_b, swap, place[order], shift[order], reference)

    def of_first_point(self, rows: Rows, flows: NDArray[np.int64]) -> tuple[Rows, NDArray[np.bool_]]:
        """Return rows of the second point with the numbers of the first, and which of them had others.

        Their options cannot be compared: SYNPROXY shifts timestamps as well (kernel: synproxy_tstamp_adjust).
        """
        order = np.argsort(self.flow_b)
        flow = flows[rows.flow]
        found = np.minimum(np.searchsorted(self.flow_b[order], flow), order.size - 1)
        lane = order[found]
        known = np.flatnonzero((self.flow_b[lane] == flow) & legible(rows.table, np.arange(len(rows))))
        lane = lane[known]
        back = rows.backward[known] ^ self.swap[lane]
        table = rows.table
        seq, ack = table.seq.copy(), table.ack.copy()
        seq[known] -= self._shift(lane * 2 + back, seq[known])
        ack[known] -= self._shift(lane * 2 + ~back, ack[known])
        moved = (seq != table.seq) | (ack != table.ack)
        content_length = np.where(moved, np.uint8(0), table.content_length)
        return replace(rows, table=replace(table, seq=seq, ack=ack, content_length=content_length)), moved

    def _shift(self, stream: NDArray[np.int64], number: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return the shift of numbers of streams: that of the last place before them, or else of the next one."""
        place = np.searchsorted(self.place, _place(stream, number, self.reference), "right") - 1
        before = (place >= 0) & (self.place[place] >> 32 == stream)
        place = np.where(before, place, np.minimum(place + 1, self.place.size - 1))
        return np.where(self.place[place] >> 32 == stream, self.shift[place], np.uint32(0))


def _place(
    stream: NDArray[np.int64], number: NDArray[np.uint32], reference: NDArray[np.uint32]
) -> NDArray[np.int64]:
    return stream << 32 | ((number - reference[stream]).view(np.int32) + _HALF)
