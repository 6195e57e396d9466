"""Clock sample: a small sample of every capture's packets, the same packets in every capture.

What is kept is decided by a packet's exact key alone, so two captures that both saw a packet both keep it or
both drop it, however far apart their clocks are. The sample says nothing of NAT; it only serves to compare
clocks. It never grows beyond its limit: when it is full, every second key goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.lookup import contains
from nattrace.match.keys import ACK_END, flow_hash
from nattrace.table import KIND, NAMED, TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.rows import Rows

#: Packets kept of all captures together (58 bytes each), and of each of them at most and at least.
TOTAL_KEPT = 2**20
MOST_KEPT = 2**13
FEWEST_KEPT = 2**11

#: Record header, Ethernet, IPv4 and UDP: no useful packet takes less room in a file that is not compressed.
_SMALLEST_RECORD_BYTES = 58

#: No packet is later than this (in the year 2116; pcap itself ends in 2106): differences then fit 64 bits.
LAST_NS = 2**62

#: A payload of this many bytes may be one of its kind, see `evidence`.
_TELLING_BYTES = 8


@dataclass(slots=True)
class Sampled:
    """Packets of one capture, one row each, in the order of the file for each point."""

    key: NDArray[np.uint64]  #: exact key, see `packet_keys`
    content: NDArray[np.uint64]  #: key without IP identification
    time_ns: NDArray[np.int64]
    frame: NDArray[np.uint32]
    point: NDArray[np.int64]  #: number among all points, as the matcher has it
    number: NDArray[np.int64]  #: running number among the point's decoded packets
    flow: NDArray[np.uint64]  #: hash of its conversation at the point
    backward: NDArray[np.bool_]
    ttl: NDArray[np.uint8]
    ip_id: NDArray[np.uint32]
    residual: NDArray[np.int32]  #: checksum residual, -1 where it is not known
    numbered: NDArray[np.bool_]  #: TCP with both sequence numbers: 64 bits that no two connections share

    def __len__(self) -> int:
        """Packets."""
        return int(self.key.size)

    def take(self, rows: NDArray[Any]) -> Sampled:
        """Return the given rows."""
        return Sampled(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Sampled]) -> Sampled:
        """Return all rows in order."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    @property
    def strong(self) -> NDArray[np.bool_]:
        """Which packets carry a number of their own: an IP identification or TCP's sequence numbers."""
        found: NDArray[np.bool_] = (self.ip_id != 0) | self.numbered
        return found


@dataclass(slots=True)
class Sample:
    """A capture's sample while it is read."""

    limit: int
    bits: int = 0  #: low bits of a key that must be 0
    _parts: list[Sampled] = field(default_factory=list)
    _kept: int = 0

    def add(self, point: int, rows: Rows) -> None:
        """Take in freshly prepared packets of a point."""
        chosen = np.flatnonzero((rows.exact & self._mask()) == 0)
        time_ns = rows.table.time_ns[chosen]
        chosen = chosen[(time_ns > 0) & (time_ns < LAST_NS)]  # simple packet blocks have no time
        if not chosen.size:
            return
        part = _packets(point, rows, chosen)
        self._parts.append(part)
        self._kept += len(part)
        while self._kept > self.limit:
            self.thin(self.bits + 1)

    def thin(self, bits: int) -> None:
        """Drop all keys but those whose `bits` low bits are 0."""
        self.bits = min(max(bits, self.bits), 64)
        mask = self._mask()
        self._parts = [part.take(np.flatnonzero((part.key & mask) == 0)) for part in self._parts]
        self._kept = sum(map(len, self._parts))
        if self.bits >= 64:
            self._parts, self._kept = [], 0

    def packets(self) -> Sampled | None:
        """Return what is kept, None when there is nothing."""
        return Sampled.concatenate(self._parts) if self._kept else None

    def _mask(self) -> np.uint64:
        return np.uint64((1 << self.bits) - 1)


def samples(sizes_bytes: Sequence[int]) -> list[Sample]:
    """Return an empty sample for each capture of a file of that size (0: unknown); none for a single one.

    A large file's sample starts thin, so that little is taken in only to be dropped.
    """
    if len(sizes_bytes) < 2:  # nothing to compare with
        return []
    limit = min(max(TOTAL_KEPT // len(sizes_bytes), FEWEST_KEPT), MOST_KEPT)
    return [
        Sample(limit, max((size // _SMALLEST_RECORD_BYTES // limit).bit_length() - 1, 0))
        for size in sizes_bytes
    ]


def _packets(point: int, rows: Rows, chosen: NDArray[np.int64]) -> Sampled:
    table = rows.table
    ip_id = table.ip_id[chosen]
    tcp = table.protocol[chosen] == TCP
    numbered = (
        tcp & (table.seq[chosen] != 0) & (table.ack[chosen] != 0) & (table.l4_visible[chosen] >= ACK_END)
    )
    said = (table.content_length[chosen] >= _TELLING_BYTES) & (table.content_length[chosen] != KIND)
    useful = (ip_id != 0) | numbered | said
    chosen, ip_id, numbered = chosen[useful], ip_id[useful], numbered[useful]
    summed = table.residual_known[chosen] & (table.content_length[chosen] < NAMED)
    return Sampled(
        key=rows.exact[chosen],
        content=rows.content[chosen],
        time_ns=table.time_ns[chosen],
        frame=table.frame[chosen],
        point=np.full(chosen.size, point),
        number=rows.number[chosen],
        flow=flow_hash(table.take(chosen))[0],
        backward=rows.backward[chosen],
        ttl=table.ttl[chosen],
        ip_id=ip_id,
        residual=np.where(summed, table.residual[chosen].astype(np.int32), -1),
        numbered=numbered,
    )


# -- two captures -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shared:
    """Packets that two captures both saw: row ``a[n]`` of the first is row ``b[n]`` of the second."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]


def distinct(packets: Sampled) -> NDArray[np.int64]:
    """Return the rows whose key occurs once at each point of the capture that has it, ascending in key."""
    order = np.lexsort((packets.point, packets.key))
    key, point = packets.key[order], packets.point[order]
    if not order.size:
        return order
    again = (key[1:] == key[:-1]) & (point[1:] == point[:-1])
    # what was seen twice at one point may be two packets: then nobody knows which of them is meant
    repeated = np.unique(key[1:][again])
    kept: NDArray[np.int64] = order[~contains(repeated, key)]
    return kept


#: Sampled of one packet in one capture; a host with more interfaces on one path compares these only.
_MOST_SIGHTINGS = 8


def shared(first: Sampled, second: Sampled) -> Shared:
    """Return the packets that are in both samples; both hold distinct rows (see `distinct`), ascending in key."""
    low = np.searchsorted(second.key, first.key, "left")
    high = np.minimum(np.searchsorted(second.key, first.key, "right"), low + _MOST_SIGHTINGS)
    count = high - low
    a = np.repeat(np.arange(len(first)), count)
    b = np.repeat(low, count) + np.arange(a.size) - np.repeat(np.cumsum(count) - count, count)
    # equal keys with contradicting checksums are two packets
    alike = (first.residual[a] < 0) | (second.residual[b] < 0) | (first.residual[a] == second.residual[b])
    return Shared(a[alike], b[alike])
