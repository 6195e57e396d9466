"""Whole analyses of simulated networks: every kind of NAT, every shape of path, exactly the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from simulation import Conversation, Network, Simulated, masquerade, routed
from verdict import check_accounting, crossing, expected, expected_flows, flows_told, judge_rows

import nattrace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nattrace import Report

CLIENT, SERVER, PUBLIC = "172.17.0.2", "198.51.100.1", "203.0.113.10"
CLIENT6, SERVER6, PUBLIC6 = "fd00::2", "2001:db8:1::1", "2001:db8::10"


def talk(network: Network, *conversations: Conversation, packets: int = 6, flags: int = 0x18) -> None:
    """Let conversations send and answer in turn, one packet a millisecond, payloads all different."""
    for n in range(packets):
        for each in conversations:
            network.wait_us(900, 1100)
            handshake = {0: 0x02, 1: 0x12}.get(n, flags)
            network.send(each, network.rng.randbytes(40), reply=n % 2 == 1, flags=handshake)


def analyzed(truth: Simulated) -> Report:
    """Analyze and check what holds for every capture: no wrong row, and every packet accounted for."""
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    check_accounting(report)
    return report


def assert_exact(truth: Simulated) -> Report:
    """Analyze a capture that missed nothing: every crossing and every translation, and nothing else."""
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert flows_told(report) == expected_flows(truth)
    assert sum(c.lost + c.unknowable + c.ambiguous for f in report.flows for c in f.crossings) == 0
    return report


#: Protocol, address inside, address of the other side, address of the box: the conversation.
NATS: dict[str, Callable[[str, str, str, str], Conversation]] = {
    "snat": lambda p, a, s, b: masquerade(p, (a, 4000), (s, 80), 50024, public=b),
    "snat, port kept": lambda p, a, s, b: masquerade(p, (a, 4000), (s, 80), 4000, public=b),
    "null binding, port changed": lambda p, a, s, _: masquerade(p, (a, 4000), (s, 80), 50024, public=a),
    "dnat of a published port": lambda p, a, s, b: routed(p, (s, 4000), (b, 8080), {"server": (a, 80)}),
    "dnat, port kept": lambda p, a, s, b: routed(p, (s, 4000), (b, 8080), {"server": (a, 8080)}),
    "redirect to another port": lambda p, _, s, b: routed(p, (s, 4000), (b, 8080), {"server": (b, 80)}),
    "no nat": lambda p, a, s, _: routed(p, (a, 4000), (s, 80), {}),
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("nat", NATS)
def test_every_kind_of_nat_is_told_as_conntrack_prints_it(
    nat: str, protocol: str, version: int, tmp_path: Path
) -> None:
    network = Network()
    names = (CLIENT, SERVER, PUBLIC) if version == 4 else (CLIENT6, SERVER6, PUBLIC6)
    talk(network, NATS[nat](protocol, *names))
    assert_exact(network.write(tmp_path))


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp", "icmp"])
def test_source_and_destination_changed_at_once(protocol: str, tmp_path: Path) -> None:
    """A published port that is masqueraded towards the container as well."""
    network = Network()
    port = 7 if protocol == "icmp" else 8080
    c = routed(
        protocol, (SERVER, 4000), (PUBLIC, port), {"client": ("172.17.0.1", 61000), "server": (CLIENT, 80)}
    )
    talk(network, c)
    report = assert_exact(network.write(tmp_path))
    assert [t.nat for f in report.flows for t in f.translations] == ["snat+dnat"]


def test_half_translated_sightings_split_one_entry_into_two_neighbours(tmp_path: Path) -> None:
    network = Network()
    c = routed(
        "tcp", (SERVER, 4000), (PUBLIC, 8080), {"server": (CLIENT, 80)}, {"client": ("172.17.0.1", 61000)},
        points=("outside", "between", "inside"),
    )  # fmt: skip
    talk(network, c)
    report = assert_exact(network.write(tmp_path))
    assert [t.nat for t in report.flows[0].translations] == ["dnat", "snat"]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_two_nat_hops_in_a_row_seen_at_three_points(protocol: str, version: int, tmp_path: Path) -> None:
    """The points are named against their order on the path: only TTL can say it."""
    network = Network()
    client, server = (CLIENT, SERVER) if version == 4 else (CLIENT6, SERVER6)
    middle, public = ("10.0.0.1", PUBLIC) if version == 4 else ("fd01::1", PUBLIC6)
    conversations = [
        routed(
            protocol, (client + str(n), 4000), (server, 80), {"client": (middle, 5000 + n)},
            {"client": (public, 6000 + n)}, points=("z-container", "m-bridge", "a-uplink"),
        )
        for n in range(4)
    ]  # fmt: skip
    talk(network, *conversations)
    report = assert_exact(network.write(tmp_path))
    assert {flow.path for flow in report.flows} == {("z-container", "m-bridge", "a-uplink")}


def test_five_points_on_one_path(tmp_path: Path) -> None:
    network = Network()
    points = ("veth", "bridge", "vlan", "eth", "uplink")
    conversations = [
        routed(
            protocol, (f"172.17.0.{n + 2}", 4000), (SERVER, 80), {}, {"client": ("10.0.0.1", 5000 + n)}, {},
            {"client": (PUBLIC, 6000 + n)}, points=points,
        )
        for n, protocol in enumerate(("tcp", "udp", "icmp", "sctp"))
    ]  # fmt: skip
    talk(network, *conversations)
    report = assert_exact(network.write(tmp_path))
    assert {flow.path for flow in report.flows} == {points}


def test_flows_of_one_analysis_take_different_paths(tmp_path: Path) -> None:
    network = Network()
    talk(
        network,
        masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000),
        routed(
            "tcp",
            (CLIENT, 4000),
            ("192.0.2.9", 80),
            {"client": ("192.0.2.1", 4000)},
            points=("inside", "vpn"),
        ),
        routed(
            "udp", (SERVER, 53000), (PUBLIC, 8053), {"server": (CLIENT, 53)}, points=("outside", "inside")
        ),
        routed("tcp", (SERVER, 53000), ("192.0.2.9", 80), {}, points=("outside", "vpn")),
    )
    report = assert_exact(network.write(tmp_path))
    assert {flow.path for flow in report.flows} == {
        ("inside", "outside"), ("inside", "vpn"), ("outside", "inside"), ("outside", "vpn"),
    }  # fmt: skip


def test_bridged_points_with_one_ttl_are_put_in_order_by_causality(tmp_path: Path) -> None:
    network = Network()
    conversations = [
        routed(
            protocol, (CLIENT, 4000), (SERVER, 80), {}, {"client": (PUBLIC, 5000)},
            points=("z-veth", "bridge", "a-eth"), bridged=True,
        )
        for protocol in ("tcp", "udp", "icmp")
    ]  # fmt: skip
    talk(network, *conversations)
    report = assert_exact(network.write(tmp_path))
    assert {flow.path for flow in report.flows} == {("z-veth", "bridge", "a-eth")}


@pytest.mark.parametrize("version", [4, 6])
def test_two_containers_that_ping_with_one_id(version: int, tmp_path: Path) -> None:
    """The seed story: both use id 1 and sequence 0, 1, 2 towards one address; the second one's id is changed."""
    network = Network()
    base, server, public = ("172.17.0.", SERVER, PUBLIC) if version == 4 else ("fd00::", SERVER6, PUBLIC6)
    conversations = [
        masquerade("icmp", (f"{base}{n}", 1), (server, 1), port, public=public)
        for n, port in ((2, 17053), (3, 1), (4, 50024))
    ]
    talk(network, *conversations, packets=10)
    report = assert_exact(network.write(tmp_path))
    assert sorted(t.changed for f in report.flows for t in f.translations) == [
        ("src",), ("src", "id"), ("src", "id"),
    ]  # fmt: skip


