"""TCP data that changed size: every byte is found, by what a segmenting and merging network knows to be true."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resizing import Settings, Truth, converse
from verdict import check_accounting, rows_told

import nattrace

if TYPE_CHECKING:
    from nattrace import Report
    from nattrace.model import Rewrite

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=60)

#: How many segments a frame has at most, inside and outside: cut on the way, merged, both.
LARGEST = st.sampled_from([(8, 1), (1, 8), (8, 8), (3, 8)])


def judged(drawn: Settings, snaplen: int = 262144) -> tuple[Report, dict[tuple[int, int], Rewrite], Truth]:
    with tempfile.TemporaryDirectory() as folder:
        truth = converse(Path(folder), drawn, snaplen)
        report = nattrace.analyze(*truth.sources)
        rows = rows_told(report)
        check_accounting(report)
        return report, rows, truth


def check_sizes(report: Report, truth: Truth) -> None:
    """Check that the crossings count packets once and bytes as the network knows them."""
    (flow,) = report.flows
    for crossing in flow.crossings:
        back = crossing.direction == "reply"
        sent = "outside" if back else "inside"
        pairs = {
            pair[::-1] if back else pair: size
            for pair, size in truth.shared.items()
            if (pair in truth.replies) == back
        }
        assert crossing.matched == len({here for here, _ in pairs})
        changed = {
            (here, there): size
            for (here, there), size in pairs.items()
            if not size == truth.sizes[sent, here] == truth.sizes["inside" if back else "outside", there]
        }
        if not changed:
            assert crossing.segments is None
            continue
        before, after = {here for here, _ in changed}, {there for _, there in changed}
        assert crossing.segments is not None
        assert (crossing.segments.before, crossing.segments.after) == (len(before), len(after))
        assert crossing.segments.bytes == sum(changed.values())
        whole = sum(truth.sizes[sent, here] for here in before)
        assert crossing.segments.missing_bytes == whole - sum(changed.values())


@EXAMPLES
@given(seed=st.integers(0, 10**6), largest=LARGEST, version=st.sampled_from([4, 6]), counted=st.booleans())
def test_what_was_cut_and_merged_is_found_to_the_last_byte(
    seed: int, largest: tuple[int, int], version: int, counted: bool
) -> None:
    report, rows, truth = judged(Settings(seed=seed, largest=largest, version=version, counted=counted))
    assert set(rows) == set(truth.shared)
    check_sizes(report, truth)
    assert sum(c.lost + c.ambiguous + c.unknowable for f in report.flows for c in f.crossings) == 0


@EXAMPLES
@given(
    seed=st.integers(0, 10**6),
    largest=LARGEST,
    shift=st.integers(1, 2**32 - 1),
    connections=st.sampled_from([1, 1, 3]),
)
def test_behind_a_proxy_that_shifts_numbers_every_byte_is_found(
    seed: int, largest: tuple[int, int], shift: int, connections: int
) -> None:
    drawn = Settings(seed=seed, largest=largest, shift=shift, writes=24, connections=connections)
    report, rows, truth = judged(drawn)
    assert set(rows) == set(truth.shared)
    check_sizes(report, truth)
    assert {"shifted-numbers"} <= {each for row in rows.values() for each in row.evidence}
    assert sum(c.lost + c.ambiguous + c.unknowable for f in report.flows for c in f.crossings) == 0


@EXAMPLES
@given(
    seed=st.integers(0, 10**6),
    largest=LARGEST,
    shift=st.integers(1, 2**32 - 1),
    counted=st.booleans(),
    again=st.sampled_from([0.0, 0.4]),
    trouble=st.tuples(*[st.sampled_from([0.0, 0.1, 0.3])] * 3),
    connections=st.sampled_from([1, 2]),
    snaplen=st.sampled_from([54, 62, 66, 262144]),
)
def test_behind_such_a_proxy_no_row_is_wrong_whatever_happens(
    seed: int,
    largest: tuple[int, int],
    shift: int,
    counted: bool,
    again: float,
    trouble: tuple[float, float, float],
    connections: int,
    snaplen: int,
) -> None:
    lost, missed, reordered = trouble
    drawn = Settings(
        seed=seed, largest=largest, shift=shift, writes=24, counted=counted, connections=connections,
        again=again, lost=lost, missed=missed, reordered=reordered,
    )  # fmt: skip
    _, rows, truth = judged(drawn, snaplen)
    assert not set(rows) - set(truth.shared)


@EXAMPLES
@given(seed=st.integers(0, 10**6), largest=LARGEST)
def test_identifications_tell_retransmissions_from_what_was_lost(seed: int, largest: tuple[int, int]) -> None:
    drawn = Settings(seed=seed, largest=largest, writes=25, lost=0.1, missed=0.05, again=0.3, reordered=0.05)
    report, rows, truth = judged(drawn)
    assert set(rows) == set(truth.shared)
    check_sizes(report, truth)
    assert sum(c.ambiguous for f in report.flows for c in f.crossings) == 0


@EXAMPLES
@given(seed=st.integers(0, 10**6), largest=LARGEST, version=st.sampled_from([4, 6]))
def test_without_identifications_retransmissions_are_never_confused(
    seed: int, largest: tuple[int, int], version: int
) -> None:
    drawn = Settings(
        seed=seed,
        largest=largest,
        version=version,
        writes=25,
        counted=False,
        lost=0.1,
        missed=0.05,
        again=0.3,
    )
    _, rows, truth = judged(drawn)
    assert not set(rows) - set(truth.shared)
    # what was sent once is found; what was sent twice may be ambiguous
    once = {
        pair
        for pair in truth.shared
        if not {("inside", pair[0]), ("outside", pair[1])} & truth.sent_again
    }  # fmt: skip
    assert once <= set(rows)


@pytest.mark.parametrize("snaplen", [42, 54, 58, 66, 96])
@pytest.mark.parametrize("largest", [(8, 1), (8, 8)])
def test_a_short_snaplen_finds_the_same_or_less_and_nothing_wrong(
    snaplen: int, largest: tuple[int, int]
) -> None:
    for seed in range(10):
        drawn = Settings(seed=seed, largest=largest, writes=20, lost=0.1, missed=0.05, again=0.3)
        _, rows, truth = judged(drawn, snaplen)
        assert not set(rows) - set(truth.shared), seed
        if snaplen >= 54:
            assert set(rows) == set(truth.shared), seed
