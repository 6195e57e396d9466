"""A seeded network with NAT boxes and capture points: the same packets, seen before and after each box.

It knows nothing of nattrace: frames are built with dpkt, translated by building them again with other
addresses, ports and ids, and written as pcap. What is true is kept beside them: which frame at one point is
which frame at another, and which conversation it belongs to.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dpkt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

#: Where simulated time begins, ns: 2023-11-14 22:13:20 UTC.
EPOCH_NS = 1_700_000_000_000_000_000

#: IP protocol numbers (IANA); ICMP is 58 over IPv6.
NUMBER = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": 132}


@dataclass(frozen=True)
class Endpoint:
    """An address in network byte order and a port; for ICMP the port is the id."""

    address: bytes
    port: int = 0


@dataclass(frozen=True)
class Seen:
    """What a conversation looks like at one point, in the original direction."""

    client: Endpoint
    server: Endpoint


@dataclass
class Conversation:
    """A conversation on its path: one `Seen` for each point, in the order its packets pass them."""

    protocol: str
    points: tuple[str, ...]
    seen: tuple[Seen, ...]
    bridged: bool = False  #: the TTL is the same everywhere
    timestamps: bool = False  #: TCP segments carry the timestamps option (RFC 7323)
    seq: int = 0  #: the client's next TCP sequence number or SCTP TSN, or the ICMP sequence number
    ack: int = 0  #: the server's next TCP sequence number or SCTP TSN
    tag: int = 0  #: SCTP verification tag
    sent: int = 0

    @property
    def version(self) -> int:
        """The IP version."""
        return 4 if len(self.seen[0].client.address) == 4 else 6


@dataclass
class Capture:
    """What one point saw: time, frame and the packet's serial number."""

    packets: list[tuple[int, bytes, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Simulated:
    """Captures on disk and the truth about them."""

    paths: dict[str, Path]
    serials: dict[str, tuple[int, ...]]  #: by point: serial of each frame, frame 1 first
    conversations: tuple[Conversation, ...]
    owner: dict[int, int]  #: serial to index of its conversation
    replies: frozenset[int]  #: serials that went in the reply direction

    @property
    def sources(self) -> list[str]:
        """The arguments for nattrace.analyze."""
        return [f"{name}={path}" for name, path in self.paths.items()]

    def pairs(self, first: str, second: str) -> set[tuple[int, int]]:
        """Return (frame at first, frame at second) of every packet that both saw: of a repeated one, the first frames."""
        here, there = self._first_frames(first), self._first_frames(second)
        return {(frame, there[serial]) for serial, frame in here.items() if serial in there}

    def _first_frames(self, point: str) -> dict[int, int]:
        frames: dict[int, int] = {}
        for frame, serial in enumerate(self.serials.get(point, ()), 1):
            frames.setdefault(serial, frame)
        return frames

    def neighbours(self) -> set[tuple[str, str]]:
        """Return the pairs of points that follow one another on some conversation's path."""
        return {pair for each in self.conversations for pair in pairwise(each.points)}


@dataclass(frozen=True)
class ClockError:
    """How wrong a point's clock is: reading = true time + offset, which drifts, and jumps at true times."""

    offset_ns: int = 0  #: at EPOCH_NS
    drift_ppm: float = 0.0
    steps: tuple[tuple[int, int], ...] = ()  #: (ns after EPOCH_NS, ns that the clock is set forward by)

    def at(self, true_ns: int) -> int:
        """Return reading less true time, ns, at a true time."""
        since = true_ns - EPOCH_NS
        jumps = sum(jump for after, jump in self.steps if since >= after)
        return self.offset_ns + round(self.drift_ppm * since / 1e6) + jumps


class Network:
    """Sends packets through conversations and lets points capture them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.now_ns = EPOCH_NS
        self.captures: dict[str, Capture] = {}
        self.clocks: dict[str, ClockError] = {}  #: of the points whose clocks are wrong
        self.anew: random.Random | None = None  #: where hosts draw identifications in another run of a script
        self._conversations: list[Conversation] = []
        self._owner: dict[int, int] = {}
        self._replies: set[int] = set()

    @property
    def replies(self) -> frozenset[int]:
        """Serials that went in the reply direction so far."""
        return frozenset(self._replies)

    def point(self, name: str) -> Capture:
        """Return a point's capture, beginning it when it is new."""
        return self.captures.setdefault(name, Capture())

    def wait_us(self, low: int, high: int | None = None) -> None:
        """Let time pass."""
        self.now_ns += self.rng.randint(low * 1000, (low if high is None else high) * 1000)

    def send(
        self,
        conversation: Conversation,
        payload: bytes = b"",
        *,
        reply: bool = False,
        ip_id: int | None = None,
        renumber: dict[str, int] | None = None,
        flags: int = 0x18,
        lost_after: str | None = None,
        unseen: Collection[str] = (),
        delay_ns: tuple[int, int] = (3_000, 60_000),
        unfinished: bool = False,
        mtu: int | None = None,
        advance: bool = True,
    ) -> list[int]:
        """Send one packet along the path and return its serial, or those of its fragments.

        `lost_after` names the last point it passes, `unseen` the points whose captures miss it.
        `unfinished` leaves the checksum to the network card at the first point, as a sending host shows it.
        `renumber` has the IP identification at points behind a box that writes its own.
        `mtu` cuts an IPv4 packet into fragments. Without `advance` the next packet repeats the numbers.
        """
        if conversation not in self._conversations:
            self._conversations.append(conversation)
        owner = next(n for n, each in enumerate(self._conversations) if each is conversation)
        if ip_id is None:
            ip_id = self.rng.randint(1, 65535)
            ip_id = ip_id if self.anew is None else self.anew.randint(1, 65535)
        steps = list(zip(conversation.points, conversation.seen, strict=True))
        if reply:
            steps.reverse()
        at_ns, ttl = self.now_ns, 64
        serials: list[int] = []
        for step, (point, seen) in enumerate(steps):
            own_id = (renumber or {}).get(point, ip_id)
            packet = _packet(conversation, seen, payload, reply, own_id, ttl, flags)
            if unfinished and step == 0:
                packet = _unfinished(packet)
            pieces = [packet] if mtu is None else list(_fragments(packet, mtu))
            while len(serials) < len(pieces):
                serials.append(len(self._owner))
                self._owner[serials[-1]] = owner
            if reply:
                self._replies.update(serials)
            if point not in unseen:
                for n, (serial, piece) in enumerate(zip(serials, pieces, strict=True)):
                    self.point(point).packets.append((at_ns + n * 500, _ethernet(piece), serial))
            if point == lost_after:
                break
            at_ns += self.rng.randint(*delay_ns)
            ttl -= 0 if conversation.bridged else 1
        if advance:
            conversation.sent += 1
            if conversation.protocol == "tcp" and reply:
                conversation.ack = (conversation.ack + len(payload)) & 0xFFFFFFFF
            elif conversation.protocol == "tcp":
                conversation.seq = (conversation.seq + len(payload)) & 0xFFFFFFFF
            elif conversation.protocol == "sctp" and reply:
                conversation.ack = (conversation.ack + 1) & 0xFFFFFFFF
            elif conversation.protocol == "sctp":
                conversation.seq = (conversation.seq + 1) & 0xFFFFFFFF
            elif reply:
                conversation.seq = (conversation.seq + 1) & 0xFFFF
        return serials

    def repeat(self, point: str, serial: int, after_ns: int = 1_000) -> None:
        """Let a point see a packet a second time."""
        capture = self.point(point)
        at_ns, frame, _ = next(p for p in reversed(capture.packets) if p[2] == serial)
        capture.packets.append((at_ns + after_ns, frame, serial))

    def write(self, folder: Path, snaplen: int = 262144) -> Simulated:
        """Write NAME.pcap for every point, in the order of time."""
        paths: dict[str, Path] = {}
        serials: dict[str, tuple[int, ...]] = {}
        for name, capture in self.captures.items():
            packets = sorted(capture.packets, key=lambda p: (p[0], p[2]))
            paths[name] = folder / f"{name}.pcap"
            clock = self.clocks.get(name, ClockError())
            read = [(time_ns + clock.at(time_ns), frame) for time_ns, frame, _ in packets]
            write_pcap(paths[name], read, snaplen)
            serials[name] = tuple(serial for _, _, serial in packets)
        return Simulated(
            paths, serials, tuple(self._conversations), dict(self._owner), frozenset(self._replies)
        )


def write_pcap(path: Path, packets: list[tuple[int, bytes]], snaplen: int = 262144) -> None:
    """Write (time in ns, frame) as a nanosecond pcap; dpkt's own writer takes times as floats."""
    with path.open("wb") as stream:
        stream.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snaplen, 1))
        for time_ns, frame in packets:
            seconds, rest = divmod(time_ns, 10**9)
            cut = frame[:snaplen]
            stream.write(struct.pack("<IIII", seconds, rest, len(cut), len(frame)) + cut)


