"""What wraps a packet, as a number and by name."""

from __future__ import annotations

import numpy as np

from nattrace.encapsulation import (
    ERSPAN,
    GRE,
    L2TP,
    VXLAN,
    both_ways,
    common,
    encapsulation,
    encapsulation_name,
)


def number(kind: int, identifier: int | None = None) -> int:
    found = encapsulation(kind, None if identifier is None else np.array([identifier]))
    return int(found.reshape(-1)[0])


def test_names_say_the_kind_and_what_the_header_carries() -> None:
    assert encapsulation_name(0) is None
    assert encapsulation_name(number(GRE)) == "gre"
    assert encapsulation_name(number(GRE, 0)) == "gre 0"
    assert encapsulation_name(number(GRE, 2**32 - 1)) == "gre 4294967295"
    assert encapsulation_name(number(VXLAN, 2**24 - 1)) == "vxlan 16777215"
    assert encapsulation_name(number(L2TP, 7 << 16 | 1)) == "l2tp 7/1"


def test_a_conversation_names_both_directions_only_where_they_differ() -> None:
    one, other = number(VXLAN, 1), number(VXLAN, 2)
    assert both_ways(one, one) == "vxlan 1"
    assert both_ways(one, 0) == "vxlan 1"
    assert both_ways(0, other) == "vxlan 2"
    assert both_ways(one, other) == "vxlan 1, back vxlan 2"
    assert both_ways(0, 0) is None


def test_what_several_packets_have_in_common() -> None:
    vxlan_1, vxlan_2, gre, erspan_1 = number(VXLAN, 1), number(VXLAN, 2), number(GRE), number(ERSPAN, 1)
    runs = [[0, 0], [vxlan_1, 0, vxlan_1], [vxlan_1, vxlan_2], [vxlan_2, gre], [erspan_1], [0, gre, 0]]
    numbers = np.array([n for run in runs for n in run], np.uint64)
    starts = np.cumsum([0, *(len(run) for run in runs[:-1])])

    found = common(numbers, starts)

    names = [None, "vxlan 1", "vxlan (several)", "tunnel (several)", "erspan 1", "gre"]
    assert [encapsulation_name(int(n)) for n in found] == names
    # what was found of parts can be put together again
    assert encapsulation_name(int(common(found[1:3], np.array([0]))[0])) == "vxlan (several)"
    assert encapsulation_name(int(common(found[2:5], np.array([0]))[0])) == "tunnel (several)"
