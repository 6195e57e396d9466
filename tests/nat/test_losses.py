"""What is lost, what cannot be known, what is ambiguous: never more than the captures prove."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from simulation import Network, Simulated, masquerade, routed
from verdict import check_accounting, crossing, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.model import Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report
    from nattrace.model import Flow

CLIENT, SERVER, PUBLIC = "172.17.0.2", "198.51.100.1", "203.0.113.10"


def analyzed(truth: Simulated) -> Report:
    report = nattrace.analyze(*truth.sources)
    assert not judge_rows(report, truth).wrong
    check_accounting(report)
    return report


def flow_from(report: Report, src: str, protocol: str = "udp") -> Flow:
    (found,) = [f for f in report.flows if f.initiator.src == src and f.protocol == protocol]
    return found


def counts(flow: Flow, direction: str = "original") -> tuple[int, int, int, int]:
    c = crossing(flow, flow.path[0], flow.path[1], direction)
    return c.matched, c.lost, c.unknowable, c.ambiguous


def test_a_packet_between_others_that_never_came_out_is_lost(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(10):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(20), lost_after="inside" if n in (4, 5) else None)
    report = analyzed(network.write(tmp_path))
    assert counts(flow_from(report, CLIENT)) == (8, 2, 0, 0)
    assert report.accounting.unmatched == {"lost": 2}
    lost = [row for row in report.rewrites.all() if isinstance(row, Unmatched)]
    assert [(row.reason, row.packet.point, row.packet.frame) for row in lost] == [
        ("lost", "inside", 5), ("lost", "inside", 6),
    ]  # fmt: skip


def test_a_reply_that_never_came_in_is_lost_on_its_way(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(10):
        network.wait_us(1000)
        reply = n % 2 == 1
        network.send(c, network.rng.randbytes(20), reply=reply, lost_after="outside" if n == 5 else None)
    report = analyzed(network.write(tmp_path))
    assert counts(flow_from(report, CLIENT)) == (5, 0, 0, 0)
    assert counts(flow_from(report, CLIENT), "reply") == (4, 1, 0, 0)


def test_a_packet_seen_only_behind_the_nat_is_not_lost(tmp_path: Path) -> None:
    """The inside capture missed it: nothing was lost on the way out."""
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(10):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(20), unseen=["inside"] if n == 5 else [])
    report = analyzed(network.write(tmp_path))
    assert counts(flow_from(report, CLIENT)) == (9, 0, 0, 0)
    assert report.accounting.unmatched == {"not-seen-upstream": 1}


@pytest.mark.parametrize("missed", [range(4), range(6, 10), [*range(3), *range(8, 10)]])
def test_where_the_other_capture_had_not_begun_or_was_over_nothing_can_be_known(
    missed: list[int], tmp_path: Path
) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(10):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(20), unseen=["outside"] if n in missed else [])
    report = analyzed(network.write(tmp_path))
    assert counts(flow_from(report, CLIENT)) == (10 - len(missed), 0, len(missed), 0)


def test_losses_need_a_witness_before_and_after(tmp_path: Path) -> None:
    """Strangers at the outside point prove that it captured while the flow's own packets were missing."""
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    stranger = routed("udp", ("192.0.2.1", 9), (PUBLIC, 7000), points=("outside",))
    network.send(stranger, b"first")
    for n in range(10):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(20), lost_after="inside" if n < 3 else None)
    network.wait_us(10_000)
    network.send(stranger, b"last")
    report = analyzed(network.write(tmp_path))
    assert counts(flow_from(report, CLIENT)) == (7, 3, 0, 0)


def test_a_flow_that_never_left_is_lost_when_its_like_passes(tmp_path: Path) -> None:
    network = Network()
    passing = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    blocked = masquerade("udp", ("172.17.0.3", 4000), (SERVER, 53), 5001)
    elsewhere = routed("tcp", ("172.17.0.3", 4000), ("172.17.0.9", 80), points=("inside",))
    for n in range(10):
        network.wait_us(1000)
        network.send(passing, network.rng.randbytes(20), reply=n % 2 == 1)
        if 2 <= n < 6:
            network.send(blocked, network.rng.randbytes(20), lost_after="inside")
            network.send(elsewhere, network.rng.randbytes(20), reply=n % 2 == 1)
    report = analyzed(network.write(tmp_path))
    assert {(f.initiator.src, f.protocol): f.status for f in report.flows} == {
        (CLIENT, "udp"): "translated",
        ("172.17.0.3", "udp"): "lost",
        ("172.17.0.3", "tcp"): "one-sided",
    }


