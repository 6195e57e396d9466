"""Datagrams in which a helper wrote other addresses are matched by their identifications, in bound flows and many at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import dpkt
import pytest
from simulation import EPOCH_NS, address, write_pcap
from verdict import check_accounting

import nattrace
from nattrace.model import Rewrite, Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

SERVER, PUBLIC = ("198.51.100.1", 162), "203.0.113.10"


@dataclass
class Agents:
    """Agents behind one address that name themselves in what they send; `pairs` are frames of one packet."""

    seed: int = 0
    ids: str = "random"
    loss: float = 0.0
    now_ns: int = EPOCH_NS
    captures: dict[str, list[tuple[int, bytes]]] = field(
        default_factory=lambda: {"inside": [], "outside": []}
    )
    pairs: set[tuple[int, int]] = field(default_factory=set)
    count: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def send(self, agent: int, text: str, *, reply: bool = False, missed: str = "") -> None:
        """Send one datagram through the box; HOST in it is the agent's address on either side."""
        self.now_ns += self.random.randrange(100_000, 1_000_000)
        self.count[agent] = self.count.get(agent, 0) + 1
        ip_id = self.random.randrange(1, 65536) if self.ids == "random" else self.count[agent]
        ends = {"inside": (f"172.17.0.{agent + 2}", 40_000), "outside": (PUBLIC, 50_000 + 7 * agent)}
        frames = {}
        for step, point in enumerate(reversed(ends) if reply else ends):
            near = ends[point]
            body = text.replace("HOST", near[0]).encode()
            src, dst = (SERVER, near) if reply else (near, SERVER)
            udp = dpkt.udp.UDP(sport=src[1], dport=dst[1], data=body, ulen=8 + len(body))
            packet = dpkt.ip.IP(
                src=address(src[0]), dst=address(dst[0]), p=17, ttl=64 - step, id=ip_id, data=udp
            )
            packet.len = len(packet)
            if point != missed and self.random.random() >= self.loss:
                frame = b"\2" * 6 + b"\4" * 6 + b"\x08\x00" + bytes(packet)
                self.captures[point].append((self.now_ns + step * 30_000, frame))
                frames[point] = len(self.captures[point])
        if len(frames) == 2:
            self.pairs.add((frames["inside"], frames["outside"]))

    def analyze(self, folder: Path) -> Report:
        """Write both captures and analyze them."""
        for point, packets in self.captures.items():
            write_pcap(folder / f"{point}.pcap", packets)
        report = nattrace.analyze(*(f"{point}={folder / f'{point}.pcap'}" for point in self.captures))
        check_accounting(report)
        return report


def crossed(report: Report) -> set[tuple[int, int]]:
    rows = [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    sides = [{each.point: each.frame for each in (row.before, row.after)} for row in rows]
    return {(each["inside"], each["outside"]) for each in sides}


def talk(agents: Agents, rounds: int, tail: str = "") -> None:
    """Have two agents name themselves, and be answered."""
    for number in range(rounds):
        for agent in range(2):
            agents.send(agent, f"inform {number} of {agent} from {tail}HOST")
            agents.send(agent, f"answer {number} to {agent}, which nobody changes", reply=True)


@pytest.mark.parametrize("ids", ["random", "in step"])
def test_what_names_its_sender_crosses(ids: str, tmp_path: Path) -> None:
    agents = Agents(ids=ids)
    talk(agents, 6)
    report = agents.analyze(tmp_path)
    assert crossed(report) == agents.pairs
    told = [row.evidence for row in report.rewrites if row.direction == "original"]
    assert len(told) == 12
    assert all({"ip-id", "binding", "rewritten-payload"} <= set(evidence) for evidence in told)


def test_what_grew_behind_all_that_is_compared_may_be_a_train_of_its_pieces(tmp_path: Path) -> None:
    """Equal beginnings, a longer datagram and a shorter one: so it looks where a card cut one in two as well."""
    agents = Agents()
    talk(agents, 6, "far behind all that is compared, a long way further on: " * 2)
    report = agents.analyze(tmp_path)
    assert not crossed(report) - agents.pairs
    assert len(agents.pairs - crossed(report)) <= 2
    assert set(report.accounting.unmatched) <= {"ambiguous"}


def test_three_are_too_few_and_not_lost(tmp_path: Path) -> None:
    agents = Agents()
    for number in range(6):
        agents.send(0, f"question {number}, which nobody changes")
        agents.send(0, f"answer {number}, which nobody changes", reply=True)
    for number in range(3):
        agents.send(0, f"inform {number} from HOST")
    agents.send(0, "question, the last one")
    report = agents.analyze(tmp_path)
    assert crossed(report) < agents.pairs
    assert report.accounting.unmatched == {"ambiguous": 6}


def test_where_nothing_binds_them_they_are_ambiguous(tmp_path: Path) -> None:
    agents = Agents()
    for number in range(6):
        for agent in range(2):
            agents.send(agent, f"trap {number} of {agent} from HOST")
    report = agents.analyze(tmp_path)
    assert crossed(report) == set()
    assert report.accounting.unmatched == {"ambiguous": 24}


def test_what_was_missed_is_lost_all_the_same(tmp_path: Path) -> None:
    """Other identifications are other packets, however much they look like each other."""
    agents = Agents()
    talk(agents, 6)
    for number in range(4):
        agents.send(0, f"inform missed {number} from HOST", missed="outside")
    talk(agents, 2)
    report = agents.analyze(tmp_path)
    assert crossed(report) == agents.pairs
    assert report.accounting.unmatched == {"lost": 4}


@pytest.mark.parametrize("ids", ["random", "in step"])
@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_missed_no_crossing_is_wrong_and_no_loss_invented(
    seed: int, ids: str, tmp_path: Path
) -> None:
    agents = Agents(seed=seed, ids=ids, loss=0.3)
    talk(agents, 20)
    report = agents.analyze(tmp_path)
    assert crossed(report) <= agents.pairs
    lost = {
        (row.packet.point, row.packet.frame)
        for row in report.rewrites.all()
        if isinstance(row, Unmatched) and row.reason == "lost"
    }
    assert not lost & {("inside", here) for here, _ in agents.pairs}
    assert not lost & {("outside", there) for _, there in agents.pairs}