def _packet(
    c: Conversation, seen: Seen, payload: bytes, reply: bool, ip_id: int, ttl: int, flags: int
) -> bytes:
    """Return the IP packet as it is at one point."""
    source, target = (seen.server, seen.client) if reply else (seen.client, seen.server)
    number = NUMBER[c.protocol]
    version = 4 if len(source.address) == 4 else 6  # another one behind a NAT64
    seq, ack = (c.ack, c.seq) if reply else (c.seq, c.ack)
    upper: Any
    if c.protocol == "icmp" and version == 4:
        echo = dpkt.icmp.ICMP.Echo(id=seen.client.port, seq=c.seq, data=payload)
        upper = dpkt.icmp.ICMP(type=0 if reply else 8, data=echo)
    elif c.protocol == "icmp":
        number = 58
        echo6 = dpkt.icmp6.ICMP6.Echo(id=seen.client.port, seq=c.seq, data=payload)
        upper = dpkt.icmp6.ICMP6(type=129 if reply else 128, data=echo6)
    elif c.protocol == "udp":
        upper = dpkt.udp.UDP(
            sport=source.port, dport=target.port, data=payload, ulen=8 + len(payload)
        )  # fmt: skip
    elif c.protocol == "tcp":
        upper = dpkt.tcp.TCP(
            sport=source.port, dport=target.port, seq=seq, ack=ack, flags=flags, win=501, data=payload
        )
        if c.timestamps:
            upper.opts = struct.pack(">HBBII", 0x0101, 8, 10, 0x5EED0000 + c.sent, 0xC0DE0000 + c.sent - 1)
            upper.off = 8
    else:
        upper = _sctp(source.port, target.port, c.tag, seq, payload)
    if version == 4:
        packet = dpkt.ip.IP(src=source.address, dst=target.address, p=number, ttl=ttl, id=ip_id, data=upper)
        packet.len = len(packet)
    else:
        packet = dpkt.ip6.IP6(
            src=source.address, dst=target.address, nxt=number, hlim=ttl, data=upper, plen=len(upper)
        )
        packet.extension_hdrs = {}
    return bytes(packet)