def test_an_unanswered_flow_outside_the_other_capture_is_one_sided(tmp_path: Path) -> None:
    network = Network()
    early = masquerade("udp", ("172.17.0.3", 4000), (SERVER, 53), 5001)
    network.send(early, b"nobody was listening yet", unseen=["outside"])
    network.wait_us(1000)
    passing = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(6):
        network.wait_us(1000)
        network.send(passing, network.rng.randbytes(20), reply=n % 2 == 1)
    report = analyzed(network.write(tmp_path))
    assert flow_from(report, "172.17.0.3").status == "one-sided"


def test_identical_packets_closer_than_the_path_is_long_are_ambiguous_and_said_so(tmp_path: Path) -> None:
    """Keep-alives of one client, byte for byte the same, one microsecond apart: nobody can tell which is which."""
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    unique = masquerade("udp", ("172.17.0.3", 4000), (SERVER, 53), 5001)
    network.send(unique, b"this one is unique")
    for _ in range(20):
        network.wait_us(1)
        network.send(c, b"alive", ip_id=0)
    network.wait_us(1000)
    network.send(unique, b"this one as well")
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert report.accounting.unmatched.get("lost", 0) == 0
    assert report.accounting.unmatched == {"ambiguous": 40}
    assert {f.status for f in report.flows} == {"translated", "ambiguous"}
    told = Counter(flow for flow in flows_told(report) if flow[3])
    assert told <= expected_flows(truth)
    ambiguous = [row for row in report.rewrites.all() if isinstance(row, Unmatched)]
    assert {row.reason for row in ambiguous} == {"ambiguous"}


def test_identical_keepalives_at_a_human_pace_are_all_told(tmp_path: Path) -> None:
    """A second apart and tens of microseconds long, the same bytes are no riddle once the flow is bound."""
    network = Network()
    clients = [masquerade("udp", (f"172.17.0.{n}", 4000), (SERVER, 53), 5000 + n) for n in (2, 3, 4)]
    for n in range(10):
        for c in clients:
            network.wait_us(300_000)
            network.send(c, b"alive", ip_id=0, reply=n % 2 == 1)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert flows_told(report) == expected_flows(truth)


def test_a_lost_keepalive_among_identical_ones_shifts_nothing(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(30):
        network.wait_us(1_000_000)
        network.send(c, b"alive", ip_id=0, lost_after="inside" if n in (7, 8, 20) else None)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    matched, lost, unknowable, ambiguous = counts(report.flows[0])
    assert matched == 27
    assert lost + unknowable + ambiguous == 3


def test_a_retransmission_after_a_lost_segment_is_not_matched_to_its_first_copy(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("tcp", (CLIENT, 4000), (SERVER, 443), 5000)
    for n in range(8):
        network.wait_us(1000)
        payload = network.rng.randbytes(100)
        if n == 4:  # the copy that was lost inside, then the one that left, 200 ms later
            network.send(c, payload, lost_after="inside", advance=False, ip_id=0)
            network.wait_us(200_000)
            network.send(c, payload, unseen=["inside"], ip_id=0)
        else:
            network.send(c, payload, ip_id=0)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed


@pytest.mark.parametrize("version", [4, 6])
def test_an_untranslated_leak_is_one_sided_or_untranslated_never_translated(
    version: int, tmp_path: Path
) -> None:
    """A RST after close leaves with its private source: the same packet, unchanged, beside the bound flow."""
    network = Network()
    client, server = (CLIENT, SERVER) if version == 4 else ("fd00::2", "2001:db8:1::1")
    c = masquerade("tcp", (client, 4000), (server, 443), 5000)
    leak = routed("tcp", (client, 4000), (server, 443), {})
    for n in range(6):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, flags={0: 2, 1: 0x12}.get(n, 0x18))
    leak.seq, leak.ack = c.seq, c.ack
    network.wait_us(1000)
    network.send(leak, flags=0x04)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert Counter(f.status for f in report.flows) == {"translated": 1, "untranslated": 1}


def test_the_middle_capture_missed_packets_that_both_ends_saw(tmp_path: Path) -> None:
    network = Network()
    c = routed(
        "tcp", (CLIENT, 4000), (SERVER, 443), {"client": ("10.0.0.1", 5000)}, {"client": (PUBLIC, 6000)},
        points=("inside", "middle", "outside"),
    )  # fmt: skip
    for n in range(12):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, unseen=["middle"] if n in (4, 5) else [])
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert flows_told(report) == expected_flows(truth)
    assert not judge_rows(report, truth).missed
    # they arrived: the middle point was deaf, the NAT lost nothing
    assert counts(report.flows[0]) == (5, 0, 1, 0)
    last = crossing(report.flows[0], "middle", "outside", "reply")
    assert (last.matched, last.lost, last.unknowable) == (5, 0, 1)


