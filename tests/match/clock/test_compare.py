"""Two hosts, two clocks: every match is found as on one clock, none is wrong, and the true offset is in the bound."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from simulation import (
    EPOCH_NS,
    ClockError,
    Network,
    Simulated,
    Traffic,
    masquerade,
    routed,
    simulate,
    write_pcap,
)
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nattrace import Report
    from nattrace.model import Clock

SECOND = 10**9
OFFSETS_NS = (
    10**6,
    -(10**6),
    5 * SECOND,
    31 * SECOND,
    -31 * SECOND,
    3600 * SECOND,
    -3600 * SECOND,
    86_400 * SECOND,
    -40 * 86_400 * SECOND,
)
MIXES = (
    Traffic(),
    Traffic(version=6, flows=12, packets_per_flow=20, spacing_us=200_000),
    Traffic(flows=12, packets_per_flow=20, spacing_us=1_000_000),
    Traffic(flows=20, packets_per_flow=20, loss_inside=0.1, loss_outside=0.1, spacing_us=50_000),
    Traffic(protocols=("icmp",), random_ports=False, spacing_us=10_000),
    Traffic(protocols=("udp",), snaplen=96),
    Traffic(zero_ids=True, constant_payload=True, packets_per_flow=20, spacing_us=100_000),
)


def clocks(report: Report) -> dict[str, Clock]:
    return {point.name: point.clock for point in report.points}


def reading(clock: Clock, reading_ns: int, steps: int = 0) -> int:
    """Return the offset that a report states for a reading, as `model.Clock` says, after so many steps."""
    at, offset_ns, ppm = clock.at, clock.offset_ns, clock.drift_ppm
    if steps:
        step = clock.steps[steps - 1]
        at, offset_ns, ppm = step.at, step.offset_ns, step.drift_ppm
    assert at is not None
    return offset_ns + round(ppm / 1e6 * (reading_ns - at))


def check_offset(truth: Simulated, clock: Clock, error: ClockError) -> None:
    """Check that the true offset was within the bound at every packet between the first and last compared."""
    assert clock.bound_ns is not None
    assert clock.at is not None
    for reading_ns in readings(truth, "outside"):
        true_ns = round((reading_ns - error.offset_ns - EPOCH_NS) / (1 + error.drift_ppm / 1e6)) + EPOCH_NS
        stated = reading(clock, reading_ns)
        assert abs(stated - error.at(true_ns)) <= clock.bound_ns + 1


def readings(truth: Simulated, point: str) -> Iterator[int]:
    """Read the times of a pcap in nanoseconds."""
    raw, at = truth.paths[point].read_bytes(), 24
    while at < len(raw):
        seconds, rest, size = (int.from_bytes(raw[at + n : at + n + 4], "little") for n in (0, 4, 8))
        yield seconds * SECOND + rest
        at += 16 + size


def frames(truth: Simulated, point: str) -> Iterator[bytes]:
    """Read the frames of a pcap."""
    raw, at = truth.paths[point].read_bytes(), 24
    while at < len(raw):
        size = int.from_bytes(raw[at + 8 : at + 12], "little")
        yield raw[at + 16 : at + 16 + size]
        at += 16 + size


def check_rows(report: Report, truth: Simulated) -> int:
    """Check that no row is wrong, that none is seen before it was sent, and that times are the files' own."""
    rows = judge_rows(report, truth)
    assert not rows.wrong
    check_accounting(report)
    recorded = {point: list(readings(truth, point)) for point in truth.paths}
    for row in report.rewrites.all():
        sightings = (row.before, row.after) if isinstance(row, Rewrite) else (row.packet,)
        for seen in sightings:
            assert seen.time == recorded[seen.point][seen.frame - 1]
        if isinstance(row, Rewrite) and row.latency_ns is not None:
            bounds = [clocks(report)[seen.point].bound_ns for seen in sightings]
            assert row.latency_ns >= -sum(bound or 0 for bound in bounds)
    return len(rows.missed)


@pytest.mark.parametrize("drift_ppm", [0.0, 27.0, -100.0])
@pytest.mark.parametrize("mix", range(len(MIXES)))
def test_no_offset_and_no_drift_costs_a_match(mix: int, drift_ppm: float, tmp_path: Path) -> None:
    truth = simulate(tmp_path, MIXES[mix])
    plain = nattrace.analyze(*truth.sources)
    missed = check_rows(plain, truth)
    assert clocks(plain)["outside"].at is None
    offsets = OFFSETS_NS[mix % 2 :: 2] if drift_ppm else OFFSETS_NS
    for offset_ns in offsets:
        error = ClockError(offset_ns, drift_ppm)
        truth = simulate(tmp_path, replace(MIXES[mix], clock=error))
        report = nattrace.analyze(*truth.sources)
        assert check_rows(report, truth) == missed
        assert flows_told(report) == flows_told(plain)
        check_offset(truth, clocks(report)["outside"], error)
        assert clocks(report)["inside"] == clocks(plain)["inside"]
        assert [f.code for f in report.findings] == ["clock-offset"]


