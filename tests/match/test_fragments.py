"""Later fragments get the ports of their datagram's first fragment, however the rows come in."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_rows import table

from nattrace.match.fragments import FirstFragments
from nattrace.table import MORE_FRAGMENTS, UDP

Row = dict[str, Any]
PORTS = ("sport", "dport", "icmp_type")


def first(datagram: int, port: int) -> Row:
    return {"version": 4, "protocol": UDP, "src": 1, "dst": 2, "ip_id": datagram, "fragment": MORE_FRAGMENTS,
            "sport": port, "dport": port + 1, "icmp_type": port % 7}  # fmt: skip


def later(datagram: int, offset: int = 185) -> Row:
    return {"version": 4, "protocol": UDP, "src": 1, "dst": 2, "ip_id": datagram, "fragment": offset}


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=20),
    st.lists(st.integers(0, 20), max_size=3),
)
def test_fragments_that_follow_their_first_one_get_its_ports(
    drawn: list[tuple[int, bool]], cuts: list[int]
) -> None:
    """Identifications are used once here: a second first fragment is taken as a later one."""
    rows: list[Row] = []
    ports: dict[int, int] = {}
    expected: list[tuple[int, int, int, bool]] = []
    for datagram, is_first in drawn:
        if is_first and datagram not in ports:
            ports[datagram] = 1000 + datagram
            rows.append(first(datagram, ports[datagram]))
        elif datagram in ports or datagram == 6:
            rows.append(later(datagram))
        else:
            continue
        port = ports.get(datagram)
        expected.append((0, 0, 0, True) if port is None else (port, port + 1, port % 7, False))
    # datagram 6 may lack its first fragment, or have it later in the same piece: both are settled below
    memory = FirstFragments()
    edges = [0, *sorted(cuts), len(rows)]
    found: list[tuple[int, int, int, bool]] = []
    for a, b in pairwise(edges):
        part = table(rows[a:b])
        orphan = memory.fill(part)
        found += zip(*(getattr(part, name).tolist() for name in PORTS), orphan.tolist(), strict=True)
    for row, got, wanted in zip(rows, found, expected, strict=True):
        if row["ip_id"] == 6 and wanted[3]:
            assert got in (wanted, (1006, 1007, 1006 % 7, False))
        else:
            assert got == wanted


def test_a_reused_identification_means_the_datagram_before_it() -> None:
    rows = [first(9, 1000), later(9), first(9, 2000), later(9), later(9, 370)]
    for pieces in ((5,), (1, 1, 1, 1, 1), (2, 3)):
        memory = FirstFragments()
        ports: list[int] = []
        for size in pieces:
            part = table(rows[len(ports) : len(ports) + size])
            memory.fill(part)
            ports += part.sport.tolist()
        assert ports == [1000, 1000, 2000, 2000, 2000], pieces


def test_reordered_fragments_in_one_piece_find_their_first_one() -> None:
    part = table([later(9), first(9, 1000), later(8)])
    orphan = FirstFragments().fill(part)
    assert part.sport.tolist() == [1000, 1000, 0]
    assert orphan.tolist() == [False, False, True]


@pytest.mark.parametrize("other", [{"src": 3}, {"dst": 3}, {"protocol": 6}, {"version": 6}, {"ip_id": 8}])
def test_every_part_of_a_datagrams_name_counts(other: Row) -> None:
    part = table([first(9, 1000), later(9) | other])
    assert FirstFragments().fill(part).tolist() == [False, True]


def test_memory_is_bounded_and_holds_the_newest() -> None:
    memory = FirstFragments()
    count = 20_000
    memory.fill(table([first(n + 1, 1000) for n in range(count)]))
    orphan = memory.fill(table([later(count), later(1)]))
    assert orphan.tolist() == [False, True]


def test_a_piece_with_more_datagrams_than_memory_holds_is_filled_all_the_same() -> None:
    count = 10_000
    rows = [row for n in range(count) for row in (first(n + 1, 1000), later(n + 1))]
    assert not FirstFragments().fill(table(rows)).any()
