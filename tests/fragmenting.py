"""Datagrams through a masquerading box, cut into fragments of other sizes at its two points, or into none.

It knows nothing of nattrace. What is true: two packets belong together when they hold bytes of one datagram that
are the same bytes. IPv4 keeps a datagram's identification; over IPv6 every point gives its own.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simulation import EPOCH_NS, Conversation, masquerade, packet_at, write_pcap

if TYPE_CHECKING:
    from pathlib import Path

POINTS = ("inside", "outside")


@dataclass(frozen=True)
class Settings:
    """How datagrams go. Probabilities are between 0 and 1."""

    seed: int = 1
    version: int = 4
    datagrams: int = 30
    largest: int = 4_000  #: payload bytes
    mtu: tuple[int, int] = (65_535, 1_500)  #: inside, outside
    lost: float = 0.0  #: share of datagrams that never reach the second point
    missed: float = 0.0  #: share of packets that a capture misses
    twice: float = 0.0  #: share of packets that a point shows a second time
    first_only: bool = False  #: outside, only first fragments are captured
    identifications: int = 65_535  #: how many there are until they come round again
    same_payload: bool = False


@dataclass
class Truth:
    """Captures and what is true about them."""

    sources: list[str]
    shared: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  #: (inside, outside) frame to bytes in both
    whole: set[tuple[int, int]] = field(
        default_factory=set
    )  #: pairs of which both points have the first piece
    doubled: set[tuple[str, int]] = field(default_factory=set)  #: frames that stand twice in their capture


def send(folder: Path, s: Settings) -> Truth:
    """Write inside.pcap and outside.pcap, and say which frames share which bytes."""
    rng = random.Random(s.seed)
    talks = _conversations(rng, s.version)
    now_ns, ip_id = EPOCH_NS, rng.randint(0, 65_535)
    frames: dict[str, list[tuple[int, bytes, int, int, int]]] = {point: [] for point in POINTS}
    doubled: set[tuple[str, int, int]] = set()
    filling = rng.randbytes(s.largest)
    for serial in range(s.datagrams):
        talk, reply = rng.choice(talks), rng.random() < 0.5
        ip_id = ip_id % s.identifications + 1
        size = rng.randint(20, s.largest)
        payload = filling[:size] if s.same_payload else rng.randbytes(size)
        now_ns += rng.randint(300_000, 900_000)
        at_ns = now_ns
        order = list(zip(POINTS, talk.seen, s.mtu, strict=True))
        for hop, (point, seen, mtu) in enumerate(order[::-1] if reply else order):
            packet = packet_at(talk, seen, payload, reply=reply, ip_id=ip_id, ttl=64 - hop)
            pieces = _cut(packet, mtu, rng.getrandbits(32) or 1)
            for n, (low, high, piece) in enumerate(pieces):
                if rng.random() < s.missed or (s.first_only and point == "outside" and low > 0):
                    continue
                frames[point].append((at_ns + n * 1_000, piece, serial, low, high))
                if rng.random() < s.twice:
                    frames[point].append((at_ns + n * 1_000 + 300, piece, serial, low, high))
                    doubled.add((point, serial, low))
            at_ns += rng.randint(15_000, 60_000)
            if rng.random() < s.lost:
                break
        if talk.protocol == "icmp":
            talk.seq = (talk.seq + 1) % 65_536
    truth = Truth([f"{name}={folder / name}.pcap" for name in POINTS])
    for point in POINTS:
        frames[point].sort(key=lambda frame: frame[0])
        kind = b"\x08\x00" if s.version == 4 else b"\x86\xdd"
        write_pcap(
            folder / f"{point}.pcap",
            [(at_ns, b"\2" * 6 + b"\4" * 6 + kind + packet) for at_ns, packet, *_ in frames[point]],
        )
        for number, (_, _, serial, low, _) in enumerate(frames[point], 1):
            if (point, serial, low) in doubled:
                truth.doubled.add((point, number))
    begun = {point: {serial for _, _, serial, low, _ in frames[point] if low == 0} for point in POINTS}
    for here, (_, _, serial, low, high) in enumerate(frames["inside"], 1):
        for there, (_, _, same, start, stop) in enumerate(frames["outside"], 1):
            if serial == same and low < stop and start < high:
                truth.shared[here, there] = min(high, stop) - max(low, start)
                if serial in begun["inside"] & begun["outside"]:
                    truth.whole.add((here, there))
    return truth


def _conversations(rng: random.Random, version: int) -> list[Conversation]:
    made = []
    for n in range(4):
        protocol = ("udp", "icmp")[n % 2]
        client = f"172.17.0.{n + 2}" if version == 4 else f"fd00::{n + 2:x}"
        server = "198.51.100.1" if version == 4 else "2001:db8:1::1"
        port = 1 if protocol == "icmp" else 40_000
        outside = port if n < 2 else 50_000 + n
        made.append(
            masquerade(
                protocol, (client, port), (server, port if protocol == "icmp" else 53), outside, rng=rng
            )
        )
    return made


def _cut(packet: bytes, mtu: int, v6_id: int) -> list[tuple[int, int, bytes]]:
    """Return (from, to, packet) of every fragment, in bytes of the IP payload; one where the packet fits."""
    four = packet[0] >> 4 == 4
    header = packet[: 20 if four else 40]
    body = packet[len(header) :]
    if len(packet) <= mtu:
        return [(0, len(body), packet)]
    size = (mtu - len(header) - 8 * (not four)) // 8 * 8
    pieces = []
    for low in range(0, len(body), size):
        piece = body[low : low + size]
        more = low + size < len(body)
        head = bytearray(header)
        if four:
            struct.pack_into(">H", head, 2, 20 + len(piece))
            struct.pack_into(">H", head, 6, 0x2000 * more | low // 8)
            made = bytes(head) + piece
        else:
            extension = struct.pack(">BBHI", header[6], 0, low | more, v6_id)
            struct.pack_into(">H", head, 4, 8 + len(piece))
            head[6] = 44
            made = bytes(head) + extension + piece
        pieces.append((low, low + len(piece), made))
    return pieces
