"""Rewrite rows: matched packets kept aside during the analysis and told one by one afterwards.

While packets are matched nobody knows yet which flow they will belong to, so both sightings are put into a
spool (memory first, then an anonymous temporary file). Once the flows are numbered the spool is read back
and rows are given out in the order of time. This module never decides anything.
"""

from __future__ import annotations

import pickle
import weakref
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from nattrace.match import evidence
from nattrace.match.keys import has_ports, icmp_query_rows
from nattrace.model import PacketRef, Rewrite, Sighting, Unmatched
from nattrace.nat.conversations import nat_kind
from nattrace.nat.hops import AMBIGUOUS, REASON_NAMES
from nattrace.nat.icmp_errors import ERROR_REASONS
from nattrace.table import ICMP, ICMPV6, TCP, PacketTable, protocol_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.clock.corrected import Recorded
    from nattrace.match.rows import Rows
    from nattrace.model import Direction
    from nattrace.nat.conversations import Conversations
    from nattrace.nat.icmp_errors import ErrorOutcome
    from nattrace.table import AddressBook

    _ByPair = dict[tuple[int, int], NDArray[np.int64]]


#: Bytes of spooled packets kept in memory before they go to a temporary file.
MEMORY_LIMIT_BYTES = 32 * 2**20

#: Columns a sighting is told with; the others are not spooled.
_KEPT = (
    "frame", "time_ns", "version", "src", "dst", "protocol", "ttl", "ip_id", "sport", "dport",
    "icmp_type", "icmp_code", "seq", "ack", "tcp_flags", "payload_length", "l4_visible",
)  # fmt: skip

_TCP_FLAG_LETTERS = "FSRP.UEWe"  # bit order; tcpdump prints them in this order


@dataclass(slots=True)
class _Block:
    """Matched pairs of one step (b set), or unmatched packets of one point (b None)."""

    pair: tuple[int, int]  #: the two points; for unmatched packets their own point and the other one
    a: dict[str, NDArray[Any]]
    b: dict[str, NDArray[Any]] | None
    link: NDArray[np.int64]  #: partial edge; for unmatched packets the running packet number
    backward: NDArray[np.bool_]
    flags: NDArray[np.uint16]  #: for unmatched packets nothing
    epoch: int = 0  #: how often edges had been numbered anew before
    flow: NDArray[np.int64] | None = None  #: for unmatched packets the number of their flow
    near: NDArray[np.uint32] | None = None  #: (rows, n) frames of candidates at the other point, 0 for none
    #: ICMP errors, kept when all is decided: `link` is the hop; for unmatched ones the reason, `flow` the
    #: conversation row or -1, and `direction` 0 original, 1 reply, -1 unknown
    error: bool = False
    direction: NDArray[np.int8] | None = None

    def size_bytes(self) -> int:
        columns = [*self.a.values(), *(self.b.values() if self.b is not None else ())]
        return sum(column.nbytes for column in columns)

    def earliest_ns(self) -> int:
        times = self.a["time_ns"].min()
        return int(times if self.b is None else min(times, self.b["time_ns"].min()))


