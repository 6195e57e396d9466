"""Flows of one layer, numbered as they turn up, against a dictionary of conversations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_rows import table

from nattrace.encapsulation import common
from nattrace.match import roll as roll_module
from nattrace.match.flows import HIGH_OPENED, LOW_OPENED, Flows
from nattrace.match.keys import flow_hash
from nattrace.match.roll import FlowRoll
from nattrace.table import ICMP, ICMPV6, TCP, UDP

if TYPE_CHECKING:
    import random


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
    """Return the slow twin of `FlowRoll`. Who is first in time spoke first, of several who is first in the file."""
    talks: dict[Who, Talk] = {}
    for row in sorted(rows, key=lambda row: row["time_ns"]):  # stable
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


def enrolled(rows: list[Row], cuts: list[int]) -> tuple[Flows, list[int]]:
    """Return the flows of packets that come in several chunks, and each packet's flow."""
    roll = FlowRoll()
    numbers: list[int] = []
    for a, b in pairwise([0, *sorted(cuts), len(rows)]):
        part = table(rows[a:b])
        numbers += roll.number(part, *flow_hash(part)).tolist()
    return roll.flows(), numbers


@settings(deadline=None, derandomize=True, max_examples=300)
@given(packets(), st.lists(st.integers(0, 25), max_size=4), st.randoms(use_true_random=False))
def test_packets_get_the_numbers_of_their_conversations(
    rows: list[Row], cuts: list[int], chance: random.Random
) -> None:
    if chance.random() < 0.3:
        chance.shuffle(rows)  # merged files, and packets that were captured on several processors
    rows = [row | {"frame": n} for n, row in enumerate(rows)]
    flows, numbers = enrolled(rows, cuts)
    assert_same(flows, rows)
    for row, flow in zip(rows, numbers, strict=True):
        ends = {(row["src"], row["sport"]), (row["dst"], row["dport"])}
        assert ends == {
            (int(flows.low_address[flow]), int(flows.low_port[flow])),
            (int(flows.high_address[flow]), int(flows.high_port[flow])),
        }


@pytest.mark.parametrize("slot_bits", [1, 4, 12])
def test_thousands_of_flows_share_slots_and_keep_their_numbers(
    slot_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_module, "_SLOT_BITS", slot_bits)
    monkeypatch.setattr(roll_module, "_SLOTS_PER_FLOW", 1)
    ports = np.random.default_rng(7).integers(1, 60_000, 20_000)
    rows = [
        {"version": 4, "protocol": TCP, "src": 1, "dst": 2, "sport": port, "dport": 80, "time_ns": n}
        for n, port in enumerate(ports.tolist())
    ]
    flows, numbers = enrolled(rows, list(range(0, 20_000, 1_500)))
    port = np.where(flows.low_port == 80, flows.high_port, flows.low_port)
    assert port[numbers].tolist() == ports.tolist()
    assert len(flows) == np.unique(ports).size == np.unique(flows.hash).size
    assert (flows.forward + flows.backward).tolist() == np.bincount(numbers).tolist()
    assert flows.first_ns.tolist() == np.unique(numbers, return_index=True)[1].tolist()


def test_no_packets_are_no_flows() -> None:
    flows, numbers = enrolled([], [])
    assert len(flows) == 0
    assert numbers == []


def test_what_wraps_a_flow_is_told_by_direction() -> None:
    there = {"version": 4, "protocol": UDP, "src": 1, "dst": 2, "sport": 5, "dport": 6}
    back = {"version": 4, "protocol": UDP, "src": 2, "dst": 1, "sport": 6, "dport": 5}
    vxlan_1, vxlan_2 = (np.uint64(number) for number in (3 << 56 | 1, 3 << 56 | 2))
    roll = FlowRoll()
    for way, wraps in ((there, [vxlan_1, vxlan_1]), (back, [vxlan_1]), (back, [vxlan_2])):
        rows = table([way] * len(wraps))
        roll.number(rows, *flow_hash(rows), np.array(wraps))
    flows = roll.flows()
    both = common(np.array([vxlan_1, vxlan_2]), np.array([0]))[0]
    assert {int(flows.wrap_forward[0]), int(flows.wrap_backward[0])} == {int(vxlan_1), int(both)}


def test_two_hosts_that_ping_each_other_with_one_id_have_two_conversations() -> None:
    """Each is PID 1 of its container, so both use id 1; conntrack has an entry for each as well."""
    one, other = {"src": 1, "dst": 2}, {"src": 2, "dst": 1}
    ends = {"protocol": ICMP, "version": 4, "sport": 1, "dport": 1}
    pings = [(one, 8), (other, 0), (other, 8), (one, 0), (one, 8), (other, 0)]
    rows = table([each | ends | {"icmp_type": kind, "time_ns": n} for n, (each, kind) in enumerate(pings)])

    roll = FlowRoll()
    member = roll.number(rows, *flow_hash(rows))
    flows = roll.flows()

    assert [member[n] == member[0] for n in range(6)] == [True, True, False, False, True, True]
    assert sorted((flows.forward + flows.backward).tolist()) == [2, 4]
