"""Sightings: a packet that one point records more than once.

A packet that is routed back through the interface it came from (hairpin), a bridge that shows a packet before
and after its translation, an `any` capture without interface numbers, a mirror port, a merged file: the same
packet stands in one capture twice. Sightings with another address or port are matched as if a second point had
recorded them: they go to a further *layer* of the point. Sightings with nothing changed are duplicates: one
packet, told once (see `duplicates`). This module finds them; it never matches packets of different points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.lookup import occurrences
from nattrace.match import evidence
from nattrace.match.duplicates import UNCHANGED_NS, duplicates, repeated
from nattrace.match.flows import sorted_groups
from nattrace.match.handshakes import Handshakes
from nattrace.match.keys import commonplace_keys, flow_hash, has_ports
from nattrace.match.rows import Rows
from nattrace.match.worn import numbered_by_hand, young_ids
from nattrace.table import TCP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.table import AddressBook

#: Layers of one point. A packet is seen four times where a file holds veth, bridge, tunnel and uplink; what
#: repeats more often is a loop, and told as ambiguous.
TURNS: int = 4

#: What `Sightings.turns` gives a packet that repeats an earlier one unchanged.
DUPLICATE: int = -1

#: A translated packet is seen again within this time: both sightings are of one host or one mirror port.
_AGAIN_NS = 100_000_000
#: Where one packet does not suffice, so many of a flow must be seen again as packets of another one.
_AGREEING_PACKETS = 3
#: Packets remembered from one chunk to the next, so that no chunk boundary comes between two sightings.
_REMEMBERED = 1_024


@dataclass(slots=True)
class Sightings:
    """What is known of one point's repeated packets; grows chunk by chunk."""

    #: flows that belong to a layer, by `flow_hash`: 0 for the point's first
    turn_of_flow: dict[int, int] = field(default_factory=dict)
    _handshakes: Handshakes = field(default_factory=Handshakes)
    _before: Rows | None = None

    def turns(self, rows: Rows, book: AddressBook) -> NDArray[np.int8] | None:
        """Return each packet's layer, or DUPLICATE; None where all packets belong to the first layer.

        `rows` are the point's next packets in file order, with their keys.
        """
        parts = [rows] if self._before is None else [self._before, rows]
        start = 0 if self._before is None else len(self._before)
        again = _soon_again(parts)
        duplicate = np.empty(0, np.int64)
        if again.size:
            duplicate = again[self._learn(_taken(parts, again), parts, book)]
            duplicate = duplicate[duplicate >= start] - start
        joined = self._handshakes.joined(parts, self.turn_of_flow)
        self._part({flow: set(sides) for sides in joined for flow in sides})
        self._before = _copied(rows, max(len(rows) - _REMEMBERED, 0))
        if not duplicate.size and not any(self.turn_of_flow.values()):
            return None
        turn = self._turn(flow_hash(rows.table)[0])
        turn[duplicate] = DUPLICATE
        return turn

    def _turn(self, hashes: NDArray[np.uint64]) -> NDArray[np.int8]:
        """Return the layers of flows."""
        moved = [(key, turn) for key, turn in self.turn_of_flow.items() if turn]
        result = np.zeros(hashes.size, np.int8)
        if moved:
            keys = np.array([key for key, _ in moved], np.uint64)
            order = np.argsort(keys)
            keys, turns = keys[order], np.array([turn for _, turn in moved], np.int8)[order]
            place = np.minimum(np.searchsorted(keys, hashes), keys.size - 1)
            result = np.where(keys[place] == hashes, turns[place], np.int8(0))
        return result

    def _learn(self, rows: Rows, everything: Sequence[Rows], book: AddressBook) -> NDArray[np.int64]:
        """Give flows that repeat each other's packets layers of their own; return the duplicates' indices.

        `rows` are those among `everything` of which there are others of the same key close in time.
        """
        hashes, backward = flow_hash(rows.table)
        again = duplicates(rows, hashes, backward, everything, book)
        first, second, group, extent = repeated(rows.exact)
        table = rows.table
        bits, flags, conflict = evidence.weigh(table, first, table, second, book)
        apart = np.abs(table.time_ns[second] - table.time_ns[first])
        tcp = (flags & (evidence.TCP_SEQ | evidence.TCP_ACK)) == (evidence.TCP_SEQ | evidence.TCP_ACK)
        vouched = (flags & evidence.IP_ID) != 0
        # on its way a packet loses hops; a traceroute's probes gain them
        passed = table.ttl[second] < table.ttl[first]
        changed = (hashes[first] != hashes[second]) & ~conflict & (apart <= _AGAIN_NS)
        known = has_ports(table.protocol[first]) | (flags & evidence.ICMP_SEQ != 0)
        changed &= (bits >= evidence.STRONG) & (vouched | tcp | (passed & known & (apart <= UNCHANGED_NS)))
        # where a payload must carry the match, no packet but these may say the same, and no more than one packet is seen
        others = np.flatnonzero(changed & (table.protocol[first] != TCP))
        # nor do numbers that somebody made up tell segments apart: devices of a kind begin alike
        common = numbered_by_hand(table)[first]
        if others.size:
            keys = [commonplace_keys(part.table, np.arange(len(part))) for part in everything]
            said = np.sort(np.concatenate(keys))
            own = commonplace_keys(table, first[others])
            count = occurrences(said, own)
            common[others] = (count > extent[others]) | (count > TURNS)
        changed &= ~common | (passed & vouched & ~young_ids(table.ip_id[first]))
        # a router takes one from the TTL; where none did (bridges), or where all say the same, several packets
        # must agree, each numbered otherwise: senders that write one IP id into all they send are not rare
        alone = passed & ~common
        number = (table.ip_id[first].astype(np.int64) << 32) | table.seq[first]
        counted: dict[tuple[int, int], set[int]] = {}
        together: dict[int, dict[int, None]] = {}
        chosen = np.flatnonzero(changed)
        for one, other, enough, named, packet in zip(
            hashes[first[chosen]].tolist(),
            hashes[second[chosen]].tolist(),
            alone[chosen].tolist(),
            number[chosen].tolist(),
            group[chosen].tolist(),
            strict=True,
        ):
            if not enough:
                numbers = counted.setdefault((one, other), set())
                numbers.add(named)
                if len(numbers) < _AGREEING_PACKETS:
                    continue
            together.setdefault(packet, {}).update({one: None, other: None})
        linked: dict[int, set[int]] = {}
        for flows in together.values():
            for flow in flows:
                linked.setdefault(flow, set()).update(flows)
        self._part(linked)
        return again

    def _part(self, linked: Mapping[int, set[int]]) -> None:
        """Put flows that carry one packet into different layers, those that are in none yet, in the order seen."""
        for flow, others in linked.items():
            if flow in self.turn_of_flow:
                continue
            taken = {self.turn_of_flow.get(other) for other in others}
            free = [turn for turn in range(TURNS) if turn not in taken]
            if free:
                self.turn_of_flow[flow] = free[0]


