"""NAT64, SIIT, 464XLAT: the protocol version changes and the packets are still the same (RFC 7915, RFC 6052)."""

from __future__ import annotations

import io
import json
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

import numpy as np
import pytest
from simulation import Conversation, Network, routed
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.report.json import report_dict, write_json
from nattrace.table import AddressBook

if TYPE_CHECKING:
    from pathlib import Path

CLIENT, POOL, SERVER = "2001:db8:1::2", "203.0.113.64", "198.51.100.1"
WELL_KNOWN = "64:ff9b::198.51.100.1"


def exchange(network: Network, c: Conversation, packets: int = 8) -> None:
    """A conversation through a translator: IPv4 packets get an identification, IPv6 packets have none."""
    for n in range(packets):
        network.wait_us(300, 900)
        flags = {0: 0x02, 1: 0x12}.get(n, 0x18)
        payload = b"" if c.protocol == "tcp" and n < 2 else network.rng.randbytes(30)
        network.send(c, payload, reply=n % 2 == 1, flags=flags)


@pytest.mark.parametrize("server", [WELL_KNOWN, "2001:db8:122:344:c6:3364:100:0"])
@pytest.mark.parametrize("protocol", ["icmp", "udp", "tcp"])
def test_a_client_behind_nat64_is_followed(protocol: str, server: str, tmp_path: Path) -> None:
    network = Network()
    for n in range(6):
        port = 40000 if protocol != "icmp" else 1
        c = routed(
            protocol,
            (f"2001:db8:1::{n + 2}", port),
            (server, 80 if protocol != "icmp" else 1),
            {"client": (POOL, 1024 + n), "server": (SERVER, 80 if protocol != "icmp" else 1024 + n)},
        )
        exchange(network, c)
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert not rows.missed
    assert flows_told(report) == expected_flows(truth)
    check_accounting(report)
    for row in report.rewrites:
        versions = {side.protocol for side in (row.before, row.after)}
        assert versions == ({"icmp", "icmpv6"} if protocol == "icmp" else {protocol})
        assert {":" in row.before.src, ":" in row.after.src} == {True, False}


def test_json_says_each_side_in_its_own_version(tmp_path: Path) -> None:
    network = Network()
    c = routed("icmp", (CLIENT, 7), (WELL_KNOWN, 7), {"client": (POOL, 9), "server": (SERVER, 9)})
    exchange(network, c)
    report = nattrace.analyze(*network.write(tmp_path).sources)
    text = io.StringIO()
    write_json(report, text)
    (flow,) = json.loads(text.getvalue())["flows"]
    assert json.loads(text.getvalue()) == report_dict(report)
    assert flow["protocol"] == "icmpv6"
    (translation,) = flow["translations"]
    assert translation["nat"] == "snat+dnat"
    assert translation["changed"] == ["src", "dst", "id"]
    assert translation["original"] == {"src": CLIENT, "dst": "64:ff9b::c633:6401", "id": 7}
    assert translation["reply"] == {"src": SERVER, "dst": POOL, "id": 9}


def test_a_server_that_embeds_another_address_is_no_kept_endpoint(tmp_path: Path) -> None:
    """A dual-stack proxy repeats payloads from IPv6 to IPv4: nothing vouches that they are one packet."""
    network = Network()
    inner = routed("udp", (CLIENT, 4000), (WELL_KNOWN, 53), points=("inside",))
    outer = routed("udp", (POOL, 4000), ("198.51.100.2", 53), points=("outside",))
    for n in range(12):
        payload = network.rng.randbytes(40)
        network.wait_us(800)
        network.send(inner, payload, reply=n % 2 == 1)
        network.wait_us(30)
        network.send(outer, payload, reply=n % 2 == 1)
    report = nattrace.analyze(*network.write(tmp_path).sources)
    assert not list(report.rewrites)


def test_addresses_embedded_as_rfc_6052_shows_them() -> None:
    """The examples of RFC 6052 section 2.4, and neighbours of them that embed something else."""
    book, four = AddressBook(), int(IPv4Address("192.0.2.33"))
    examples = (
        "2001:db8:c000:221::", "2001:db8:1c0:2:21::", "2001:db8:122:c000:2:2100::", "2001:db8:122:3c0:0:221::",
        "2001:db8:122:344:c0:2:2100::", "2001:db8:122:344::192.0.2.33", "64:ff9b::192.0.2.33",
    )  # fmt: skip
    others = ("64:ff9b::192.0.2.34", "2001:db8:c000:221:100::", "2001:db8:c000:221::1", "::")
    handles = np.array([book.handle(IPv6Address(a).packed) for a in examples + others], np.uint32)
    assert book.embeds(handles, np.full(handles.size, four, np.uint32)).tolist() == [True] * 7 + [False] * 4
    assert not book.embeds(handles[-1:], np.zeros(1, np.uint32)).any()
