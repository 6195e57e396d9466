"""Offset and drift from causality: the true offset is inside the stated error, whatever the latencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.clock.fit import MIN_PIECE, fit
from nattrace.match.clock.line import Bounds, lower_hull

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECOND = 10**9
EPOCH_NS = 1_700_000_000 * SECOND


def seen(
    packets: int,
    offset_ns: int = 0,
    ppm: float = 0.0,
    steps: tuple[tuple[float, int], ...] = (),
    *,
    seed: int = 0,
    spacing_ns: int = 500_000,
    latency_ns: tuple[int, int] = (3_000, 60_000),
    one_way: bool = False,
) -> tuple[Bounds, NDArray[np.int64]]:
    """Return what two clocks say of packets, and the true offset at each; steps are (share of packets, ns)."""
    rng = np.random.default_rng(seed)
    sent = EPOCH_NS + np.cumsum(rng.integers(spacing_ns // 2, spacing_ns * 3 // 2, packets))
    side = np.ones(packets, np.int8) if one_way else rng.choice(np.array([1, -1], np.int8), packets)
    arrived = sent + rng.integers(*latency_ns, packets)
    there, here = np.where(side > 0, arrived, sent), np.where(side > 0, sent, arrived)
    true = offset_ns + np.rint(ppm * 1e-6 * (there - EPOCH_NS)).astype(np.int64)
    for share, jump in steps:
        true[int(share * packets) :] += jump
    return Bounds(there + true, there + true - here, side), true


@settings(max_examples=60, deadline=None)
@given(
    packets=st.integers(MIN_PIECE * 3, 400),
    offset_ns=st.integers(-(10**15), 10**15),
    ppm=st.floats(-150, 150),
    spacing_ns=st.integers(10_000, 10**9),
    longest_ns=st.integers(4_000, 5 * 10**8),
    seed=st.integers(0, 2**32),
)
def test_the_true_offset_is_inside_the_bound(
    packets: int, offset_ns: int, ppm: float, spacing_ns: int, longest_ns: int, seed: int
) -> None:
    bounds, true = seen(
        packets, offset_ns, ppm, seed=seed, spacing_ns=spacing_ns, latency_ns=(3_000, longest_ns)
    )
    (piece,) = fit(bounds, 0) or []
    if piece.line.bound_ns is not None:  # one direction had less than three packets
        error = np.abs(piece.line.offsets(bounds.time_ns) - true)
        assert error.max() <= piece.line.bound_ns
        # and no packet arrives before it was sent
        latency = (bounds.delta_ns - piece.line.offsets(bounds.time_ns)) * bounds.side
        assert latency.min() >= -1


def test_the_error_is_about_half_of_the_quickest_way_there_and_back() -> None:
    bounds, _ = seen(5_000, 3600 * SECOND, 27.0, spacing_ns=10**8, latency_ns=(100_000, 400_000))
    (piece,) = fit(bounds, 0) or []
    assert piece.line.drift * 1e6 == pytest.approx(27.0, abs=0.05)
    assert piece.line.bound_ns is not None
    assert 100_000 <= piece.line.bound_ns <= 130_000


@pytest.mark.parametrize("ppm", [0.0, 27.0, -100.0])
@pytest.mark.parametrize(
    "steps",
    [
        ((0.5, 5 * SECOND),),
        ((0.5, -5 * SECOND),),
        ((0.1, 3600 * SECOND),),
        ((0.3, -2 * SECOND), (0.7, 20_000_000)),
        ((0.2, 10**6), (0.4, 10**6), (0.6, -(10**6)), (0.8, 50 * 365 * 86400 * SECOND)),
    ],
)
def test_steps_are_found_where_they_are(steps: tuple[tuple[float, int], ...], ppm: float) -> None:
    bounds, true = seen(600, 10**9, ppm, steps)
    pieces = fit(bounds, 0)
    assert pieces is not None
    found = [piece.start for piece in pieces[1:]]
    assert found == pytest.approx([int(share * 600) for share, _ in steps], abs=2)
    for piece in pieces:
        rows = slice(piece.start + 2, piece.stop - 2)
        assert piece.line.bound_ns is not None
        error = np.abs(piece.line.offsets(bounds.time_ns[rows]) - true[rows])
        assert error.max() <= piece.line.bound_ns


def test_a_few_wrong_pairs_change_nothing() -> None:
    bounds, true = seen(400, 31 * SECOND, 27.0)
    wrong = np.array([3, 77, 200, 399])
    delta = bounds.delta_ns.copy()
    delta[wrong] -= bounds.side[wrong] * np.array([10**7, 10**9, 10**12, 10**8])
    (piece,) = fit(Bounds(bounds.time_ns, delta, bounds.side), 0) or []
    assert piece.line.bound_ns is not None
    assert np.abs(piece.line.offsets(bounds.time_ns) - true).max() <= piece.line.bound_ns


def test_packets_of_one_direction_leave_the_error_unknown() -> None:
    bounds, true = seen(300, -3600 * SECOND, 0.0, one_way=True)
    (piece,) = fit(bounds, 0) or []
    assert piece.line.bound_ns is None
    # as if the quickest packet had taken no time: that is off by its latency, here less than 60 us
    assert np.abs(piece.line.offsets(bounds.time_ns) - true).max() < 60_000


def test_readings_in_microseconds_do_not_break_the_bounds() -> None:
    bounds, true = seen(2_000, 10**9 + 333, 27.0, latency_ns=(1, 900))
    coarse = bounds.time_ns // 1000 * 1000
    here = (bounds.time_ns - bounds.delta_ns) // 1000 * 1000
    (piece,) = fit(Bounds(coarse, coarse - here, bounds.side), 1000) or []
    assert piece.line.bound_ns is not None
    assert np.abs(piece.line.offsets(coarse) - true).max() <= piece.line.bound_ns


def test_noise_has_no_clock() -> None:
    rng = np.random.default_rng(1)
    time_ns = EPOCH_NS + np.arange(500) * 10**6
    delta_ns = rng.integers(-(10**12), 10**12, 500)
    assert fit(Bounds(time_ns, delta_ns, rng.choice(np.array([1, -1], np.int8), 500)), 0) is None


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=1, max_size=30, unique=True))
def test_the_hull_is_the_lowest_points(points: list[tuple[int, int]]) -> None:
    """A point is a corner when some straight line has it below all the others, on its own."""
    x, y = lower_hull(*(np.array(column, float) for column in zip(*points, strict=True)))
    corners = set(zip(x.tolist(), y.tolist(), strict=True))
    lowest: dict[int, int] = {}
    for px, py in points:
        lowest[px] = min(py, lowest.get(px, py))
    columns = sorted(lowest.items())
    for px, py in columns:
        chords = [
            (ay * (bx - px) + by * (px - ax)) / (bx - ax)
            for ax, ay in columns
            for bx, by in columns
            if ax < px < bx
        ]
        assert ((px, py) in corners) == all(py < chord - 1e-9 for chord in chords)
