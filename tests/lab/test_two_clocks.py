"""The recorded kernel NAT again, as if the points had been on two hosts: the translations stay the kernel's.

A network namespace has no CLOCK_REALTIME of its own, so the recordings' timestamps are written anew.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

import nattrace
from lab.check import check_accounting, check_losses, check_rows, check_translations, read_points
from lab.truth import Truth

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lab"
SECOND = 10**9

#: Ticks in a second by the magic number of a pcap (draft-ietf-opsawg-pcap); tcpdump wrote them in native order.
TICKS = {0xA1B2C3D4: 10**6, 0xA1B23C4D: 10**9}

#: One host's traffic through one or two NATs, captured on both sides. Numbers that tell packets apart at any
#: distance (TCP's, IP identifications) are in all of them but the last.
RECORDED = (
    "conntrack_flushed", "dropped_in_forward", "half_translated", "host_traffic", "icmp_id_collision",
    "icmp_random_fully", "identical_keepalives", "ipv6_masquerade", "partial_capture", "port_collision",
    "published_port", "published_port_masqueraded", "routed", "two_hops",
)  # fmt: skip
WITHOUT_NUMBERS = "identical_ipv6_pings"


def with_other_clock(source: Path, target: Path, offset_ns: int, drift_ppm: float) -> None:
    """Copy a pcap as a clock would have stamped it that is off and drifts, from the first packet on."""
    raw = bytearray(source.read_bytes())
    ticks = TICKS[int.from_bytes(raw[:4], "little")]
    at, begin = 24, None
    while at < len(raw):
        seconds, rest, captured = struct.unpack_from("<III", raw, at)
        true_ns = seconds * SECOND + rest * (SECOND // ticks)
        begin = true_ns if begin is None else begin
        read_ns = true_ns + offset_ns + round(drift_ppm * (true_ns - begin) / 1e6)
        struct.pack_into("<II", raw, at, read_ns // SECOND, read_ns % SECOND // (SECOND // ticks))
        at += 16 + captured
    target.write_bytes(raw)


def other_host(folder: Path, tmp_path: Path, offset_ns: int, drift_ppm: float) -> Truth:
    """Write the recording as seen by a host whose clock is right and another, that of the outermost point."""
    truth = Truth.load(folder / "truth.json")
    for path in folder.glob("*.pcap"):
        shutil.copy(path, tmp_path)
    outer = truth.hops[-1].outer
    with_other_clock(folder / f"{outer}.pcap", tmp_path / f"{outer}.pcap", offset_ns, drift_ppm)
    return truth


@pytest.mark.parametrize("drift_ppm", [0.0, 27.0])
@pytest.mark.parametrize("offset_ns", [5 * SECOND, -31 * SECOND, 3600 * SECOND])
@pytest.mark.parametrize("name", RECORDED)
def test_translations_and_rows_are_the_kernels(
    name: str, offset_ns: int, drift_ppm: float, tmp_path: Path
) -> None:
    truth = other_host(FIXTURES / name, tmp_path, offset_ns, drift_ppm)
    report = nattrace.analyze(*sorted(tmp_path.glob("*.pcap")))
    points = read_points(tmp_path)
    check_translations(report, truth, points)
    check_rows(report, truth, points)
    check_losses(report, truth, points)
    check_accounting(report, tmp_path)
    plain = nattrace.analyze(*sorted((FIXTURES / name).glob("*.pcap")))
    assert report.accounting == plain.accounting
    outer = truth.hops[-1].outer
    (clock,) = {point.clock for point in report.points if point.name == outer}
    # the points were on one host: what was added is all the offset there is
    before = next(point.first for point in plain.points if point.name == outer)
    assert before is not None
    assert clock.at is not None
    assert clock.bound_ns is not None
    since_ns = clock.at - offset_ns - before
    assert abs(clock.offset_ns - offset_ns - drift_ppm * since_ns / 1e6) <= clock.bound_ns + 1


@pytest.mark.parametrize("offset_ns", [5 * SECOND, 3600 * SECOND])
def test_packets_without_numbers_are_no_reason_to_believe_in_a_clock(offset_ns: int, tmp_path: Path) -> None:
    """Pings over IPv6 with one payload are the same in every run of the test: nothing is claimed."""
    truth = other_host(FIXTURES / WITHOUT_NUMBERS, tmp_path, offset_ns, 0.0)
    report = nattrace.analyze(*sorted(tmp_path.glob("*.pcap")))
    check_rows(report, truth, read_points(tmp_path))
    check_accounting(report, tmp_path)
    assert not any(flow.translations for flow in report.flows)
    assert all(point.clock.at is None for point in report.points)
