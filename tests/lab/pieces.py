"""The slow, obvious matcher for packets that changed size: applies the kernel's entries, then compares bytes.

Two packets of one conversation and direction on both sides of a router are pieces of one another when they hold
the same bytes at the same place: of a TCP stream, of a datagram that was cut into fragments, of a datagram that
UDP_SEGMENT cut. Where the same bytes were sent twice, IP identifications that count up with the segments tell
the transmissions apart (kernel: inet_gso_segment). dpkt reads the records and nothing of nattrace is used. It is
an oracle, so it never guesses: what it cannot decide is an error of the scenario.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import dpkt

from lab.oracle import PROTOCOL_NAMES, ExpectedRow, Seen, UndecidableError
from lab.truth import Addressing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from lab.truth import Hop

LINK_MTU = 1500
#: Payload bytes of the datagrams that the lab has UDP_SEGMENT cut.
SEGMENT = 100
_FIN, _PSH, _CWR = 0x001, 0x008, 0x080


@dataclass(frozen=True, slots=True)
class Piece(Seen):
    """One packet with the bytes it carries and where they belong. Needs captures of whole packets."""

    same: tuple[object, ...] = ()  #: what all pieces of one transmission have in common
    start: int = 0  #: TCP: sequence number; fragments and datagrams: offset in the IP payload
    body: bytes = (
        b""  #: TCP: payload; else IP payload without the UDP or ICMP header's ports, id and checksum
    )
    cut: bool = False  #: is a fragment
    version: int = 4
    header: int = 0  #: bytes of the TCP header


def read(path: Path) -> list[Seen]:
    """Return the TCP, UDP and ICMP echo packets of an Ethernet pcap, later fragments with their first one's ports."""
    pieces: list[Seen] = []
    known: dict[tuple[object, ...], Piece] = {}
    orphans: dict[tuple[object, ...], list[tuple[int, Piece]]] = defaultdict(list)
    with path.open("rb") as file:
        for frame, (_, data) in enumerate(dpkt.pcap.Reader(file), 1):
            found = _decode(frame, data)
            if found is None:
                continue
            piece, datagram = found
            if piece.start == 0 and piece.cut:
                known[datagram] = piece
                for place, orphan in orphans.pop(datagram, ()):
                    pieces[place] = replace(orphan, addressing=piece.addressing)
            elif piece.cut and datagram in known:
                piece = replace(piece, addressing=known[datagram].addressing)
            elif piece.cut:
                orphans[datagram].append((len(pieces), piece))
            pieces.append(piece)
    return pieces


def _decode(frame: int, data: bytes) -> tuple[Piece, tuple[object, ...]] | None:
    kind, ip = int.from_bytes(data[12:14], "big"), data[14:]
    fragment = 0
    if kind == dpkt.ethernet.ETH_TYPE_IP:
        header, ip_id = (ip[0] & 15) * 4, int.from_bytes(ip[4:6], "big")
        # 0 where a super-frame is longer than the field can say
        length = int.from_bytes(ip[2:4], "big") or len(ip)
        fragment, ttl, protocol = int.from_bytes(ip[6:8], "big"), ip[8], ip[9]
        offset, more = (fragment & 0x1FFF) * 8, bool(fragment & 0x2000)
        src, dst = ip[12:16], ip[16:20]
    elif kind == dpkt.ethernet.ETH_TYPE_IP6:
        header, ip_id, offset, more = 40, 0, 0, False
        length, protocol, ttl = 40 + int.from_bytes(ip[4:6], "big"), ip[6], ip[7]
        src, dst = ip[8:24], ip[24:40]
        if protocol == dpkt.ip.IP_PROTO_FRAGMENT:
            protocol, ip_id = ip[40], int.from_bytes(ip[44:48], "big")
            offset, more = int.from_bytes(ip[42:44], "big") & 0xFFF8, bool(ip[43] & 1)
            header += 8
    else:
        return None
    name = PROTOCOL_NAMES.get(protocol)
    body = ip[header:length]
    if name is None or len(body) != length - header:
        return None
    addressing = Addressing(str(ipaddress.ip_address(src)), str(ipaddress.ip_address(dst)))
    cut = more or offset > 0
    same: tuple[object, ...] = ()
    start, options = offset, 0
    if offset == 0 and name in ("icmp", "icmpv6"):
        if body[0] not in (0, 8, 128, 129):
            return None
        addressing = replace(addressing, type=body[0], id=int.from_bytes(body[4:6], "big"))
        body = bytes(6) + body[6:]
    elif offset == 0 and name == "udp":
        addressing = _ported(addressing, body)
        body = bytes(8) + body[8:]
    elif offset == 0:
        addressing = _ported(addressing, body)
        flags = int.from_bytes(body[12:14], "big") & 0xFFF & ~(_FIN | _PSH | _CWR)
        options = (body[12] >> 4) * 4
        same = (body[8:12], flags, body[14:16], body[20:options])
        fin = body[13] & _FIN
        start, body = int.from_bytes(body[4:8], "big"), body[options:]
        same = same if body else (*same, fin)
    piece = Piece(
        frame, name, addressing, ttl, (), body, ip_id,
        same=same, start=start, body=body, cut=cut, version=ip[0] >> 4, header=options,
    )  # fmt: skip
    return piece, (src, dst, protocol, ip_id)