def _soon_again(parts: Sequence[Rows]) -> NDArray[np.int64]:
    """Return the rows of which others have the same exact key within _AGAIN_NS, as indices into all parts."""
    exact = np.concatenate([part.exact for part in parts])
    time = np.concatenate([part.table.time_ns for part in parts])
    order, starts = sorted_groups(exact)
    if starts.size == order.size:
        return np.empty(0, np.int64)
    alike = np.ones(order.size, np.bool_)
    alike[starts] = False  # each row but the first of its key
    place = np.flatnonzero(alike)
    place = place[np.abs(time[order[place]] - time[order[place - 1]]) <= _AGAIN_NS]
    return np.unique(order[np.concatenate([place - 1, place])])


def _taken(parts: Sequence[Rows], chosen: NDArray[np.int64]) -> Rows:
    """Return the chosen rows of all parts together; `chosen` ascends."""
    start = 0
    taken = []
    for part in parts:
        here = chosen[(chosen >= start) & (chosen < start + len(part))]
        taken.append(part.take(here - start))
        start += len(part)
    return Rows.concatenate(taken)


def _copied(rows: Rows, start: int) -> Rows:
    """Return the rows from `start` on, as copies: a view would keep the whole chunk in memory."""
    return rows.take(np.arange(start, len(rows)))
