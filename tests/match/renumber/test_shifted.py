"""Boxes that number TCP anew or change its options: SYNPROXY, helpers, option strippers, and what only looks so."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from match.test_truncation import cut
from simulation import EPOCH_NS, address, write_pcap
from verdict import check_accounting

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

SERVER, PUBLIC = ("198.51.100.1", 80), "203.0.113.10"
TIMESTAMPS = bytes([1, 1, 8, 10])
M32 = 0xFFFFFFFF
S, SA, A, PA, FA = 0x02, 0x12, 0x10, 0x18, 0x11


@dataclass
class Wire:
    """Two captures and the truth: which frame inside is which frame outside, from a sequence of what was seen."""

    now_ns: int = EPOCH_NS
    inside: list[tuple[int, bytes]] = field(default_factory=list)
    outside: list[tuple[int, bytes]] = field(default_factory=list)
    pairs: set[tuple[int, int]] = field(default_factory=set)
    version: int = 4

    def see(self, point: str, packet: bytes) -> int:
        """Record a packet 20 us after the last one; return its frame number."""
        self.now_ns += 20_000
        kind = b"\x08\x00" if self.version == 4 else b"\x86\xdd"
        capture = self.inside if point == "inside" else self.outside
        capture.append((self.now_ns, b"\2" * 6 + b"\4" * 6 + kind + packet))
        return len(capture)

    def analyze(self, folder: Path, **snaplens: int) -> Report:
        """Write both captures, cut where a snaplen is given for a point, and analyze them."""
        for point, capture in (("inside", self.inside), ("outside", self.outside)):
            write_pcap(folder / f"{point}.pcap", capture)
            if point in snaplens:
                cut(folder / f"{point}.pcap", folder / "cut", snaplens[point])
                (folder / "cut").replace(folder / f"{point}.pcap")
        report = nattrace.analyze(f"inside={folder / 'inside.pcap'}", f"outside={folder / 'outside.pcap'}")
        check_accounting(report)
        return report


def packet(
    wire: Wire,
    src: tuple[str, int],
    dst: tuple[str, int],
    seq: int,
    ack: int,
    flags: int,
    data: bytes = b"",
    *,
    ip_id: int = 0,
    options: bytes = b"",
    ttl: int = 64,
) -> bytes:
    """Build an IP packet with TCP, checksums included."""
    tcp = dpkt.tcp.TCP(
        sport=src[1],
        dport=dst[1],
        seq=seq & M32,
        ack=ack & M32,
        flags=flags,
        win=501,
        data=data,
        opts=options,
        off=(20 + len(options)) // 4,
    )
    if wire.version == 6:
        six = dpkt.ip6.IP6(src=address(src[0]), dst=address(dst[0]), nxt=6, hlim=ttl, data=tcp, plen=len(tcp))
        six.extension_hdrs = {}
        return bytes(six)
    four = dpkt.ip.IP(src=address(src[0]), dst=address(dst[0]), p=6, ttl=ttl, id=ip_id, data=tcp)
    four.len = len(four)
    return bytes(four)


@dataclass
class Connection:
    """A TCP connection whose packets a box changes: number shifts by direction, timestamps taken away."""

    wire: Wire
    client: tuple[str, int]
    public: tuple[str, int]
    server: tuple[str, int] = SERVER
    seq: int = 0x1000
    ack: int = 0x70000000
    id: int = 100
    ids: bool = True
    shift: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})  #: by "is a reply"
    timestamps: bool = False  #: inside only: the box strips them
    mss: bool = True

    def send(
        self,
        data: bytes = b"",
        *,
        reply: bool = False,
        flags: int = PA,
        becomes: bytes | None = None,
        lost: str = "",
    ) -> None:
        """Send a packet across the box; what a helper makes of its data shifts all that follows."""
        self.id = self.id % 65535 + 1
        ip_id = self.id if self.ids else 0
        options = TIMESTAMPS + self.wire.now_ns.to_bytes(8, "big") if self.timestamps else b""
        after = data if becomes is None else becomes
        seq, ack = (self.ack, self.seq) if reply else (self.seq, self.ack)
        frames = {}
        ends = (("inside", self.client), ("outside", self.public))
        for step, (point, near) in enumerate(reversed(ends) if reply else ends):
            far = point == "outside"
            own, other = (self.shift[reply], self.shift[not reply]) if far else (0, 0)
            payload = after if step else data
            src, dst = (self.server, near) if reply else (near, self.server)
            built = packet(
                self.wire,
                src,
                dst,
                seq + own,
                ack + other,
                flags,
                payload,
                ip_id=ip_id,
                ttl=64 - step,
                options=options if not far else b"",
            )
            if point != lost:
                frames[point] = self.wire.see(point, built)
        if len(frames) == 2:
            self.wire.pairs.add((frames["inside"], frames["outside"]))
        length = len(data) + bool(flags & 3)
        if reply:
            # the client counts what arrives inside
            self.ack = (self.ack + len(after) + bool(flags & 3)) & M32
            self.shift[True] -= len(after) - len(data)
        else:
            self.seq = (self.seq + length) & M32
            self.shift[False] += len(after) - len(data)

    def open(self) -> None:
        """Shake hands across the box."""
        self.send(flags=S)
        self.send(flags=SA, reply=True)
        self.send(flags=A)

    def talk(self, rounds: int, size: int = 40) -> None:
        """Exchange data and acknowledgements."""
        for n in range(rounds):
            self.send(bytes([65 + n % 26]) * size)
            self.send(reply=True, flags=A)
            self.send(bytes([97 + n % 26]) * (2 * size), reply=True)
            self.send(flags=A)


def proxied_handshake(c: Connection, server_isn: int) -> None:
    """SYNPROXY answers the client, then opens its own connection with the client's number (synproxy_core.c)."""
    w = c.wire
    c.shift[True] = (server_isn - c.ack) & M32
    w.see("inside", packet(w, c.client, c.server, c.seq, 0, S, ip_id=c.id if c.ids else 0))
    w.see("inside", packet(w, c.server, c.client, c.ack, c.seq + 1, SA))
    w.see("inside", packet(w, c.client, c.server, c.seq + 1, c.ack + 1, A, ip_id=c.id + 1 if c.ids else 0))
    w.see("outside", packet(w, c.public, c.server, c.seq, c.ack, S))
    w.see("outside", packet(w, c.server, c.public, server_isn, c.seq + 1, SA))
    w.see("outside", packet(w, c.public, c.server, c.seq + 1, server_isn + 1, A))
    w.see("inside", packet(w, c.server, c.client, c.ack + 1, c.seq + 1, A))
    c.seq, c.ack, c.id = c.seq + 1, c.ack + 1, c.id + 2


