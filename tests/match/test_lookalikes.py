"""Packets that look alike and are not the same: matching refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from simulation import ClockError, Conversation, Network, Simulated, Traffic, masquerade, routed, simulate
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

CLIENT, SERVER, PUBLIC = "172.17.0.2", "198.51.100.1", "203.0.113.10"


def analyzed(truth: Simulated) -> Report:
    report = nattrace.analyze(*truth.sources)
    assert not judge_rows(report, truth).wrong
    check_accounting(report)
    return report


def crossings(report: Report) -> int:
    return sum(isinstance(row, Rewrite) for row in report.rewrites.all())


def exchange(network: Network, c: Conversation, packets: int = 8) -> None:
    for n in range(packets):
        network.wait_us(900, 1100)
        flags = {0: 0x02, 1: 0x12}.get(n, 0x18)
        network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, flags=flags)


def test_two_captures_that_have_nothing_in_common(tmp_path: Path) -> None:
    network = Network()
    for n in range(10):
        exchange(network, routed("tcp", (f"172.17.0.{n + 2}", 4000), (SERVER, 443), points=("inside",)))
        exchange(network, routed("tcp", (f"192.0.2.{n + 2}", 4000), (SERVER, 443), points=("outside",)))
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0
    assert {f.status for f in report.flows} == {"one-sided"}
    assert report.accounting.unmatched == {"one-sided": 160}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocols", [("icmp",), ("udp",), ("tcp",), ("icmp", "udp", "tcp")])
def test_two_runs_of_one_test_hours_apart(protocols: tuple[str, ...], version: int, tmp_path: Path) -> None:
    """The inside capture is of today's run, the outside one of yesterday's: the same script, no packet in common.

    Hosts draw sequence numbers and identifications anew; where there are none (pings and UDP over IPv6) the two
    runs are equal to the last byte.
    """
    (tmp_path / "yesterday").mkdir()
    earlier = ClockError(-4 * 3600 * 10**9)
    inside = simulate(tmp_path, Traffic(protocols=protocols, version=version)).paths["inside"]
    other = Traffic(protocols=protocols, version=version, clock=earlier, run=1)
    outside = simulate(tmp_path / "yesterday", other).paths["outside"]
    report = nattrace.analyze(str(inside), str(outside))
    check_accounting(report)
    assert crossings(report) == 0
    assert {f.status for f in report.flows} == {"one-sided"}
    assert set(report.accounting.unmatched) == {"one-sided"}


@pytest.mark.parametrize("minutes", [1, 10])
def test_the_same_run_repeated_while_both_capture(minutes: int, tmp_path: Path) -> None:
    """A scripted client sends the same requests again; the outside capture missed the first run."""
    network = Network()
    script = [network.rng.randbytes(30) for _ in range(8)]
    for run in range(2):
        c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000 + run)
        for n, payload in enumerate(script):
            network.wait_us(1000)
            network.send(c, payload, reply=n % 2 == 1, ip_id=0, unseen=["outside"] if run == 0 else [])
        network.wait_us(minutes * 60_000_000)
    analyzed(network.write(tmp_path))


def test_a_proxy_that_copies_payloads_onto_its_own_connection(tmp_path: Path) -> None:
    """docker-proxy: the same UDP payloads on both sides, other addresses, ports and identifications."""
    network = Network()
    outer = routed("udp", (SERVER, 4000), (PUBLIC, 8080), points=("outside",))
    inner = routed("udp", ("172.17.0.1", 45000), (CLIENT, 80), points=("inside",))
    for n in range(20):
        payload = network.rng.randbytes(60)
        network.wait_us(5000)
        first, second = (inner, outer) if n % 2 else (outer, inner)
        network.send(first, payload, reply=n % 2 == 1)
        network.wait_us(60)
        network.send(second, payload, reply=n % 2 == 1)
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_proxy_whose_packets_have_no_identification(version: int, tmp_path: Path) -> None:
    network = Network()
    names = (SERVER, PUBLIC, "172.17.0.1", CLIENT)
    if version == 6:
        names = ("2001:db8:1::1", "2001:db8::10", "fd00::1", "fd00::2")
    outer = routed("udp", (names[0], 4000), (names[1], 8080), points=("outside",))
    inner = routed("udp", (names[2], 45000), (names[3], 80), points=("inside",))
    for n in range(20):
        payload = network.rng.randbytes(60)
        network.wait_us(5000)
        first, second = (inner, outer) if n % 2 else (outer, inner)
        network.send(first, payload, reply=n % 2 == 1, ip_id=0)
        network.wait_us(60)
        network.send(second, payload, reply=n % 2 == 1, ip_id=0)
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_one_host_announces_the_same_on_both_networks(version: int, tmp_path: Path) -> None:
    """SSDP and mDNS: equal bytes at both points, sent from another address each: no translation."""
    network = Network()
    group = "239.255.255.250" if version == 4 else "ff02::c"
    hosts = ("172.17.0.1", "192.0.2.1") if version == 4 else ("fe80::1", "fe80::2")
    here = routed("udp", (hosts[0], 1900), (group, 1900), points=("inside",))
    there = routed("udp", (hosts[1], 1900), (group, 1900), points=("outside",))
    for _ in range(12):
        network.wait_us(100_000)
        network.send(here, b"NOTIFY * HTTP/1.1 alive", ip_id=0)
        network.wait_us(30)
        network.send(there, b"NOTIFY * HTTP/1.1 alive", ip_id=0)
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0


@pytest.mark.parametrize("group", ["239.255.255.250", "255.255.255.255", "172.17.255.255", "ff02::fb"])
def test_announcements_that_both_points_see_are_untranslated(group: str, tmp_path: Path) -> None:
    """A bridge floods multicast and broadcast: the same packet at both points, nothing changed."""
    network = Network()
    hosts = [f"172.17.0.{n}" if "." in group else f"fe80::{n}" for n in (2, 3, 4)]
    for _ in range(6):
        for host in hosts:
            network.wait_us(100_000)
            c = routed("udp", (host, 5353), (group, 5353), {}, bridged=True)
            known = next((k for k in network._conversations if k.seen == c.seen), c)
            network.send(known, b"the same announcement of everybody")
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert {f.status for f in report.flows} <= {"untranslated", "ambiguous", "one-sided"}
    assert not list(report.rewrites)


def test_announcements_that_repeat_at_one_point_only(tmp_path: Path) -> None:
    network = Network()
    passing = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    host = routed("udp", ("172.17.0.1", 5353), ("224.0.0.251", 5353), points=("inside",))
    for n in range(20):
        network.wait_us(50_000)
        network.send(host, b"who has printer.local", ip_id=0)
        network.wait_us(1000)
        network.send(passing, network.rng.randbytes(20), reply=n % 2 == 1)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert {(f.initiator.src, f.status) for f in report.flows} == {
        (CLIENT, "translated"), ("172.17.0.1", "one-sided"),
    }  # fmt: skip


def test_a_scan_whose_probes_have_one_sequence_number(tmp_path: Path) -> None:
    """Scanners send every SYN with the same sequence number; ports are all that differs, and NAT keeps them."""
    network = Network()
    for port in range(1, 200):
        c = masquerade("tcp", (CLIENT, 40000), (SERVER, port), 40000)
        c.seq, c.ack = 12345, 0
        network.wait_us(100)
        network.send(c, flags=0x02, ip_id=7 * port)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert flows_told(report) == expected_flows(truth)


def test_a_scan_from_two_hosts_with_nothing_of_its_own(tmp_path: Path) -> None:
    """Without identifications two scanners' SYNs differ in nothing that NAT leaves alone: refused, not guessed."""
    network = Network()
    for port in range(1, 100):
        for n in (2, 3):
            c = masquerade("tcp", (f"172.17.0.{n}", 40000), (SERVER, port), 40000 + n * 7)
            c.seq, c.ack = 12345, 0
            network.wait_us(5)
            network.send(c, flags=0x02, ip_id=0)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    told = [flow for flow in flows_told(report) if flow[3]]
    assert set(told) <= set(expected_flows(truth))