@pytest.mark.parametrize("drift_ppm", [0.0, 27.0])
@pytest.mark.parametrize("jump_ns", [5 * SECOND, -7 * SECOND, 3600 * SECOND, -3600 * SECOND, 20_000_000])
@pytest.mark.parametrize("offset_ns", [0, -31 * SECOND])
def test_a_clock_that_is_set_during_the_capture(
    offset_ns: int, jump_ns: int, drift_ppm: float, tmp_path: Path
) -> None:
    traffic = Traffic(flows=12, packets_per_flow=20, spacing_us=1_000_000)
    length_ns = 240 * SECOND
    error = ClockError(offset_ns, drift_ppm, ((length_ns // 2, jump_ns),))
    truth = simulate(tmp_path, replace(traffic, clock=error))
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    assert flows_told(report) == expected_flows(truth)
    clock = clocks(report)["outside"]
    (step,) = clock.steps
    assert clock.bound_ns is not None
    # the reading at the step is the clock's own, and the time of some packet just behind it
    after_ns = EPOCH_NS + length_ns // 2
    true_ns = step.at - error.at(after_ns)
    assert 0 <= true_ns - after_ns < 10 * SECOND
    assert abs(step.offset_ns - error.at(true_ns)) <= clock.bound_ns + 1
    findings = {finding.code: finding for finding in report.findings}
    assert set(findings) == {"clock-step", "clock-offset"}
    assert ("forward" if jump_ns > 0 else "back") in findings["clock-step"].message


def test_two_steps_and_a_loss_beside_them(tmp_path: Path) -> None:
    traffic = Traffic(flows=20, packets_per_flow=30, spacing_us=100_000, loss_inside=0.05, loss_outside=0.05)
    plain = nattrace.analyze(*simulate(tmp_path, traffic).sources)
    error = ClockError(3600 * SECOND, 27.0, ((20 * SECOND, -5 * SECOND), (40 * SECOND, 2 * SECOND)))
    truth = simulate(tmp_path, replace(traffic, clock=error))
    report = nattrace.analyze(*truth.sources)
    check_rows(report, truth)
    assert flows_told(report) == flows_told(plain)
    assert report.accounting == plain.accounting
    assert len(clocks(report)["outside"].steps) == 2


def test_a_latency_below_the_error_of_the_clock_was_not_measured(tmp_path: Path) -> None:
    network = Network(3)
    c = masquerade("tcp", ("172.17.0.2", 4000), ("198.51.100.1", 443), 5000)
    slow = masquerade("tcp", ("172.17.0.3", 4000), ("198.51.100.1", 443), 5001)
    for n in range(40):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(30), reply=n % 2 == 1, delay_ns=(20_000, 30_000))
        network.send(slow, network.rng.randbytes(30), reply=n % 2 == 1, delay_ns=(900_000, 999_000))
    network.clocks["outside"] = ClockError(SECOND)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    check_rows(report, truth)
    bound_ns = clocks(report)["outside"].bound_ns
    assert bound_ns is not None
    assert 20_000 <= bound_ns < 40_000
    by_port = {flow.translations[0].reply.dport: flow for flow in report.flows}
    for crossing in by_port[5001].crossings:
        assert crossing.latency.measurable
        assert crossing.latency.median_ns is not None
        assert abs(crossing.latency.median_ns - 950_000) <= 50_000 + bound_ns
    quick = [crossing.latency for crossing in by_port[5000].crossings]
    assert all(not each.measurable or (each.median_ns or 0) >= bound_ns for each in quick)


def test_packets_of_one_direction_do_not_tell_the_latency(tmp_path: Path) -> None:
    network = Network(4)
    flows = [masquerade("udp", (f"172.17.0.{n}", 514), ("198.51.100.1", 514), 5000 + n) for n in range(2, 6)]
    for _ in range(20):
        for c in flows:
            network.wait_us(800, 1200)
            network.send(c, network.rng.randbytes(40))
    network.clocks["outside"] = ClockError(-3600 * SECOND)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    clock = clocks(report)["outside"]
    assert abs(clock.offset_ns + 3600 * SECOND) < 60_000
    assert clock.bound_ns is None
    assert not any(crossing.latency.measurable for flow in report.flows for crossing in flow.crossings)


def test_three_points_on_two_hosts_and_a_fourth_far_away(tmp_path: Path) -> None:
    """Points of one host keep one clock; the last one is reached through the others, and their errors add up."""
    network = Network(5)
    names = ("a-veth", "a-uplink", "b-uplink", "c-uplink")
    flows = [
        routed(
            "tcp", (f"172.17.0.{n}", 4000), ("198.51.100.1", 443), {}, {"client": ("203.0.113.10", 5000 + n)}, {},
            points=names,
        )
        for n in range(2, 8)
    ]  # fmt: skip
    for n in range(30):
        for c in flows:
            network.wait_us(20_000)
            network.send(c, network.rng.randbytes(40), reply=n % 2 == 1)
    network.clocks["b-uplink"] = ClockError(-5 * SECOND, 27.0)
    network.clocks["c-uplink"] = ClockError(3600 * SECOND, -11.0)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    assert flows_told(report) == expected_flows(truth)
    found = clocks(report)
    assert found["a-uplink"].at is found["a-veth"].at is None
    assert found["a-uplink"].reference == "a-uplink"
    for name in ("b-uplink", "c-uplink"):
        clock, error = found[name], network.clocks[name]
        assert clock.at is not None
        assert clock.bound_ns is not None
        assert abs(clock.offset_ns - error.at(clock.at - error.offset_ns)) <= clock.bound_ns + 1
        assert clock.bound_ns < 200_000
    on_host = [
        c.latency for f in report.flows for c in f.crossings if {c.from_point, c.to_point} == set(names[:2])
    ]
    assert all(each.measurable for each in on_host)


def test_the_other_clock_gives_the_same_report_in_any_order(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(clock=ClockError(-3600 * SECOND, 27.0)))
    texts = []
    for n, sources in enumerate((truth.sources, truth.sources[::-1])):
        path = tmp_path / f"{n}.json"
        nattrace.analyze(*sources).write(path)
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]


def test_open_files_are_read_again_from_where_they_stood(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(clock=ClockError(3600 * SECOND)))
    inside = io.BytesIO(b"read already" + truth.paths["inside"].read_bytes())
    inside.seek(len(b"read already"))
    with truth.paths["outside"].open("rb") as outside:
        report = nattrace.analyze(inside, outside)
    assert report.accounting.unmatched == {}


class Pipe(io.BytesIO):
    """Bytes that come once."""

    def seekable(self) -> bool:
        return False


def test_a_pipe_is_not_read_again_and_that_is_said(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(clock=ClockError(5 * SECOND)))
    report = nattrace.analyze(Pipe(truth.paths["inside"].read_bytes()), truth.paths["outside"])
    assert {finding.code for finding in report.findings} == {"clock-offset", "clock-not-corrected"}
    assert not any(crossing.latency.measurable for flow in report.flows for crossing in flow.crossings)
    clock = next(point.clock for point in report.points if point.clock.at is not None)
    assert abs(abs(clock.offset_ns) - 5 * SECOND) <= (clock.bound_ns or 0)
    check_accounting(report)


def test_a_reference_that_shares_no_packet_keeps_nobody_from_being_corrected(tmp_path: Path) -> None:
    network = Network(8)
    lonely = routed("udp", ("192.0.2.1", 5353), ("192.0.2.2", 5353), points=("a-lonely",))
    flows = [masquerade("tcp", (f"172.17.0.{n}", 4000), ("198.51.100.1", 443), 5000 + n) for n in range(2, 6)]
    for n in range(20):
        network.send(lonely, network.rng.randbytes(20))
        for c in flows:
            network.wait_us(5_000)
            network.send(c, network.rng.randbytes(40), reply=n % 2 == 1)
    network.clocks["outside"] = ClockError(3600 * SECOND)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    found = clocks(report)
    assert found["a-lonely"].reference == "a-lonely"
    assert found["outside"].reference == found["inside"].reference == "inside"
    assert abs(found["outside"].offset_ns - 3600 * SECOND) <= (found["outside"].bound_ns or 0)


def outgoing_ttl(network: Network, ttl: int) -> None:
    """Let the router set the TTL of what it sends out (iptables -j TTL --ttl-set)."""
    capture = network.captures["outside"]
    for n, (time_ns, frame, serial) in enumerate(capture.packets):
        if serial not in network._replies:
            capture.packets[n] = (time_ns, frame[:22] + bytes([ttl]) + frame[23:], serial)


@pytest.mark.parametrize("offset_ns", [0, 3600 * SECOND])
def test_causality_knows_better_than_a_ttl_that_is_set(offset_ns: int, tmp_path: Path) -> None:
    network = Network(9)
    flows = [
        masquerade(kind, (f"172.17.0.{n}", 4000), ("198.51.100.1", 443), 5000 + n)
        for kind in ("tcp", "udp")
        for n in range(2, 6)
    ]
    for n in range(20):
        for c in flows:
            network.wait_us(5_000)
            network.send(c, network.rng.randbytes(40), reply=n % 2 == 1)
    outgoing_ttl(network, 255)
    network.clocks["outside"] = ClockError(offset_ns, 27.0 if offset_ns else 0.0)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    assert flows_told(report) == expected_flows(truth)


def test_a_ttl_that_is_set_is_no_clock(tmp_path: Path) -> None:
    """One host, packets of one direction only: the TTL says the wrong way, and nothing else says any."""
    network = Network(10)
    flows = [masquerade("udp", (f"172.17.0.{n}", 514), ("198.51.100.1", 514), 5000 + n) for n in range(2, 6)]
    for _ in range(20):
        for c in flows:
            network.wait_us(800, 1200)
            network.send(c, network.rng.randbytes(40))
    outgoing_ttl(network, 255)
    report = nattrace.analyze(*network.write(tmp_path).sources)
    assert all(clock.at is None for clock in clocks(report).values())
    assert report.accounting.unmatched == {}


# -- what no clock explains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counting", [False, True])
def test_one_ping_that_was_run_again_is_not_a_clock(counting: bool, tmp_path: Path) -> None:
    """Same host, same server, same ICMP id and payload; identifications are counters that start somewhere else."""
    network = Network(6)
    for missed in ("outside", "inside"):
        c = masquerade("icmp", ("172.17.0.2", 1), ("198.51.100.1", 1), 1)
        start = network.rng.randint(1, 60_000)
        for n in range(40):
            network.wait_us(1_000_000)
            ip_id = start + n if counting else 0
            network.send(c, bytes(48), reply=n % 2 == 1, ip_id=ip_id, unseen=[missed])
        network.wait_us(3600_000_000)
    report = nattrace.analyze(*network.write(tmp_path).sources)
    assert report.accounting.matched == 0
    assert all(clock.at is None for clock in clocks(report).values())


def test_a_device_that_counts_from_zero_after_every_start_is_not_a_clock(tmp_path: Path) -> None:
    """Two runs of one small device are equal to the last byte, its counter of identifications included."""
    network = Network(7)
    script = [network.rng.randbytes(40) for _ in range(50)]
    c = masquerade("udp", ("172.17.0.2", 4000), ("198.51.100.1", 514), 4000)
    for missed in ("outside", "inside"):
        for n, payload in enumerate(script):
            network.wait_us(100_000)
            network.send(c, payload, ip_id=n + 1, unseen=[missed])
        network.wait_us(3600_000_000)
    report = nattrace.analyze(*network.write(tmp_path).sources)
    assert report.accounting.matched == 0
    assert all(clock.at is None for clock in clocks(report).values())


def test_the_same_bytes_at_another_time_are_the_same_packets(tmp_path: Path) -> None:
    """A replay (tcpreplay) repeats both ends' random numbers: nothing tells it from a clock, and the finding says so."""
    truth = simulate(tmp_path, Traffic(clock=ClockError(-4 * 3600 * SECOND)))
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) == 0
    (finding,) = report.findings
    assert finding.advice is not None
    assert "replayed" in finding.advice


def test_a_replay_that_both_points_saw_is_no_clock(tmp_path: Path) -> None:
    """Both the traffic and its replay are inside; outside is the replay only: each key is there twice inside."""
    truth = simulate(tmp_path, Traffic())
    packets = list(zip(readings(truth, "inside"), frames(truth, "inside"), strict=True))
    earlier = [(time_ns - 3600 * SECOND, frame) for time_ns, frame in packets]
    write_pcap(tmp_path / "inside.pcap", earlier + packets)
    report = nattrace.analyze(str(tmp_path / "inside.pcap"), *truth.sources[1:])
    check_accounting(report)
    assert clocks(report)["outside"].at is None
    for row in report.rewrites:
        assert min(row.before.frame, row.after.frame) <= len(packets)
        inside = row.before if row.before.point == "inside" else row.after
        assert inside.frame > len(packets)