def connections(wire: Wire, count: int, **more: object) -> list[Connection]:
    """Clients that use one port and get others."""
    host = "172.17.0.{}" if wire.version == 4 else "fd00:17::{}"
    server = SERVER if wire.version == 4 else ("2001:db8:2::1", 80)
    public = PUBLIC if wire.version == 4 else "2001:db8:1::10"
    return [
        Connection(wire, (host.format(n + 2), 40000), (public, 1024 + n), server, seq=0x1000 + n * 77777777,
                   ack=0x70000000 + n * 9999999, id=100 + 1000 * n, **more)  # type: ignore[arg-type]
        for n in range(count)
    ]  # fmt: skip


def crossed(report: Report) -> set[tuple[int, int]]:
    """Return (frame inside, frame outside) of all crossings."""
    rows = [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    found = set()
    for row in rows:
        sides = {row.before.point: row.before.frame, row.after.point: row.after.frame}
        found.add((sides["inside"], sides["outside"]))
    assert len(found) == len(rows)
    return found


def lost(report: Report) -> int:
    return sum(c.lost + c.ambiguous for flow in report.flows for c in flow.crossings)


@pytest.mark.parametrize("version", [4, 6])
def test_synproxy_shifts_every_number_of_the_server(version: int, tmp_path: Path) -> None:
    wire = Wire(version=version)
    for n, c in enumerate(connections(wire, 3, ids=version == 4)):
        proxied_handshake(c, 0x11111111 * (n + 1))
        c.talk(6)
        c.send(flags=FA)
        c.send(flags=FA, reply=True)
        c.send(flags=A)
    report = wire.analyze(tmp_path)
    assert crossed(report) == wire.pairs
    assert lost(report) == 0
    assert report.accounting.unmatched == {"proxied": 3 * 7}
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.flows) == ("sequence-shifted", "info", (1, 2, 3))
    assert "SYNPROXY" in finding.message
    amount = (0x11111111 - 0x70000000 + 2**31) % 2**32 - 2**31
    assert f"reply {abs(amount)} bytes {'higher' if amount > 0 else 'lower'} at outside" in finding.message


