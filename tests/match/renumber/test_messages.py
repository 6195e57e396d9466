"""SIP messages that a helper rewrites are matched by what stays of them; seeded calls with losses, both truth known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import dpkt
import pytest
from match.test_truncation import cut
from simulation import EPOCH_NS, address, write_pcap
from verdict import check_accounting

import nattrace
from nattrace.model import Rewrite, Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

SERVER, PUBLIC = "198.51.100.1", "203.0.113.10"


@dataclass
class Telephones:
    """Telephones behind one address, and what two points captured of them; `pairs` are frames of one packet."""

    seed: int
    ids: str = "random"  #: how senders number datagrams: at random, in step from 1, with 0
    loss: float = 0.0  #: share of its packets that each point missed
    gap_ns: int = 300_000
    now_ns: int = EPOCH_NS
    captures: dict[str, list[tuple[int, bytes]]] = field(
        default_factory=lambda: {"inside": [], "outside": []}
    )
    pairs: set[tuple[int, int]] = field(default_factory=set)
    count: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def ip_id(self, sender: str) -> int:
        """Return the sender's next identification."""
        self.count[sender] = self.count.get(sender, 0) + 1
        return {"random": self.random.randrange(1, 65536), "in step": self.count[sender], "none": 0}[self.ids]

    def send(self, phone: int, text: str, *, reply: bool = False) -> None:
        """Send one message through the box; HOST in it is the telephone's address and port on either side."""
        sender = "server" if reply else str(phone)
        ip_id = self.ip_id(sender)
        self.now_ns += self.random.randrange(self.gap_ns // 2, 2 * self.gap_ns)
        ends = {"inside": (f"172.17.0.{phone + 2}", 5060), "outside": (PUBLIC, 10_000 + 7 * phone)}
        frames = {}
        for step, point in enumerate(reversed(ends) if reply else ends):
            host, port = ends[point]
            body = text.replace("HOST", f"{host}:{port}").encode()
            near, far = (host, port), (SERVER, 5060)
            src, dst = (far, near) if reply else (near, far)
            udp = dpkt.udp.UDP(sport=src[1], dport=dst[1], data=body, ulen=8 + len(body))
            packet = dpkt.ip.IP(
                src=address(src[0]), dst=address(dst[0]), p=17, ttl=64 - step, id=ip_id, data=udp
            )
            packet.len = len(packet)
            if self.random.random() >= self.loss:
                capture = self.captures[point]
                capture.append(
                    (self.now_ns + step * 30_000, b"\2" * 6 + b"\4" * 6 + b"\x08\x00" + bytes(packet))
                )
                frames[point] = len(capture)
        if len(frames) == 2:
            self.pairs.add((frames["inside"], frames["outside"]))

    def talk(self, phones: int, rounds: int) -> None:
        """Let all telephones register again and again, call and be called; some requests are sent twice."""
        for number in range(1, rounds + 1):
            for phone in range(phones):
                # as SIPp names calls: by a counter and by the process, which every container counts alike
                named = f"{number}-7@"
                asks = self.random.random() < 0.7
                method = self.random.choice(["REGISTER", "OPTIONS", "INVITE"]) if asks else "NOTIFY"
                text = (
                    f"{{}}\r\nVia: SIP/2.0/UDP {'HOST' if asks else SERVER};branch=z9hG4bK-7-{number}-{method}\r\n"
                    f"From: <sip:a@{'HOST' if asks else SERVER}>;tag={number}\r\nTo: <sip:b@x.example>{{}}\r\n"
                    f"Call-ID: {named}172.17.0.{phone + 2}\r\nCSeq: {number} {method}\r\n"
                    f"Contact: <sip:{'HOST' if asks else SERVER}>\r\nContent-Length: 0\r\n\r\n"
                )
                repeated = self.random.random() < 0.2
                for _ in range(1 + repeated):
                    self.send(phone, text.format(f"{method} sip:x.example SIP/2.0", ""), reply=not asks)
                    self.now_ns += 500_000_000 * repeated  # T1 (RFC 3261 section 17.1.1.2)
                self.send(phone, text.format("SIP/2.0 200 OK", ";tag=9"), reply=asks)

    def analyze(self, folder: Path, snaplen: int = 0) -> Report:
        """Write both captures and analyze them."""
        paths = []
        for point, capture in self.captures.items():
            path = folder / f"{point}.pcap"
            write_pcap(path, capture)
            paths.append(path)
            if snaplen:
                cut(path, folder / "cut.pcap", snaplen)
                (folder / "cut.pcap").replace(path)
        report = nattrace.analyze(*paths)
        check_accounting(report)
        return report


def crossed(report: Report) -> set[tuple[int, int]]:
    """Return (frame inside, frame outside) of all crossings."""
    found = set()
    for row in report.rewrites.all():
        if isinstance(row, Rewrite):
            sides = {row.before.point: row.before.frame, row.after.point: row.after.frame}
            found.add((sides["inside"], sides["outside"]))
    return found


def told_lost(report: Report) -> set[tuple[str, int]]:
    """Return point and frame of all packets that are called lost."""
    rows = [row for row in report.rewrites.all() if isinstance(row, Unmatched) and row.reason == "lost"]
    return {(row.packet.point, row.packet.frame) for row in rows}


@pytest.mark.parametrize("ids", ["random", "in step", "none"])
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_whole_messages_are_matched(ids: str, loss: float, tmp_path: Path) -> None:
    phones = Telephones(1, ids, loss)
    phones.talk(6, 20)
    report = phones.analyze(tmp_path)
    found = crossed(report)
    assert not found - phones.pairs
    # without identifications, of a message sent twice one may stand at each point
    assert len(found) >= (0.9 if ids == "none" else 1.0) * len(phones.pairs)
    assert len(report.flows) == 6
    assert all(flow.status == "translated" for flow in report.flows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ids", ["random", "in step", "none"])
def test_whatever_is_cut_or_missing_no_row_is_wrong(ids: str, seed: int, tmp_path: Path) -> None:
    phones = Telephones(seed, ids, loss=0.25, gap_ns=(3_000, 30_000, 3_000_000)[seed % 3])
    phones.talk(8, 12)
    for snaplen in (0, 42, 54, 60, 74, 94, 128, 300):
        report = phones.analyze(tmp_path, snaplen)
        assert not crossed(report) - phones.pairs, snaplen
        crossing = {("inside", a) for a, _ in phones.pairs} | {("outside", b) for _, b in phones.pairs}
        assert not told_lost(report) & crossing, snaplen


def test_a_rewritten_message_is_said_to_be_so(tmp_path: Path) -> None:
    phones = Telephones(3)
    phones.talk(2, 4)
    rows = list(phones.analyze(tmp_path).rewrites)
    grown = [row for row in rows if row.before.length != row.after.length]
    assert grown
    assert all({"payload", "rewritten-payload"} <= set(row.evidence) for row in grown)
    assert not any("rewritten-payload" in row.evidence for row in rows if row not in grown)