class Spool:
    """Blocks of packets, in memory until MEMORY_LIMIT_BYTES, then in an unnamed temporary file."""

    def __init__(self) -> None:
        self._memory: list[_Block] = []
        self._memory_bytes = 0
        self._file: BinaryIO | None = None
        self._index: list[tuple[int, int]] = []  #: (earliest time, offset in the file or in memory)
        #: how edges were numbered anew, one entry each time
        self._renumbered: list[_ByPair] = []

    def add_matched(
        self, pair: tuple[int, int], a: Rows, b: Rows, edge: NDArray[np.int64], flags: NDArray[np.uint16]
    ) -> None:
        """Keep matched packets."""
        self._add(_Block(pair, _columns(a.table), _columns(b.table), edge, a.backward, flags))

    def add_unmatched(self, point: int, other: int, rows: Rows, near: NDArray[np.uint32] | None) -> None:
        """Keep packets of a point that stayed unmatched at the other one, and the frames they could be."""
        self._add(
            _Block(
                pair=(point, other),
                a=_columns(rows.table),
                b=None,
                link=rows.number,
                backward=rows.backward,
                flags=np.zeros(0, np.uint16),
                flow=rows.flow,
                near=near,
            )
        )

    def add_errors(self, outcome: ErrorOutcome) -> None:
        """Keep the ICMP errors of an analysis that is over."""
        for crossed in outcome.crossed:
            i, j = crossed.points
            a, b = outcome.errors[i].packets.take(crossed.a), outcome.errors[j].packets.take(crossed.b)
            self._add(
                _Block(
                    (outcome.homes[i], outcome.homes[j]), _columns(a), _columns(b), crossed.hop, crossed.backward, crossed.flags,
                    error=True,
                )
            )  # fmt: skip
        for point, errors in enumerate(outcome.errors):
            unmatched, rival = np.flatnonzero(outcome.reason[point]), outcome.rival[point]
            for other in np.unique(rival[unmatched]).tolist():
                rows = unmatched[rival[unmatched] == other]
                home = outcome.homes[point]
                self._add(
                    _Block(
                        pair=(home, outcome.homes[other] if other >= 0 else home),
                        a=_columns(errors.packets.take(rows)),
                        b=None,
                        link=outcome.reason[point][rows].astype(np.int64),
                        backward=np.zeros(rows.size, np.bool_),
                        flags=np.zeros(0, np.uint16),
                        flow=outcome.conversation[point][rows],
                        near=outcome.candidates[point][rows],
                        error=True,
                        direction=outcome.direction[point][rows],
                    )
                )

    def renumber(self, edges: _ByPair) -> None:
        """Note that edge e of a pair is now edges[pair][e]."""
        self._renumbered.append(edges)

    def _in_new_numbers(self, block: _Block) -> _Block:
        link = block.link
        for edges in self._renumbered[block.epoch :] if block.flow is None else ():
            if block.pair in edges:
                link = edges[block.pair][link]
        return replace(block, link=link)

    def _add(self, block: _Block) -> None:
        if not block.link.size:
            return
        block.epoch = len(self._renumbered)
        self._memory_bytes += block.size_bytes()
        if self._file is None and self._memory_bytes > MEMORY_LIMIT_BYTES:
            self._spill()
        if self._file is None:
            self._index.append((block.earliest_ns(), len(self._memory)))
            self._memory.append(block)
        else:
            self._write(block)

    def _spill(self) -> None:
        import tempfile  # noqa: PLC0415 - small captures never need it

        self._file = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - closed with the spool
        weakref.finalize(self, self._file.close)
        held, self._memory, self._index = self._memory, [], []
        for block in held:
            self._write(block)

    def _write(self, block: _Block) -> None:
        assert self._file is not None
        self._file.seek(0, 2)
        self._index.append((block.earliest_ns(), self._file.tell()))
        pickle.dump(block, self._file, protocol=5)

    def blocks(self) -> Iterator[tuple[_Block, int]]:
        """Give the blocks by their earliest packet, each with the earliest time of all later blocks."""
        order = sorted(self._index)
        for place, (_, offset) in enumerate(order):
            if self._file is None:
                block = self._memory[offset]
            else:
                self._file.seek(offset)
                block = cast("_Block", pickle.load(self._file))  # noqa: S301 - this process wrote it
            yield self._in_new_numbers(block), order[place + 1][0] if place + 1 < len(order) else 2**62


def _columns(table: PacketTable) -> dict[str, NDArray[Any]]:
    return {name: getattr(table, name) for name in _KEPT}


