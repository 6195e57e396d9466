"""IP headers: version 4 with options, version 6 with extension headers, for all frames of a block at once.

It reads addresses, lengths and where the upper layer begins. It never reads ports, and never enters a tunnel.
Formats: RFC 791, RFC 8200, RFC 4302 (AH), RFC 2675 (jumbograms).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.ingest.gather import gather, gather_bytes
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS

if TYPE_CHECKING:
    from collections import Counter

    from numpy.typing import NDArray

    from nattrace.ingest.link import Frames
    from nattrace.table import AddressBook

#: IPv6 extension headers followed in one packet. RFC 8200 section 4.1 allows each kind once and destination
#: options twice, so six at most of those followed here; 16 leaves room for what breaks that rule.
EXTENSION_LIMIT: Final = 16

#: The first 20 bytes of an upper-layer header: every field of TCP, UDP, ICMP that the table has.
L4 = np.dtype(
    {
        "names": [
            "word0",
            "word1",
            "word2",
            "word3",
            "seq",
            "ack",
            "flags",
            "window",
            "tcp_checksum",
            "type",
            "code",
        ],
        "formats": [">u2", ">u2", ">u2", ">u2", ">u4", ">u4", ">u2", ">u2", ">u2", "u1", "u1"],
        "offsets": [0, 2, 4, 6, 4, 8, 12, 14, 16, 0, 1],
        "itemsize": 20,
    }
)

_IPV4 = np.dtype(
    {
        "names": ["version_ihl", "length", "id", "fragment", "ttl", "protocol", "src", "dst"],
        "formats": ["u1", ">u2", ">u2", ">u2", "u1", "u1", ">u4", ">u4"],
        "offsets": [0, 2, 4, 6, 8, 9, 12, 16],
        "itemsize": 40,
    }
)
_IPV6 = np.dtype(
    {
        "names": ["length", "next_header", "hop_limit", "addresses"],
        "formats": [">u2", "u1", "u1", (">u4", 8)],
        "offsets": [4, 6, 7, 8],
        "itemsize": 40,
    }
)

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _NO_NEXT_HEADER, _DESTINATION = 0, 43, 44, 51, 59, 60
_EXTENSIONS = np.zeros(256, np.bool_)
_EXTENSIONS[[_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION]] = True

#: Version 4, header of five words: nearly every packet there is.
_PLAIN_IPV4 = 0x45

_KEPT, _TRUNCATED, _VERSION, _HEADER, _TOO_MANY = 0, 1, 2, 3, 4
_REASONS: Final = ("", "truncated", "ip-version", "bad-ip-header", "ip-extension-limit")


@dataclass(slots=True)
class Datagrams:
    """IP datagrams of a block, in record order; columns as in `PacketTable` where the name is the same."""

    record: slice | NDArray[np.int64]  #: which records, as an index into the columns of `Records`
    at: NDArray[np.int64]  #: position of the IP header in the buffer
    available: NDArray[np.int64]  #: bytes from there on that are both captured and of this datagram
    version: NDArray[np.uint8]
    src: NDArray[np.uint32]
    dst: NDArray[np.uint32]
    protocol: NDArray[np.uint8]
    ttl: NDArray[np.uint8]
    ip_id: NDArray[np.uint32]
    fragment: NDArray[np.uint16]
    ip_length: NDArray[np.int64]
    l4_offset: NDArray[np.int64]  #: from `at` to the upper layer
    address_sum: NDArray[
        np.uint64
    ]  #: sum of the addresses' 32-bit words: the same modulo 65535 as of 16-bit words
    routed: NDArray[np.bool_]  #: has an IPv6 routing header: the checksum is over another destination
    l4: NDArray[Any]  #: bytes at `l4_offset`, dtype `L4`; whatever lies in the buffer, so see `available`

    def take(self, keep: NDArray[Any]) -> Datagrams:
        """Return the datagrams that a mask or indices keep."""
        record = self.record
        if isinstance(record, slice):
            record = np.arange(record.start, record.stop)
        columns = {f.name: getattr(self, f.name)[keep] for f in fields(self)[1:-1]}
        return Datagrams(record[keep], **columns, l4=headers(self.l4, keep))


def headers(l4: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Return upper-layer headers that a mask or indices choose: bytes whole, for numpy copies structures field by field."""
    chosen: NDArray[Any] = l4.view(np.dtype((np.void, l4.itemsize)))[rows]
    return chosen.view(l4.dtype)