def _ported(addressing: Addressing, body: bytes) -> Addressing:
    return replace(addressing, sport=int.from_bytes(body[:2], "big"), dport=int.from_bytes(body[2:4], "big"))


#: Instead of a count of bytes: a helper rewrote the payload.
_REWRITTEN = -1


@dataclass(frozen=True, slots=True)
class Shared:
    """How many bytes two packets share, and have in all: TCP or UDP payload, or IP payload where one is a fragment."""

    size: int
    before: int
    after: int


def expected_pieces(hop: Hop, points: Mapping[str, Iterable[Seen]]) -> dict[ExpectedRow, Shared]:
    """Return every pair of packets of the hop that the kernel translated and that hold the same bytes.

    Raises UndecidableError where bytes of a packet could be in two packets of the other side.
    """
    rows: dict[ExpectedRow, Shared] = {}
    for entry in {(e.protocol, e.original, e.reply): e for e in hop.entries if e.translated}.values():
        for direction, before, after in (
            ("original", entry.original, entry.reply.inverted()),
            ("reply", entry.reply, entry.original.inverted()),
        ):
            for here, there in ((hop.inner, hop.outer), (hop.outer, hop.inner)):
                first = [
                    p for p in whole(points[here]) if (p.protocol, p.addressing) == (entry.protocol, before)
                ]
                second = [
                    p for p in whole(points[there]) if (p.protocol, p.addressing) == (entry.protocol, after)
                ]
                for one, other, size in _pairs_kept(first, second, hop.keeps):
                    assert other.ttl == one.ttl - 1, (here, one.frame, there, other.frame)
                    row = ExpectedRow(here, one.frame, there, other.frame, direction)  # type: ignore[arg-type]
                    header = 8 if one.protocol == "udp" and not one.cut and not other.cut else 0
                    rows[row] = Shared(size, len(one.body) - header, len(other.body) - header)
                    if size == _REWRITTEN:
                        rows[row] = Shared(0, 0, 0)
    return rows


def whole(points: Iterable[Seen]) -> Iterator[Piece]:
    """Give the packets that `read` returned as what they are."""
    for each in points:
        assert isinstance(each, Piece)
        yield each


def _pairs(first: list[Piece], second: list[Piece]) -> list[tuple[Piece, Piece, int]]:
    """Compare every packet with every other one."""
    found = _trains_in_order(*([each for each in side if _says_one_thing(each)] for side in (first, second)))
    first, second = ([each for each in side if not _says_one_thing(each)] for side in (first, second))
    for one in first:
        for other in second:
            shared = _shared(one, other)
            if shared:
                found.append((one, other, shared))
    found += _without_data(first, second)
    for shares in ([(one, size) for one, _, size in found], [(other, size) for _, other, size in found]):
        total: dict[int, int] = defaultdict(int)
        for piece, size in shares:
            total[piece.frame] += size
        for piece, _ in shares:
            if total[piece.frame] > len(piece.body):
                raise UndecidableError(f"bytes of frame {piece.frame} are in several packets")
    return found


def _says_one_thing(piece: Piece) -> bool:
    """Whether it is a datagram whose payload is one byte again and again: bytes do not tell its pieces apart."""
    return piece.protocol == "udp" and not piece.cut and len(set(piece.body[8:])) == 1