@pytest.mark.parametrize("snaplen", [42, 44, 46, 48, 50, 54, 62])
@pytest.mark.parametrize("points", [("inside", "outside"), ("inside",), ("outside",)])
def test_what_a_proxy_answered_is_not_lost_where_headers_are_cut(
    points: tuple[str, ...], snaplen: int, tmp_path: Path
) -> None:
    wire = Wire()
    for n, c in enumerate(connections(wire, 3)):
        proxied_handshake(c, 0x11111111 * (n + 1))
        c.talk(6)
    report = wire.analyze(tmp_path, **dict.fromkeys(points, snaplen))
    assert crossed(report) == wire.pairs
    assert lost(report) == 0
    assert report.accounting.unmatched == {"proxied": 3 * 7}
    (finding,) = report.findings
    assert "SYNPROXY" in finding.message


def test_numbers_that_wrap_are_shifted_all_the_same(tmp_path: Path) -> None:
    wire = Wire()
    (c,) = connections(wire, 1)
    c.seq, c.ack = 0xFFFFFFF0, 0xFFFFFF00
    proxied_handshake(c, 0xFFFFFFFE)
    c.talk(6)
    assert crossed(wire.analyze(tmp_path)) == wire.pairs


def test_a_helper_rewrites_a_payload_and_shifts_what_follows(tmp_path: Path) -> None:
    wire = Wire()
    (c,) = connections(wire, 1)
    c.open()
    c.talk(2)
    c.send(b"PORT 172,17,0,2,195,80\r\n", becomes=b"PORT 203,0,113,10,195,80\r\n")
    port = len(wire.inside), len(wire.outside)
    c.talk(2)
    c.send(b"227 (203,0,113,10,195,80)\r\n", reply=True, becomes=b"227 (172,17,0,2,195,80)\r\n")
    passive = len(wire.inside), len(wire.outside)
    c.talk(2)
    report = wire.analyze(tmp_path)
    assert crossed(report) == wire.pairs
    assert lost(report) == 0
    (finding,) = report.findings
    assert finding.code == "sequence-shifted"
    assert "original 2 bytes higher at outside" in finding.message
    frames = [(ref.point, ref.frame) for ref in finding.packets]
    assert frames == [
        ("inside", port[0]), ("outside", port[1]), ("inside", passive[0]), ("outside", passive[1])
    ]  # fmt: skip
    rewritten = [row for row in report.rewrites if "rewritten-payload" in row.evidence]
    assert [row.before.frame for row in rewritten] == [port[0], passive[1]]
    assert [
        row.after.length - row.before.length for row in rewritten if row.after.length and row.before.length
    ] == [2, -2]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(8))
def test_every_message_of_a_stream_is_rewritten(seed: int, version: int, tmp_path: Path) -> None:
    """SIP over TCP: each message grows or shrinks by another amount, in both directions."""
    chance = random.Random(seed)
    wire = Wire(version=version)
    both = connections(wire, 2, ids=version == 4)
    both[0].seq, both[0].ack = 0xFFFFF000, 0xFFFFFF00  # both numbers wrap
    for c in both:
        if seed % 2:
            proxied_handshake(c, chance.getrandbits(32))
        else:
            c.open()
    for n in range(40):
        for c in both:
            reply = chance.random() < 0.5
            size = 100 + chance.randrange(80)
            c.send(bytes([n]) * size, becomes=bytes([n]) * (size + chance.randrange(1, 9)), reply=reply)
            if chance.random() < 0.7:
                c.send(flags=A, reply=not reply)
    report = wire.analyze(tmp_path)
    assert not crossed(report) - wire.pairs
    assert "lost" not in report.accounting.unmatched
    # behind a proxy nothing binds the flows; else the last messages may have nothing behind them that shows their shift
    assert seed % 2 or len(wire.pairs - crossed(report)) <= 4