def test_identical_retries_of_a_query_that_a_third_point_saw_before(tmp_path: Path) -> None:
    """DNS retries byte for byte alike through two resolvers; the first one's answer was lost outside."""
    network = Network()
    query = b"\x12\x34" + b"example.org question"
    for n, server in enumerate((SERVER, "198.51.100.2")):
        c = masquerade("udp", (CLIENT, 4000), (server, 53), 5000 + n)
        for attempt in range(3):
            network.wait_us(500_000)
            network.send(c, query, ip_id=0, unseen=["outside"] if attempt == 1 else [])
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert {flow for flow in flows_told(report) if flow[3]} <= set(expected_flows(truth))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("version", [4, 6])
def test_two_hosts_that_ping_one_server_in_step_and_were_seen_at_one_point_each(
    version: int, seed: int, tmp_path: Path
) -> None:
    """Same filling, same sequence numbers, a fraction of a millisecond apart: causality tells them apart."""
    network = Network(seed)
    hosts = ("172.17.0.2", "172.17.1.3") if version == 4 else ("fd00::2", "fd01::3")
    server = SERVER if version == 4 else "2001:db8:1::1"
    here, there = (
        routed("icmp", (host, 1), (server, 1), points=(point,))
        for host, point in zip(hosts, ("inside", "outside"), strict=True)
    )
    for n in range(6):
        network.wait_us(1_000_000)
        for c in (here, there) if network.rng.random() < 0.5 else (there, here):
            network.wait_us(20, 400)
            network.send(c, bytes(32), reply=n % 2 == 1, ip_id=0)
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_one_zero_filled_packet_at_each_point_is_no_evidence(version: int, tmp_path: Path) -> None:
    network = Network()
    hosts = ("172.17.0.2", "172.17.1.3") if version == 4 else ("fd00::2", "fd01::3")
    server = SERVER if version == 4 else "2001:db8:1::1"
    for host, point in zip(hosts, ("inside", "outside"), strict=True):
        network.wait_us(300)
        network.send(routed("udp", (host, 4000), (server, 9), points=(point,)), bytes(32), ip_id=0)
    report = analyzed(network.write(tmp_path))
    assert crossings(report) == 0