def packet_at(
    c: Conversation, seen: Seen, payload: bytes, *, reply: bool, ip_id: int, ttl: int, flags: int = 0x18
) -> bytes:
    """Return the IP packet that a conversation's next payload makes at the point where it looks like `seen`."""
    return _packet(c, seen, payload, reply, ip_id, ttl, flags)


def _sctp(sport: int, dport: int, tag: int, tsn: int, payload: bytes) -> bytes:
    """Return an SCTP packet with one DATA chunk (RFC 9260 section 3.3.1); dpkt's own class pads no chunk."""
    chunk = struct.pack(">BBHIHHI", 0, 3, 16 + len(payload), tsn, 0, 0, 0) + payload
    chunk += b"\0" * (-len(payload) % 4)
    header = struct.pack(">HHI", sport, dport, tag)
    crc = dpkt.crc32c.done(dpkt.crc32c.add(0xFFFFFFFF, header + b"\0" * 4 + chunk))
    return header + struct.pack(">I", crc) + chunk


def _ethernet(packet: bytes) -> bytes:
    kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
    return b"\2" * 6 + b"\4" * 6 + kind + packet


def _unfinished(packet: bytes) -> bytes:
    """Return an IPv4 TCP or UDP packet whose checksum is that of the pseudo-header (CHECKSUM_PARTIAL)."""
    body = packet[20:]
    at = 20 + {6: 16, 17: 6}[packet[9]]
    pseudo = packet[12:20] + struct.pack(">xBH", packet[9], len(body))
    total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:at] + struct.pack(">H", total) + packet[at + 2 :]


