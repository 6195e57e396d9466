from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nattrace import analyze
from nattrace.model import (
    Accounting,
    Comment,
    Crossing,
    Endpoint,
    Flow,
    IcmpErrors,
    Latency,
    ReportData,
    Rule,
    Translation,
    Tuple,
)
from nattrace.report.json import flow_dict, flow_json, report_dict, write_json

if TYPE_CHECKING:
    from nattrace.report.view import ReportView

GOLDEN = Path(__file__).parent / "docker-ping.json"

names = st.text(st.characters(exclude_categories=()), min_size=1, max_size=8)
counts = st.integers(0, 2**40)
ports = st.integers(0, 65535)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
tuples = st.one_of(
    st.builds(Tuple, addresses, addresses, ports, ports),
    st.builds(Tuple, addresses, addresses, id=ports),
    st.builds(Tuple, addresses, addresses),
)
durations = st.integers(-(2**62), 2**62)
latencies = st.one_of(
    st.just(Latency(False, None, None, None, None)),
    st.builds(Latency, st.just(True), durations, durations, durations, durations),
    st.builds(Latency, st.booleans(), *[st.none() | durations] * 4),
)
directions = st.sampled_from(["original", "reply"])
fields = st.lists(st.sampled_from(["src", "dst", "sport", "dport", "id"]), unique=True).map(tuple)
rules = st.builds(Rule, names, names, names, st.integers(1, 1000))
translations = st.builds(
    Translation,
    names,
    names,
    st.sampled_from(["snat", "dnat", "snat+dnat"]),
    fields,
    tuples,
    tuples,
    st.none() | rules,
    *[st.none() | st.integers(-(2**63), 2**63 - 1)] * 2,
)
crossings = st.builds(Crossing, names, names, directions, counts, counts, counts, counts, latencies)
endpoints = st.none() | st.builds(
    Endpoint,
    st.none() | names,
    st.none() | names,
    st.none() | names,
    st.dictionaries(names, names, max_size=3),
)
icmp_errors = st.builds(
    IcmpErrors,
    st.integers(0, 255),
    st.integers(0, 255),
    st.sampled_from(["ttl-exceeded", "type-3-code-77"]),
    st.none() | st.integers(1, 2**32 - 1),
    counts,
)
instants = st.integers(-(2**63), 2**63 - 1)
flows = st.builds(
    Flow,
    st.integers(1, 2**40),
    st.sampled_from(["icmp", "icmpv6", "tcp", "udp", "sctp", "gre", "253"]),
    st.sampled_from(["translated", "untranslated", "lost", "one-sided", "ambiguous"]),
    st.lists(st.sampled_from(["docker0", "eth0", 'we"ird\u202e', "\udcff"]), min_size=1, max_size=3).map(
        tuple
    ),
    tuples,
    st.lists(translations, max_size=2).map(tuple),
    counts,
    counts,
    st.lists(crossings, max_size=3).map(tuple),
    instants,
    instants,
    endpoints,
    endpoints,
    icmp_errors=st.lists(icmp_errors, max_size=2).map(tuple),
)


def written(data: ReportView) -> str:
    stream = io.StringIO()
    write_json(data, stream)
    return stream.getvalue()


def test_docker_ping_is_written_as_the_contract_says(docker_ping: ReportData) -> None:
    assert written(docker_ping) == GOLDEN.read_text()


def test_the_text_and_the_dictionary_say_the_same(docker_ping: ReportData) -> None:
    found = json.loads(written(docker_ping))
    expected = report_dict(docker_ping)
    assert found == expected
    assert list(found) == ["schema", "generator", "points", "flows", "findings", "accounting"]
    assert json.dumps(found) == json.dumps(expected)  # the order of the keys too


@given(flows, st.frozensets(st.sampled_from(["docker0", "eth0"])))
def test_the_fast_text_of_a_flow_is_that_of_json_dumps(flow: Flow, undated: frozenset[str]) -> None:
    assert flow_json(flow, undated) == json.dumps(flow_dict(flow, undated))


def test_a_report_of_nothing_is_json() -> None:
    nothing = ReportData("0", (), (), (), Accounting(0, 0, {}, {}))
    found = json.loads(written(nothing))
    assert (found["points"], found["flows"], found["findings"]) == ([], [], [])


