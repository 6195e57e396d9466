"""A seeded TCP conversation through a masquerading box, cut and merged differently at its two points.

It knows nothing of nattrace. A transmission is a run of segments that left the sender's stack at once; each point
shows it in frames of one or more neighbouring segments, as segmentation and receive offload do. What is true:
two frames belong together when they share a segment of one transmission.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import dpkt
from simulation import EPOCH_NS, address, write_pcap

if TYPE_CHECKING:
    from pathlib import Path

_FIN, _SYN, _PSH, _ACK = 0x01, 0x02, 0x08, 0x10


@dataclass(frozen=True)
class Settings:
    """How a conversation goes. Probabilities are between 0 and 1."""

    seed: int = 1
    version: int = 4
    writes: int = 12
    mss: int = 100
    counted: bool = True  #: IP identifications count up with the segments; else they are all 0
    lost: float = 0.0  #: share of segments that never reach the second point
    missed: float = 0.0  #: share of frames that a capture misses
    again: float = 0.0  #: share of writes after which older bytes are sent again
    reordered: float = 0.0  #: share of frames that arrive late
    shift: int = (
        0  #: what the box adds to the server's numbers, as SYNPROXY does, whose handshake is not shown
    )
    connections: int = 1  #: one after the other on the same ports, with numbers and a shift of their own
    largest: tuple[int, int] = (8, 8)  #: segments in one frame at most: client's side, server's side


@dataclass(frozen=True)
class _Segment:
    transmission: int
    start: int
    data: bytes
    ip_id: int
    last: bool


@dataclass
class Truth:
    """Captures and what is true about them."""

    sources: list[str]
    shared: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  #: (inside, outside) frame to bytes in both
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)  #: (point, frame) to payload bytes
    replies: set[tuple[int, int]] = field(default_factory=set)  #: pairs of `shared` that go in
    sent_again: set[tuple[str, int]] = field(default_factory=set)  #: frames with bytes sent more than once


class _Conversation:
    def __init__(self, settings: Settings) -> None:
        self.s = settings
        self.rng = random.Random(settings.seed)
        six = settings.version == 6
        self.inside = (address("fd00::2" if six else "172.17.0.2"), 40000)
        self.outside = (address("2001:db8::10" if six else "203.0.113.10"), self.rng.choice([40000, 50001]))
        self.server = (address("2001:db8:1::1" if six else "198.51.100.1"), 443)
        # close below the end of the sequence space, so that numbers wrap in mid-stream
        self.seq = [2**32 - self.rng.randint(1, 3000), 2**32 - self.rng.randint(1, 3000)]
        self.next_id = [self.rng.randint(65000, 65535), self.rng.randint(1, 65535)]
        self.sent: tuple[list[list[_Segment]], list[list[_Segment]]] = ([], [])
        self.now_ns = EPOCH_NS
        self.replies: set[int] = set()
        self.frames: dict[str, list[tuple[int, bytes, frozenset[tuple[int, int]], int]]] = {
            "inside": [],
            "outside": [],
        }
        self.transmissions = 0
        self.shift = settings.shift
        self.again: set[int] = set()
        self.acks = [0, 0]

    def run(self) -> None:
        for number in range(self.s.connections):
            if number:
                self.now_ns += 2_000_000_000
                self.seq = [self.rng.getrandbits(32), self.rng.getrandbits(32)]
                self.shift = self.rng.getrandbits(32) if self.shift else 0
            self._connect()

    def _connect(self) -> None:
        for reply, flags in ((False, _SYN), (True, _SYN | _ACK), (False, _ACK)) if not self.shift else ():
            self._control(reply=reply, flags=flags)
        self.acks = self.seq[::-1]
        for _ in range(self.s.writes):
            reply = self.rng.random() < 0.5
            self._write(reply=reply)
            if self.sent[reply] and self.rng.random() < self.s.again:
                self.now_ns += 250_000_000
                self._repeat(reply=reply)
            if self.rng.random() < 0.5:
                self._control(reply=not reply, flags=_ACK)
        for reply in (False, True):
            self._control(reply=reply, flags=_FIN | _ACK)

    def _identification(self, reply: bool, count: int) -> int:
        first = self.next_id[reply]
        self.next_id[reply] = (first + count) % 65536
        return first if self.s.counted and self.s.version == 4 else 0

    def _control(self, *, reply: bool, flags: int) -> None:
        self.now_ns += self.rng.randint(200_000, 900_000)
        segment = _Segment(
            self.transmissions, self.seq[reply], b"", self._identification(reply, 1), last=True
        )
        self.transmissions += 1
        self._carry([[segment]], [[segment]], reply=reply, flags=flags, sure=True)
        if flags & (_SYN | _FIN):
            self.seq[reply] = (self.seq[reply] + 1) % 2**32
        self.acks[reply] = self.seq[not reply]

    def _write(self, *, reply: bool) -> None:
        size = self.rng.randint(1, 8 * self.s.mss)
        data = self.rng.randbytes(size)
        self._transmit(data, self.seq[reply], reply=reply)
        self.seq[reply] = (self.seq[reply] + size) % 2**32

    def _repeat(self, *, reply: bool) -> None:
        """Send some neighbouring segments of an earlier transmission again, with new identifications."""
        old = self.rng.choice(self.sent[reply])
        first = self.rng.randrange(len(old))
        chosen = old[first : self.rng.randint(first + 1, len(old))]
        self.again |= {old[0].transmission, self.transmissions}
        self._transmit(b"".join(s.data for s in chosen), chosen[0].start, reply=reply)

    def _transmit(self, data: bytes, seq: int, *, reply: bool) -> None:
        mss = self.s.mss
        first = self._identification(reply, -(-len(data) // mss))
        segments = [
            _Segment(
                self.transmissions, (seq + at) % 2**32, data[at : at + mss],
                (first + n) % 65536 if first or (self.s.counted and self.s.version == 4) else 0,
                last=at + mss >= len(data),
            )
            for n, at in enumerate(range(0, len(data), mss))
        ]  # fmt: skip
        self.transmissions += 1
        self.sent[reply].append(segments)
        self.now_ns += self.rng.randint(200_000, 900_000)
        here, there = self.s.largest[reply], self.s.largest[not reply]
        arriving = [s for s in segments if self.rng.random() >= self.s.lost]
        self._carry(self._grouped(segments, here), self._grouped(arriving, there), reply=reply, flags=_ACK)

    def _grouped(self, segments: list[_Segment], largest: int) -> list[list[_Segment]]:
        """Cut into runs of neighbours of random length, at most `largest`."""
        groups: list[list[_Segment]] = []
        room = 0
        for segment in segments:
            follows = groups and (groups[-1][-1].start + len(groups[-1][-1].data)) % 2**32 == segment.start
            if follows and len(groups[-1]) < room:
                groups[-1].append(segment)
            else:
                groups.append([segment])
                room = self.rng.randint(1, largest)
        return groups

    def _carry(
        self,
        first: list[list[_Segment]],
        second: list[list[_Segment]],
        *,
        reply: bool,
        flags: int,
        sure: bool = False,
    ) -> None:
        if reply:
            self.replies |= {s.transmission for group in first for s in group}
        points = ("outside", "inside") if reply else ("inside", "outside")
        at_ns = self.now_ns
        for hop, (point, groups) in enumerate(zip(points, (first, second), strict=True)):
            for n, group in enumerate(groups):
                if not sure and self.rng.random() < self.s.missed:
                    continue
                late = 60_000 if self.rng.random() < self.s.reordered and not sure else 0
                frame = self._frame(point, group, reply=reply, flags=flags, ttl=64 - hop)
                serials = frozenset((s.transmission, s.start) for s in group)
                size = sum(len(s.data) for s in group)
                self.frames[point].append((at_ns + n * 1_000 + late, frame, serials, size))
            at_ns += self.rng.randint(15_000, 60_000)

    def _frame(self, point: str, group: list[_Segment], *, reply: bool, flags: int, ttl: int) -> bytes:
        client = self.inside if point == "inside" else self.outside
        source, target = (self.server, client) if reply else (client, self.server)
        data = b"".join(s.data for s in group)
        if data and group[-1].last:
            flags |= _PSH
        shift = self.shift if point == "outside" else 0
        seq, ack = group[0].start + shift * reply, self.acks[reply] + shift * (not reply)
        tcp = dpkt.tcp.TCP(
            sport=source[1],
            dport=target[1],
            seq=seq % 2**32,
            ack=ack % 2**32,
            flags=flags,
            win=501,
            data=data,
        )
        packet: dpkt.Packet
        if self.s.version == 4:
            packet = dpkt.ip.IP(src=source[0], dst=target[0], p=6, ttl=ttl, id=group[0].ip_id, df=1, data=tcp)
            packet.len = len(packet)
        else:
            packet = dpkt.ip6.IP6(src=source[0], dst=target[0], nxt=6, hlim=ttl, data=tcp, plen=len(tcp))
            packet.extension_hdrs = {}
        kind = b"\x08\x00" if self.s.version == 4 else b"\x86\xdd"
        return b"\2" * 6 + b"\4" * 6 + kind + bytes(packet)


def converse(folder: Path, settings: Settings, snaplen: int = 262144) -> Truth:
    """Write inside.pcap and outside.pcap of one conversation, and say which frames share which bytes."""
    c = _Conversation(settings)
    c.run()
    truth = Truth([f"{name}={folder / name}.pcap" for name in c.frames])
    sizes = {
        (s.transmission, s.start): len(s.data)
        for side in c.sent
        for transmission in side
        for s in transmission
    }
    holders: dict[str, dict[tuple[int, int], int]] = {"inside": {}, "outside": {}}
    for name, frames in c.frames.items():
        frames.sort(key=lambda frame: frame[0])
        write_pcap(folder / f"{name}.pcap", [frame[:2] for frame in frames], snaplen)
        for number, (_, _, serials, size) in enumerate(frames, 1):
            truth.sizes[name, number] = size
            holders[name].update(dict.fromkeys(serials, number))
            if any(transmission in c.again for transmission, _ in serials):
                truth.sent_again.add((name, number))
    for serial, here in holders["inside"].items():
        there = holders["outside"].get(serial)
        if there is not None:
            if serial[0] in c.replies:
                truth.replies.add((here, there))
            truth.shared[here, there] = truth.shared.get((here, there), 0) + sizes.get(serial, 0)
    return truth