def test_a_packet_that_passed_the_middle_and_went_no_further_is_lost_there(tmp_path: Path) -> None:
    network = Network()
    c = routed(
        "tcp", (CLIENT, 4000), (SERVER, 443), {"client": ("10.0.0.1", 5000)}, {"client": (PUBLIC, 6000)},
        points=("inside", "middle", "outside"),
    )  # fmt: skip
    for n in range(12):
        network.wait_us(1000)
        lost = {4: "middle", 5: "middle", 6: "inside"}.get(n)
        network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, lost_after=lost)
    report = analyzed(network.write(tmp_path))
    (flow,) = report.flows
    told = {(c.from_point, c.direction): (c.matched, c.lost, c.unknowable) for c in flow.crossings}
    assert told == {
        ("inside", "original"): (5, 1, 0),
        ("middle", "original"): (4, 1, 0),
        ("middle", "reply"): (6, 0, 0),
        ("inside", "reply"): (5, 1, 0),
    }


def test_a_flow_that_changes_its_way_out_loses_nothing(tmp_path: Path) -> None:
    """Failover: the same inside tuple leaves by one uplink and then by the other."""
    network = Network()
    ways = [
        routed("udp", (CLIENT, 4000), (SERVER, 53), {"client": (public, 5000)}, points=("inside", name))
        for name, public in (("uplink1", PUBLIC), ("uplink2", "192.0.2.9"))
    ]
    others = [
        routed("udp", ("10.9.9.9", n), (SERVER, 99), points=(f"uplink{n}",)) for n in (1, 2)
    ]  # fmt: skip
    for n in range(16):
        for stranger in others:  # both uplinks capture all the time
            network.wait_us(500)
            network.send(stranger, network.rng.randbytes(20))
        network.wait_us(500)
        network.send(ways[n >= 8], network.rng.randbytes(20), reply=n % 2 == 1)
    for stranger in others:
        network.wait_us(500)
        network.send(stranger, network.rng.randbytes(20))
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert not judge_rows(report, truth).missed
    assert sum(c.lost for flow in report.flows for c in flow.crossings) == 0
    translated = {flow for flow in flows_told(report) if flow[3]}
    assert translated == {flow for flow in expected_flows(truth) if flow[3]}


def test_a_packet_seen_twice_at_one_point_is_one_packet(tmp_path: Path) -> None:
    network = Network()
    c = masquerade("udp", (CLIENT, 4000), (SERVER, 53), 5000)
    for n in range(10):
        network.wait_us(10_000)
        (serial,) = network.send(c, network.rng.randbytes(20))
        if n == 5:
            network.repeat("inside", serial, 2_000_000)
    truth = network.write(tmp_path)
    report = analyzed(truth)
    assert report.accounting.matched == 20
    assert report.accounting.unmatched == {"duplicate": 1}
    assert sum(f.packets_original for f in report.flows) == 10
