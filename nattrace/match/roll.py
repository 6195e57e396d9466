"""The roll: the flows of one layer of a point while it is read; every packet is given its flow's number at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.encapsulation import common
from nattrace.match.flows import HIGH_OPENED, LOW_OPENED, Flows, members, sorted_groups, unwrapped
from nattrace.table import ECHO_REPLY, ECHO_REPLY_V6, ECHO_REQUEST, ECHO_REQUEST_V6, ICMP, ICMPV6

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from nattrace.table import PacketTable

_SYN, _SYN_ACK = 0x02, 0x12
_INT64 = np.iinfo(np.int64)

#: Bits of the number of slots at first, and how many slots there are for each flow at least.
_SLOT_BITS: Final = 12
_SLOTS_PER_FLOW: Final = 4
#: Flows for which there is room at first.
_ROOM: Final = 1024


@dataclass(slots=True)
class Lives:
    """When the flows of one point began and ended, by flow number; grows while packets are read."""

    flows: int = 0
    _first_ns: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _last_ns: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _first_backward: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    _newest_ns: int = _INT64.min

    def note(
        self,
        flow: NDArray[np.int64],
        time_ns: NDArray[np.int64],
        backward: NDArray[np.bool_],
    ) -> None:
        """Take in the next packets, at least one, by flow number; new flows have the next numbers."""
        known, self.flows = self.flows, max(self.flows, int(flow.max()) + 1)
        self._first_ns = _roomy(self._first_ns, self.flows, _INT64.max)
        self._last_ns = _roomy(self._last_ns, self.flows, _INT64.min)
        self._first_backward = _roomy(self._first_backward, self.flows, 0)
        if time_ns[0] >= self._newest_ns and (time_ns[1:] >= time_ns[:-1]).all():
            # in order of time, as captures mostly are: of values written to one place the last one stays
            self._newest_ns = int(time_ns[-1])
            self._last_ns[flow] = time_ns
            new = np.flatnonzero(flow >= known)[::-1]
            self._first_ns[flow[new]], self._first_backward[flow[new]] = time_ns[new], backward[new]
            return
        self._newest_ns = _INT64.max
        order = np.lexsort((time_ns, flow))
        starts = np.flatnonzero(np.append(True, flow[order[1:]] != flow[order[:-1]]))
        stops = np.append(starts[1:], flow.size) - 1
        first, last = order[starts], order[stops]
        which = flow[first]
        self._last_ns[which] = np.maximum(self._last_ns[which], time_ns[last])
        first = first[time_ns[first] < self._first_ns[which]]
        self._first_ns[flow[first]], self._first_backward[flow[first]] = time_ns[first], backward[first]

    def tell(self, flows: Flows) -> None:
        """Write what is known into the table of the same flows."""
        flows.first_ns = self._first_ns[: len(flows)]
        flows.last_ns = self._last_ns[: len(flows)]
        flows.first_backward = self._first_backward[: len(flows)]


class FlowRoll:
    """The flows of one layer of a point, numbered from 0 as they turn up.

    A flow is found by a table of slots, which the high bits of its hash choose. A slot holds the hash's other bits
    above the flow's number plus one, so that one look at it tells all. Of flows that share a slot the first one has it;
    the others stand in a sorted list. A chunk's packets are mostly of flows that are known, so little is left to be
    sorted, and nothing to be merged afterwards.
    """

    def __init__(self) -> None:
        self._count = 0
        self._flows = Flows.empty(_ROOM)  # of these columns only those that never change are used
        self._packets = np.zeros(2 * _ROOM, np.int64)  # forward and backward ones of each flow in turn
        self._lives = Lives()
        self._wraps: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
        self._bits = _SLOT_BITS
        self._slots = np.zeros(1 << self._bits, np.uint64)
        self._crowded = np.empty(0, np.int64)  # flows without a slot, in the order of their hashes

    def number(
        self,
        table: PacketTable,
        hashes: NDArray[np.uint64],
        backward: NDArray[np.bool_],
        wrap: NDArray[np.uint64] | None = None,
    ) -> NDArray[np.int64]:
        """Return the flow number of each row of a table, the layer's next packets.

        `hashes` and `backward` are from `flow_hash`; `wrap` says what each row is wrapped in, None for nothing.
        """
        if not hashes.size:
            return np.empty(0, np.int64)
        entry = self._slots[self._slot(hashes)]
        entry ^= hashes << np.uint64(self._bits)
        entry -= np.uint64(1)  # an empty slot becomes more than any flow's number
        flow: NDArray[np.int64] = entry.view(np.int64)
        others = np.flatnonzero(entry >= np.uint64((1 << self._bits) - 1))
        if others.size:
            flow[others] = self._look_up(table, others, hashes[others], backward)
        lane = flow << 1 | backward
        np.add.at(self._packets, lane, 1)
        self._lives.note(flow, table.time_ns, backward)
        telling, opened = _openers(table, backward)
        np.bitwise_or.at(self._flows.hint, flow[telling], opened)
        if wrap is not None:
            self._wraps.append((lane, wrap))
        return flow

    def flows(self) -> Flows:
        """Return the flows by their numbers."""
        flows = self._flows.take(slice(self._count))
        flows.forward, flows.backward = self._packets[: 2 * self._count].reshape(-1, 2).T.copy()
        self._lives.tell(flows)
        flows.wrap_forward = flows.wrap_backward = unwrapped(self._count)
        if self._wraps:
            lane, wrap = (np.concatenate(parts) for parts in zip(*self._wraps, strict=True))
            order = np.argsort(lane, kind="stable")
            starts = np.flatnonzero(np.append(True, lane[order[1:]] != lane[order[:-1]]))
            wraps = np.zeros(2 * self._count, np.uint64)
            wraps[lane[order[starts]]] = common(wrap[order], starts)
            flows.wrap_forward, flows.wrap_backward = wraps.reshape(-1, 2).T.copy()
        return flows

    def _slot(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - self._bits)).view(np.int64)

    def _look_up(
        self,
        table: PacketTable,
        rows: NDArray[np.int64],
        hashes: NDArray[np.uint64],
        backward: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """Return the flows of the given rows, which have no slot; new ones are enrolled."""
        order, starts = sorted_groups(hashes)
        own = hashes[order[starts]]
        crowded = self._flows.hash[self._crowded]
        place = np.searchsorted(crowded, own)
        found = np.full(own.size, -1)
        inside = np.flatnonzero(place < crowded.size)
        inside = inside[crowded[place[inside]] == own[inside]]
        found[inside] = self._crowded[place[inside]]
        new = np.flatnonzero(found < 0)
        if new.size:
            found[new] = np.arange(self._count, self._count + new.size)
            self._enrol(table, rows[order[starts[new]]], own[new], backward)
        return found[members(order, starts)]

    def _enrol(
        self,
        table: PacketTable,
        rows: NDArray[np.int64],
        hashes: NDArray[np.uint64],
        backward: NDArray[np.bool_],
    ) -> None:
        """Give the next numbers to flows that the given rows, one each, have brought."""
        start, self._count = self._count, self._count + rows.size
        turned = backward[rows]
        src, dst, sport, dport = table.src[rows], table.dst[rows], table.sport[rows], table.dport[rows]
        for name, column in (
            ("hash", hashes),
            ("version", table.version[rows]),
            ("protocol", table.protocol[rows]),
            ("low_address", np.where(turned, dst, src)),
            ("low_port", np.where(turned, dport, sport)),
            ("high_address", np.where(turned, src, dst)),
            ("high_port", np.where(turned, sport, dport)),
            ("hint", np.zeros(rows.size, np.uint8)),
        ):
            roomy = _roomy(getattr(self._flows, name), self._count, 0)
            roomy[start : self._count] = column
            setattr(self._flows, name, roomy)
        self._packets = _roomy(self._packets, 2 * self._count, 0)
        new = np.arange(start, self._count)
        if self._count * _SLOTS_PER_FLOW > self._slots.size:
            self._bits = (self._count * 2 * _SLOTS_PER_FLOW).bit_length()
            self._slots = np.zeros(1 << self._bits, np.uint64)
            self._crowded, new = self._crowded[:0], np.arange(self._count)
        own = self._flows.hash[new]
        slot, entry = self._slot(own), own << np.uint64(self._bits) | (new + 1).view(np.uint64)
        free = self._slots[slot] == 0
        self._slots[slot[free]] = entry[free]
        without = new[self._slots[slot] != entry]
        if without.size:
            crowded = np.concatenate([self._crowded, without])
            self._crowded = crowded[np.argsort(self._flows.hash[crowded])]


def _roomy(column: NDArray[Any], rows: int, blank: int) -> NDArray[Any]:
    """Return the column with room for so many rows, new ones blank."""
    if rows <= column.size:
        return column
    roomy = np.full(max(2 * column.size, rows, _ROOM), blank, column.dtype)
    roomy[: column.size] = column
    return roomy


def _openers(table: PacketTable, backward: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the packets that tell who opened their conversation (SYNs, queries, their answers), and who."""
    # flags are 0 without TCP, so the few packets that matter are found without looking at the protocol
    syn = np.flatnonzero((table.tcp_flags & np.uint16(_SYN)) != 0)
    by_receiver = (table.tcp_flags[syn] & np.uint16(_SYN_ACK)) == _SYN_ACK
    icmp = np.flatnonzero((table.protocol == ICMP) | (table.protocol == ICMPV6))
    if not icmp.size:
        rows, answered = syn, by_receiver
    else:
        kind, v4 = table.icmp_type[icmp], table.protocol[icmp] == ICMP
        answer = np.where(
            v4,
            (kind == ECHO_REPLY) | (kind == 14) | (kind == 16) | (kind == 18),
            kind == ECHO_REPLY_V6,
        )
        query = np.where(
            v4, (kind == ECHO_REQUEST) | (kind == 13) | (kind == 15) | (kind == 17), kind == ECHO_REQUEST_V6
        )
        telling = answer | query
        rows = np.concatenate([syn, icmp[telling]])
        answered = np.concatenate([by_receiver, answer[telling]])
    high = backward[rows] ^ answered
    return rows, np.where(high, np.uint8(HIGH_OPENED), np.uint8(LOW_OPENED))
