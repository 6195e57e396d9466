"""Keys: what NAT rewrites never enters them, whatever the packet and whatever the NAT function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packet_rows import decoded, table
from simulation import Conversation, Endpoint, Network, Seen, Simulated
from verdict import check_accounting, expected, flows_told, judge_rows

import nattrace
from nattrace.match.keys import flow_hash, packet_keys
from nattrace.table import MORE_FRAGMENTS, TCP

if TYPE_CHECKING:
    import pytest

BOTH = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def endpoints(draw: st.DrawFn, version: int, where: int) -> Endpoint:
    """Draw a unicast endpoint; those of different `where` never have an address in common.

    Clients (odd `where`) have no port below 1024: without a handshake such a port speaks for a server.
    """
    rest = draw(st.binary(min_size=3, max_size=3))
    host = bytes([10 + where]) + rest if version == 4 else bytes([0x20, where]) + rest * 4 + b"\0\1"
    return Endpoint(host, draw(st.integers(1024 if where % 2 else 1, 65535)))


@st.composite
def translated(draw: st.DrawFn) -> tuple[Conversation, bytes, int, list[bool]]:
    """Draw a conversation through a NAT that changes the client, the server or both, and packets for it."""
    version = draw(st.sampled_from((4, 6)))
    protocol = draw(st.sampled_from(("icmp", "udp", "tcp", "sctp")))
    client, server = draw(endpoints(version, 1)), draw(endpoints(version, 2))
    if protocol == "icmp":
        server = Endpoint(server.address, client.port)
    after_client, after_server = client, server
    kinds = ["none", "snat", "dnat", "port"]
    if version == 4 or protocol == "tcp":
        # twice NAT leaves no endpoint as it was: then something that proxies do not copy has to vouch
        kinds.append("both")
    kind = draw(st.sampled_from(kinds))
    if kind in ("snat", "both"):
        after_client = draw(endpoints(version, 3))
    if kind in ("dnat", "both"):
        after_server = draw(endpoints(version, 4))
    if kind == "port":
        after_client = Endpoint(client.address, draw(st.integers(1024, 65535)))
    if protocol == "icmp":
        after_server = Endpoint(after_server.address, after_client.port)
    conversation = Conversation(
        protocol,
        ("inside", "outside"),
        (Seen(client, server), Seen(after_client, after_server)),
        seq=draw(st.integers(1, 2**32 - 1)) if protocol == "tcp" else draw(st.integers(0, 65535)),
        ack=draw(st.integers(0, 2**32 - 1)),
        tag=draw(st.integers(1, 2**32 - 1)),
    )
    payload = draw(st.binary(min_size=8, max_size=200))
    return conversation, payload, draw(st.integers(1, 65535)), draw(st.lists(st.booleans(), max_size=5))


def capture(
    drawn: tuple[Conversation, bytes, int, list[bool]], tmp_path_factory: pytest.TempPathFactory
) -> Simulated:
    """Capture a first packet from the client and then one a boolean, True for a reply."""
    conversation, payload, ip_id, replies = drawn
    network = Network()
    for n, reply in enumerate([False, *replies]):
        network.wait_us(1000)
        content = bytes([n, 255 - n]) + payload  # never a filling, which speaks for nobody
        network.send(
            conversation, content, reply=reply, ip_id=(ip_id + n) % 65535 + 1, flags=0x18 if n else 0x02
        )
    return network.write(tmp_path_factory.mktemp("nat"))


@BOTH
@given(drawn=translated())
def test_a_nat_function_never_changes_a_key(
    drawn: tuple[Conversation, bytes, int, list[bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    truth = capture(drawn, tmp_path_factory)
    before, after = (decoded(truth.paths[name]) for name in ("inside", "outside"))
    pairs = sorted(truth.pairs("inside", "outside"))
    for key_before, key_after in zip(packet_keys(before), packet_keys(after), strict=True):
        for here, there in pairs:
            assert key_before[here - 1] == key_after[there - 1]


@BOTH
@given(drawn=translated())
def test_a_generated_packet_and_a_nat_function_give_the_expected_rewrite(
    drawn: tuple[Conversation, bytes, int, list[bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The report names exactly what the NAT function changed, for every packet and for the flow."""
    truth = capture(drawn, tmp_path_factory)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert not rows.missed
    conversation = drawn[0]
    protocol, path, initiator, changes = expected(conversation)
    assert list(flows_told(report)) == [(protocol, path, initiator, changes)]
    for row in report.rewrites:
        (_, _, nat, changed, _, _) = changes[0]
        assert row.nat == nat
        mirror = {"src": "dst", "dst": "src", "sport": "dport", "dport": "sport", "id": "id"}
        seen = {mirror[name] for name in changed} if row.direction == "reply" else set(changed)
        assert set(row.changed) == seen
    assert len(list(report.rewrites)) == (rows.right if changes else 0)
    check_accounting(report)


