"""The slow, obvious matcher: applies the kernel's own entries to packets, one by one.

A packet that a conntrack entry describes on one side of the router must be on the other side with the
entry's other tuple and otherwise unchanged. dpkt reads the records and nothing of nattrace is used. It is
an oracle, so it never guesses: what it cannot decide is an error of the scenario.
"""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import dpkt

from lab.truth import Addressing
from lab.unwrap import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from lab.truth import Hop

Direction = Literal["original", "reply"]
PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
ECHO_TYPES = (0, 8, 128, 129)

#: What a box may leave alone of a packet beside addresses and ports, by `Hop.keeps`: all of it; all but the TTL;
#: all but TCP options, length and ECN flags; payload and the numbers of TCP and ICMP, whatever the IP version;
#: IP id and TCP flags, while sequence numbers are shifted and payloads rewritten; the same behind SYNPROXY,
#: which makes the handshake itself; the IP id, and the token in a payload that is rewritten.
KEPT = ("all", "ttl", "options", "version", "stream", "proxied", "named")


class UndecidableError(AssertionError):
    """Two packets of one scenario are the same in every field, so no oracle could tell them apart."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One packet at one point, cut into what NAT may change and what it must not."""

    frame: int
    protocol: str
    addressing: Addressing
    ttl: int
    fixed: tuple[object, ...]  #: IP id and length, TCP seq, ack, flags and window, ICMP seq, payload
    payload: bytes
    ip_id: int = 0
    flags: int = 0  #: TCP flags without those of ECN (RFC 3168)
    numbers: tuple[int, ...] = ()  #: TCP seq and ack, ICMP seq


@dataclass(frozen=True, slots=True, order=True)
class ExpectedRow:
    """A packet on both sides of a router, in the order it travelled."""

    before_point: str
    before_frame: int
    after_point: str
    after_frame: int
    direction: Direction


#: Link types of tcpdump.org/linktypes: bytes before the IP header, and where the Ethernet type stands.
LINK_HEADERS = {1: (14, 12), 113: (16, 14), 276: (20, 0)}
LINUX_SLL2 = 276


def read(path: Path) -> list[Seen]:
    """Return the TCP, UDP and ICMP echo packets of a pcap, those in tunnels after their carriers."""
    return [packet for packets in read_points(path).values() for packet in packets]


def read_points(path: Path) -> dict[str, list[Seen]]:
    """Return the same by point: a file is one, and an `any` capture with SLL2 headers one for each interface."""
    seen: dict[str, list[Seen]] = defaultdict(list)
    for name, frame, data in frames(path):
        layer: bytes | None = data
        while layer is not None:
            packet = _decode(frame, layer)
            if packet is not None:
                seen[name].append(packet)
            layer = unwrapped(layer)
    return seen