def _fragments(packet: bytes, mtu: int) -> Iterator[bytes]:
    """Cut an IPv4 packet without options as ip_fragment() does (RFC 791 section 3.2)."""
    body, size = packet[20:], (mtu - 20) // 8 * 8
    for at in range(0, len(body), size):
        piece = body[at : at + size]
        more = 0x2000 if at + size < len(body) else 0
        header = bytearray(packet[:20])
        struct.pack_into(">H", header, 2, 20 + len(piece))
        struct.pack_into(">HBBH", header, 6, more | at // 8, header[8], header[9], 0)
        struct.pack_into(">H", header, 10, dpkt.in_cksum(bytes(header)))
        yield bytes(header) + piece


# -- ready-made conversations ------------------------------------------------------------------------------


def address(text: str) -> bytes:
    """Return an address in network byte order."""
    import ipaddress  # noqa: PLC0415 - one small use

    return ipaddress.ip_address(text).packed


def routed(
    protocol: str,
    client: tuple[str, int],
    server: tuple[str, int],
    *rewrites: dict[str, tuple[str, int]],
    points: tuple[str, ...] = ("inside", "outside"),
    bridged: bool = False,
    rng: random.Random | None = None,
) -> Conversation:
    """Return a conversation; each rewrite says what the box between two points puts for client or server.

    For ICMP the ports are the id, so a rewrite of either side's id is given with the client.
    """
    seen = [Seen(Endpoint(address(client[0]), client[1]), Endpoint(address(server[0]), server[1]))]
    for rewrite in rewrites:
        now = {"client": seen[-1].client, "server": seen[-1].server}
        now |= {side: Endpoint(address(host), port) for side, (host, port) in rewrite.items()}
        seen.append(Seen(now["client"], now["server"]))
    rng = rng or random.Random(repr((protocol, client, server)))
    return Conversation(
        protocol, points, tuple(seen), bridged,
        seq=rng.getrandbits(32) if protocol in ("tcp", "sctp") else 0, ack=rng.getrandbits(32), tag=rng.getrandbits(32),
    )  # fmt: skip


def masquerade(
    protocol: str,
    client: tuple[str, int],
    server: tuple[str, int],
    port: int,
    *,
    public: str | None = None,
    rng: random.Random | None = None,
) -> Conversation:
    """Return a conversation whose source becomes the box's public address and the given port or id."""
    host = public or ("203.0.113.10" if "." in server[0] else "2001:db8::10")
    return routed(protocol, client, server, {"client": (host, port)}, rng=rng)


@dataclass(frozen=True)
class Traffic:
    """Traffic of a masquerading box, and how hard it is to tell its packets apart."""

    seed: int = 1
    flows: int = 10
    packets_per_flow: int = 10
    loss_inside: float = 0.0  #: share of packets that the inside capture misses
    loss_outside: float = 0.0  #: share of packets that the outside capture misses
    duplicated: float = 0.0  #: share of packets that a capture records twice, at either point
    reordered: float = 0.0  #: share of packets that the box holds back while later ones pass
    held_us: int = 3000  #: for how long at most
    #: share of datagrams and bare acknowledgements that are sent twice at once, with another IP id where there is one
    sent_twice: float = 0.0
    resent: float = 0.0  #: share of packets that are sent again, unchanged but for their IP id
    resent_after_ms: int = 200  #: no sooner; Linux TCP waits 200 ms at least (TCP_RTO_MIN), queries longer
    timestamps: bool = False  #: TCP with timestamps
    counted_ids: bool = False  #: every conversation's IP ids count from 1, so that they collide
    zero_ids: bool = False  #: IP identification 0 everywhere
    constant_payload: bool = False
    pure_acks: bool = False  #: TCP servers only acknowledge: their sequence number never moves
    random_ports: bool = True  #: every port and id is rewritten
    snaplen: int = 262144
    spacing_us: int = 500
    protocols: tuple[str, ...] = ("icmp", "udp", "tcp")
    version: int = 4
    servers: int = 3
    clock: ClockError = ClockError()  #: of the outside capture
    run: int = 0  #: another run of one script: the same requests, with numbers that hosts draw anew


def simulate(folder: Path, traffic: Traffic) -> Simulated:
    """Write inside.pcap and outside.pcap: clients whose ports and ids collide, in random order."""
    network = Network(traffic.seed)
    rng = network.rng
    network.point("inside")
    network.point("outside")
    conversations = _clients(rng, traffic)
    network.clocks["outside"] = traffic.clock
    if traffic.run:
        network.anew = random.Random(f"{traffic.seed} {traffic.run}")
        for c in conversations:
            if c.protocol in ("tcp", "sctp"):
                c.seq, c.ack, c.tag = (network.anew.getrandbits(32) for _ in range(3))
    order = [c for c in conversations for _ in range(traffic.packets_per_flow)]
    rng.shuffle(order)
    for c in order:
        network.now_ns += rng.randint(traffic.spacing_us * 500, traffic.spacing_us * 1500)
        payload = b"\0" * 32 if traffic.constant_payload else rng.randbytes(rng.randint(8, 64))
        if traffic.pure_acks and c.protocol == "tcp" and c.sent % 2 == 1:
            payload = b""
        missed = _missed(rng, traffic)
        delay_ns = (3_000, 60_000)
        # options that are off draw no random numbers, so that a seed means the same traffic as ever
        if traffic.reordered and rng.random() < traffic.reordered:
            delay_ns = (60_000, 60_000 + traffic.held_us * 1000)
        ip_id = 0 if traffic.zero_ids else c.sent + 1 if traffic.counted_ids else None
        reply, again = c.sent % 2 == 1, bool(traffic.resent and rng.random() < traffic.resent)
        may_repeat = c.protocol == "udp" or (c.protocol == "tcp" and not payload)
        twice = bool(traffic.sent_twice and may_repeat and rng.random() < traffic.sent_twice)
        serials = network.send(
            c, payload, reply=reply, ip_id=ip_id, unseen=missed, delay_ns=delay_ns, advance=not (again or twice)
        )  # fmt: skip
        for point in ("inside", "outside"):
            if traffic.duplicated and rng.random() < traffic.duplicated and point not in missed:
                network.repeat(point, serials[0], rng.randint(100, 20_000))
        if twice:
            network.now_ns += rng.randint(1_000, 15_000)
            ip_id = ip_id and ip_id + 1
            network.send(
                c, payload, reply=reply, ip_id=ip_id, unseen=_missed(rng, traffic), advance=not again
            )
        if again:
            missed = _missed(rng, traffic)
            now_ns = network.now_ns
            network.wait_us(traffic.resent_after_ms * 1000, traffic.resent_after_ms * 2000)
            network.send(c, payload, reply=reply, ip_id=ip_id and ip_id + 1, unseen=missed)
            network.now_ns = now_ns
    return network.write(folder, traffic.snaplen)


def _missed(rng: random.Random, traffic: Traffic) -> list[str]:
    """Return the points whose captures miss a packet."""
    losses = (("inside", traffic.loss_inside), ("outside", traffic.loss_outside))
    return [point for point, loss in losses if rng.random() < loss]


def _clients(rng: random.Random, traffic: Traffic) -> list[Conversation]:
    """Return conversations that collide inside between hosts, never within one; outside all are distinct."""
    made: dict[tuple[str, tuple[str, int], tuple[str, int]], Conversation] = {}
    while len(made) < traffic.flows:
        n = len(made)
        protocol = traffic.protocols[n % len(traffic.protocols)]
        host, remote = rng.randint(2, 250), rng.randint(1, traffic.servers)
        port = rng.randint(1, 5) if protocol == "icmp" else rng.choice([40000, 40001, 50000 + n])
        client, server = f"172.17.0.{host}", f"198.51.100.{remote}"
        if traffic.version == 6:
            client, server = f"fd00::{host:x}", f"2001:db8:1::{remote:x}"
        service = port if protocol == "icmp" else 80 + n % 3
        outside = 1024 + n * 7 + 1 if traffic.random_ports else port
        key = (protocol, (client, port), (server, service))
        if key in made:
            continue
        if not traffic.random_ports and any(
            c.protocol == protocol and c.seen[1].client.port == outside
            and c.seen[1].server == Endpoint(address(server), service)
            for c in made.values()
        ):  # fmt: skip
            outside = 30000 + n  # the kernel gives a colliding tuple another port
        made[key] = masquerade(protocol, (client, port), (server, service), outside, rng=rng)
        made[key].timestamps = traffic.timestamps
    return list(made.values())
