"""ICMP errors, kept with what they quote until all bindings are known, and the pairs found. Data and keys only.

An error belongs to the flow of the packet that it quotes, and where that flow was bound is known at the end at
the earliest. Errors are rare, but a scan makes millions: only so many are kept, the others are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.match.keys import M1, M2, SEQ_END, endpoint_hash, mix
from nattrace.table import PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.quotes import Quotes

#: Errors kept at one point: some 45 MB. Linux sends no more than 1000 errors a second (icmp_msgs_per_sec), so
#: this is what one host answers to four minutes of scanning; what comes later is counted as `icmp-error` only.
ERRORS_LIMIT = 262_144


#: What is wrong with a pair. The host that the error is for looks the quote up among its own connections, so it
#: ignores an error whose quote or outer header shows the other side's addresses or ports.
NO_FAULT, UNTRANSLATED, OUTER_UNTRANSLATED, QUOTE_UNTRANSLATED, BROKEN = range(5)


#: An unchanged error seen again within this time is the same one, see `sightings`.
_UNCHANGED_NS: Final = 10_000_000


@dataclass(slots=True)
class Errors:
    """ICMP errors and their quotes, one row each; all columns of equal length."""

    packets: PacketTable  #: the errors themselves
    quoted: PacketTable  #: the packets that they quote
    rest: NDArray[np.uint32]  #: MTU, pointer, gateway: see `Quotes.rest`
    l4_length: NDArray[np.uint16]  #: see `Quotes.l4_length`
    carrier: NDArray[np.int64]  #: of errors in tunnels: their carriers, see `prepare.carriers`

    def __len__(self) -> int:
        """Errors."""
        return len(self.packets)

    @classmethod
    def empty(cls) -> Errors:
        """Return no errors."""
        none = np.empty(0, np.int64)
        words = none.astype(np.uint32), none.astype(np.uint16), none
        return cls(PacketTable.empty(), PacketTable.empty(), *words)

    @classmethod
    def concatenate(cls, parts: Sequence[Errors]) -> Errors:
        """Return all rows in order."""
        if not parts:
            return cls.empty()
        return cls(
            PacketTable.concatenate([part.packets for part in parts]),
            PacketTable.concatenate([part.quoted for part in parts]),
            np.concatenate([part.rest for part in parts]),
            np.concatenate([part.l4_length for part in parts]),
            np.concatenate([part.carrier for part in parts]),
        )

    @classmethod
    def of_batch(cls, table: PacketTable, quotes: Quotes) -> Errors:
        """Return the errors of a batch with what they quote, row by row."""
        none = np.full(len(quotes), -1)
        return cls(table.take(quotes.row), quotes.packets, quotes.rest, quotes.l4_length, none)

    def quoted_seq(self) -> NDArray[np.uint32]:
        """Return the quoted sequence numbers, 0 where some capture is cut off before them."""
        whole = self.quoted.l4_visible >= SEQ_END
        return np.where(whole, self.quoted.seq, 0).astype(np.uint32)

    def without_ids(self) -> Errors:
        """Return the same without IP identifications, for where a box writes its own (see `renumbered`)."""
        none = np.zeros(len(self), np.uint32)
        return replace(
            self, packets=replace(self.packets, ip_id=none), quoted=replace(self.quoted, ip_id=none)
        )

    def take(self, rows: NDArray[np.int64]) -> Errors:
        """Return the given rows."""
        return Errors(
            self.packets.take(rows),
            self.quoted.take(rows),
            self.rest[rows],
            self.l4_length[rows],
            self.carrier[rows],
        )


@dataclass(slots=True)
class Located:
    """Errors of one point on the edges that their quotes may belong to: one row for each of both."""

    errors: Errors
    row: NDArray[np.int64]
    edge: NDArray[np.int64]
    backward: NDArray[np.bool_]  #: of the quoted packet, as the first point counts

    def lane(self) -> NDArray[np.uint64]:
        """Return one number for each edge and direction."""
        return (self.edge.astype(np.uint64) << np.uint64(1)) | self.backward

    def take(self, keep: NDArray[np.bool_]) -> Located:
        """Return the rows that a mask keeps."""
        return Located(self.errors, self.row[keep], self.edge[keep], self.backward[keep])


@dataclass(slots=True)
class ErrorPairs:
    """The same errors at two points, one row each."""

    a: NDArray[np.int64]  #: row of the first point's errors
    b: NDArray[np.int64]  #: row of the second point's
    edge: NDArray[np.int64]  #: merged edge of the two points that carries the quoted flow
    backward: NDArray[np.bool_]  #: the quoted packet went backward at the first point
    flags: NDArray[np.uint16]  #: see `evidence`
    fault: NDArray[np.uint8]  #: NO_FAULT, ... BROKEN

    def __len__(self) -> int:
        """Pairs."""
        return int(self.a.size)

    @classmethod
    def concatenate(cls, parts: Sequence[ErrorPairs]) -> ErrorPairs:
        """Return all rows in order."""
        kinds: list[Any] = [np.int64, np.int64, np.int64, np.bool_, np.uint16, np.uint8]
        columns: list[NDArray[Any]] = [np.empty(0, kind) for kind in kinds]
        none = cls(*columns)
        return cls(*(np.concatenate([getattr(p, f.name) for p in (none, *parts)]) for f in fields(cls)))

    def take(self, rows: NDArray[Any]) -> ErrorPairs:
        """Return the given rows: indices or a mask."""
        return ErrorPairs(*(getattr(self, f.name)[rows] for f in fields(self)))


#: How much two sightings of one error have to agree on: everything; everything but the checksum's residual; ...
#: but what a snaplen cuts; only what every quote has.
EXACT, CHECKED, WHOLE, LOOSE = range(4)


def duplicates(errors: Errors) -> NDArray[np.bool_]:
    """Return which errors repeat an earlier one unchanged, as mirror ports and merged files show them.

    As for other packets (see `sightings`) they share their IP identification and follow within milliseconds.
    """
    packets, quoted = errors.packets, errors.quoted
    key = error_key(errors, EXACT)
    for table in (packets, quoted):
        for end, port in (("src", "sport"), ("dst", "dport")):
            key = mix(key ^ endpoint_hash(table.version, getattr(table, end), getattr(table, port)))
    order = np.lexsort((packets.time_ns, key))
    again = np.zeros(len(errors), np.bool_)
    before, after = order[:-1], order[1:]
    same = (key[before] == key[after]) & (packets.ip_id[after] != 0)
    again[after] = same & (packets.time_ns[after] - packets.time_ns[before] <= _UNCHANGED_NS)
    return again


def error_key(errors: Errors, level: int) -> NDArray[np.uint64]:
    """Return a key of what NAT leaves alone in an error and in its quote."""
    packets, quoted = errors.packets, errors.quoted
    word = packets.icmp_type.astype(np.uint64) << np.uint64(56)
    word |= packets.icmp_code.astype(np.uint64) << np.uint64(48)
    word |= quoted.icmp_type.astype(np.uint64) << np.uint64(40)
    word |= quoted.protocol.astype(np.uint64) << np.uint64(32)
    word |= errors.rest
    word *= M1
    word ^= packets.version
    word ^= (quoted.ip_id.astype(np.uint64) << np.uint64(32)) | errors.quoted_seq()
    key = mix(word)
    if level >= LOOSE:
        return key
    key ^= (packets.ip_id.astype(np.uint64) << np.uint64(32)) | quoted.ip_length
    key *= M2
    key ^= (quoted.fragment.astype(np.uint64) << np.uint64(8)) | quoted.ttl
    key = mix(key)
    if level >= WHOLE:
        return key
    key ^= quoted.content_hash + quoted.content_length
    if level == EXACT:
        told = np.where(quoted.residual_known, quoted.residual.astype(np.uint64) + np.uint64(1), np.uint64(0))
        key ^= told * M1
    return mix(key)