def test_one_external_port_serves_several_destinations_at_once(tmp_path: Path) -> None:
    network = Network()
    conversations = [
        masquerade("udp", (f"172.17.0.{n + 2}", 40000), (f"198.51.100.{n + 1}", 53), 40000) for n in range(5)
    ]
    talk(network, *conversations)
    assert_exact(network.write(tmp_path))


def test_container_ids_and_addresses_that_meet_on_both_sides(tmp_path: Path) -> None:
    """Many clients, few ports, one server: every outside tuple is another client's inside tuple but for the host."""
    network = Network(3)
    clients = [(f"172.17.0.{n // 3 + 2}", 40000 + n % 3) for n in range(12)]
    ports = [port for _, port in clients[5:] + clients[:5]]
    conversations = [
        masquerade("tcp", client, (SERVER, 443), port, public=f"203.0.113.{n}")
        for n, (client, port) in enumerate(zip(clients, ports, strict=True))
    ]
    talk(network, *conversations)
    assert_exact(network.write(tmp_path))


@pytest.mark.parametrize("protocol", ["udp", "icmp", "tcp"])
def test_a_binding_that_is_renewed_mid_flow_is_two_translations(protocol: str, tmp_path: Path) -> None:
    """Conntrack was flushed: the same original tuple gets another port or id."""
    network = Network()
    before = masquerade(protocol, (CLIENT, 4000), (SERVER, 80), 5000)
    after = masquerade(protocol, (CLIENT, 4000), (SERVER, 80), 6000)
    talk(network, before, packets=6)
    network.wait_us(40_000_000)
    after.seq, after.ack = before.seq, before.ack
    talk(network, after, packets=8)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert flows_told(report) == expected_flows(truth)
    assert [(f.packets_original, f.packets_reply) for f in report.flows] == [(3, 3), (4, 4)]


