"""Random networks of two to five points, any NAT at any hop, conversations up and down part of the path.

NATTRACE_SWEEP=N multiplies the networks by N.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from simulation import Conversation, Endpoint, Network, Simulated, routed
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace

if TYPE_CHECKING:
    import random
    from pathlib import Path

NETWORKS = 40 * max(int(os.environ.get("NATTRACE_SWEEP", "0")), 1)


def address(version: int, network: int, host: int) -> str:
    return f"10.{network}.0.{host}" if version == 4 else f"fd{network:02x}::{host:x}"


def conversations(rng: random.Random, version: int) -> list[Conversation]:
    """Return conversations of which no two look alike at any point, as conntrack makes sure."""
    points = rng.sample(["veth", "bridge", "eth", "tun", "uplink"], rng.randint(2, 5))
    bridged = rng.random() < 0.25
    made: list[Conversation] = []
    taken: set[tuple[str, str, Endpoint, Endpoint | bytes]] = set()
    for n in range(rng.randint(1, 12)):
        protocol = rng.choice(["tcp", "udp", "icmp", "sctp"])
        low = rng.randint(0, len(points) - 2)
        high = rng.randint(low + 1, len(points) - 1)
        path = (
            tuple(points[low : high + 1]) if rng.random() < 0.8 else tuple(reversed(points[low : high + 1]))
        )
        client = (address(version, low, rng.randint(2, 5)), rng.choice([40000, 40001, 50000 + n]))
        server = (address(version, 50, rng.randint(2, 4)), rng.choice([53, 80, 443]))
        if protocol == "icmp":
            client, server = (client[0], rng.randint(1, 4)), (server[0], 0)
        rewrites: list[dict[str, tuple[str, int]]] = []
        for hop in range(len(path) - 1):
            kind = rng.choice(["none", "snat", "snat", "dnat"])
            if kind == "snat":
                rewrites.append({"client": (address(version, 10 + low + hop, 1), rng.randint(33000, 60000))})
            elif kind == "dnat":
                rewrites.append({"server": (address(version, 60 + hop, rng.randint(2, 9)), server[1])})
            else:
                rewrites.append({})
        c = routed(protocol, client, server, *rewrites, points=path, bridged=bridged, rng=rng)
        looks = {
            (protocol, point, seen.client, seen.server.address if protocol == "icmp" else seen.server)
            for point, seen in zip(c.points, c.seen, strict=True)
        }
        if not looks & taken:
            taken |= looks
            made.append(c)
    return made


def captured(seed: int, folder: Path, version: int, loss: float, *, zero_ids: bool) -> Simulated:
    """Send everybody's packets in random order and capture them at all points."""
    network = Network(seed)
    rng = network.rng
    talks = conversations(rng, version)
    spacing_us = rng.choice([20, 300, 5000])
    order = [c for c in talks for _ in range(rng.randint(2, 14))]
    rng.shuffle(order)
    for c in order:
        network.wait_us(spacing_us // 2, spacing_us * 3 // 2)
        network.send(
            c, rng.randbytes(rng.randint(8, 50)), reply=c.sent % 2 == 1,
            flags={0: 0x02, 1: 0x12}.get(c.sent, 0x18), ip_id=0 if zero_ids else None,
            unseen=[point for point in c.points if rng.random() < loss],
            lost_after=rng.choice(c.points) if rng.random() < loss / 2 else None,
        )  # fmt: skip
    return network.write(folder)


@pytest.mark.parametrize("zero_ids", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_network_that_loses_nothing_is_told_exactly(version: int, zero_ids: bool, tmp_path: Path) -> None:
    for seed in range(NETWORKS):
        truth = captured(seed, tmp_path, version, 0, zero_ids=zero_ids)
        report = nattrace.analyze(*truth.sources)
        rows = judge_rows(report, truth)
        assert not rows.wrong, seed
        assert not rows.missed, seed
        check_accounting(report)
        assert flows_told(report) == expected_flows(truth), seed
        assert {flow.status for flow in report.flows} <= {"translated", "untranslated"}, seed
        assert sum(c.lost + c.unknowable + c.ambiguous for f in report.flows for c in f.crossings) == 0, seed


@pytest.mark.parametrize("zero_ids", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_network_that_loses_packets_is_never_told_wrong(
    version: int, zero_ids: bool, tmp_path: Path
) -> None:
    for seed in range(NETWORKS):
        truth = captured(seed, tmp_path, version, 0.15, zero_ids=zero_ids)
        if not truth.paths:
            continue
        report = nattrace.analyze(*truth.sources)
        wrong = [
            (point, frame, other, there)
            for point, frame, other, there in judge_rows(report, truth).wrong
            # a conversation whose first packets no point saw may be told the other way round
            if truth.serials[point][frame - 1] != truth.serials[other][there - 1]
        ]
        assert not wrong, seed
        check_accounting(report)
