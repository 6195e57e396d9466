"""Files that show one packet at several points of its way, made hard: no row may join two packets.

Up to three NAT boxes, their captures merged into one file or two, and what captures do: copies by a bridge, records
made twice, one direction only, losses, packets held back, multicast that every point shows. The simulator numbers all
packets, so what is one packet and what is not comes from there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from simulation import Network, packet_at, routed, write_pcap
from verdict import check_accounting

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

SERVER = "198.51.100.1"
MULTICAST = 1_000_000  #: serials of multicast packets begin here


@dataclass(frozen=True)
class Trouble:
    """What happens to packets and captures, drawn from a seed. Shares are between 0 and 1."""

    hops: int
    flows: int
    ids: str  #: random, or counted from 1 by flow and direction, or by all together
    constant: float  #: share of packets that say what all others say
    gap_us: int
    loss: float
    held_back: float
    twice: float  #: share of records that are made twice
    one_way: bool  #: a point shows questions only
    copied: bool  #: a point shows copies of everything
    multicast: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> Trouble:
        """Draw one."""
        return cls(
            rng.choice([1, 1, 2, 3]), rng.choice([1, 3, 8]), rng.choice(["random", "flow", "all"]),
            rng.choice([0.0, 0.5, 1.0]), rng.choice([20, 200, 3_000]), rng.choice([0.0, 0.05, 0.3]),
            rng.choice([0.0, 0.1]), rng.choice([0.0, 0.1, 1.0]), rng.random() < 0.3, rng.random() < 0.3,
            rng.random() < 0.3,
        )  # fmt: skip


def network(seed: int) -> Network:
    """Return what all points saw."""
    draw = random.Random(seed)
    trouble = Trouble.drawn(draw)
    net = Network(seed)
    rng, names = net.rng, tuple(f"p{n}" for n in range(trouble.hops + 1))
    talks = []
    for n in range(trouble.flows):
        protocol = draw.choice(["tcp", "udp", "icmp"])
        port, service = (1 + n // 5, 1 + n // 5) if protocol == "icmp" else (40_000 + n // 5, 80)
        rewrites = [
            draw.choice([{}, {"client": (f"10.{hop + 1}.0.{n + 2}", 2_000 + n * 3)}])
            for hop in range(trouble.hops)
        ]
        client, server = (f"172.17.0.{n % 5 + 2}", port), (SERVER, service)
        talks.append(
            routed(protocol, client, server, *rewrites, points=names, bridged=draw.random() < 0.3, rng=rng)
        )
    payload = draw.choice([b"", b"\xff", bytes(32), b"keep-alive 123"])
    sent: dict[tuple[int, bool], int] = {}
    for turn in range(100):
        which, reply = draw.randrange(len(talks)), rng.random() < 0.5
        sent[which, reply] = sent.get((which, reply), 0) + 1
        net.wait_us(trouble.gap_us // 2, trouble.gap_us * 3 // 2)
        says = payload if draw.random() < trouble.constant else rng.randbytes(draw.randint(4, 40))
        missed = [name for name in names if rng.random() < trouble.loss]
        (serial,) = net.send(
            talks[which], says, reply=reply, unseen=missed,
            ip_id={"random": None, "flow": sent[which, reply], "all": turn + 1}[trouble.ids],
            delay_ns=(60_000, 3_000_000) if rng.random() < trouble.held_back else (3_000, 60_000),
        )  # fmt: skip
        for name in names:
            if name not in missed and rng.random() < trouble.twice:
                net.repeat(name, serial, rng.choice([0, rng.randint(100, 20_000), rng.randint(100, 400_000)]))
    capture = net.captures[draw.choice(names)]
    if trouble.one_way:
        capture.packets = [packet for packet in capture.packets if packet[2] not in net.replies]
    if trouble.copied:
        capture.packets += [
            (at + rng.randint(0, 40_000), frame, serial) for at, frame, serial in capture.packets
        ]
    for n in range(20 * trouble.multicast):
        group = routed(
            "udp", (f"172.17.0.{draw.randint(2, 6)}", 5353), ("224.0.0.251", 5353), points=("all",), rng=rng
        )
        ip_id = draw.choice([0, n + 1, rng.randint(1, 65_535)])
        packet = packet_at(group, group.seen[0], b"who is there", reply=False, ip_id=ip_id, ttl=255)
        at_ns = net.now_ns - rng.randint(0, 50 * trouble.gap_us * 1_000)
        for name in names:
            frame = b"\2" * 12 + b"\x08\x00" + packet
            net.captures[name].packets.append((at_ns + rng.randint(0, 30_000), frame, MULTICAST + n))
    return net


def rows(net: Network, files: list[list[str]], folder: Path) -> list[bool]:
    """Merge the points of each file, analyze the files, and say of each row whether its frames are one packet."""
    serials = {}
    for number, points in enumerate(files):
        packets = sorted(
            (at, n, serial, frame)
            for n, name in enumerate(points)
            for at, frame, serial in net.captures[name].packets
        )
        write_pcap(folder / f"file{number}.pcap", [(at, frame) for at, _, _, frame in packets])
        serials[f"file{number}"] = [serial for _, _, serial, _ in packets]
    report = nattrace.analyze(*(folder / f"{name}.pcap" for name in serials))
    check_accounting(report)
    return [
        serials[row.before.point][row.before.frame - 1] == serials[row.after.point][row.after.frame - 1]
        for row in report.rewrites.all()
        if isinstance(row, Rewrite)
    ]


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize("together", ["one file", "two files"])
def test_no_row_joins_two_packets(block: int, together: str, tmp_path: Path) -> None:
    told = 0
    for seed in range(block * 8, block * 8 + 8):
        net = network(seed)
        names = sorted(net.captures)
        right = rows(net, [names] if together == "one file" else [names[:1], names[1:]], tmp_path)
        assert all(right), seed
        told += len(right)
    assert told > 150