def frames(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Give every record of a pcap: its point, its frame number, its bytes as if Ethernet had carried them."""
    link_type = int.from_bytes(path.read_bytes()[20:24], "little") & 0xFFFF
    header_bytes, type_at = LINK_HEADERS[link_type]
    with path.open("rb") as file:
        for frame, (_, data) in enumerate(dpkt.pcap.Reader(file), 1):
            name = path.stem
            if link_type == LINUX_SLL2:
                name = f"{name}:{int.from_bytes(data[4:8], 'big')}"
            yield name, frame, bytes(12) + data[type_at : type_at + 2] + data[header_bytes:]


def _decode(frame: int, data: bytes) -> Seen | None:
    kind = int.from_bytes(data[12:14], "big")
    ip = data[14:]
    if kind == dpkt.ethernet.ETH_TYPE_IP:
        length, ip_id = int.from_bytes(ip[2:4], "big"), int.from_bytes(ip[4:6], "big")
        ttl, protocol, header = ip[8], ip[9], (ip[0] & 15) * 4
        src, dst = ip[12:16], ip[16:20]
    elif kind == dpkt.ethernet.ETH_TYPE_IP6:
        header, ip_id = 40, 0
        length, ttl, protocol = 40 + int.from_bytes(ip[4:6], "big"), ip[7], ip[6]
        src, dst = ip[8:24], ip[24:40]
    else:
        return None
    name = PROTOCOL_NAMES.get(protocol)
    l4 = ip[header:length]
    if name is None:
        return None
    addresses = (str(ipaddress.ip_address(src)), str(ipaddress.ip_address(dst)))
    fixed: tuple[object, ...]
    flags = 0
    numbers: tuple[int, ...] = ()
    if name in ("icmp", "icmpv6"):
        if l4[0] not in ECHO_TYPES:
            return None
        echo_id, seq = int.from_bytes(l4[4:6], "big"), int.from_bytes(l4[6:8], "big")
        addressing = Addressing(*addresses, type=l4[0], id=echo_id)
        payload = l4[8:]
        fixed, numbers = (ip_id, length, seq, payload), (seq,)
    elif name == "udp":
        addressing = Addressing(*addresses, int.from_bytes(l4[:2], "big"), int.from_bytes(l4[2:4], "big"))
        payload = l4[8:]
        fixed = (ip_id, length, payload)
    else:
        addressing = Addressing(*addresses, int.from_bytes(l4[:2], "big"), int.from_bytes(l4[2:4], "big"))
        payload = l4[(l4[12] >> 4) * 4 :]
        # Sequence and acknowledgement numbers, flags, window, options; not the ports, not the checksum.
        fixed = (ip_id, length, l4[4:16], l4[20:])
        flags = l4[13] & 0x3F
        numbers = (int.from_bytes(l4[4:8], "big"), int.from_bytes(l4[8:12], "big"))
    return Seen(frame, name, addressing, ttl, fixed, payload, ip_id, flags, numbers)


def _kept(packet: Seen, keeps: str) -> tuple[object, ...] | None:
    """Return what a box that `keeps` so much leaves alone, None for packets that such a box makes itself."""
    if keeps == "options":
        return packet.ip_id, packet.flags, packet.numbers, packet.payload
    if keeps == "version":
        return packet.flags, packet.numbers, packet.payload
    if keeps == "stream":
        return packet.ip_id, packet.flags
    if keeps == "named":
        return packet.ip_id, re.findall(rb"token-\d{8}", packet.payload)[0]
    if keeps == "proxied":
        # SYNPROXY's own packets have no IP id (kernel: synproxy_build_ip); what it forwards has its sender's
        return (packet.ip_id, packet.flags) if packet.ip_id and not packet.flags & 2 else None
    return packet.fixed


def expected_rows(hop: Hop, points: Mapping[str, Iterable[Seen]]) -> set[ExpectedRow]:
    """Return every packet of the hop that the kernel translated and that neighbouring points have.

    Neighbours are the points of the hop that saw the packet, in the hop's order; a row stands where the
    packet differs between two of them. Raises UndecidableError where two packets at one point are equal in
    every field, and AssertionError where a packet's TTL does not fall by one at most from point to point.
    """
    rows = set()
    for entry in {(e.protocol, e.original, e.reply): e for e in hop.entries if e.translated}.values():
        # what a packet can carry, in the order in which NAT makes it so
        forth = [entry.original, *entry.halves, entry.reply.inverted()]
        back = [entry.reply, *(half.inverted() for half in entry.halves), entry.original.inverted()]
        ways: list[tuple[Direction, list[Addressing]]] = [("original", forth), ("reply", back)]
        for direction, states in ways:
            for sightings in _sightings(hop, points, entry.protocol, states):
                if len(sightings) > 1:
                    rows |= _changes(sightings, states, direction, hop.keeps)
    return rows


def _sightings(
    hop: Hop, points: Mapping[str, Iterable[Seen]], protocol: str, states: list[Addressing]
) -> list[list[tuple[str, Seen]]]:
    """Return where each packet of an entry was seen, in the order of the hop's points."""
    found: dict[tuple[object, ...], list[tuple[str, Seen]]] = defaultdict(list)
    for name in hop.chain:
        for packet in points.get(name, ()):
            same = packet.protocol.removesuffix("v6") == protocol.removesuffix("v6")
            kept = _kept(packet, hop.keeps) if same and packet.addressing in states else None
            if kept is not None:
                seen = found[kept]
                if any((name, packet.addressing) == (each, other.addressing) for each, other in seen):
                    if hop.repeats:
                        continue
                    raise UndecidableError(f"{name}: {seen[-1][1]} and {packet}")
                seen.append((name, packet))
    return list(found.values())


def _changes(
    sightings: list[tuple[str, Seen]], states: list[Addressing], direction: Direction, keeps: str
) -> set[ExpectedRow]:
    """Return one packet's rows; it travels from the end where NAT has done less."""
    stage = {id(packet): states.index(packet.addressing) for _, packet in sightings}
    names = list(dict.fromkeys(name for name, _ in sightings))
    ends = [[stage[id(packet)] for name, packet in sightings if name == end] for end in (names[0], names[-1])]
    if (min(ends[0]), max(ends[0])) > (min(ends[1]), max(ends[1])):
        names.reverse()
    # a point that the packet passes twice shows it before and after
    sightings = sorted(sightings, key=lambda each: (names.index(each[0]), stage[id(each[1])]))
    rows = set()
    for (here, first), (there, second) in pairwise(sightings):
        # a translator between IP versions is a router of its own, behind the kernel's
        lowered = first.ttl - second.ttl
        assert keeps in ("ttl", "version") or 0 <= lowered <= 1, (here, first, there, second)
        if first.addressing != second.addressing:
            rows.add(ExpectedRow(here, first.frame, there, second.frame, direction))
    return rows


def token_rows(
    hop: Hop, points: Mapping[str, Iterable[Seen]]
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Pair the data packets of a hop by payload alone: (inner frame, outer frame) that NAT changed, and not.

    A payload seen more than once at a point in one direction is no token and is left out.
    """
    by_payload: list[dict[bytes, list[Seen]]] = []
    for name in (hop.inner, hop.outer):
        index: dict[bytes, list[Seen]] = defaultdict(list)
        for packet in points.get(name, ()):
            if len(packet.payload) >= 16:
                # An echo reply carries its request's payload: the type tells the two apart, in either version.
                kind = {128: 8, 129: 0}.get(packet.addressing.type, packet.addressing.type)
                index[packet.payload + bytes([kind & 255])].append(packet)
        by_payload.append(index)
    changed: set[tuple[int, int]] = set()
    same: set[tuple[int, int]] = set()
    for payload, inner in by_payload[0].items():
        outer = by_payload[1].get(payload, [])
        if len(inner) == len(outer) == 1:
            rows = changed if inner[0].addressing != outer[0].addressing else same
            rows.add((inner[0].frame, outer[0].frame))
    return changed, same
