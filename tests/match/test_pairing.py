"""Pairing against slow, obvious twins."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.pairing import group_ids, nearest_distance, nearest_pairs, unique_pairs

#: Few distinct keys, so that repeats are common; high bits differ, as a hash's do, or only low ones, as none's.
SPREAD = 0x9E3779B97F4A7C15
KEYS = st.lists(st.integers(0, 12).map(lambda n: n * SPREAD % 2**64), max_size=30)
LOW_KEYS = st.lists(st.one_of(st.integers(0, 40), st.integers(2**64 - 5, 2**64 - 1)), max_size=30)


def keys(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def unique_pairs_twin(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    once_a = {key for key, count in Counter(a).items() if count == 1}
    once_b = {key for key, count in Counter(b).items() if count == 1}
    return [(i, b.index(key)) for i, key in enumerate(a) if key in once_a & once_b]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(KEYS, KEYS)
def test_keys_that_occur_once_on_both_sides_are_pairs(a: list[int], b: list[int]) -> None:
    found = unique_pairs(keys(a), keys(b))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == unique_pairs_twin(a, b)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(LOW_KEYS, LOW_KEYS)
def test_keys_that_differ_only_where_the_index_rides_are_never_confused(a: list[int], b: list[int]) -> None:
    found_a, found_b = unique_pairs(keys(a), keys(b))
    pairs = list(zip(found_a.tolist(), found_b.tolist(), strict=True))
    assert set(pairs) <= set(unique_pairs_twin(a, b))
    assert pairs == sorted(pairs)


def test_a_million_distinct_keys_lose_almost_none_to_shortened_keys() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**64, 200_000, np.uint64)
    other = rng.permutation(values.size)
    a, b = unique_pairs(values, values[other])
    assert (values[a] == values[other][b]).all()
    # 2**18 rows leave 45 bits of the key: a chance of about 200000**2 / 2**45 = 0.001 of one pair lost
    assert a.size >= values.size - 4


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(KEYS, min_size=1, max_size=4))
def test_equal_keys_get_equal_ids_in_all_arrays(lists: list[list[int]]) -> None:
    ids = group_ids(*(keys(each) for each in lists))
    flat_keys = [key for each in lists for key in each]
    flat_ids = [number for part in ids for number in part.tolist()]
    assert [part.size for part in ids] == [len(each) for each in lists]
    assert len(set(zip(flat_keys, flat_ids, strict=True))) == len(set(flat_keys)) == len(set(flat_ids))


# -- nearest in time ---------------------------------------------------------------------------------------


def runner_up(distances: list[int], partner: int) -> float:
    """Return the distance of the nearest rival of the row at `partner`."""
    return min((d for n, d in enumerate(distances) if n != partner), default=float("inf"))


def one_round(
    a: list[tuple[int, int]], b: list[tuple[int, int]], window_ns: int, floor_ns: int, margin: int
) -> list[tuple[int, int]]:
    """Return the pairs of mutually nearest rows of one group whose rivals are all far enough away."""
    found = []
    for i, (group, time) in enumerate(a):
        own = [abs(time - t) if g == group else 10**9 for g, t in b]
        for j, (g, t) in enumerate(b):
            if g != group or own[j] > window_ns:
                continue
            other = [abs(t - t2) if g2 == g else 10**9 for g2, t2 in a]
            needed = max(own[j], floor_ns) * margin
            if own[j] <= min(own) and other[i] <= min(other):
                nearest_rival = min(runner_up(own, j), runner_up(other, i))
                if nearest_rival >= needed:
                    found.append((i, j))
    return found


def nearest_pairs_twin(
    a: list[tuple[int, int]],
    b: list[tuple[int, int]],
    window_ns: int,
    floor_ns: int,
    margin: int,
    rounds: int,
) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    rest_a, rest_b = list(range(len(a))), list(range(len(b)))
    for _ in range(rounds):
        pairs = one_round([a[i] for i in rest_a], [b[j] for j in rest_b], window_ns, floor_ns, margin)
        if not pairs:
            break
        chosen = {(rest_a[i], rest_b[j]) for i, j in pairs}
        found |= chosen
        rest_a = [i for i in rest_a if i not in {i for i, _ in chosen}]
        rest_b = [j for j in rest_b if j not in {j for _, j in chosen}]
    return found


ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=9)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(ROWS, ROWS, st.integers(1, 80), st.integers(1, 6), st.integers(2, 8), st.integers(1, 3))
def test_nearest_pairs_are_mutual_and_without_a_near_rival(
    a: list[tuple[int, int]],
    b: list[tuple[int, int]],
    window_ns: int,
    floor_ns: int,
    margin: int,
    rounds: int,
) -> None:
    columns = [np.array([row[n] for row in rows], np.int64) for rows in (a, b) for n in (0, 1)]
    found_a, found_b = nearest_pairs(
        *columns, window_ns=window_ns, floor_ns=floor_ns, margin=margin, rounds=rounds
    )
    found = list(zip(found_a.tolist(), found_b.tolist(), strict=True))
    assert set(found) == nearest_pairs_twin(a, b, window_ns, floor_ns, margin, rounds)
    assert len(found) == len(set(found))
    assert found_a.tolist() == sorted(found_a.tolist())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(ROWS, ROWS)
def test_the_nearest_row_of_the_other_side_is_this_far(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    columns = [np.array([row[n] for row in rows], np.int64) for rows in (a, b) for n in (0, 1)]
    expected = [min((abs(time - t) for g, t in b if g == group), default=2**62) for group, time in a]
    assert nearest_distance(*columns).tolist() == expected


def test_a_tie_is_never_broken() -> None:
    zero = np.zeros(1, np.int64)
    two = np.zeros(2, np.int64)
    a, _ = nearest_pairs(
        zero, np.array([1000]), two, np.array([900, 1100]), window_ns=10**6, floor_ns=1, margin=8, rounds=4
    )
    assert a.size == 0


def test_a_solved_rival_frees_its_neighbour() -> None:
    # 0 and 5000 belong together beyond doubt; once they are gone, 100 and 190 have no rival left
    a = np.array([0, 100])
    b = np.array([1, 190])
    group = np.zeros(2, np.int64)
    once = nearest_pairs(group, a, group, b, window_ns=10**6, floor_ns=1, margin=8, rounds=1)
    twice = nearest_pairs(group, a, group, b, window_ns=10**6, floor_ns=1, margin=8, rounds=2)
    assert once[0].tolist() == [0]
    assert twice[0].tolist() == [0, 1]
    assert twice[1].tolist() == [0, 1]
