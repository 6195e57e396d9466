"""ICMP errors written byte by byte, and a middlebox that translates them well or badly, for tests.

The truth is the writer's: every packet is made once and then shown at two points, before and after translation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

UDP, TCP = 17, 6
CONTAINER, PUBLIC, SERVER, ROUTER = "172.17.0.2", "203.0.113.10", "198.51.100.1", "203.0.113.1"
CONTAINER6, PUBLIC6, SERVER6, ROUTER6 = "fd00:17::2", "2001:db8:1::10", "2001:db8:2::1", "2001:db8:1::1"
START_NS = 1_800_000_000 * 10**9


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Packet:
    """A UDP or TCP packet."""

    src: str
    sport: int
    dst: str
    dport: int
    payload: bytes = b"payload of its own"
    protocol: int = UDP
    ip_id: int = 77
    ttl: int = 64
    seq: int = 1000
    flags: int = 2

    def upper(self) -> bytes:
        """The upper layer with its checksum."""
        ports = struct.pack(">HH", self.sport, self.dport)
        if self.protocol == UDP:
            head = ports + struct.pack(">HH", 8 + len(self.payload), 0)
            at = 6
        else:
            head = ports + struct.pack(">IIBBHHH", self.seq, 0, 0x50, self.flags, 64240, 0, 0)
            at = 16
        data = head + self.payload
        pseudo = ip_address(self.src).packed + ip_address(self.dst).packed
        pseudo += struct.pack(">II", len(data), self.protocol)
        return data[:at] + struct.pack(">H", checksum(pseudo + data) or 0xFFFF) + data[at + 2 :]

    def ip(self) -> bytes:
        """The IP packet."""
        return ip(self.src, self.dst, self.protocol, self.upper(), self.ip_id, self.ttl)


def ip(src: str, dst: str, protocol: int, upper: bytes, ip_id: int, ttl: int) -> bytes:
    """An IP packet of the version that the addresses have."""
    packed = ip_address(src).packed + ip_address(dst).packed
    if len(packed) == 32:
        return struct.pack(">IHBB", 6 << 28, len(upper), protocol, ttl) + packed + upper
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(upper), ip_id, 0, ttl, protocol, 0) + packed
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + upper


def error(
    src: str,
    dst: str,
    quote: bytes,
    *,
    kind: tuple[int, int] = (3, 3),
    rest: int = 0,
    ip_id: int = 501,
    ttl: int = 60,
) -> bytes:
    """An ICMP error with this quote, of the version that the addresses have."""
    body = struct.pack(">BBHI", *kind, 0, rest) + quote
    version6 = ":" in src
    pseudo = b""
    if version6:
        pseudo = ip_address(src).packed + ip_address(dst).packed + struct.pack(">II", len(body), 58)
    body = body[:2] + struct.pack(">H", checksum(pseudo + body)) + body[4:]
    return ip(src, dst, 58 if version6 else 1, body, ip_id, ttl)


#: Extension objects (RFC 4884 section 8): an MPLS label stack of two (RFC 4950), and the interface that the packet
#: came in by, with index, IPv4 address, name and MTU (RFC 5837).
MPLS = struct.pack(">HBBII", 12, 1, 1, 16003 << 12 | 1, 24 << 12 | 0x1FF)
INTERFACE = struct.pack(">HBBIHH4sB7sI", 28, 2, 0x0F, 7, 1, 0, bytes([203, 0, 113, 1]), 8, b"eth0.12", 1500)


def extended(quote: bytes, *objects: bytes, size: int = 128) -> bytes:
    """A quote, cut or filled up with zeros to `size`, with an extension structure behind it (RFC 4884 section 7)."""
    body = b"\x20\0\0\0" + b"".join(objects)
    body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
    return quote[:size].ljust(size, b"\0") + body


def extension_length(version: int, size: int = 128) -> int:
    """Bytes 4 to 7 of an error whose quote takes `size` bytes: in words of 32 bits, or 64 for ICMPv6."""
    return size // 4 << 16 if version == 4 else size // 8 << 24


@dataclass
class Points:
    """What two points recorded, docker0 inside and eth0 outside, in order of time."""

    inside: list[tuple[int, bytes]] = field(default_factory=list)
    outside: list[tuple[int, bytes]] = field(default_factory=list)
    now_ns: int = START_NS
    latency_ns: int = 20_000

    def step(self, ns: int = 1_000_000) -> None:
        """Let time pass."""
        self.now_ns += ns

    def out(self, before: Packet, after: Packet) -> None:
        """A packet goes out."""
        self.inside.append((self.now_ns, before.ip()))
        self.outside.append((self.now_ns + self.latency_ns, replace(after, ttl=after.ttl - 1).ip()))
        self.step()

    def back(self, before: bytes | None, after: bytes | None) -> None:
        """Something comes in: its bytes outside and inside, None where it was not seen."""
        if before is not None:
            self.outside.append((self.now_ns, before))
        if after is not None:
            self.inside.append((self.now_ns + self.latency_ns, after))
        self.step()

    def frame(self) -> None:
        """Another conversation goes by, so that both points are known to be recording."""
        for sport in (50000, 50001):
            before = Packet(
                CONTAINER, sport, SERVER, 443, struct.pack(">Q", self.now_ns), ip_id=9 + sport % 7
            )
            self.out(before, replace(before, src=PUBLIC))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write docker0.pcap and eth0.pcap."""
        paths = []
        for name, packets in (("docker0", self.inside), ("eth0", self.outside)):
            path = folder / f"{name}.pcap"
            with path.open("wb") as file:
                file.write(struct.pack("<IHHIIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 101))
                for time_ns, data in sorted(packets, key=lambda item: item[0]):
                    file.write(struct.pack("<IIII", *divmod(time_ns, 10**9), len(data), len(data)) + data)
            paths.append(path)
        return paths[0], paths[1]
