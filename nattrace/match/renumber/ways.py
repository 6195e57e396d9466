"""Ways: what is known of the two directions of a TCP stream without IP identifications, and its packets by number.

A direction's numbers are shifted by as much as its payloads have grown so far. Behind bytes that one of the captures
missed nobody knows by how much, until something says so (see `steps`). Nothing here decides which packet is which.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nattrace.match.renumber.anchors import SOON_NS
from nattrace.table import TCP_SYN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

M32 = 0xFFFFFFFF
#: Packets that are closer than this are not told apart by time.
FLOOR_NS = 10_000
_FIN = 0x01
#: Packets before and behind in time that are looked at.
_AROUND = 32


@dataclass(frozen=True, slots=True)
class Packet:
    """What is compared of a packet; `row` is its place in its point's rows."""

    row: int
    way: int  #: direction, as the first point has it
    time_ns: int
    due_ns: int  #: when it is due at the second point, by what is usual
    seq: int
    ack: int
    flags: int
    length: int
    content: int  #: hash of options and payload
    content_length: int
    repeated: bool  #: others of its flow, at its point, say the same

    @property
    def size(self) -> int:
        """Numbers that it takes (RFC 9293 section 3.4)."""
        return self.length + ((self.flags & _FIN) != 0) + ((self.flags & TCP_SYN) != 0)


@dataclass(slots=True)
class Way:
    """One direction's shifts: from which of the first point's numbers on they are what, and where they are known."""

    reference: int | None = None
    places: list[int] = field(default_factory=list)
    shifts: list[int] = field(default_factory=list)
    end: int | None = None  #: the furthest number, as a place, up to which the shift is known
    gaps: list[tuple[int, int]] = field(default_factory=list)  #: (behind, before) which places it is not

    @classmethod
    def of(cls, shift: int) -> Way:
        """Return what is known of a direction all of whose numbers are shifted, until something is rewritten."""
        return cls(places=[-(2**31)], shifts=[shift])

    def copy(self) -> Way:
        """Return the same, to be tried on."""
        return replace(self, places=self.places.copy(), shifts=self.shifts.copy(), gaps=self.gaps.copy())

    @property
    def untold(self) -> bool:
        """Whether nothing was found yet: a shift may have begun before the first packet that was not missed."""
        return self.end is None

    def at(self, number: int) -> int:
        """Return the shift of a number; behind all that is known, the last one."""
        place = bisect_right(self.places, self._place(number)) - 1
        return self.shifts[place] if place >= 0 else 0

    def knows(self, number: int) -> bool:
        """Return whether no packet is missing before a number: behind one nobody knows what became of the rest."""
        if self.reference is None:
            self.reference = number
        place = self._place(number)
        if self.end is not None and place > self.end:
            return False
        gap = bisect_left(self.gaps, (place, place)) - 1
        return gap < 0 or place >= self.gaps[gap][1]

    def found(self, packet: Packet, growth: int) -> bool:
        """Note a packet that was found; return whether its growth can be so: what was sent before is as it was."""
        place = self._place(packet.seq) + packet.size
        further = self.end is None or place > self.end
        if growth and not further:
            return False
        if growth:
            self.shifts.append((self.shifts[-1] if self.shifts else 0) + growth)
            self.places.append(place)
        if further:
            self.end = place
        return True

    def resume(self, number: int, shift: int) -> None:
        """Note the shift of a number behind all that is known."""
        place = self._place(number)
        if self.untold and shift:
            self.gaps.append((-(2**31), place))
        elif self.end is not None:
            self.gaps.append((self.end, place))
        self.places.append(place)
        self.shifts.append(shift)
        self.end = place

    def _place(self, number: int) -> int:
        reference = number if self.reference is None else self.reference
        return ((number - reference + 2**31) & M32) - 2**31


class There:
    """The second point's packets of a flow, by number and by time."""

    def __init__(self, packets: Sequence[Packet]) -> None:
        """Take the packets in the order of time."""
        self._by_number: dict[tuple[int, int, int, int], list[Packet]] = defaultdict(list)
        self._by_time: dict[tuple[int, int], list[Packet]] = defaultdict(list)
        for packet in packets:
            self._by_number[packet.way, packet.seq, packet.ack, packet.flags].append(packet)
            self._by_time[packet.way, packet.flags].append(packet)

    def numbered(self, packet: Packet, seq: int, ack: int) -> list[Packet]:
        """Return what may be the first point's packet, which has these numbers here."""
        found = self._by_number.get((packet.way, seq & M32, ack & M32, packet.flags), ())
        return [
            each for each in found if abs(each.time_ns - packet.time_ns) <= SOON_NS and _later(packet, each)
        ]

    def around(self, packet: Packet) -> Iterator[Packet]:
        """Return the nearest in time that may be the first point's packet, whatever their numbers."""
        some = self._by_time.get((packet.way, packet.flags), [])
        place = bisect_left(some, packet.due_ns, key=_time)
        for each in some[max(place - _AROUND, 0) : place + _AROUND]:
            if abs(each.time_ns - packet.time_ns) <= SOON_NS and _later(packet, each):
                yield each


def _time(packet: Packet) -> int:
    return packet.time_ns


def _later(here: Packet, there: Packet) -> bool:
    """Return whether a packet is behind the other one in time as all of its direction are, or close enough."""
    usual, apart = here.due_ns - here.time_ns, there.time_ns - here.time_ns
    return abs(usual) < FLOOR_NS or (apart > -FLOOR_NS if usual > 0 else apart < FLOOR_NS)
