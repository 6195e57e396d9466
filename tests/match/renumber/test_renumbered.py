"""Consumer NATs that write IP identifications of their own, and captures in which only chance does so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from simulation import Conversation, Network, masquerade, routed
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

SERVER, PUBLIC = "198.51.100.1", "203.0.113.10"
BOTH = ("outbound", "inbound")


class Box:
    """A NAT that numbers its own packets, of one direction or of both, from one counter or at random."""

    def __init__(self, network: Network, directions: tuple[str, ...], *, counter: bool) -> None:
        self.network, self.directions, self.counter, self.next = network, directions, counter, 7000

    def send(self, c: Conversation, payload: bytes, *, reply: bool, **more: object) -> None:
        """Send a packet through the box."""
        rng = self.network.rng
        self.next = self.next % 65535 + 1
        own = self.next if self.counter else rng.randint(1, 65535)
        behind = "inside" if reply else "outside"
        written = ("inbound" if reply else "outbound") in self.directions
        self.network.send(c, payload, reply=reply, renumber={behind: own} if written else {}, **more)  # type: ignore[arg-type]


def conversations(
    network: Network, count: int, protocols: tuple[str, ...] = ("tcp", "udp", "icmp")
) -> list[Conversation]:
    """Clients with colliding ports and ids."""
    made = []
    for n in range(count):
        protocol = protocols[n % len(protocols)]
        port, service = (1, 1) if protocol == "icmp" else (40000, 80)
        outside = 1024 + n
        made.append(
            masquerade(protocol, (f"172.17.0.{n + 2}", port), (SERVER, outside if protocol == "icmp" else service),
                       outside, rng=network.rng)
        )  # fmt: skip
    return made


def analyzed(network: Network, folder: Path) -> tuple[Report, int, int]:
    """Return the report, and how many packets were seen on both sides and have no row."""
    truth = network.write(folder)
    report = nattrace.analyze(*truth.sources)
    check_accounting(report)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    return report, len(rows.missed), rows.right


@pytest.mark.parametrize("directions", [("outbound",), BOTH])
@pytest.mark.parametrize("counter", [False, True])
def test_a_box_that_numbers_its_packets_itself(
    directions: tuple[str, ...], counter: bool, tmp_path: Path
) -> None:
    network = Network(3)
    box = Box(network, directions, counter=counter)
    made = conversations(network, 12)
    for n in range(14):
        for c in made:
            network.wait_us(300, 900)
            flags = {0: 0x02, 1: 0x12}.get(n, 0x18)
            payload = b"" if c.protocol == "tcp" and n < 2 else network.rng.randbytes(40)
            box.send(c, payload, reply=n % 2 == 1, flags=flags)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert not rows.missed
    assert flows_told(report) == expected_flows(truth)
    assert not sum(c.lost + c.ambiguous for flow in report.flows for c in flow.crossings)


def test_packets_lost_on_either_side_of_such_a_box(tmp_path: Path) -> None:
    network = Network(5)
    box = Box(network, BOTH, counter=True)
    made = conversations(network, 10)
    seen = 0
    for n in range(40):
        for c in made:
            network.wait_us(200, 600)
            miss = [point for point in ("inside", "outside") if network.rng.random() < 0.05]
            seen += not miss
            box.send(c, network.rng.randbytes(40), reply=n % 2 == 1, unseen=miss)
    _, missed, right = analyzed(network, tmp_path)
    assert missed == 0
    assert right == seen


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_retransmissions_seen_once_on_each_side_are_two_packets(share: float, tmp_path: Path) -> None:
    """Where identifications are kept, a repeated segment is another packet, however many are seen so."""
    network = Network(7)
    (c,) = conversations(network, 1, ("tcp",))
    truth = 0
    for n in range(120):
        network.wait_us(900)
        payload = network.rng.randbytes(60)
        if network.rng.random() < share:
            network.send(c, payload, unseen=["outside"], advance=False)
            network.wait_us(30_000)  # as soon as a lost segment is sent again on a short path
            network.send(c, payload, unseen=["inside"])
        else:
            network.send(c, payload, reply=n % 2 == 1)
            truth += 1
    _, missed, right = analyzed(network, tmp_path)
    assert missed == 0
    assert right == truth


def test_a_few_packets_teach_nothing(tmp_path: Path) -> None:
    network = Network(9)
    (c,) = conversations(network, 1, ("tcp",))
    box = Box(network, BOTH, counter=False)
    for n in range(7):
        network.wait_us(900)
        box.send(c, network.rng.randbytes(40), reply=n % 2 == 1)
    _, _, right = analyzed(network, tmp_path)
    assert right == 0


def test_a_proxy_s_own_identifications_teach_nothing(tmp_path: Path) -> None:
    """Its payloads are copies, its sequence numbers and its packets are its own."""
    network = Network(11)
    inner = routed("tcp", ("172.17.0.1", 45000), ("172.17.0.2", 80), points=("inside",))
    outer = routed("tcp", ("198.51.100.7", 50000), (PUBLIC, 8080), points=("outside",))
    for n in range(60):
        payload = network.rng.randbytes(60)
        for c in (outer, inner):
            network.wait_us(40)
            network.send(c, payload, reply=n % 2 == 1)
    _, _, right = analyzed(network, tmp_path)
    assert right == 0


def test_equal_identifications_behind_such_a_box_are_chance(tmp_path: Path) -> None:
    """Keep-alives that all say the same, and identifications that count up on both sides of the box."""
    network = Network(13)
    box = Box(network, ("outbound",), counter=True)
    made = conversations(network, 12, ("tcp", "udp"))
    for n in range(60):
        for k, c in enumerate(made):
            network.wait_us(100, 300)
            own = 7001 + (len(made) * n + k + 40) // 2  # what the box writes some packets later
            reply = n % 2 == 1
            payload = b"keep-alive, keep-alive" if c.protocol == "udp" else network.rng.randbytes(30)
            miss = [point for point in ("inside", "outside") if network.rng.random() < 0.03]
            box.send(c, payload, reply=reply, ip_id=None if reply else own, unseen=miss)
    _, _, right = analyzed(network, tmp_path)
    assert right > 12 * 60 * 0.4  # the TCP packets at least, nearly all of them
