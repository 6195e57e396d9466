"""Grouping by keys against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.flows import members, sorted_groups

#: Keys that differ in all bits, and keys that differ only in the low ones, where the index rides.
KEY = st.one_of(st.integers(0, 6).map(lambda n: n * 0x9E3779B97F4A7C15 % 2**64), st.integers(0, 40))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(KEY, max_size=40))
def test_sorted_groups_are_the_groups_of_equal_keys(keys: list[int]) -> None:
    order, starts = sorted_groups(np.array(keys, np.uint64))
    groups = [part.tolist() for part in np.split(order, starts[1:])] if keys else []
    by_key: dict[int, list[int]] = {}
    for n, key in enumerate(keys):
        by_key.setdefault(key, []).append(n)
    assert sorted(groups) == sorted(by_key.values())
    label = members(order, starts) if keys else np.empty(0, np.int64)
    assert label.tolist() == [groups.index(by_key[key]) for key in keys]
