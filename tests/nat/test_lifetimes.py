"""Hops that several conversations share, against a simulated network that knows every packet's way."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Conversation, Network, Simulated, routed

import nattrace
from nattrace.nat.lifetimes import _Runs

if TYPE_CHECKING:
    from pathlib import Path

CLIENT, MIDDLE, FAR, PUBLIC, SERVER = "172.17.0.2", "10.9.0.2", "10.8.0.2", "203.0.113.10", "198.51.100.1"
POINTS = ("one", "two", "three")


def way(middle_port: int, port: int, client_port: int = 4000) -> Conversation:
    """Return a conversation with two translations: one host's NAT, then another's."""
    return routed(
        "udp", (CLIENT, client_port), (SERVER, 53), {"client": (MIDDLE, middle_port)}, {"client": (PUBLIC, port)},
        points=POINTS,
    )  # fmt: skip


def exchange(network: Network, each: Conversation, rounds: int, lost_after: str | None = None) -> None:
    """Send a packet each way, `rounds` times; the second one out may get lost behind a point."""
    for n in range(rounds):
        network.wait_us(300)
        lost = lost_after if n == 1 else None
        network.send(each, network.rng.randbytes(24), lost_after=lost)
        if lost is None:
            network.wait_us(300)
            network.send(each, network.rng.randbytes(24), reply=True)


def told(truth: Simulated) -> list[tuple[tuple[str, ...], int, int, list[tuple[int, int]]]]:
    """Return of each flow its path, its packets at path[0] both ways, and its crossings' (matched, lost)."""
    report = nattrace.analyze(*truth.sources)
    return [
        (
            flow.path,
            flow.packets_original,
            flow.packets_reply,
            [(c.matched, c.lost) for c in flow.crossings],
        )
        for flow in report.flows
    ]


def test_a_binding_renewed_at_the_second_hop_divides_the_first_one(tmp_path: Path) -> None:
    network = Network(1)
    for port, rounds in ((20001, 3), (20002, 5), (20003, 4)):
        exchange(network, way(5000, port), rounds)
        network.wait_us(40_000)

    assert told(network.write(tmp_path)) == [(POINTS, n, n, [(n, 0)] * 4) for n in (3, 5, 4)]


def test_a_packet_lost_behind_the_middle_belongs_to_the_binding_of_its_time(tmp_path: Path) -> None:
    network = Network(2)
    exchange(network, way(5000, 20001), 3)
    network.wait_us(40_000)
    exchange(network, way(5000, 20002), 4, lost_after="two")
    exchange(network, way(5000, 20002), 2)

    assert told(network.write(tmp_path)) == [
        (POINTS, 3, 3, [(3, 0)] * 4),
        (POINTS, 6, 5, [(6, 0), (5, 0), (5, 1), (5, 0)]),
    ]


def test_a_middle_tuple_that_another_flow_takes_over_makes_no_third_conversation(tmp_path: Path) -> None:
    """Both hops change within two seconds, and the tuple between them stays: only two ways were taken."""
    network = Network(3)
    exchange(network, way(5000, 20001, client_port=4001), 3)
    network.wait_us(40_000)
    exchange(network, way(5000, 20002, client_port=4002), 5)

    assert told(network.write(tmp_path)) == [
        (POINTS, 3, 3, [(3, 0)] * 4),
        (POINTS, 5, 5, [(5, 0)] * 4),
    ]


def test_a_renewal_three_hops_away_divides_all_hops_before_it(tmp_path: Path) -> None:
    network = Network(4)
    for port, rounds in ((20001, 3), (20002, 5)):
        each = routed(
            "udp", (CLIENT, 4000), (SERVER, 53), {"client": (MIDDLE, 5000)}, {"client": (FAR, 6000)},
            {"client": (PUBLIC, port)}, points=("one", "two", "three", "four"),
        )  # fmt: skip
        exchange(network, each, rounds)
        network.wait_us(40_000)

    path = ("one", "two", "three", "four")
    assert told(network.write(tmp_path)) == [(path, n, n, [(n, 0)] * 6) for n in (3, 5)]


def test_directions_that_a_point_shows_under_different_tuples_are_not_counted_twice(tmp_path: Path) -> None:
    """Bridge netfilter: requests pass the middle with one tuple, answers with another."""
    network = Network(5)
    out, back = way(5000, 20001), way(5001, 20001)
    for _ in range(5):
        network.wait_us(300)
        network.send(out, network.rng.randbytes(24))
        network.wait_us(300)
        network.send(back, network.rng.randbytes(24), reply=True)

    flows = told(network.write(tmp_path))

    assert [path for path, *_ in flows] == [POINTS, POINTS]
    assert Counter((out, back) for _, out, back, _ in flows) == {(5, 0): 1, (0, 5): 1}


def test_rows_belong_to_the_conversation_that_counts_them(tmp_path: Path) -> None:
    network = Network(6)
    for port in (20001, 20002, 20003):
        exchange(network, way(5000, port), 4)
        network.wait_us(10_000)
    report = nattrace.analyze(*network.write(tmp_path).sources)

    for flow in report.flows:
        rows = [row for row in report.rewrites if row.flow == flow.id]
        assert len(rows) == sum(c.matched for c in flow.crossings) == 16
        assert {row.after.sport for row in rows if row.after.src == PUBLIC} == {20000 + flow.id}


LIVES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.integers(0, 3)), max_size=20)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(LIVES, st.lists(st.tuples(st.integers(0, 5), st.integers(-5, 55)), max_size=10))
def test_the_piece_nearest_in_time_is_found(
    known: list[tuple[int, int, int]], asked: list[tuple[int, int]]
) -> None:
    """Against a loop; lanes 2n and 2n + 1 are the directions of one hop. Of equally near ones any will do."""
    columns = [np.array([each[n] for each in known], np.int64) for n in range(3)]
    lane, time = (np.array([each[n] for each in asked], np.int64) for n in range(2))
    found = _Runs.of(*columns).at(lane, time).tolist()

    for piece, (own, time_ns) in zip(found, asked, strict=True):
        near = [each for each in known if each[0] == own] or [each for each in known if each[0] == own ^ 1]
        if not near:
            assert piece == -1
            continue
        least = min(abs(time_ns - each[1]) for each in near)
        assert piece in {each[2] for each in near if abs(time_ns - each[1]) == least}