def test_more_flows_than_one_write_holds(docker_ping: ReportData) -> None:
    flows = [replace(docker_ping.flows[0], id=number) for number in range(1, 3001)]
    found = json.loads(written(replace(docker_ping, flows=flows)))
    assert [flow["id"] for flow in found["flows"]] == list(range(1, 3001))


def test_undated_points_have_no_instants(docker_ping: ReportData) -> None:
    printed = replace(docker_ping.points[0], dated=False)
    found: dict[str, Any] = json.loads(written(replace(docker_ping, points=(printed, docker_ping.points[1]))))
    undated, dated = found["points"]
    assert (undated["first"], undated["last"], undated["dated"]) == (None, None, False)
    assert dated["first"] == "2026-11-23T16:25:55.280741000Z"
    assert {(flow["first"], flow["last"]) for flow in found["flows"]} == {(None, None)}


def test_counts_are_in_the_order_of_their_names(docker_ping: ReportData) -> None:
    there = replace(docker_ping, accounting=Accounting(83, 80, {}, {"lldp": 1, "arp": 2}))
    back = replace(docker_ping, accounting=Accounting(83, 80, {}, {"arp": 2, "lldp": 1}))
    assert written(there) == written(back)


def test_captured_text_cannot_break_out(docker_ping: ReportData) -> None:
    name = '"}],\u202e\x1b[2J\n'
    point = replace(
        docker_ping.points[0], name=name, file=os.fsdecode(b"\xff.pcap"), comments=(Comment(3, name),)
    )
    text = written(replace(docker_ping, points=(point,)))
    assert text.isascii()
    assert "\x1b" not in text
    found = json.loads(text)["points"][0]
    assert (found["name"], found["comments"], found["file"]) == (
        name,
        [{"frame": 3, "text": name}],
        r"\xff.pcap",
    )


def test_what_is_not_a_number_is_null(docker_ping: ReportData) -> None:
    point = docker_ping.points[0]
    odd = replace(point, clock=replace(point.clock, drift_ppm=float("nan")))
    assert json.loads(written(replace(docker_ping, points=(odd,))))["points"][0]["clock"]["drift_ppm"] is None


SAMPLES = Path(__file__).parents[2] / "nattrace" / "samples"
SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
#: Every IP version with TCP, UDP, SCTP, ICMP and protocols without ports; several interfaces; no dates.
VARIED = (
    "zeek/testing/btest/Traces/cisco-fabric-path.pcap",
    "pcapplusplus/Tests/Packet++Test/PacketExamples/ipv6_options.pcap",
    "pcapplusplus/Tests/Pcap++Test/PcapExamples/many_interfaces-1.pcapng",
    "printed/docker0.txt",
)


def check_columns_against_objects(*sources: str) -> int:
    report = analyze(*sources, rows=False)
    for undated in (frozenset[str](), frozenset(point.name for point in report.points)):
        from_columns = "".join(report.flows.json_texts(undated))  # type: ignore[attr-defined]
        assert from_columns == "\n" + ",\n".join(flow_json(flow, undated) for flow in report.flows)
    found = json.loads(written(report))
    assert json.dumps(found) == json.dumps(report_dict(report))
    return len(report.flows)


def test_flows_written_from_columns_are_those_of_the_objects() -> None:
    assert (
        check_columns_against_objects(*(str(SAMPLES / f"{name}.pcap") for name in ("docker0", "eth0"))) == 4
    )


@pytest.mark.parametrize("name", ["errors_two_hops", "errors_v6", "path_mtu"])
def test_icmp_errors_written_from_columns_are_those_of_the_objects(name: str) -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "lab" / name

    assert check_columns_against_objects(*map(str, sorted(folder.glob("*.pcap")))) > 0


@pytest.mark.parametrize("name", VARIED)
def test_varied_flows_written_from_columns_are_those_of_the_objects(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip("needs the shared captures beside the checkout")
    # The same file as two points gives crossings too.
    assert check_columns_against_objects(f"a={SHARED / name}", f"b={SHARED / name}") > 0
