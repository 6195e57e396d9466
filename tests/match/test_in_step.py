"""Hosts that say the same at the same pace, and hosts that say it again: told apart by what proves it, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from simulation import Network, Simulated, Traffic, masquerade, routed, simulate
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.match.pairing import same_ranks
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

SERVER, SERVER_V6 = "198.51.100.1", "2001:db8:1::1"


def analyzed(truth: Simulated) -> Report:
    """Return the report; nothing in it may be wrong."""
    report = nattrace.analyze(*truth.sources)
    assert not judge_rows(report, truth).wrong
    assert not {flow for flow in flows_told(report) if flow[3]} - set(expected_flows(truth))
    check_accounting(report)
    return report


def crossings(report: Report) -> int:
    return sum(isinstance(row, Rewrite) for row in report.rewrites.all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("missed", [0.0, 0.05])
@pytest.mark.parametrize("snaplen", [62, 68, 262144])
@pytest.mark.parametrize("gap_us", [5, 20, 50, 200])
def test_ipv6_hosts_that_ping_in_lockstep(
    gap_us: int, snaplen: int, missed: float, seed: int, tmp_path: Path
) -> None:
    """Zeros, one id, one sequence number and no IP id: the box takes longer than the hosts are apart."""
    network = Network(seed)
    hosts = [masquerade("icmp", (f"fd00::{n + 2}", 1), (SERVER_V6, 0), 100 + n) for n in range(2)]
    for _ in range(10):
        network.wait_us(1_000_000)
        for reply in (False, True):
            for host in hosts:
                network.wait_us(gap_us)
                unseen = [point for point in ("inside", "outside") if network.rng.random() < missed]
                network.send(host, bytes(56), reply=reply, ip_id=0, unseen=unseen)
            network.wait_us(500, 900)
    report = analyzed(network.write(tmp_path, snaplen))
    # 3 to 60 us in the box: from 50 us on the order of a burst holds; at 5 us nobody can tell
    if gap_us >= 50 and not missed:
        assert crossings(report) == 40
    if gap_us == 5:
        assert crossings(report) == 0


@pytest.mark.parametrize("protocol", ["icmp", "udp"])
@pytest.mark.parametrize("first_id", [1, 30_000])
@pytest.mark.parametrize("seed", range(3))
def test_devices_that_count_their_identifications_in_step(
    seed: int, first_id: int, protocol: str, tmp_path: Path
) -> None:
    """Two of a kind, started together: equal payloads with equal IP ids, and both captures miss packets."""
    network = Network(seed)
    devices = [masquerade(protocol, (f"172.17.0.{n + 2}", 7), (SERVER, 9), 100 + n) for n in range(3)]
    for n in range(40):
        network.wait_us(20_000)
        for device in devices:
            network.wait_us(200, 900)
            unseen = [point for point in ("inside", "outside") if network.rng.random() < 0.4]
            network.send(device, b"alive...", reply=n % 2 == 1, ip_id=first_id + n, unseen=unseen)
    analyzed(network.write(tmp_path))


@pytest.mark.parametrize("snaplen", [42, 54, 262144])
@pytest.mark.parametrize("payload", [b"", b"GET / HTTP/1.1"])
@pytest.mark.parametrize("first_number", [0, 1000, 0x01010101])
@pytest.mark.parametrize("missed", [0.0, 0.1, 0.3])
def test_segments_with_numbers_made_up_by_devices_in_step(
    missed: float, first_number: int, payload: bytes, snaplen: int, tmp_path: Path
) -> None:
    """Sequence numbers that all begin with and identifications that all have: no packet is another one, here or there."""
    for seed in range(4):
        network = Network(seed)
        devices = [masquerade("tcp", (f"172.17.0.{n + 2}", 40_000), (SERVER, 80), 100 + n) for n in range(3)]
        for device in devices:
            device.seq = device.ack = first_number
        for n in range(10):
            network.wait_us(20_000)
            for device in devices:
                network.wait_us(5, 50)
                unseen = [point for point in ("inside", "outside") if network.rng.random() < missed]
                network.send(device, payload, reply=n % 2 == 1, ip_id=30_000 + n, unseen=unseen)
        analyzed(network.write(tmp_path, snaplen))


def test_bursts_closer_than_the_box_takes_do_not_elect_by_their_order(tmp_path: Path) -> None:
    """Two hosts that ping at once: in four bursts of four the box let the second one out first."""
    network = Network()
    hosts = [masquerade("icmp", (f"fd00::{n + 2}", 1), (SERVER_V6, 0), 100 + n) for n in range(2)]
    for _ in range(4):
        network.wait_us(1_000_000)
        for reply in (False, True):
            for host, way_us in zip(hosts, (40, 10), strict=True):
                network.wait_us(10)
                way_ns = (way_us * 1000, way_us * 1000)
                network.send(host, bytes(56), reply=reply, ip_id=0, delay_ns=way_ns)
            network.wait_us(900)
    assert crossings(analyzed(network.write(tmp_path))) == 0


@pytest.mark.parametrize(("ip_id", "found"), [(3, 0), (30_003, 1)])
def test_one_blank_packet_with_a_small_identification_is_no_proof(
    ip_id: int, found: int, tmp_path: Path
) -> None:
    """What a device sends right after its start, every other device sends, too."""
    network = Network()
    network.send(masquerade("udp", ("172.17.0.2", 4000), (SERVER, 9), 5000), bytes(32), ip_id=ip_id)
    assert crossings(analyzed(network.write(tmp_path))) == found


@pytest.mark.parametrize("protocol", ["udp", "icmp", "tcp"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("after_ms", [200, 500, 1500])
def test_a_repeat_is_not_the_packet_that_it_repeats(
    after_ms: int, known: bool, protocol: str, tmp_path: Path
) -> None:
    """Inside missed the repeat, outside the first try: no IP id, the same bytes, and never one packet."""
    network = Network()
    c = masquerade(protocol, ("172.17.0.2", 4000), (SERVER, 53), 5000)
    for _ in range(20 if known else 0):
        network.wait_us(2000)
        network.send(c, network.rng.randbytes(20), ip_id=0)
    for _ in range(6 if known else 3):
        query = network.rng.randbytes(20)
        network.wait_us(5_000_000)
        network.send(c, query, ip_id=0, unseen=["outside"], advance=False)
        network.wait_us(after_ms * 1000)
        network.send(c, query, ip_id=0, unseen=["inside"])
    assert crossings(analyzed(network.write(tmp_path))) == (20 if known else 0)


def test_an_identification_shared_by_chance_is_outvoted(tmp_path: Path) -> None:
    """Equal keep-alives with random IP ids: once, two flows whose packets were missed share one."""
    network = Network()
    first, second = (masquerade("udp", (f"172.17.0.{n}", 4500), (SERVER, 4500), 5000 + n) for n in (2, 3))
    for n in range(20):
        network.wait_us(20_000)
        if n == 10:
            network.send(first, b"\xff", ip_id=40_000, unseen=["outside"])
            network.send(second, b"\xff", ip_id=40_000, unseen=["inside"])
        for c in (first, second):
            network.wait_us(500)
            network.send(c, b"\xff")
    assert crossings(analyzed(network.write(tmp_path))) == 40


@pytest.mark.parametrize("seed", range(6))
def test_lengths_alone_match_nothing_where_packets_are_close(seed: int, tmp_path: Path) -> None:
    """IPv6 cut behind the ports: many flows, held back by the box, a third of them missed."""
    traffic = Traffic(
        seed=seed, version=6, zero_ids=True, snaplen=58, flows=25, packets_per_flow=20, spacing_us=10,
        protocols=("udp",), servers=1, loss_inside=0.3, loss_outside=0.05, reordered=0.5, random_ports=False,
    )  # fmt: skip
    analyzed(simulate(tmp_path, traffic))


def test_two_hosts_in_step_that_were_seen_at_one_point_each(tmp_path: Path) -> None:
    network = Network()
    here = routed("icmp", ("fd00::2", 1), (SERVER_V6, 0), points=("inside",))
    there = routed("icmp", ("fd01::3", 1), (SERVER_V6, 0), points=("outside",))
    for n in range(12):
        network.wait_us(1_000_000)
        for c in (here, there) if n % 3 else (there, here):
            network.wait_us(20, 60)
            network.send(c, bytes(32), reply=n % 2 == 1, ip_id=0)
    assert crossings(analyzed(network.write(tmp_path))) == 0


def test_ranks_are_those_inside_a_burst() -> None:
    group = np.array([0, 0, 0, 0, 1])
    a = np.array([0, 10, 5000, 9000, 0])
    b = np.array([3, 12, 5004, 5006, 4])
    # the second burst of group 0 has one row here and two there, the third none there
    got = same_ranks(group, a, group, b, pause_ns=1000)
    assert [rows.tolist() for rows in got] == [[0, 1, 4], [0, 1, 4]]
