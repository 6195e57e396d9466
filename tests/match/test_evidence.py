"""Evidence against a plain reading of its rules, packet by packet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packet_rows import table

from nattrace.match import evidence
from nattrace.table import ICMP, ICMPV6, TCP, UDP, AddressBook

Row = dict[str, Any]

CLIENT, SERVER, PUBLIC, OTHER = 0xAC110002, 0xC6336401, 0xCB00710A, 0x01020304
GROUP = 0xEFFFFFFA  # 239.255.255.250, SSDP


def weigh(
    a: Row, b: Row, book: AddressBook | None = None, *, renumbered: int = 0
) -> tuple[int, set[str], bool]:
    zero = np.zeros(1, np.int64)
    rows = [{"version": 4} | row for row in (a, b)]
    bits, flags, conflict = evidence.weigh(
        table(rows[:1]), zero, table(rows[1:]), zero, book or AddressBook(), renumbered=renumbered
    )
    return int(bits[0]), set(evidence.names(int(flags[0]))), bool(conflict[0])


SMALL = st.integers(0, 2)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Row, Row]:
    """Draw two packets with one content key: what NAT may touch and what may be unknown differ freely."""
    protocol = draw(st.sampled_from((ICMP, ICMPV6, TCP, UDP, 47)))
    common: Row = {
        "protocol": protocol,
        "seq": draw(SMALL),
        "ack": draw(SMALL) if protocol == TCP else 0,
        "tcp_flags": draw(st.sampled_from((0x02, 0x10))) if protocol == TCP else 0,
        "payload_length": draw(st.sampled_from((0, 100))),
        "content_length": draw(st.sampled_from((0, 1, 3, 4, 7, 8, 32))),
    }

    def side() -> Row:
        return common | {
            "version": 4,
            "src": draw(st.sampled_from((CLIENT, SERVER, PUBLIC, GROUP))),
            "dst": draw(st.sampled_from((CLIENT, SERVER, PUBLIC, GROUP))),
            "sport": draw(SMALL),
            "dport": draw(SMALL),
            "ip_id": draw(SMALL),
            "residual": draw(SMALL),
            "residual_known": draw(st.booleans()),
            "l4_visible": draw(st.sampled_from((8, 12, 40))),
            "time_ns": draw(st.sampled_from((0, 1_000, 10**9))),
        }

    return side(), side()


def twin(a: Row, b: Row, renumbered: int = 0) -> tuple[int, set[str], bool]:
    """Weigh as the module's documentation says, one `if` a rule."""
    bits, flags = 0, set()
    length = a["content_length"]
    content = 24 if length >= 8 else 12 if length >= 4 else 4 if length else 0
    if length:
        flags.add("payload")
    sums = a["residual_known"] and b["residual_known"]
    if sums and a["residual"] == b["residual"]:
        flags.add("checksum")
        content = max(content, 12)
    bits += content
    tcp = a["protocol"] == TCP
    if tcp and a["seq"]:
        flags.add("tcp-seq")
        bits += 24
    if tcp and a["ack"] and min(a["l4_visible"], b["l4_visible"]) >= 12:
        flags.add("tcp-ack")
        bits += 16
    if a["protocol"] in (ICMP, ICMPV6):
        flags.add("icmp-seq")
        bits += 4
    kept = (a["src"] == b["src"]) + 2 * (a["dst"] == b["dst"])
    ids = a["ip_id"] and b["ip_id"] and not renumbered >> kept & 1
    if ids and a["ip_id"] == b["ip_id"]:
        flags.add("ip-id")
        bits += 14
    for end, port in (("src", "sport"), ("dst", "dport")):
        if a[end] == b[end]:
            flags.add(f"same-{end}")
            bits += 16
            if a[port] == b[port] and a["protocol"] in (TCP, UDP):
                bits += 8
    if tcp and min(a["l4_visible"], b["l4_visible"]) < 12 and "ip-id" not in flags:
        bits = min(bits, evidence.STRONG - 1)  # acknowledgements that cannot be told apart
    conflict = bool(ids and a["ip_id"] != b["ip_id"])
    if sums and a["residual"] != b["residual"]:
        # a SYN's options may be clamped; one that is sent again has other options too, but later
        clamped = a["tcp_flags"] & 2 and ("ip-id" in flags or abs(a["time_ns"] - b["time_ns"]) <= 100_000_000)
        conflict = conflict or not clamped
    if not flags & {"same-src", "same-dst", "ip-id", "tcp-seq"}:
        conflict = True
    if (
        tcp
        and not a["payload_length"]
        and min(a["l4_visible"], b["l4_visible"]) < 12
        and "ip-id" not in flags
    ):
        conflict = True  # bare acknowledgements that cannot be told apart
    if GROUP in (a["dst"], b["dst"]) and not {"same-src", "same-dst"} <= flags:
        conflict = True
    return bits, flags, conflict


@settings(deadline=None, derandomize=True, max_examples=500)
@given(pairs(), st.sampled_from((0, 0b0100, 0b1110)))
def test_every_rule_counts_as_documented(pair: tuple[Row, Row], renumbered: int) -> None:
    assert weigh(*pair, renumbered=renumbered) == twin(*pair, renumbered)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(pairs())
def test_evidence_does_not_depend_on_which_point_comes_first(pair: tuple[Row, Row]) -> None:
    assert weigh(*pair) == weigh(pair[1], pair[0])