@dataclass(slots=True)
class Rewrites:
    """The rewritten packets of a report, in order of time; iterate as often as needed.

    Iterating gives `Rewrite` rows; `all` adds crossings without a rewrite and `Unmatched` packets.
    """

    spool: Spool
    conversations: Conversations
    names: Sequence[str]
    dated: Sequence[bool]
    book: AddressBook
    #: pair of points to (merged edge of each partial edge, hop of each merged edge)
    edges: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]
    #: point to the reason code of each packet number, 0 for matched ones
    reasons: dict[int, NDArray[np.uint8]]
    #: point to the conversation row of each flow number
    flow_rows: dict[int, NDArray[np.int64]]
    #: point to the place of each flow number among the ordered flows
    merged_flow: dict[int, NDArray[np.int64]]
    #: point to the times that its file recorded, where packets were matched by corrected ones
    recorded: Mapping[int, Recorded] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Rewrite]:
        """Give the rewritten packets."""
        for row in self._rows(everything=False):
            assert isinstance(row, Rewrite)
            yield row

    def to_arrow(self) -> Any:
        """Return the rewritten packets as a `pyarrow.Table`: whole columns, shaped as the JSON rows are.

        Raises MissingToolError where pyarrow (the extra ``arrow``) is not installed.
        """
        from nattrace.report.arrow import to_table  # noqa: PLC0415 - pyarrow is an extra

        return to_table(self)

    def all(self) -> Iterator[Rewrite | Unmatched]:
        """Give every crossing and every packet without one."""
        return self._rows(everything=True)

    def _rows(self, *, everything: bool) -> Iterator[Rewrite | Unmatched]:
        held: list[tuple[tuple[int, ...], Rewrite | Unmatched]] = []
        told: dict[int, set[int]] = {}
        for block, following_ns in self.spool.blocks():
            if block.b is not None:
                held.extend(self._crossings(block, everything=everything))
            elif everything:
                held.extend(self._errors(block) if block.error else self._without(block, told))
            held.sort(key=lambda item: item[0])
            ready = 0
            while ready < len(held) and held[ready][0][0] < following_ns:
                ready += 1
            for _, row in held[:ready]:
                yield row
            del held[:ready]

    def _crossings(self, block: _Block, *, everything: bool) -> Iterator[tuple[tuple[int, ...], Rewrite]]:
        assert block.b is not None
        c = self.conversations
        if block.error:
            hop = block.link
        else:
            merged, hop_of_edge = self.edges[block.pair]
            hop = hop_of_edge[merged[block.link]]
        changed = np.zeros(hop.size, np.bool_)
        for name in ("version", "src", "dst", "sport", "dport"):
            changed |= block.a[name] != block.b[name]
        wanted = np.flatnonzero((hop >= 0) & (changed | everything))
        wanted = wanted[c.flow_of_hop[hop[wanted]] >= 0]
        if not wanted.size:
            return
        h = hop[wanted]
        reverse, swap = c.hops.reverse[h], c.hops.swap[h]
        forward_a = c.hops.forward[h] ^ (reverse & swap)
        reply = block.backward[wanted] == forward_a
        a_first = reply == reverse
        if c.division is not None:
            # both sightings are on the hop; the one at its beginning says when
            time_ns = np.where(reverse, block.b["time_ns"][wanted], block.a["time_ns"][wanted])
            h = c.division.piece(h, reply, time_ns, np.zeros(h.size, np.bool_))
        i, j = block.pair
        wraps_a = wraps_b = None
        if c.encapsulations is not None and not block.error:
            backward = block.backward[wanted]
            flow_a = np.where(reverse, c.hops.to_flow[h], c.hops.from_flow[h])
            flow_b = np.where(reverse, c.hops.from_flow[h], c.hops.to_flow[h])
            wraps_a = c.encapsulations.of_packets(i, flow_a, backward)
            wraps_b = c.encapsulations.of_packets(j, flow_b, backward ^ swap)
        seen_a = self._sightings(block.a, wanted, i, wraps_a)
        seen_b = self._sightings(block.b, wanted, j, wraps_b)
        flows = (c.flow_of_hop[h] + 1).tolist()
        kinds = c.changed[h].tolist()
        flags = block.flags[wanted].tolist()
        delta = (block.b["time_ns"][wanted] - block.a["time_ns"][wanted]).tolist()
        measurable = c.counts.measurable[h, reply.astype(np.int64)].tolist()
        for k, (first_is_a, is_reply) in enumerate(zip(a_first.tolist(), reply.tolist(), strict=True)):
            before, after = (seen_a[k], seen_b[k]) if first_is_a else (seen_b[k], seen_a[k])
            fields = _changed_fields(before, after)
            row = Rewrite(
                flow=flows[k],
                direction="reply" if is_reply else "original",
                nat=_kind(kinds[k]) if fields else None,
                changed=fields,
                latency_ns=(delta[k] if first_is_a else -delta[k]) if measurable[k] else None,
                before=before,
                after=after,
                evidence=evidence.names(flags[k]),
            )
            yield (self._time(block, wanted[k], first_is_a), flows[k], before.frame, after.frame), row

    @staticmethod
    def _time(block: _Block, row: int, first_is_a: bool) -> int:
        side = block.a if first_is_a else block.b
        assert side is not None
        return int(side["time_ns"][row])

    def _without(
        self, block: _Block, told: dict[int, set[int]]
    ) -> Iterator[tuple[tuple[int, ...], Unmatched]]:
        """Give packets that no pair of points matched, once each."""
        point, other = block.pair
        reason = self.reasons[point][block.link]
        rows = np.flatnonzero(reason)
        seen = told.setdefault(point, set())
        assert block.flow is not None
        c = self.conversations
        wraps = None
        if c.encapsulations is not None:
            merged = self.merged_flow[point][block.flow[rows]]
            wraps = c.encapsulations.of_packets(point, merged, block.backward[rows])
        sightings = self._sightings(block.a, rows, point, wraps)
        flow = self.flow_rows[point][block.flow[rows]]
        known = np.maximum(flow, 0)
        starts = (flow >= 0) & (c.point[known] == point)
        opens = block.a["src"][rows] == c.initiator.src[known]
        opens &= block.a["sport"][rows] == c.initiator.sport[known]
        about = zip(flow.tolist(), starts.tolist(), opens.tolist(), strict=True)
        for sighting, row, (number, at_start, opening) in zip(sightings, rows.tolist(), about, strict=True):
            direction: Direction | None = None
            if at_start:
                direction = "original" if opening else "reply"
            if sighting.frame in seen:
                continue
            seen.add(sighting.frame)
            code = int(reason[row])
            near = block.near[row].tolist() if block.near is not None and code == AMBIGUOUS else ()
            yield (
                (int(block.a["time_ns"][row]), 0, sighting.frame, point),
                Unmatched(
                    flow=number + 1 if number >= 0 else None,
                    direction=direction,
                    reason=REASON_NAMES[code],
                    packet=sighting,
                    candidates=tuple(PacketRef(self.names[other], frame) for frame in near if frame),
                ),
            )

    def _errors(self, block: _Block) -> Iterator[tuple[tuple[int, ...], Unmatched]]:
        """Give the ICMP errors that no pair of points matched."""
        assert block.flow is not None
        assert block.direction is not None
        assert block.near is not None
        point, other = block.pair
        sightings = self._sightings(block.a, np.arange(block.link.size), point, None)
        columns = (block.flow, block.direction, block.link, block.near)
        about = zip(*(column.tolist() for column in columns), strict=True)
        times = block.a["time_ns"].tolist()
        for sighting, time, (flow, direction, code, near) in zip(sightings, times, about, strict=True):
            way: Direction | None = None
            if direction >= 0 and flow >= 0:
                way = "reply" if direction else "original"
            rivals = near if code == AMBIGUOUS else ()
            yield (
                (time, 0, sighting.frame, point),
                Unmatched(
                    flow=flow + 1 if flow >= 0 else None,
                    direction=way,
                    reason=ERROR_REASONS[code],
                    packet=sighting,
                    candidates=tuple(PacketRef(self.names[other], frame) for frame in rivals if frame),
                ),
            )

    def _sightings(
        self,
        columns: dict[str, NDArray[Any]],
        rows: NDArray[np.int64],
        point: int,
        wraps: list[str | None] | None,
    ) -> list[Sighting]:
        taken = {name: column[rows] for name, column in columns.items()}
        if point in self.recorded:
            taken["time_ns"] = self.recorded[point].times(taken["frame"])
        table = PacketTable.empty(rows.size)
        for name, column in taken.items():
            setattr(table, name, column)
        query = icmp_query_rows(table).tolist()
        ported = (has_ports(table.protocol) & ((table.sport != 0) | (table.dport != 0))).tolist()
        name, dated, book = self.names[point], self.dated[point], self.book
        text = lru_cache(maxsize=65536)(book.text)
        found: list[Sighting] = []
        wrapped = [None] * rows.size if wraps is None else wraps
        values = zip(*(taken[n].tolist() for n in _KEPT), query, ported, wrapped, strict=True)
        for (
            frame, time, version, src, dst, protocol, ttl, ip_id, sport, dport,
            kind, code, seq, ack, flags, length, visible, is_query, has_port, wrap,
        ) in values:  # fmt: skip
            tcp = protocol == TCP
            icmp = protocol in (ICMP, ICMPV6)
            found.append(
                Sighting(
                    point=name,
                    frame=frame,
                    time=time if dated else None,
                    protocol=protocol_name(protocol),
                    src=text(version, src),
                    dst=text(version, dst),
                    ttl=ttl or None,
                    ip_id=ip_id if version == 4 else ip_id or None,
                    sport=sport if has_port else None,
                    dport=dport if has_port else None,
                    type=kind if icmp else None,
                    code=code if icmp else None,
                    id=sport if is_query else None,
                    seq=seq if tcp or is_query else None,
                    ack=ack if tcp and visible >= 12 else None,
                    flags=tcp_flags(flags) if tcp and visible >= 14 else None,
                    length=length,
                    encapsulation=wrap,
                )
            )
        return found


@lru_cache(maxsize=4096)
def tcp_flags(flags: int) -> str:
    """Spell TCP flags as tcpdump does: S, S., P., F., R."""
    return "".join(letter for n, letter in enumerate(_TCP_FLAG_LETTERS) if flags >> n & 1) or "none"


@lru_cache(maxsize=32)
def _kind(changed: int) -> Any:
    return nat_kind(changed)


def _changed_fields(before: Sighting, after: Sighting) -> Any:
    return tuple(
        name
        for name in ("src", "dst", "sport", "dport", "id")
        if getattr(before, name) != getattr(after, name)
    )
