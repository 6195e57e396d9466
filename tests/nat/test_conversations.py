"""How a change is named, and who opened a conversation."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from packet_rows import table

from nattrace.match.keys import flow_hash
from nattrace.match.roll import FlowRoll
from nattrace.nat.conversations import (
    CHANGED_DPORT,
    CHANGED_DST,
    CHANGED_ID,
    CHANGED_SPORT,
    CHANGED_SRC,
    changed_fields,
    nat_kind,
)
from nattrace.nat.orientation import opening_side
from nattrace.table import ICMP, TCP, UDP

CLIENT, SERVER = 0xAC110002, 0xC6336401


@pytest.mark.parametrize(("src", "dst", "sport", "dport"), list(product((False, True), repeat=4)))
def test_ports_follow_their_address(src: bool, dst: bool, sport: bool, dport: bool) -> None:
    changed = src * CHANGED_SRC | dst * CHANGED_DST | sport * CHANGED_SPORT | dport * CHANGED_DPORT
    expected = {(False, False): None, (True, False): "snat", (False, True): "dnat", (True, True): "snat+dnat"}
    assert nat_kind(changed) == expected[src or sport, dst or dport]
    names = (("src", src), ("dst", dst), ("sport", sport), ("dport", dport))
    assert changed_fields(changed) == tuple(name for name, differs in names if differs)


@pytest.mark.parametrize(
    ("changed", "nat", "fields"),
    [
        (CHANGED_ID, "snat", ("id",)),
        (CHANGED_SRC | CHANGED_ID, "snat", ("src", "id")),
        (CHANGED_DST | CHANGED_ID, "dnat", ("dst", "id")),
        (CHANGED_SRC | CHANGED_DST | CHANGED_ID, "snat+dnat", ("src", "dst", "id")),
    ],
)
def test_an_icmp_id_belongs_to_the_source_unless_only_the_destination_changed(
    changed: int, nat: str, fields: tuple[str, ...]
) -> None:
    assert nat_kind(changed) == nat
    assert changed_fields(changed) == fields


def opener(*packets: dict[str, Any]) -> tuple[int, int]:
    """Return the address and port that a single point takes for the side that opened the conversation."""
    rows = table([{"version": 4, "time_ns": n} | packet for n, packet in enumerate(packets)])
    roll = FlowRoll()
    roll.number(rows, *flow_hash(rows))
    flows = roll.flows()
    assert len(flows) == 1
    low = bool(opening_side(flows)[0])
    side = "low" if low else "high"
    return int(getattr(flows, f"{side}_address")[0]), int(getattr(flows, f"{side}_port")[0])


def there(**more: int) -> dict[str, Any]:
    return {"src": CLIENT, "dst": SERVER, "sport": 40000, "dport": 5000} | more


def back(**more: int) -> dict[str, Any]:
    return {"src": SERVER, "dst": CLIENT, "sport": 5000, "dport": 40000} | more


ME, PEER = (CLIENT, 40000), (SERVER, 5000)


def test_a_syn_opens_whoever_was_seen_first() -> None:
    late = [back(protocol=TCP, tcp_flags=0x10), there(protocol=TCP, tcp_flags=0x02)]
    assert opener(*late) == ME
    assert opener(back(protocol=TCP, tcp_flags=0x12), there(protocol=TCP, tcp_flags=0x10)) == ME


def test_an_echo_request_opens_and_an_echo_reply_answers() -> None:
    ends = {"protocol": ICMP, "sport": 7, "dport": 7}
    assert opener(back(icmp_type=0, **ends), there(icmp_type=8, **ends)) == (CLIENT, 7)
    assert opener(back(icmp_type=0, **ends)) == (CLIENT, 7)


def test_a_system_port_is_the_servers() -> None:
    assert opener(back(protocol=UDP, sport=53)) == (CLIENT, 40000)
    assert opener({"src": SERVER, "dst": CLIENT, "sport": 53, "dport": 40000, "protocol": UDP}) == ME


def test_a_tcp_capture_that_began_late_goes_by_the_ephemeral_port() -> None:
    assert opener(back(protocol=TCP, tcp_flags=0x18), there(protocol=TCP, tcp_flags=0x10)) == ME


def test_without_any_sign_the_first_packet_opens() -> None:
    assert opener(back(protocol=UDP), there(protocol=UDP)) == PEER
    assert opener(there(protocol=UDP), back(protocol=UDP)) == ME


def test_system_ports_on_both_sides_say_nothing() -> None:
    ntp = {"protocol": UDP, "sport": 123, "dport": 123}
    assert opener(there(**ntp), back(**ntp)) == (CLIENT, 123)
    assert opener(back(**ntp), there(**ntp)) == (SERVER, 123)
