"""What a point recorded twice is one packet; what a sender sent twice is two. The simulator knows which is which."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from simulation import Network, Traffic, masquerade, simulate
from sweep import FAMILIES
from verdict import check_accounting, judge_rows

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

    from simulation import Simulated

SEEDS = range(3)
TRAFFIC = Traffic(flows=12, packets_per_flow=16, servers=2, timestamps=True)


def again(truth: Simulated) -> int:
    """Return how many records there are of packets that their point had recorded before."""
    return sum(count - 1 for serials in truth.serials.values() for count in Counter(serials).values())


def analyzed(folder: Path, traffic: Traffic) -> tuple[nattrace.Report, Simulated, int]:
    """Return report and truth, after checking that no row is wrong, and how many packets are missed."""
    truth = simulate(folder, traffic)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    check_accounting(report)
    assert not rows.wrong
    return report, truth, len(rows.missed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("protocol", ["icmp", "tcp"])
def test_what_carries_a_number_of_its_own_is_told_once_and_matched(
    protocol: str, share: float, family: str, tmp_path: Path
) -> None:
    for seed in SEEDS:
        traffic = replace(TRAFFIC, seed=seed, duplicated=share, protocols=(protocol,), **FAMILIES[family])
        report, truth, missed = analyzed(tmp_path, traffic)
        assert missed == 0
        assert report.accounting.unmatched == {"duplicate": again(truth)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_point_that_records_all_twice_records_datagrams_twice_as_well(family: str, tmp_path: Path) -> None:
    for seed in SEEDS:
        report, truth, missed = analyzed(
            tmp_path, replace(TRAFFIC, seed=seed, duplicated=1.0, **FAMILIES[family])
        )
        assert missed == 0
        assert report.accounting.unmatched == {"duplicate": again(truth)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trouble", [{"sent_twice": 0.2}, {"sent_twice": 1.0}, {"resent": 0.5}])
def test_what_its_sender_repeats_is_another_packet(
    trouble: dict[str, Any], family: str, tmp_path: Path
) -> None:
    for seed in SEEDS:
        traffic = replace(TRAFFIC, seed=seed, pure_acks=True, **trouble, **FAMILIES[family])
        report, _, _ = analyzed(tmp_path, traffic)
        assert "duplicate" not in report.accounting.unmatched


def test_a_datagram_without_identification_is_not_repeated_by_the_records_of_others(tmp_path: Path) -> None:
    """One packet in five is there twice: nobody knows of a datagram whether it is its record or the next one."""
    for seed in SEEDS:
        traffic = replace(TRAFFIC, seed=seed, duplicated=0.2, protocols=("udp", "tcp"), zero_ids=True)
        report, truth, missed = analyzed(tmp_path, traffic)
        unsure = [
            serial
            for serials in truth.serials.values()
            for serial, count in Counter(serials).items()
            if count > 1 and truth.conversations[truth.owner[serial]].protocol == "udp"
        ]
        assert report.accounting.unmatched["duplicate"] == again(truth) - len(unsure)
        assert missed == len(set(unsure))


def test_keep_alives_are_packets_where_everything_is_recorded_twice(tmp_path: Path) -> None:
    """Without identifications, and all alike: their records are not told apart, and none is taken for another."""
    network = Network(5)
    pings = masquerade("icmp", ("172.17.0.2", 1), ("198.51.100.1", 1), 700)
    alive = masquerade("udp", ("172.17.0.2", 4500), ("198.51.100.1", 4500), 900)
    for n in range(40):
        for conversation, payload in ((pings, network.rng.randbytes(24)), (alive, b"\xff")):
            network.wait_us(15_000)
            serial = network.send(conversation, payload, reply=n % 2 == 1, ip_id=0)[0]
            for point in ("inside", "outside"):
                network.repeat(point, serial)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert report.accounting.unmatched["duplicate"] == 80  # the pings' own
    assert not {here for _, here, _, _ in rows.missed} & {
        frame for frame, serial in enumerate(truth.serials["inside"], 1) if truth.owner[serial] == 0
    }
