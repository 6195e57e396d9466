"""Edges against a dictionary of matched packets."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.edges import Edges, group_edges, merge_edges


@dataclass(frozen=True)
class Match:
    """One matched packet."""

    flow_a: int
    flow_b: int
    swap: bool
    backward: bool
    time_ns: int
    ttl_drop: int
    delta_ns: int
    evidence: int


MATCHES = st.lists(
    st.builds(
        Match, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 10**18),
        st.integers(-3, 3), st.integers(-(10**6), 10**6), st.integers(0, 1023),
    ),
    max_size=30,
)  # fmt: skip
_DTYPES = (np.int64, np.int64, np.bool_, np.bool_, np.int64, np.int64, np.int64, np.uint16)


def group(matches: list[Match]) -> tuple[Edges, np.ndarray[Any, Any]]:
    columns = list(zip(*(astuple(m) for m in matches), strict=True)) or [()] * len(_DTYPES)
    return group_edges(*(np.array(c, dtype) for c, dtype in zip(columns, _DTYPES, strict=True)))


def twin(matches: list[Match]) -> dict[tuple[int, int, bool], tuple[int, ...]]:
    """Return by edge: forward, backward, first, last at both points, TTL and delta sums each way, evidence."""
    result: dict[tuple[int, int, bool], tuple[int, ...]] = {}
    for key in {(m.flow_a, m.flow_b, m.swap) for m in matches}:
        own = [m for m in matches if (m.flow_a, m.flow_b, m.swap) == key]
        there, back = [m for m in own if not m.backward], [m for m in own if m.backward]
        evidence = 0
        for m in own:
            evidence |= m.evidence
        result[key] = (
            len(there), len(back), min(m.time_ns for m in own), max(m.time_ns for m in own),
            min(m.time_ns + m.delta_ns for m in own), max(m.time_ns + m.delta_ns for m in own),
            sum(m.ttl_drop for m in there), sum(m.ttl_drop for m in back),
            sum(m.delta_ns for m in there), sum(m.delta_ns for m in back), evidence,
        )  # fmt: skip
    return result


def as_dict(edges: Edges) -> dict[tuple[int, int, bool], tuple[int, ...]]:
    names = (
        "forward", "backward", "first_ns", "last_ns", "first_b_ns", "last_b_ns", "ttl_forward",
        "ttl_backward", "delta_forward", "delta_backward", "evidence",
    )  # fmt: skip
    keys = zip(edges.flow_a.tolist(), edges.flow_b.tolist(), edges.swap.tolist(), strict=True)
    values = zip(*(getattr(edges, name).tolist() for name in names), strict=True)
    found = dict(zip(keys, values, strict=True))
    assert len(found) == len(edges), "an edge occurs twice"
    return found


@settings(deadline=None, derandomize=True, max_examples=150)
@given(MATCHES)
def test_matched_packets_add_up_to_edges(matches: list[Match]) -> None:
    edges, member = group(matches)
    assert as_dict(edges) == twin(matches)
    for m, n in zip(matches, member.tolist(), strict=True):
        assert (edges.flow_a[n], edges.flow_b[n], edges.swap[n]) == (m.flow_a, m.flow_b, m.swap)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(MATCHES, MATCHES, st.permutations(range(4)))
def test_edges_of_two_windows_merge_to_the_edges_of_both(
    first: list[Match], second: list[Match], became: list[int]
) -> None:
    """The second window numbers its flows anew: its flow n is the first one's flow became[n]."""
    parts = [group(part) for part in (first, second)]
    for edges, _ in parts[1:]:
        edges.flow_a += 4
        edges.flow_b += 4
    flows = np.array([*range(4), *became], np.int64)
    merged, member = merge_edges([edges for edges, _ in parts], flows, flows)
    renamed = [
        Match(became[m.flow_a], became[m.flow_b], *astuple(m)[2:]) for m in second
    ]  # fmt: skip
    assert as_dict(merged) == twin(first + renamed)
    concatenated = Edges.concatenate([edges for edges, _ in parts])
    for n, edge in enumerate(member.tolist()):
        assert merged.flow_a[edge] == flows[concatenated.flow_a[n]]
        assert merged.swap[edge] == concatenated.swap[n]
