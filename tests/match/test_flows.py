"""Flows at one point against a dictionary of conversations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_rows import table

from nattrace.match.flows import (
    HIGH_OPENED,
    LOW_OPENED,
    Flows,
    group_flows,
    members,
    merge_flows,
    sorted_groups,
)
from nattrace.match.keys import flow_hash
from nattrace.table import ICMP, ICMPV6, TCP, UDP

if TYPE_CHECKING:
    from nattrace.table import PacketTable

Row = dict[str, Any]
End = tuple[int, int]


@st.composite
def packets(draw: st.DrawFn) -> list[Row]:
    """Draw packets of a few hosts and ports, in the order of time, so that conversations repeat."""
    made: list[Row] = []
    now = 0
    for _ in range(draw(st.integers(0, 25))):
        now += draw(st.integers(0, 3))
        protocol = draw(st.sampled_from((TCP, UDP, ICMP, ICMPV6)))
        ends = [draw(st.integers(1, 3)) for _ in range(2)]
        ports = [draw(st.integers(1, 2)) for _ in range(2)]
        row = {"protocol": protocol, "version": 4, "time_ns": now, "src": ends[0], "dst": ends[1]}
        if protocol in (ICMP, ICMPV6):
            ports[1] = ports[0]
            row["icmp_type"] = draw(st.sampled_from((8, 0, 13, 14) if protocol == ICMP else (128, 129)))
        elif protocol == TCP:
            row["tcp_flags"] = draw(st.sampled_from((0x02, 0x12, 0x10, 0x18, 0x04)))
        made.append(row | {"sport": ports[0], "dport": ports[1]})
    return made


@dataclass
class Talk:
    """What the twin remembers of one conversation; counts are by sender."""

    sent: dict[End, int]
    first_ns: int
    last_ns: int
    first_sender: End
    openers: set[End]


#: Protocol, both ends, and for ICMP who asks.
Who = tuple[int, frozenset[End], End | None]


def conversations(rows: list[Row]) -> dict[Who, Talk]:
    """Return the slow twin of `group_flows`."""
    talks: dict[Who, Talk] = {}
    for row in rows:
        source, target = (row["src"], row["sport"]), (row["dst"], row["dport"])
        icmp, asks = row["protocol"] in (ICMP, ICMPV6), row.get("icmp_type", 0) in (8, 13, 128)
        key = (row["protocol"], frozenset((source, target)), (source if asks else target) if icmp else None)
        time = row["time_ns"]
        talk = talks.setdefault(key, Talk({}, time, time, source, set()))
        talk.sent[source] = talk.sent.get(source, 0) + 1
        talk.first_ns, talk.last_ns = min(talk.first_ns, time), max(talk.last_ns, time)
        syn = row.get("tcp_flags", 0) & 0x12
        kind = row.get("icmp_type", 0)
        if (row["protocol"] == TCP and syn == 0x02) or (
            row["protocol"] in (ICMP, ICMPV6) and kind in (8, 13, 128)
        ):
            talk.openers.add(source)
        elif (row["protocol"] == TCP and syn == 0x12) or (
            row["protocol"] in (ICMP, ICMPV6) and kind in (0, 14, 129)
        ):
            talk.openers.add(target)
    return talks


def assert_same(flows: Flows, rows: list[Row]) -> None:
    expected = conversations(rows)
    assert len(flows) == len(expected)
    for n in range(len(flows)):
        low = (int(flows.low_address[n]), int(flows.low_port[n]))
        high = (int(flows.high_address[n]), int(flows.high_port[n]))
        asker = {LOW_OPENED: low, HIGH_OPENED: high}.get(int(flows.hint[n]), low)
        icmp = flows.protocol[n] in (ICMP, ICMPV6)
        talk = expected.pop((int(flows.protocol[n]), frozenset((low, high)), asker if icmp else None))
        assert flows.first_ns[n] == talk.first_ns
        assert flows.last_ns[n] == talk.last_ns
        if low == high:  # a host that talks to itself from one port has no direction
            assert flows.forward[n] + flows.backward[n] == talk.sent[low]
            continue
        assert (flows.forward[n], flows.backward[n]) == (talk.sent.get(low, 0), talk.sent.get(high, 0))
        assert flows.first_backward[n] == (talk.first_sender == high)
        hint = (LOW_OPENED if low in talk.openers else 0) | (HIGH_OPENED if high in talk.openers else 0)
        assert flows.hint[n] == hint


def grouped(rows: PacketTable) -> tuple[Flows, np.ndarray[Any, Any]]:
    return group_flows(rows, *flow_hash(rows))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(packets())
def test_packets_are_grouped_into_conversations(rows: list[Row]) -> None:
    flows, member = grouped(table(rows))
    assert_same(flows, rows)
    for row, flow in zip(rows, member.tolist(), strict=True):
        ends = {(row["src"], row["sport"]), (row["dst"], row["dport"])}
        assert ends == {
            (int(flows.low_address[flow]), int(flows.low_port[flow])),
            (int(flows.high_address[flow]), int(flows.high_port[flow])),
        }


@settings(deadline=None, derandomize=True, max_examples=150)
@given(packets(), st.lists(st.integers(0, 25), max_size=4))
def test_grouping_piece_by_piece_is_grouping_at_once(rows: list[Row], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(rows)]
    parts = [grouped(table(rows[a:b])) for a, b in pairwise(edges)]
    flows, became = merge_flows([part for part, _ in parts])
    assert_same(flows, rows)
    offset = 0
    whole = {int(key): n for n, key in enumerate(flows.hash)}
    for part, _ in parts:
        assert [whole[int(key)] for key in part.hash] == became[offset : offset + len(part)].tolist()
        offset += len(part)


def test_no_parts_merge_to_no_flows() -> None:
    flows, became = merge_flows([])
    assert len(flows) == 0
    assert became.size == 0


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


def test_two_hosts_that_ping_each_other_with_one_id_have_two_conversations() -> None:
    """Each is PID 1 of its container, so both use id 1; conntrack has an entry for each as well."""
    one, other = {"src": 1, "dst": 2}, {"src": 2, "dst": 1}
    ends = {"protocol": ICMP, "version": 4, "sport": 1, "dport": 1}
    pings = [(one, 8), (other, 0), (other, 8), (one, 0), (one, 8), (other, 0)]
    rows = table([each | ends | {"icmp_type": kind, "time_ns": n} for n, (each, kind) in enumerate(pings)])

    flows, member = group_flows(rows, *flow_hash(rows))

    assert [member[n] == member[0] for n in range(6)] == [True, True, False, False, True, True]
    assert sorted((flows.forward + flows.backward).tolist()) == [2, 4]
