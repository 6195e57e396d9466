"""The recorded kernel NAT of tests/fixtures: translations, rows and losses are the kernel's, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nattrace
from lab.check import (
    check_accounting,
    check_against_truth,
    check_errors,
    check_losses,
    check_rows,
    check_translations,
    read_points,
)
from lab.record import MAX_FIXTURE_BYTES
from lab.truth import Hop, Truth, parse_conntrack

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RECORDED = sorted((FIXTURES / "lab").iterdir())
IDS = [folder.name for folder in RECORDED]


@pytest.fixture(scope="module", params=RECORDED, ids=IDS)
def recorded(request: pytest.FixtureRequest) -> tuple[Any, Truth, Path]:
    """One fixture: its report, its truth, its folder."""
    folder: Path = request.param
    report = nattrace.analyze(*sorted(folder.glob("*.pcap")))
    return report, Truth.load(folder / "truth.json"), folder


def test_translations_are_the_kernels(recorded: tuple[Any, Truth, Path]) -> None:
    report, truth, folder = recorded
    check_translations(report, truth, read_points(folder, truth))


def test_rows_are_the_packets_that_the_kernel_rewrote(recorded: tuple[Any, Truth, Path]) -> None:
    report, truth, folder = recorded
    check_rows(report, truth, read_points(folder, truth))


def test_losses_are_what_the_kernel_dropped(recorded: tuple[Any, Truth, Path]) -> None:
    report, truth, folder = recorded
    check_losses(report, truth, read_points(folder, truth))


def test_icmp_errors_crossed_as_the_kernels_entries_say(recorded: tuple[Any, Truth, Path]) -> None:
    report, truth, folder = recorded
    check_errors(report, truth, folder)


def test_every_record_is_accounted_for(recorded: tuple[Any, Truth, Path]) -> None:
    report, _, folder = recorded
    check_accounting(report, folder)


@pytest.mark.parametrize("folder", RECORDED, ids=IDS)
def test_points_given_in_another_order_change_nothing(folder: Path) -> None:
    truth = Truth.load(folder / "truth.json")
    report = nattrace.analyze(*sorted(folder.glob("*.pcap"), reverse=True))

    check_against_truth(report, truth, folder)


def test_the_docker_host_says_what_its_conntrack_says() -> None:
    folder = FIXTURES / "docker-ping"
    entries = tuple(parse_conntrack((folder / "conntrack.txt").read_text()))
    truth = Truth((Hop("docker0", "eth0", "conntrack.txt", entries),))
    report = nattrace.analyze(folder / "docker0.pcap", folder / "eth0.pcap")

    check_against_truth(report, truth, folder)
    assert sum(1 for row in report.rewrites if row.changed) == 40


@pytest.mark.parametrize("folder", RECORDED, ids=IDS)
def test_a_fixture_is_small_and_has_its_recipe(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_FIXTURE_BYTES
    assert f"tests/lab/record.py {folder.name}" in (folder / "README.md").read_text()