def _trains_in_order(first: list[Piece], second: list[Piece]) -> list[tuple[Piece, Piece, int]]:
    """Pair datagrams with those that they were cut into on their way from `first` to `second`, in the order sent.

    The lab's links keep the order, and datagrams are lost whole. With a pieces' length of SEGMENT bytes and
    identifications that count (IPv4), the next one to arrive is of the next one sent that begins with its number.
    """
    found: list[tuple[Piece, Piece, int]] = []
    arrived = list(second)
    for one in first:
        whole = one.body[8:]
        count = -(-len(whole) // SEGMENT) if arrived and len(arrived[0].body) < len(one.body) else 1
        pieces = arrived[:count]
        numbers = [(one.ip_id + k) % 65536 if one.version == 4 else 0 for k in range(count)]
        if one.version == 4 and [piece.ip_id for piece in pieces[:1]] != numbers[:1]:
            continue  # it was lost
        if [piece.ip_id for piece in pieces] != numbers or b"".join(p.body[8:] for p in pieces) != whole:
            raise UndecidableError(f"frame {one.frame} did not arrive as {[piece.frame for piece in pieces]}")
        found += [(one, piece, len(piece.body) - 8) for piece in pieces]
        del arrived[:count]
    if arrived:
        raise UndecidableError(f"frames {[piece.frame for piece in arrived]} were never sent")
    return found


def _pairs_kept(first: list[Piece], second: list[Piece], keeps: str) -> list[tuple[Piece, Piece, int]]:
    """The same where a box `keeps` so much (see `oracle.KEPT`).

    Where it shifts numbers and timestamps bytes say where they are, IP ids which transmission. What has no IP id
    SYNPROXY has made itself (kernel: synproxy_build_ip). A payload that a helper rewrote keeps its IP id and shares
    no beginning; it counts as of one size.
    """
    if keeps not in ("stream", "proxied"):
        return _pairs(first, second)
    found = []
    for one in first:
        for other in second:
            if one.same[1] != other.same[1] or (keeps == "proxied" and not (one.ip_id and other.ip_id)):
                continue
            shared = None
            if one.body and other.body:
                ahead = _ahead(one.body, other.body)
                if ahead is not None:
                    shared = _shared_stream(replace(one, start=0), replace(other, start=ahead % 2**32))
                elif one.ip_id == other.ip_id and one.body[:5] == other.body[:5] == b"PORT ":
                    shared = _REWRITTEN
            elif not one.body and not other.body and one.ip_id == other.ip_id:
                shared = 0
            if shared is not None:
                found.append((one, other, shared))
    return found


def _ahead(one: bytes, other: bytes) -> int | None:
    """Return how far after the first one's bytes the second one's begin; None where neither holds the other's start."""
    here, there = one.find(other[:32]), other.find(one[:32])
    return here if here >= 0 else -there if there >= 0 else None


def _without_data(first: list[Piece], second: list[Piece]) -> list[tuple[Piece, Piece, int]]:
    """Pair segments without data, which nothing resizes; those alike in everything in the order they came."""
    sides: dict[tuple[object, ...], tuple[list[Piece], list[Piece]]] = defaultdict(lambda: ([], []))
    for side, pieces in enumerate((first, second)):
        for piece in pieces:
            if not piece.body:
                sides[piece.start, piece.same, piece.ip_id][side].append(piece)
    for ones, others in sides.values():
        if len(ones) != len(others) and max(len(ones), len(others)) > 1:
            raise UndecidableError(f"{ones} and {others}")
    return [
        (one, other, 0) for ones, others in sides.values() for one, other in zip(ones, others, strict=False)
    ]


def _shared(one: Piece, other: Piece) -> int | None:
    """Return how many bytes two packets share; None where they are not of one transmission."""
    if one.same != other.same:
        return None
    if one.protocol == "tcp":
        return _shared_stream(one, other)
    if one.cut or other.cut:
        return _shared_datagram(one, other)
    if one.body == other.body:
        return len(one.body) - 8 * (one.protocol == "udp") if one.ip_id == other.ip_id else None
    # UDP_SEGMENT: every datagram's payload is somewhere in the large one; the lab's payloads are all different
    long, short = sorted((one.body[8:], other.body[8:]), key=len, reverse=True)
    if long == short or not short or short not in long:
        return None
    if long.count(short) > 1:
        raise UndecidableError(f"{one.frame} and {other.frame}: the same bytes twice")
    return len(short)


def _shared_stream(one: Piece, other: Piece) -> int | None:
    ahead = (other.start - one.start + 2**31) % 2**32 - 2**31
    low, high = max(0, ahead), min(len(one.body), ahead + len(other.body))
    if high <= low:
        return None
    if one.body[low:high] != other.body[low - ahead : high - ahead]:
        return None
    if one.version == 4:
        # the identification counts the segments, which are as long as the lab's links allow
        segments, rest = divmod(ahead, LINK_MTU - 20 - one.header)
        if rest or (other.ip_id - one.ip_id) % 65536 != segments % 65536:
            return None
    return high - low


def _shared_datagram(one: Piece, other: Piece) -> int | None:
    low, high = max(one.start, other.start), min(one.start + len(one.body), other.start + len(other.body))
    ids = (
        one.ip_id == other.ip_id or ":" in one.addressing.src
    )  # IPv6 fragments get a new one from every router
    if high <= low or not ids:
        return None
    same = one.body[low - one.start : high - one.start] == other.body[low - other.start : high - other.start]
    return high - low if same else None
