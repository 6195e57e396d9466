"""A clock that is set just after a capture begins, or before it ends: few packets say so, and no other one is the worse for it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from match.clock.test_compare import SECOND, check_rows, clocks
from simulation import ClockError, Traffic, simulate

import nattrace
from nattrace.model import Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from simulation import Simulated

    from nattrace import Report

#: Packets that the shortest pieces are made of, at most.
FEW = 16


def lost_falsely(report: Report, truth: Simulated) -> int:
    """Return how many packets that both points have are called lost."""
    both = set(truth.serials["inside"]) & set(truth.serials["outside"])
    rows = [row for row in report.rewrites.all() if isinstance(row, Unmatched) and row.reason == "lost"]
    return sum(truth.serials[row.packet.point][row.packet.frame - 1] in both for row in rows)


@pytest.mark.parametrize("loss", [0.0, 0.1])
@pytest.mark.parametrize("end", ["begins", "ends"])
@pytest.mark.parametrize("jump_ns", [20_000_000, -2 * SECOND, 29 * SECOND, 600 * SECOND, -3600 * SECOND])
@pytest.mark.parametrize("offset_ns", [0, 31 * SECOND, -3600 * SECOND])
def test_few_packets_before_or_behind_a_step(
    offset_ns: int, jump_ns: int, end: str, loss: float, tmp_path: Path
) -> None:
    traffic = Traffic(flows=12, packets_per_flow=20, spacing_us=200_000, loss_inside=loss, loss_outside=loss)
    length_ns = 240 * 200_000_000
    plain = simulate(tmp_path, traffic)
    missed = check_rows(nattrace.analyze(*plain.sources), plain)
    after_ns = 1_000_000_000 if end == "begins" else length_ns - 1_000_000_000
    truth = simulate(tmp_path, replace(traffic, clock=ClockError(offset_ns, 27.0, ((after_ns, jump_ns),))))
    report = nattrace.analyze(*truth.sources)
    assert check_rows(report, truth) <= missed + FEW
    assert lost_falsely(report, truth) == 0


@pytest.mark.parametrize("seed", range(24))
def test_steps_at_any_time(seed: int, tmp_path: Path) -> None:
    """Steps of both signs, also in silence and close to each other, from offsets of up to an hour, with losses."""
    chance = random.Random(seed)
    loss = chance.choice([0, 0.05, 0.3])
    traffic = Traffic(
        seed=seed, flows=12, packets_per_flow=20, spacing_us=chance.choice([1_000, 200_000, 1_000_000]),
        version=chance.choice([4, 6]), loss_inside=loss, loss_outside=loss, timestamps=True,
    )  # fmt: skip
    length_ns = 240 * traffic.spacing_us * 1000
    jumps = [20_000_000, 500_000_000, 2 * SECOND, 29 * SECOND, 31 * SECOND, 600 * SECOND, 3600 * SECOND]
    steps = sorted(
        (chance.randrange(length_ns), chance.choice([1, -1]) * chance.choice(jumps))
        for _ in range(chance.randrange(1, 6))
    )
    offset_ns = chance.choice([0, 1_000_000, -5 * SECOND, 31 * SECOND, -3600 * SECOND])
    truth = simulate(
        tmp_path, replace(traffic, clock=ClockError(offset_ns, chance.choice([0, 27.0]), tuple(steps)))
    )
    report = nattrace.analyze(*truth.sources)
    check_rows(report, truth)
    assert clocks(report)["inside"].at is None
