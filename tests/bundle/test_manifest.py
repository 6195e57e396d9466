"""manifest.json: what is written obeys its schema and is read back; what is hostile costs one line."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nattrace.bundle.counters import counters_in, interface_in
from nattrace.bundle.manifest import Counters, Manifest, Missing, PointEntry, Workload, parse_manifest
from nattrace.bundle.writing import manifest_text
from nattrace.errors import InputError
from nattrace.report.schema import schema_text

FULL = Manifest(
    points=(
        PointEntry(
            name="docker0",
            files=("docker0.pcap", "docker0.pcap1"),
            interface="docker0",
            ifindex=5,
            namespace="host",
            filter="icmp",
            snaplen=65535,
            counters=Counters(80, 80, 2, None),
            command=("tcpdump", "-i", "docker0"),
        ),
        PointEntry(name="job:eth0", files=(), container="job", problem="tcpdump was killed"),
    ),
    version="0.1.0",
    host="h",
    kernel="6.1",
    start_ns=1_763_930_000_123_456_789,
    stop_ns=1_763_930_060_000_000_000,
    stopped_by="workload",
    workload=Workload(("ping", "-c", "3"), 1),
    context={"before/links": "context/before/links.json"},
    missing=(Missing("conntrack", "no right", "CAP_NET_ADMIN"),),
)


def test_what_is_written_obeys_the_schema_and_is_read_back() -> None:
    for manifest in (FULL, Manifest(points=())):
        text = manifest_text(manifest)
        jsonschema.Draft202012Validator(json.loads(schema_text("bundle"))).validate(json.loads(text))
        assert parse_manifest(text.encode(), "m") == manifest


def test_instants_have_nine_decimals() -> None:
    assert json.loads(manifest_text(FULL))["start"] == "2025-11-23T20:33:20.123456789Z"


def test_a_later_field_is_ignored() -> None:
    document = json.loads(manifest_text(FULL)) | {"colour": "blue"}
    assert parse_manifest(json.dumps(document).encode(), "m") == FULL


@pytest.mark.parametrize(
    "data", [b"[]", b"{}", b'{"schema": 1}', b'{"schemaVersion": 2}', b"\xff", b"", b"[" * 10**6]
)
def test_another_programs_manifest_is_none(data: bytes) -> None:
    assert parse_manifest(data, "m") is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema": "nattrace/bundle/2"}, "update nattrace"),
        ({"points": {}}, "points: not a list"),
        ({"points": [1]}, "points: not a list of objects"),
        ({"points": [{}]}, r"points\[0\].name: a point needs one"),
        ({"points": [{"name": "a"}, {"name": "a"}]}, "two are called 'a'"),
        ({"points": [{"name": "x" * 5000}]}, r"points\[0\].name"),
        ({"points": [{"name": "a", "files": "a.pcap"}]}, "files: not a list"),
        ({"points": [{"name": "a", "files": [1]}]}, "files: not a list of texts"),
        ({"points": [{"name": "a", "counters": {"dropped_by_kernel": -1}}]}, "counters.dropped_by_kernel"),
        ({"points": [{"name": "a", "counters": {"captured": True}}]}, "counters.captured"),
        ({"points": [{"name": "a", "ifindex": 10**30}]}, "ifindex"),
        ({"points": [{"name": f"p{n}"} for n in range(1025)]}, "points: not a list of a sensible size"),
        ({"start": "yesterday"}, "start: 'yesterday' is no instant"),
        ({"start": "2026-13-45T99:99:99Z"}, "is no instant"),
        ({"context": {"links": 1}}, "context: not an object of texts"),
        ({"workload": "ping"}, "workload: not an object"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_says_where(change: dict[str, Any], where: str) -> None:
    data = json.dumps(json.loads(manifest_text(FULL)) | change).encode()
    with pytest.raises(InputError, match=where) as caught:
        parse_manifest(data, "b/manifest.json")
    assert str(caught.value).startswith("b/manifest.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b'{"schema": "nattrace/bundle/1", "points": [',
        b'{"schema": "nattrace/bundle/1", "points": ' + b"[" * 10**5,
        b'{"schema": "nattrace/bundle/1", "n": ' + b"9" * 10**5 + b"}",
        b'{"schema": "nattrace/bundle/1"}' + b" " * (17 << 20),
    ],
)
def test_broken_or_endless_json_is_one_line(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        parse_manifest(data, "m")
    assert "\n" not in str(caught.value)


#: As tcpdump 4.99.3 prints it, first on SIGUSR1, then at its end.
SAID = """tcpdump: listening on docker0, link-type EN10MB (Ethernet), snapshot length 65535 bytes
tcpdump: 4 packets captured, 4 packets received by filter, 0 packets dropped by kernel
1 packet captured
5 packets received by filter
3 packets dropped by kernel
"""


def test_tcpdumps_last_counts_are_taken() -> None:
    assert counters_in(SAID) == Counters(1, 5, 3, None)
    assert counters_in(SAID + "7 packets dropped by interface\n") == Counters(1, 5, 3, 7)
    assert counters_in("tcpdump: eth9: No such device exists") is None


def test_the_interface_that_tcpdump_listens_on() -> None:
    assert interface_in(SAID) == "docker0"
    assert interface_in("tcpdump: eth9: No such device exists") is None
