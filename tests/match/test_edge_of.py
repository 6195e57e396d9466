"""Which binding a packet used, against a loop over all bindings of its flow."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.edges import Edges
from nattrace.match.lanes import edge_of

Life = tuple[int, int, int]  #: flow, first, last


@st.composite
def lives(draw: st.DrawFn) -> list[Life]:
    """Draw bindings of a few flows; no two of one flow begin at the same instant."""
    drawn = draw(
        st.lists(
            st.tuples(st.integers(0, 4), st.integers(0, 60), st.integers(0, 15)),
            max_size=12,
            unique_by=lambda life: life[:2],
        )
    )
    return [(flow, first, first + length) for flow, first, length in drawn]


def edges_of(drawn: list[Life], side: int = 0) -> Edges:
    """Build edges whose flows and times are those of the first (0) or the second point (1)."""
    size = len(drawn)
    none = np.zeros(size, np.int64)
    life = [np.array([each[n] for each in drawn], np.int64) for n in range(3)]
    a, b = (life, [none] * 3) if side == 0 else ([none] * 3, life)
    return Edges(
        flow_a=a[0], flow_b=b[0], swap=none.astype(np.bool_), forward=none, backward=none,
        first_ns=a[1], last_ns=a[2], first_b_ns=b[1], last_b_ns=b[2],
        ttl_forward=none, ttl_backward=none, delta_forward=none, delta_backward=none,
        evidence=none.astype(np.uint16),
    )  # fmt: skip


def twin(flow: int, time_ns: int, drawn: list[Life]) -> int:
    own = sorted((first, last, n) for n, (f, first, last) in enumerate(drawn) if f == flow)
    if len(own) <= 1:
        return own[0][2] if own else -1
    if time_ns < own[0][0]:
        return own[0][2]
    if time_ns > max(last for _, last, _ in own):
        return own[-1][2]
    inside = [n for first, last, n in own if first <= time_ns <= last]
    return inside[0] if len(inside) == 1 else -1


@settings(deadline=None, derandomize=True, max_examples=300)
@given(lives(), st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 80)), max_size=12), st.integers(0, 1))
def test_a_packet_is_on_the_binding_that_lived_around_it(
    drawn: list[Life], packets: list[tuple[int, int]], side: int
) -> None:
    flow, time = (np.array([p[n] for p in packets], np.int64) for n in (0, 1))
    found = edge_of(flow, time, side, edges_of(drawn, side))
    assert found.tolist() == [twin(*packet, drawn) for packet in packets]


def test_a_packet_after_all_bindings_of_its_flow_is_on_the_last_whatever_other_flows_do() -> None:
    """Another flow's later binding once hid that the packet came after its own flow's bindings."""
    edges = edges_of([(0, 0, 10), (0, 20, 30), (1, 0, 1000)])
    assert edge_of(np.array([0]), np.array([500]), 0, edges).tolist() == [1]


def test_a_packet_between_two_bindings_is_on_neither() -> None:
    edges = edges_of([(0, 0, 10), (0, 20, 30)])
    assert edge_of(np.array([0, 0]), np.array([15, 25]), 0, edges).tolist() == [-1, 1]
