"""Which binding a packet used, against a loop over all bindings of its flow."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nattrace.match.bindings import edge_of
from nattrace.match.edges import Edges

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


def edges_of(drawn: list[Life]) -> Edges:
    size = len(drawn)
    none = np.zeros(size, np.int64)
    return Edges(
        flow_a=np.array([life[0] for life in drawn], np.int64), flow_b=none, swap=none.astype(np.bool_),
        forward=none, backward=none,
        first_ns=np.array([life[1] for life in drawn], np.int64),
        last_ns=np.array([life[2] for life in drawn], np.int64),
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
@given(lives(), st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 80)), max_size=12))
def test_a_packet_is_on_the_binding_that_lived_around_it(
    drawn: list[Life], packets: list[tuple[int, int]]
) -> None:
    edges = edges_of(drawn)
    flow, time = (np.array([p[n] for p in packets], np.int64) for n in (0, 1))
    found = edge_of(flow, time, edges.flow_a, edges)
    assert found.tolist() == [twin(*packet, drawn) for packet in packets]


def test_a_packet_after_all_bindings_of_its_flow_is_on_the_last_whatever_other_flows_do() -> None:
    """Another flow's later binding once hid that the packet came after its own flow's bindings."""
    edges = edges_of([(0, 0, 10), (0, 20, 30), (1, 0, 1000)])
    assert edge_of(np.array([0]), np.array([500]), edges.flow_a, edges).tolist() == [1]


def test_a_packet_between_two_bindings_is_on_neither() -> None:
    edges = edges_of([(0, 0, 10), (0, 20, 30)])
    assert edge_of(np.array([0, 0]), np.array([15, 25]), edges.flow_a, edges).tolist() == [-1, 1]