FIELDS = (
    "protocol", "payload_length", "icmp_type", "icmp_code", "seq", "ack", "tcp_flags", "window", "content_hash",
)  # fmt: skip


def test_every_field_that_nat_leaves_alone_tells_packets_apart() -> None:
    base = {"protocol": TCP, "l4_visible": 40, "seq": 7, "ack": 9, "payload_length": 100, "tcp_flags": 16}
    rows = [base, base | {"fragment": MORE_FRAGMENTS}, base | {"fragment": 185}]
    rows += [base | {name: 33} for name in FIELDS if not name.startswith("icmp")]
    ping = {"protocol": 1, "icmp_type": 8, "seq": 1, "residual": 5, "residual_known": True}
    rows += [ping, *(ping | {name: 33} for name in ("icmp_type", "icmp_code", "seq", "residual"))]
    content, exact = packet_keys(table(rows))
    assert len(set(content.tolist())) == len(rows)
    assert len(set(exact.tolist())) == len(rows)


def test_only_the_exact_key_knows_the_ip_identification() -> None:
    content, exact = packet_keys(table([{"ip_id": 1}, {"ip_id": 2}, {"ip_id": 0}]))
    assert len(set(content.tolist())) == 1
    assert len(set(exact.tolist())) == 3


def test_what_nat_rewrites_is_in_no_key() -> None:
    changed = {"src": 9, "dst": 9, "sport": 9, "dport": 9, "ttl": 9, "checksum": 9, "time_ns": 9, "frame": 9}
    base = {"protocol": TCP, "l4_visible": 40, "seq": 7, "version": 4}
    rows = table([base, *(base | {name: value} for name, value in changed.items())])
    content, exact = packet_keys(rows)
    assert len(set(content.tolist())) == 1
    assert len(set(exact.tolist())) == 1


def test_tcp_fields_that_were_cut_off_somewhere_are_left_out() -> None:
    seen = {"protocol": TCP, "seq": 7, "ack": 9, "tcp_flags": 16, "window": 501}
    for visible, same in (
        (8, {"ack", "tcp_flags", "window"}),
        (12, {"tcp_flags", "window"}),
        (14, {"window"}),
    ):
        rows = [seen | {"l4_visible": visible}]
        rows += [seen | {"l4_visible": visible, name: 1} for name in ("ack", "tcp_flags", "window")]
        content = packet_keys(table(rows))[0]
        unmoved = {
            name
            for name, key in zip(("ack", "tcp_flags", "window"), content[1:], strict=True)
            if key == content[0]
        }
        assert unmoved == same


PACKETS = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.sampled_from((6, 17))
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(PACKETS)
def test_both_directions_of_a_conversation_have_one_hash(drawn: list[tuple[int, int, int, int, int]]) -> None:
    there = [
        {"version": 4, "src": a, "dst": b, "sport": p, "dport": q, "protocol": n} for a, b, p, q, n in drawn
    ]
    back = [
        row | {"src": row["dst"], "dst": row["src"], "sport": row["dport"], "dport": row["sport"]}
        for row in there
    ]
    hash_there, turned_there = flow_hash(table(there))
    hash_back, turned_back = flow_hash(table(back))
    assert np.array_equal(hash_there, hash_back)
    ends = [frozenset(((a, p), (b, q))) for a, b, p, q, _ in drawn]
    assert len(set(hash_there.tolist())) == len({(e, row[4]) for e, row in zip(ends, drawn, strict=True)})
    for (a, b, p, q, _), one, other in zip(drawn, turned_there.tolist(), turned_back.tolist(), strict=True):
        assert one != other or (a, p) == (b, q)