PING = {"protocol": ICMP, "src": CLIENT, "dst": SERVER, "seq": 1, "icmp_type": 8}
SYN = {
    "protocol": TCP,
    "src": CLIENT,
    "dst": SERVER,
    "dport": 443,
    "seq": 7,
    "tcp_flags": 2,
    "l4_visible": 20,
}


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (PING | {"content_length": 0}, "a ping whose payload is cut off"),
        (PING | {"residual": 5, "residual_known": True}, "a ping with a checksum alone"),
        (SYN | {"l4_visible": 8, "payload_length": 100}, "a segment cut before its acknowledgement number"),
        (
            {"protocol": UDP, "src": CLIENT, "dst": SERVER, "dport": 53, "content_length": 1},
            "a one-byte keep-alive",
        ),
        ({"protocol": UDP, "src": CLIENT, "dst": SERVER, "dport": 53}, "an empty datagram"),
    ],
)
def test_what_traffic_repeats_is_never_strong_alone(before: Row, name: str) -> None:
    bits, _, conflict = weigh(before, before | {"src": PUBLIC})
    assert bits < evidence.STRONG, name
    assert not conflict


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (PING | {"content_length": 32}, "a ping with a payload"),
        (PING | {"residual": 5, "residual_known": True, "ip_id": 9}, "a ping with a checksum and an IP id"),
        (SYN, "a SYN"),
    ],
)
def test_what_is_nobody_elses_is_strong(before: Row, name: str) -> None:
    bits, _, conflict = weigh(before, before | {"src": PUBLIC})
    assert bits >= evidence.STRONG, name
    assert not conflict


def test_a_different_identification_contradicts_and_a_missing_one_does_not() -> None:
    assert weigh(PING | {"ip_id": 1}, PING | {"ip_id": 2})[2]
    assert not weigh(PING | {"ip_id": 1}, PING | {"ip_id": 0})[2]


def test_a_proxy_that_copies_the_payload_onto_its_own_connection_is_no_match() -> None:
    copied = {"protocol": UDP, "dst": SERVER, "src": CLIENT, "content_length": 32}
    assert weigh(copied | {"ip_id": 7}, copied | {"src": PUBLIC, "dst": OTHER, "ip_id": 0})[2]
    # twice NAT in one hop keeps the identification
    assert not weigh(copied | {"ip_id": 7}, copied | {"src": PUBLIC, "dst": OTHER, "ip_id": 7})[2]


def test_multicast_of_two_senders_is_no_translation() -> None:
    book = AddressBook()
    group = book.handle(bytes.fromhex("ff0200000000000000000000000000fb"))
    one, two = (book.handle(bytes.fromhex("fe8000000000000000000000000000") + bytes([n])) for n in (1, 2))
    say = {"protocol": UDP, "version": 6, "dst": group, "dport": 5353, "content_length": 32}
    assert weigh(say | {"src": one}, say | {"src": two}, book)[2]
    assert not weigh(say | {"src": one}, say | {"src": one}, book)[2]


def test_addresses_of_two_ip_versions_are_never_the_same() -> None:
    book = AddressBook()
    assert book.handle(bytes(16)) == 0
    _, flags, _ = weigh({"protocol": UDP, "version": 4}, {"protocol": UDP, "version": 6}, book)
    assert not flags & {"same-src", "same-dst"}


def test_a_syn_with_clamped_options_is_the_same_syn() -> None:
    summed = SYN | {"residual_known": True}
    for changes, conflict in (
        ({}, False),
        ({"time_ns": 10**9}, True),  # sent again: only the IP id could tell
        ({"tcp_flags": 0x10}, True),  # an acknowledgement has nothing that is clamped
    ):
        after = summed | {"src": PUBLIC, "residual": 5} | changes
        assert weigh(summed | changes | {"time_ns": 0}, after)[2] == conflict
    vouched = summed | {"ip_id": 4}
    assert not weigh(vouched, vouched | {"src": PUBLIC, "residual": 5, "time_ns": 10**9})[2]


def test_across_ip_versions_an_embedded_address_is_a_kept_end() -> None:
    book = AddressBook()
    client, server = (book.handle(bytes.fromhex(text)) for text in
                      ("20010db8000000000000000000000002", "0064ff9b0000000000000000c6336401"))  # fmt: skip
    say = {"protocol": UDP, "sport": 4000, "dport": 53, "content_length": 32}
    six = say | {"version": 6, "src": client, "dst": server}
    for before, after in (
        (six, say | {"src": PUBLIC, "dst": SERVER}),
        (say | {"src": PUBLIC, "dst": SERVER}, six),
    ):
        bits, flags, conflict = weigh(before, after, book)
        assert (bits, flags & {"same-src", "same-dst"}, conflict) == (48, {"same-dst"}, False)
    assert weigh(six, say | {"src": PUBLIC, "dst": OTHER}, book)[2]
    # a fragment header's identification is carried over in its low half
    assert not weigh(six | {"ip_id": 0x12340007}, say | {"src": PUBLIC, "dst": SERVER, "ip_id": 7}, book)[2]
    assert weigh(six | {"ip_id": 0x12340007}, say | {"src": PUBLIC, "dst": SERVER, "ip_id": 8}, book)[2]


def test_every_flag_has_a_name() -> None:
    assert evidence.names(0) == ()
    assert evidence.names((1 << 14) - 1) == (
        "icmp-seq", "tcp-seq", "tcp-ack", "payload", "checksum", "ip-id", "same-src", "same-dst", "binding",
        "nearest", "byte-range", "quote", "shifted-numbers", "rewritten-payload",
    )  # fmt: skip