def test_a_shift_that_comes_back_to_nothing(tmp_path: Path) -> None:
    wire = Wire()
    (c,) = connections(wire, 1)
    c.open()
    for n in range(10):
        c.send(b"PORT 172,17,0,2,4,%d\r\n" % (10 + n), becomes=b"PORT 203,0,113,10,4,%d\r\n" % (10 + n))
        c.talk(2)
        c.send(b"EPRT longer %d\r\n" % (10 + n), becomes=b"EPRT long %d\r\n" % (10 + n))
        c.talk(2)
    report = wire.analyze(tmp_path)
    assert crossed(report) == wire.pairs
    assert lost(report) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_options_taken_away_in_mid_stream(version: int, tmp_path: Path) -> None:
    wire = Wire(version=version)
    for c in connections(wire, 3, ids=version == 4, timestamps=True):
        c.talk(6)
    report = wire.analyze(tmp_path)
    assert crossed(report) == wire.pairs
    assert lost(report) == 0
    assert not report.findings


# -- what only looks so ------------------------------------------------------------------------------------


def test_a_proxy_that_copies_data_and_lengths(tmp_path: Path) -> None:
    """docker-proxy, or any TCP proxy: equal payloads, both numbers of its own, IP ids of its own."""
    wire = Wire()
    inner = Connection(
        wire, ("172.17.0.1", 45000), ("172.17.0.1", 45000), ("172.17.0.2", 80), seq=5, ack=77, id=300
    )
    outer = Connection(
        wire, ("198.51.100.7", 50000), ("198.51.100.7", 50000), (PUBLIC, 8080), seq=999, ack=1234, id=300
    )
    for n in range(30):
        data, reply = bytes([n]) * 50, n % 2 == 1
        for c, point in ((outer, "inside"), (inner, "outside")):
            c.send(data, reply=reply, lost=point)
    report = wire.analyze(tmp_path)
    assert crossed(report) == set()
    assert not report.findings


def test_retransmissions_seen_on_one_side_each(tmp_path: Path) -> None:
    """The capture inside missed the originals, the one outside the repetitions: equal numbers, other timestamps."""
    wire = Wire()
    (c,) = connections(wire, 1, timestamps=True)
    c.open()
    truth = set(wire.pairs)
    for _ in range(8):
        before = c.seq, dict(c.shift)
        c.send(b"data" * 10, lost="inside")
        c.seq, c.shift = before
        wire.now_ns += 200_000_000
        c.send(b"data" * 10, lost="outside")
        wire.now_ns += 300_000_000
    report = wire.analyze(tmp_path)
    assert crossed(report) <= truth


def test_two_runs_of_one_connection(tmp_path: Path) -> None:
    """A test that is run twice with fixed ports: equal lengths and IP ids, numbers of a new connection."""
    wire = Wire()
    for n, point in enumerate(("inside", "outside")):
        c = Connection(wire, ("172.17.0.2", 40000), ("172.17.0.2", 40000), seq=n * 12345678, ack=n * 87654321)
        for _ in range(20):
            c.send(b"x" * 30, lost=point)
            c.send(b"y" * 30, reply=True, lost=point)
        wire.now_ns += 5_000_000_000
    assert crossed(wire.analyze(tmp_path)) == set()


def test_three_packets_bind_nothing(tmp_path: Path) -> None:
    wire = Wire()
    (c,) = connections(wire, 1)
    c.shift[True] = 4711
    for _ in range(3):
        c.send(b"z" * 20, reply=True)
    assert crossed(wire.analyze(tmp_path)) == set()


def test_one_shift_does_not_speak_for_another_connection(tmp_path: Path) -> None:
    """Two connections of one client to one server, shifted differently: each is matched by its own shift only."""
    wire = Wire()
    first, second = connections(wire, 2)
    second.client = (first.client[0], 40001)
    second.seq, second.id = first.seq, first.id
    first.shift[True], second.shift[True] = 1000, 5000
    for _ in range(8):
        first.talk(1)
        second.talk(1)
    assert crossed(wire.analyze(tmp_path)) <= wire.pairs


