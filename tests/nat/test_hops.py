"""Latencies and counts of single hops against sorted lists."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.edges import Edges
from nattrace.match.outcome import Unmatched
from nattrace.nat.hops import Coverage, HopCounts, Onward, PairEvidence, count_hops
from nattrace.nat.paths import Hops

#: Two captures of one host can be this far apart, ns (windows.REACH_NS).
FAR = 30_000_000_000

Sample = tuple[int, bool, int]  #: edge, backward at the first point, second point's time minus first point's
Hop = tuple[bool, bool, bool]  #: reverse, original is forward at its from_point, swap


def integers(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def booleans(values: list[bool]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.array(values, np.bool_)


def counted(drawn: list[Hop | None], samples: list[Sample]) -> HopCounts:
    """Count edges 0, 1, ... between points 0 and 1; an edge drawn as None was dropped and has no hop."""
    size = len(drawn)
    kept = [n for n, hop in enumerate(drawn) if hop is not None]
    flags = [hop for hop in drawn if hop is not None]
    forward = [sum(s[0] == n and not s[1] for s in samples) for n in range(size)]
    backward = [sum(s[0] == n and s[1] for s in samples) for n in range(size)]
    none = np.zeros(size, np.int64)
    edges = Edges(
        flow_a=np.arange(size), flow_b=np.arange(size),
        swap=booleans([bool(hop and hop[2]) for hop in drawn]),
        forward=integers(forward), backward=integers(backward), first_ns=none, last_ns=none,
        first_b_ns=none, last_b_ns=none, ttl_forward=none, ttl_backward=none, delta_forward=none, delta_backward=none,
        evidence=none.astype(np.uint16),
    )  # fmt: skip
    reverse = booleans([hop[0] for hop in flags])
    hops = Hops(
        pair=np.zeros(len(kept), np.int64), edge=integers(kept), reverse=reverse,
        from_point=reverse.astype(np.int64), to_point=(~reverse).astype(np.int64),
        from_flow=integers(kept), to_flow=integers(kept), forward=booleans([hop[1] for hop in flags]),
        swap=booleans([hop[2] for hop in flags]), first_ns=none[kept], last_ns=none[kept],
        to_first_ns=none[kept], to_last_ns=none[kept],
    )  # fmt: skip
    nobody = Unmatched.concatenate([], np.empty(0, np.int64))
    pair = PairEvidence(
        edges=edges,
        sample_lane=[integers([s[0] * 2 + s[1] for s in samples]).astype(np.int32)],
        sample_delta=[integers([s[2] for s in samples])],
        sample_time=[none[:0]],
        unmatched=(nobody, nobody),
        margin_ns=0,
    )
    always = Coverage(integers([0, 0]), integers([1, 1]), booleans([True, True]))
    return count_hops(hops, {(0, 1): pair}, always, Onward(hops, {}))


def latencies_of(edge: int, hop: Hop, samples: list[Sample]) -> dict[bool, list[int]]:
    """Return the sorted latencies of replies (True) and originals (False), along their own way."""
    reverse, forward, swap = hop
    forward_at_first = forward != (reverse and swap)
    found: dict[bool, list[int]] = {False: [], True: []}
    for number, backward, delta in samples:
        if number == edge:
            reply = backward == forward_at_first
            # an original packet runs from the hop's from_point to its to_point, a reply the other way
            first_to_second = reply == reverse
            found[reply].append(delta if first_to_second else -delta)
    return {reply: sorted(values) for reply, values in found.items()}


HOPS = st.lists(
    st.one_of(st.none(), st.tuples(st.booleans(), st.booleans(), st.booleans())), min_size=1, max_size=4
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(HOPS, st.data())
def test_latencies_are_the_ranks_of_a_sorted_list(drawn: list[Hop | None], data: st.DataObject) -> None:
    samples = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(drawn) - 1), st.booleans(), st.integers(-FAR, FAR)), max_size=150
        )
    )
    counts = counted(drawn, samples)
    kept = [(n, hop) for n, hop in enumerate(drawn) if hop is not None]
    for row, (edge, hop) in enumerate(kept):
        for reply, values in latencies_of(edge, hop, samples).items():
            column = int(reply)
            assert counts.matched[row, column] == len(values)
            if not values:
                assert not counts.measurable[row, column]
                continue
            nearest_rank = values[math.ceil(0.99 * len(values)) - 1]
            median = values[math.ceil(0.5 * len(values)) - 1]
            assert counts.latency[row, column].tolist() == [values[0], median, nearest_rank, values[-1]]
            assert counts.measurable[row, column] == (values[0] >= 0 and values[-1] > 0)


def test_a_hundred_and_one_latencies_have_a_99th_percentile_below_their_maximum() -> None:
    samples = [(0, False, 1000 * n) for n in range(1, 102)]
    counts = counted([(False, True, False)], samples)
    assert counts.latency[0, 0].tolist() == [1000, 51_000, 100_000, 101_000]


def test_coverage_begins_after_the_first_and_ends_before_the_last_packet() -> None:
    """A capture that lost packets in the kernel proves no loss at all."""
    coverage = Coverage(
        integers([0, 0, 2**62]), integers([100, 100, -(2**62)]), booleans([True, False, True])
    )
    instants = integers([-1, 0, 1, 99, 100, 101])
    assert coverage.sure(0, instants).tolist() == [False, False, True, True, False, False]
    assert not coverage.sure(1, instants).any()
    assert not coverage.sure(2, instants).any()
