"""Overlapping byte ranges, held against the obvious loops."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.resize.ranges import PIECES_LIMIT, Ranges, decide, overlapping

#: Group, start, length.
Drawn = tuple[int, int, int]
RANGES = st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 50), st.integers(1, 30)), max_size=12)
QUICK = settings(deadline=None, derandomize=True, max_examples=300)
FAR = 2**62


def ranges(drawn: list[Drawn]) -> Ranges:
    group, start, length = np.array(drawn, np.int64).reshape(-1, 3).T
    return Ranges(group, start, start + length)


@QUICK
@given(RANGES, RANGES)
def test_all_overlaps_and_no_others_are_found(first: list[Drawn], second: list[Drawn]) -> None:
    i, j, left_out = overlapping(ranges(first), ranges(second))
    expected = [
        (n, m)
        for n, (group, start, length) in enumerate(first)
        for m, (other, begin, size) in enumerate(second)
        if group == other and start < begin + size and begin < start + length
    ]
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert not left_out.size


def test_a_range_that_overlaps_more_than_a_packet_can_is_left_out() -> None:
    many = ranges([(0, 2 * n, 2) for n in range(PIECES_LIMIT + 1)])
    one = ranges([(0, 0, 2 * PIECES_LIMIT + 2), (0, 0, 4)])
    i, _, left_out = overlapping(one, many)
    assert left_out.tolist() == [0]
    assert i.tolist() == [1, 1]


def test_sequence_numbers_far_apart_do_not_mix_groups() -> None:
    first = Ranges(np.array([0, 1]), np.array([2**40, -(2**40)]), np.array([2**40 + 5, 5 - 2**40]))
    second = Ranges(np.array([1, 0]), np.array([2**40, -(2**40)]), np.array([2**40 + 5, 5 - 2**40]))
    assert overlapping(first, second)[0].size == 0


def slow_decide(
    pairs: list[tuple[int, int]], spans: list[tuple[int, int]], cost: list[int], margin: int, rounds: int
) -> tuple[set[int], set[int]]:
    """Decide as the docstring says, one pair after the other."""
    rivals = [
        {
            q
            for q in range(len(pairs))
            if q != p
            and (pairs[p][0] == pairs[q][0] or pairs[p][1] == pairs[q][1])
            and spans[p][0] < spans[q][1]
            and spans[q][0] < spans[p][1]
        }
        for p in range(len(pairs))
    ]
    standing, taken = set(range(len(pairs))), set[int]()
    for _ in range(rounds):
        clear = {
            p
            for p in standing - taken
            if all(cost[q] // margin >= max(cost[p], 10) for q in rivals[p] & standing)
        }
        if not clear:
            break
        taken |= clear
        standing -= {q for p in taken for q in rivals[p]} - taken
    return taken, standing - taken


@QUICK
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 3), st.integers(0, 20), st.integers(1, 10), st.integers(0, 500)
        ),
        max_size=8,
    )
)
def test_the_cheapest_overlap_is_taken_where_it_clearly_is(
    drawn: list[tuple[int, int, int, int, int]],
) -> None:
    i, j, start, length, cost = np.array(drawn, np.int64).reshape(-1, 5).T
    taken, contested = decide(i, j, start, start + length, cost, floor=10, margin=8, rounds=4)
    expected = slow_decide(
        [(one, other) for one, other, *_ in drawn],
        [(begin, begin + size) for _, _, begin, size, _ in drawn],
        [each[-1] for each in drawn],
        8,
        4,
    )
    assert (set(np.flatnonzero(taken).tolist()), set(np.flatnonzero(contested).tolist())) == expected
