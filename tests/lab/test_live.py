"""Every scenario on this machine's kernel, now: the report must say what conntrack says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import nattrace
from lab.check import check_against_truth
from lab.scenarios import SCENARIOS
from lab.scenarios.basic import icmp_random_fully
from lab.scenarios.recording import NotHereError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.lab


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_report_of_live_captures_says_what_the_kernel_did(name: str, tmp_path: Path) -> None:
    try:
        truth = SCENARIOS[name](tmp_path)
    except NotHereError as absent:
        pytest.skip(str(absent))

    report = nattrace.analyze(*sorted(tmp_path.glob("*.pcap")))

    check_against_truth(report, truth, tmp_path)


def test_a_hundred_pings_at_once_are_told_apart(tmp_path: Path) -> None:
    # 96 requests of equal seq and payload in one burst: now and then two of them share their IP id as well.
    truth = icmp_random_fully(tmp_path, containers=8, ids=12, rounds=20)

    report = nattrace.analyze(*sorted(tmp_path.glob("*.pcap")))

    check_against_truth(report, truth, tmp_path)
    assert sum(1 for row in report.rewrites if row.changed) == 2 * 8 * 12 * 20