def read_ip(buffer: NDArray[np.uint8], frames: Frames, book: AddressBook, skipped: Counter[str]) -> Datagrams:
    """Return the datagrams of `frames`; count every frame without a whole IP header once in `skipped`."""
    head = gather(buffer, frames.at, 40)
    plain = head.view(_IPV4)
    if (
        frames.at.size
        and int(frames.have.min()) >= 20
        and (plain["version_ihl"] == _PLAIN_IPV4).all()
        and int(plain["length"].min()) >= 20
    ):
        return _plain_ipv4(frames, head)
    return _any_ip(buffer, frames, head, book, skipped)


def _plain_ipv4(frames: Frames, head: NDArray[Any]) -> Datagrams:
    """Read a block in which every header is IPv4 without options: no second gather, no branches."""
    ipv4 = head.view(_IPV4)
    rows = frames.at.size
    src, dst = ipv4["src"].astype(np.uint32), ipv4["dst"].astype(np.uint32)
    ip_length = ipv4["length"].astype(np.int64)
    return Datagrams(
        record=frames.record,
        at=frames.at,
        available=np.minimum(frames.have, ip_length),
        version=np.full(rows, 4, np.uint8),
        src=src,
        dst=dst,
        protocol=ipv4["protocol"].astype(np.uint8),
        ttl=ipv4["ttl"],
        ip_id=ipv4["id"],
        fragment=ipv4["fragment"],
        ip_length=ip_length,
        l4_offset=np.full(rows, 20, np.int64),
        address_sum=np.add(src, dst, dtype=np.uint64),
        routed=np.zeros(rows, np.bool_),
        l4=np.ndarray((rows,), L4, head, 20, (40,)),
    )


def _any_ip(
    buffer: NDArray[np.uint8], frames: Frames, head: NDArray[Any], book: AddressBook, skipped: Counter[str]
) -> Datagrams:
    """Read headers of both versions and any length; a second gather fetches the upper layer."""
    ipv4 = head.view(_IPV4)
    is_v6 = ipv4["version_ihl"] >> 4 == 6
    header = np.where(is_v6, 40, (ipv4["version_ihl"] & 15).astype(np.int64) * 4)
    ip_length = ipv4["length"].astype(np.int64)
    # 0 where a segmentation offload made the packet longer than the field can say (Linux BIG TCP).
    ip_length = np.where(ip_length == 0, np.maximum(frames.wire, 0), ip_length)
    src, dst = ipv4["src"].astype(np.uint32), ipv4["dst"].astype(np.uint32)
    rows = Datagrams(
        record=frames.record,
        at=frames.at,
        available=np.zeros(0, np.int64),
        version=np.where(is_v6, np.uint8(6), np.uint8(4)),
        src=src,
        dst=dst,
        protocol=ipv4["protocol"].astype(np.uint8),
        ttl=ipv4["ttl"].astype(np.uint8),
        ip_id=ipv4["id"].astype(np.uint32),
        fragment=ipv4["fragment"].astype(np.uint16),
        ip_length=ip_length,
        l4_offset=header,
        address_sum=np.add(src, dst, dtype=np.uint64),
        routed=np.zeros(frames.at.size, np.bool_),
        l4=head,
    )
    stop = np.zeros(frames.at.size, np.uint8)
    six = np.flatnonzero(is_v6 & (frames.have >= 40))
    _fixed_ipv6(rows, six, head[six].view(_IPV6), frames, book)
    rows.available = np.minimum(frames.have, rows.ip_length)
    _follow_extensions(buffer, rows, six, stop)
    stop[frames.have < header] = _TRUNCATED
    stop[~is_v6 & ((header < 20) | (ip_length < header))] = _HEADER
    stop[~is_v6 & (frames.have < 20)] = _TRUNCATED
    stop[~is_v6 & (ipv4["version_ihl"] >> 4 != 4)] = _VERSION
    stop[frames.have < 1] = _TRUNCATED
    if stop.any():
        for code, count in enumerate(np.bincount(stop).tolist()):
            if code != _KEPT and count:
                skipped[_REASONS[code]] += count
        rows = rows.take(stop == _KEPT)
    rows.l4 = gather(buffer, rows.at + rows.l4_offset, L4.itemsize).view(L4)
    return rows