def test_strangers_on_one_side_change_nothing(tmp_path: Path) -> None:
    network = Network()
    own = [masquerade("tcp", (f"172.17.0.{n}", 4000), (SERVER, 443), 5000 + n) for n in range(2, 6)]
    strangers = [
        routed("tcp", (f"203.0.113.{n}", 4000), (SERVER, 443), points=("outside",)) for n in range(20, 40)
    ]
    for n in range(10):
        for c in own + strangers:
            network.wait_us(50)
            network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, flags={0: 2, 1: 0x12}.get(n, 0x18))
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert {flow for flow in flows_told(report) if flow[3]} == {
        flow for flow in expected_flows(truth) if flow[3]
    }
    assert report.accounting.unmatched == {"one-sided": 200}


def test_all_packets_identical(tmp_path: Path) -> None:
    """The worst case: nothing tells any packet from any other; everything is ambiguous and nothing is slow."""
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for _ in range(3000):
        network.now_ns += 1000
        network.send(c, b"same", ip_id=0)
    report = analyzed(network.write(tmp_path))
    assert report.accounting.matched + report.accounting.unmatched.get("ambiguous", 0) == 6000


@pytest.mark.parametrize("alike", [False, True])
def test_rows_that_time_ranked_say_so(alike: bool, tmp_path: Path) -> None:
    """Equal keep-alives of one flow differ in time only; packets that say something of their own need no rank."""
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 4500), 5000)
    for n in range(16):
        network.wait_us(50_000)
        network.send(c, b"\xff" * 8 if alike else network.rng.randbytes(8), reply=n % 2 == 1, ip_id=0)
    report = analyzed(network.write(tmp_path))
    found = [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    assert len(found) == 16
    assert {"nearest" in row.evidence for row in found} == {alike}
