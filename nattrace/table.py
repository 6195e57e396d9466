"""The packet table: the packets of one observation point as columns.

Everything between ingest and the report works on these columns; there is never one Python object per
packet. This module holds data and moves rows; it never decodes, matches or prints.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

#: Flags inside ``PacketTable.fragment`` (RFC 791 section 3.1); the low 13 bits are the offset in 8-byte units.
MORE_FRAGMENTS = 0x2000
DONT_FRAGMENT = 0x4000
FRAGMENT_OFFSET = 0x1FFF

#: IP protocol numbers (IANA) that have ports, ids or invariants nattrace knows.
ICMP, TCP, UDP, DCCP, GRE, ICMPV6, SCTP, UDPLITE = 1, 6, 17, 33, 47, 58, 132, 136

#: Protocols whose header begins with a source and a destination port.
PORTED = frozenset({TCP, UDP, DCCP, SCTP, UDPLITE})

#: The SYN bit of `PacketTable.tcp_flags` (RFC 9293 section 3.1).
TCP_SYN = 0x002

#: In `PacketTable.content_length`, beyond all lengths: the hash is of what stays of a message when a NAT helper
#: rewrites the addresses in it, so that its length and checksum need not stay: of its name (see `ingest.sip`), or
#: of its kind alone, which it shares with others.
NAMED, KIND = 64, 65

#: `ReadOptions.comparable_bytes` where nothing was cut: no IPv4 datagram is longer (RFC 791).
ALL_BYTES = 65535

#: ICMP and ICMPv6 echo types (RFC 792, RFC 4443).
ECHO_REPLY, ECHO_REQUEST, ECHO_REQUEST_V6, ECHO_REPLY_V6 = 0, 8, 128, 129


@dataclass(slots=True)
class PacketTable:
    """Decoded IP packets of one point, one row a packet, all columns of equal length.

    A field that the packet does not have, or that the capture cut off, is 0. Addresses are 32-bit handles:
    the address itself for IPv4, an `AddressBook` index for IPv6.
    """

    frame: NDArray[np.uint32]  #: 1-based position in the file, as Wireshark shows it
    time_ns: NDArray[np.int64]  #: ns since 1970-01-01 UTC
    captured_length: NDArray[np.uint32]  #: bytes in the file, link header included
    wire_length: NDArray[np.uint32]  #: bytes on the wire, link header included
    version: NDArray[np.uint8]  #: 4 or 6
    src: NDArray[np.uint32]
    dst: NDArray[np.uint32]
    protocol: NDArray[np.uint8]  #: IP protocol after IPv6 extension headers
    ttl: NDArray[np.uint8]  #: TTL or hop limit
    ip_id: NDArray[np.uint32]  #: IPv4 identification; identification of an IPv6 fragment header; else 0
    fragment: NDArray[np.uint16]  #: offset and flags, see MORE_FRAGMENTS; IPv6 fragment headers alike
    ip_length: NDArray[
        np.uint32
    ]  #: IP header to end of datagram, bytes (from the wire length where the header says 0)
    sport: NDArray[np.uint16]  #: source port; for ICMP queries (echo, timestamp, ...) the id
    dport: NDArray[np.uint16]  #: destination port; for ICMP queries the id
    icmp_type: NDArray[np.uint8]
    icmp_code: NDArray[np.uint8]
    seq: NDArray[np.uint32]  #: TCP sequence number, ICMP query sequence, SCTP verification tag
    ack: NDArray[np.uint32]  #: TCP acknowledgement number as it stands in the header, even without ACK flag
    tcp_flags: NDArray[np.uint16]  #: the 12 bits after the data offset; FIN=1 SYN=2 RST=4 PSH=8 ACK=16 ...
    window: NDArray[np.uint16]  #: TCP window, unscaled
    checksum: NDArray[np.uint16]  #: L4 checksum as it stands in the packet
    residual: NDArray[np.uint16]  #: what the checksum says about all that NAT does not touch, see `decode`
    residual_known: NDArray[
        np.bool_
    ]  #: False: no checksum, unfinished (offload), cut off, or not of this protocol
    payload_length: NDArray[np.uint32]  #: L4 payload bytes as the IP header claims them
    l4_visible: NDArray[np.uint8]  #: L4 header and payload bytes inside the comparable length, at most 255
    content_hash: NDArray[
        np.uint64
    ]  #: hash of `content_length` bytes that NAT never rewrites (options, payload)
    #: bytes hashed, 0..32; 0 means nothing was comparable; NAMED, KIND: see there
    content_length: NDArray[np.uint8]

    def __len__(self) -> int:
        """Rows."""
        return int(self.frame.size)

    @classmethod
    def empty(cls, rows: int = 0) -> PacketTable:
        """Return a table of `rows` rows of zeros."""
        return cls(**{name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()})

    @classmethod
    def concatenate(cls, tables: Sequence[PacketTable]) -> PacketTable:
        """Return the rows of all tables, in the order given."""
        if not tables:
            return cls.empty()
        if len(tables) == 1:
            return tables[0]
        return cls(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in COLUMNS})

    def take(self, rows: NDArray[Any] | slice) -> PacketTable:
        """Return the given rows: indices, a mask, or a slice (a slice shares memory)."""
        return PacketTable(**{name: getattr(self, name)[rows] for name in COLUMNS})


#: Column name to numpy dtype, in the order of the fields.
COLUMNS: dict[str, np.dtype[Any]] = {
    "frame": np.dtype(np.uint32),
    "time_ns": np.dtype(np.int64),
    "captured_length": np.dtype(np.uint32),
    "wire_length": np.dtype(np.uint32),
    "version": np.dtype(np.uint8),
    "src": np.dtype(np.uint32),
    "dst": np.dtype(np.uint32),
    "protocol": np.dtype(np.uint8),
    "ttl": np.dtype(np.uint8),
    "ip_id": np.dtype(np.uint32),
    "fragment": np.dtype(np.uint16),
    "ip_length": np.dtype(np.uint32),
    "sport": np.dtype(np.uint16),
    "dport": np.dtype(np.uint16),
    "icmp_type": np.dtype(np.uint8),
    "icmp_code": np.dtype(np.uint8),
    "seq": np.dtype(np.uint32),
    "ack": np.dtype(np.uint32),
    "tcp_flags": np.dtype(np.uint16),
    "window": np.dtype(np.uint16),
    "checksum": np.dtype(np.uint16),
    "residual": np.dtype(np.uint16),
    "residual_known": np.dtype(np.bool_),
    "payload_length": np.dtype(np.uint32),
    "l4_visible": np.dtype(np.uint8),
    "content_hash": np.dtype(np.uint64),
    "content_length": np.dtype(np.uint8),
}
assert list(COLUMNS) == [f.name for f in fields(PacketTable)]


#: Octets of an IPv6 address that hold the IPv4 address, by prefix length 96, 64, 56, 48, 40, 32 (RFC 6052 section 2.2).
_EMBEDDED = (
    (12, 13, 14, 15), (9, 10, 11, 12), (7, 9, 10, 11), (6, 7, 9, 10), (5, 6, 7, 9), (4, 5, 6, 7),
)  # fmt: skip


class AddressBook:
    """IPv6 addresses by handle, so that every address column is 32 bits wide.

    An IPv4 address is its own handle. Handles are given in order of first sight, so they mean nothing
    outside the book and are never sorted on; sort on `packed` where order must not depend on the input.
    """

    def __init__(self) -> None:
        self._handles: dict[bytes, int] = {}
        self._packed: list[bytes] = []

    def __len__(self) -> int:
        """Count of IPv6 addresses seen."""
        return len(self._packed)

    def handle(self, packed: bytes) -> int:
        """Return the handle of a 16-byte IPv6 address, giving it one when it is new."""
        found = self._handles.get(packed)
        if found is None:
            found = self._handles[packed] = len(self._packed)
            self._packed.append(packed)
        return found

    def handles(self, packed: NDArray[np.uint8]) -> NDArray[np.uint32]:
        """Return the handles of an (n, 16) array of IPv6 addresses, shape (n,)."""
        halves = np.ascontiguousarray(packed).view(np.uint64).reshape(-1, 2)
        # Sorting numbers is ten times faster than sorting addresses; the check makes a collision harmless.
        mixed = (halves[:, 0] ^ halves[:, 0] >> 32) * np.uint64(0x9E3779B185EBCA87) + halves[:, 1]
        _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
        if not np.array_equal(halves[first][inverse], halves):
            _, first, inverse = np.unique(halves.view("V16"), return_index=True, return_inverse=True)
            inverse = inverse.reshape(-1)
        order = np.argsort(first)
        addresses = halves[first[order]].tobytes()
        each = (self.handle(addresses[at : at + 16]) for at in range(0, len(addresses), 16))
        known = np.zeros(first.size, np.uint32)
        known[order] = np.fromiter(each, np.uint32, first.size)
        return known[inverse]

    def packed(self, version: int, handle: int) -> bytes:
        """Return the address in network byte order: 4 bytes for version 4, 16 for version 6."""
        return int(handle).to_bytes(4, "big") if version == 4 else self._packed[handle]

    def text(self, version: int, handle: int) -> str:
        """Return the address as RFC 5952 and inet_ntop write it."""
        if version == 4:
            return f"{handle >> 24}.{handle >> 16 & 255}.{handle >> 8 & 255}.{handle & 255}"
        return str(ipaddress.IPv6Address(self._packed[handle]))

    def rank(self, version: NDArray[np.uint8], handles: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return numbers that sort as the addresses do, IPv4 before IPv6, whatever order they came in."""
        rank = handles.astype(np.int64)
        v6 = version == 6
        if v6.any():
            place = np.empty(len(self._packed), np.int64)
            place[sorted(range(len(self._packed)), key=self._packed.__getitem__)] = np.arange(place.size)
            rank[v6] = place[handles[v6]] + 2**32
        return rank

    def is_group(self, version: NDArray[np.uint8], handles: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Return which addresses are multicast (RFC 5771, RFC 4291 section 2.7) or 255.255.255.255."""
        group: NDArray[np.bool_] = (version == 4) & (handles >= np.uint32(0xE0000000))
        v6 = version == 6
        if v6.any():
            multicast = np.fromiter((p[0] == 0xFF for p in self._packed), np.bool_, len(self._packed))
            group[v6] = multicast[handles[v6]]
        return group

    def embeds(self, six: NDArray[np.uint32], four: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Return where the IPv6 address `six[i]` has the IPv4 address `four[i]` in it (RFC 6052 section 2.2).

        All prefix lengths of that RFC count: 96, and 32 to 64 with octet 8 and everything behind zero.
        """
        distinct, place = np.unique(six, return_inverse=True)
        packed = np.frombuffer(b"".join(self._packed[handle] for handle in distinct.tolist()), np.uint8)
        octets = packed.reshape(-1, 16)[place.reshape(-1)].astype(np.uint32)
        found: NDArray[np.bool_] = np.zeros(six.size, np.bool_)
        for where in _EMBEDDED:
            value = np.zeros(six.size, np.uint32)
            for octet in where:
                value = (value << np.uint32(8)) | octets[:, octet]
            same = value == four
            if where[-1] != 15:
                same &= (octets[:, 8] == 0) & ~octets[:, where[-1] + 1 :].any(axis=1)
            found |= same
        found &= four != 0
        return found

    def as_four(self, version: NDArray[np.uint8], handle: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return IPv4 addresses as they are and the last 32 bits of IPv6 ones: what a prefix of 96 bits embeds."""
        result = handle.copy()
        six = np.flatnonzero(version == 6)
        if six.size:
            last = [int.from_bytes(self._packed[each][12:], "big") for each in handle[six].tolist()]
            result[six] = np.array(last, np.uint32)
        return result

    def addresses(self, start: int = 0) -> list[bytes]:
        """Return the addresses from handle `start` on, 16 bytes each."""
        return self._packed[start:]

    def extend(self, packed: Iterable[bytes]) -> NDArray[np.uint32]:
        """Take over another book's addresses; return this book's handle for each of them, in order."""
        return np.fromiter((self.handle(address) for address in packed), np.uint32)


_PROTOCOL_NAMES = {
    ICMP: "icmp", TCP: "tcp", UDP: "udp", DCCP: "dccp", ICMPV6: "icmpv6", SCTP: "sctp", UDPLITE: "udplite",
    2: "igmp", 4: "ipip", 41: "ipv6", 47: "gre", 50: "esp", 51: "ah", 89: "ospf", 103: "pim", 112: "vrrp",
}  # fmt: skip


def protocol_name(number: int) -> str:
    """Name an IP protocol as conntrack and /etc/protocols do; ``ip-N`` where they have no name."""
    return _PROTOCOL_NAMES.get(number) or f"ip-{number}"