def _fixed_ipv6(
    rows: Datagrams, six: NDArray[np.int64], ipv6: NDArray[Any], frames: Frames, book: AddressBook
) -> None:
    """Write the fields of the fixed IPv6 header into the rows `six`."""
    length = ipv6["length"].astype(np.int64)
    # 0 in a jumbogram and in BIG TCP packets; a packet that ends with its header says "no next header".
    unsaid = (length == 0) & (ipv6["next_header"] != _NO_NEXT_HEADER)
    rows.ip_length[six] = np.where(unsaid, np.maximum(frames.wire[six], 40), length + 40)
    rows.protocol[six] = ipv6["next_header"]
    rows.ttl[six] = ipv6["hop_limit"]
    rows.ip_id[six] = 0
    rows.fragment[six] = 0
    addresses = np.ascontiguousarray(ipv6["addresses"])
    rows.address_sum[six] = addresses.sum(axis=1, dtype=np.uint64)
    packed = addresses.view(np.uint8).reshape(-1, 2, 16)
    # Source and destination of a packet side by side: handles then follow packet order, block by block.
    handles = book.handles(packed.reshape(-1, 16)).reshape(-1, 2) if six.size else np.zeros((0, 2), np.uint32)
    rows.src[six], rows.dst[six] = handles[:, 0], handles[:, 1]


def _follow_extensions(
    buffer: NDArray[np.uint8], rows: Datagrams, six: NDArray[np.int64], stop: NDArray[np.uint8]
) -> None:
    """Walk the extension headers of rows `six` (RFC 8200 section 4); write where and why a walk stops."""
    active = six[_EXTENSIONS[rows.protocol[six]]]
    for _ in range(EXTENSION_LIMIT):
        if not active.size:
            return
        cut = rows.l4_offset[active] + 8 > rows.available[active]
        stop[active[cut]] = _TRUNCATED
        active = active[~cut]
        head = gather_bytes(buffer, rows.at[active] + rows.l4_offset[active], 8)
        kind = rows.protocol[active]
        length = (head[:, 1].astype(np.int64) + 1) * 8
        length[kind == _FRAGMENT] = 8
        length[kind == _AUTHENTICATION] = (head[kind == _AUTHENTICATION, 1].astype(np.int64) + 2) * 4
        rows.routed[active[kind == _ROUTING]] = True
        fragments = active[kind == _FRAGMENT]
        words = head[kind == _FRAGMENT].view(">u4")
        rows.ip_id[fragments] = words[:, 1]
        rows.fragment[fragments] = (words[:, 0] >> 3 & FRAGMENT_OFFSET) | np.where(
            words[:, 0] & 1, np.uint32(MORE_FRAGMENTS), np.uint32(0)
        )
        rows.protocol[active] = head[:, 0]
        rows.l4_offset[active] += length
        beyond = rows.l4_offset[active] > rows.available[active]
        stop[active[beyond]] = _TRUNCATED
        later_fragment = (kind == _FRAGMENT) & (rows.fragment[active] & FRAGMENT_OFFSET != 0)
        active = active[~beyond & ~later_fragment & _EXTENSIONS[rows.protocol[active]]]
    stop[active] = _TOO_MANY
