"""What is usual between two points: figures as numpy's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nattrace.match.usual import percentile


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.sampled_from([0, 12.5, 50, 99.5, 100]))
def test_percentiles_are_those_of_numpy(values: list[int], percent: float) -> None:
    assert percentile(np.array(values), percent) == np.percentile(values, percent)