def test_an_outside_port_passes_from_one_client_to_another(tmp_path: Path) -> None:
    network = Network()
    first = masquerade("udp", ("172.17.0.2", 4000), (SERVER, 53), 5000)
    second = masquerade("udp", ("172.17.0.3", 4000), (SERVER, 53), 5000)
    talk(network, first)
    network.wait_us(60_000_000)
    talk(network, second)
    assert_exact(network.write(tmp_path))


@pytest.mark.parametrize("protocol", ["udp", "icmp"])
@pytest.mark.parametrize("version", [4])
def test_fragments_belong_to_the_flow_of_their_first_one(protocol: str, version: int, tmp_path: Path) -> None:
    network = Network(version)
    conversations = [masquerade(protocol, (f"172.17.0.{n}", 4000), (SERVER, 80), 5000 + n) for n in (2, 3, 4)]
    for n in range(4):
        for each in conversations:
            network.wait_us(5000)
            network.send(each, network.rng.randbytes(4000), reply=n % 2 == 1, mtu=1500)
    report = assert_exact(network.write(tmp_path))
    assert {(f.packets_original, f.packets_reply) for f in report.flows} == {(6, 6)}


def test_unfinished_checksums_of_the_sending_host_change_nothing(tmp_path: Path) -> None:
    """The transmit side of veth holds only the sum of the pseudo-header (CHECKSUM_PARTIAL)."""
    network = Network()
    conversations = [masquerade(p, (CLIENT, 4000), (SERVER, 80), 5000) for p in ("tcp", "udp")]
    for n in range(6):
        for each in conversations:
            network.wait_us(1000)
            reply = n % 2 == 1
            network.send(each, network.rng.randbytes(30), reply=reply, unfinished=not reply, ip_id=0)
    assert_exact(network.write(tmp_path))


def test_latencies_are_those_of_each_direction(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("tcp", (CLIENT, 4000), (SERVER, 80), 5000)
    delays = [11_000, 30_000, 20_000, 90_000, 5_000, 70_000, 40_000]
    for n, delay in enumerate(delays):
        network.wait_us(1000)
        network.send(c, b"payload" + bytes([n]), reply=n % 2 == 1, delay_ns=(delay, delay))
    report = assert_exact(network.write(tmp_path))
    for direction, own in (("original", delays[::2]), ("reply", delays[1::2])):
        ordered = sorted(own)
        latency = crossing(report.flows[0], "inside", "outside", direction).latency
        assert latency.measurable
        assert (latency.min_ns, latency.max_ns) == (ordered[0], ordered[-1])
        assert latency.median_ns == ordered[(len(ordered) - 1) // 2]
        assert latency.p99_ns == ordered[-1]


def test_taps_that_share_one_timestamp_measure_nothing(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("tcp", (CLIENT, 4000), (SERVER, 80), 5000)
    for n in range(4):
        network.wait_us(1000)
        network.send(c, bytes([n]) * 20, delay_ns=(0, 0))
    report = assert_exact(network.write(tmp_path))
    latency = crossing(report.flows[0], "inside", "outside", "original").latency
    assert (latency.measurable, latency.min_ns, latency.max_ns) == (False, None, None)
    assert {row.latency_ns for row in report.rewrites} == {None}


def test_packets_of_one_flow_are_counted_at_its_first_point(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    talk(network, c, packets=9)
    report = assert_exact(network.write(tmp_path))
    (flow,) = report.flows
    assert expected(c)[2][:2] == (flow.initiator.src, flow.initiator.dst)
    assert (flow.packets_original, flow.packets_reply) == (5, 4)
    assert crossing(flow, "inside", "outside", "original").matched == 5
    assert crossing(flow, "inside", "outside", "reply").matched == 4