@st.composite
def stories(draw: st.DrawFn) -> tuple[list[tuple[int, str]], int, bool, bool]:
    """What happens to two connections: who does what, the shift of the first, ids or none, options or none."""
    deeds = st.sampled_from(
        ["ask", "answer", "ack", "grow", "shrink", "told", "miss-inside", "miss-outside", "repeat"]
    )
    steps = draw(st.lists(st.tuples(st.integers(0, 1), deeds), min_size=10, max_size=60))
    return steps, draw(st.integers(0, M32)), draw(st.booleans()), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(stories())
def test_whatever_happens_no_crossing_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, story: tuple[list[tuple[int, str]], int, bool, bool]
) -> None:
    steps, shift, ids, timestamps = story
    wire = Wire()
    both = connections(wire, 2, ids=ids, timestamps=timestamps)
    both[0].shift[True] = shift
    both[1].open()  # so that it is known how long packets take
    for who, deed in steps:
        c = both[who]
        if deed == "ask":
            c.send(b"q" * 30)
        elif deed == "answer":
            c.send(b"r" * 60, reply=True)
        elif deed == "ack":
            c.send(flags=A)
        elif deed == "grow":
            c.send(b"PORT 1\r\n", becomes=b"PORT 12\r\n")
        elif deed == "shrink":
            c.send(b"PORT 123\r\n", becomes=b"PORT 12\r\n")
        elif deed == "told":
            c.send(b"227 (12)\r\n", becomes=b"227 (1234)\r\n", reply=True)
        elif deed == "repeat":
            before = c.seq
            c.send(b"q" * 30, lost="outside")
            c.seq = before
            wire.now_ns += 250_000_000
            c.send(b"q" * 30, lost="inside")
        elif deed.startswith("miss"):
            c.send(b"m" * 25, lost=deed.removeprefix("miss-"))
    report = wire.analyze(tmp_path_factory.mktemp("story"))
    assert crossed(report) <= wire.pairs


def _happens(c: Connection, chance: random.Random) -> None:
    """Let a connection say something, be rewritten, be repeated, or be missed by one of the captures."""
    deed = chance.choice(["ask", "answer", "ack", "grow", "shrink", "told", "rewritten", "missed", "repeat"])
    missed = chance.choice(["", "", "inside", "outside"])
    reply = chance.random() < 0.5
    if deed == "ask":
        c.send(b"q" * chance.choice([30, 31, 40]))
    elif deed == "answer":
        c.send(b"r" * 60, reply=True)
    elif deed == "ack":
        c.send(flags=A, reply=reply)
    elif deed == "grow":
        c.send(b"PORT 1\r\n", becomes=b"PORT 12\r\n", lost=missed)
    elif deed == "shrink":
        c.send(b"PORT 123\r\n", becomes=b"PORT 12\r\n")
    elif deed == "told":
        c.send(b"227 (12)\r\n", becomes=b"227 (1234)\r\n", reply=True)
    elif deed == "rewritten":
        size = chance.randrange(20, 60)
        c.send(b"x" * size, becomes=b"x" * (size + chance.randrange(1, 30)), reply=reply, lost=missed)
    elif deed == "missed":
        c.send(b"m" * 25, lost=chance.choice(["inside", "outside"]), reply=reply)
    else:
        before = c.seq
        c.send(b"q" * 30, lost="outside")
        c.seq = before
        c.wire.now_ns += 250_000_000
        c.send(b"q" * 30, lost="inside")


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_helper_rewrites_and_a_capture_misses_no_crossing_is_wrong(
    seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    wire = Wire(version=chance.choice([4, 6]))
    ids = wire.version == 4 and chance.random() < 0.5
    both = connections(wire, 2, ids=ids, timestamps=chance.random() < 0.3)
    if chance.random() < 0.3:
        both[0].shift[True] = chance.getrandbits(32)
    for c in both:
        if (
            chance.random() < 0.8 or not ids
        ):  # without ids and handshake nothing tells a repeated answer's place
            c.open()
    for _ in range(chance.randrange(10, 90)):
        _happens(chance.choice(both), chance)
    assert crossed(wire.analyze(tmp_path)) <= wire.pairs
