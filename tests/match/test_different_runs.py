"""Public captures against each other: no translation, except between captures that are copies of one another.

The captures lie beside the checkout and are read in place. Which of them are copies was looked up by hand, packet
by packet; every such family is listed with what makes it one.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest

import nattrace
from nattrace.errors import NattraceError

CAPTURES = Path(__file__).resolve().parents[2].parent / "shared" / "captures"
ZEEK = CAPTURES / "zeek" / "testing" / "btest" / "Traces"

pytestmark = pytest.mark.skipif(not CAPTURES.exists(), reason="needs the shared captures")

#: Captures of the same packets, with other ports in some of them: that is what NAT does, too.
TWINS = (
    ("socks-auth.pcap", "socks-auth-10080.pcap"),
    ("ldap/simpleauth.pcap", "ldap/simpleauth-diff-port.pcap"),
    ("postgresql/psql-aws-ssl-disable.pcap", "postgresql/psql-aws-ssl-disable-15432.pcap"),
    ("postgresql/psql-aws-ssl-require.pcap", "postgresql/psql-aws-ssl-require-15432.pcap"),
    ("mysql/change-user-success.pcap", "postgresql/mysql-on-port-5432.pcap"),
    ("dnp3/dnp3_read.pcap", "dnp3/dnp3_read_p20001.pcap"),
    ("quic/quicv2-echo-443.pcap", "quic/quicv2-echo-dpd-custom-port-4433.pcap"),
    ("quic/chromium-115.0.5790.110-api-cirrus-com.pcap", "quic/chromium-dpd-custom-port-4433.pcap"),
    ("port4242.pcap", "port4243.pcap"),
    ("var-services-std-ports.pcap", "ssh/ssh-on-port-80.pcap"),  # one of its connections is the SSH session
    # one HTTP exchange, TCP from 141.142.228.5 port 59856, which Zeek's tests wrapped, cut and moved in many ways
    ("http/get.pcap", "postgresql/http-on-port-5432.pcap"),
    ("http/get.pcap", "tcp/http-on-irc-port-missing-syn.pcapng"),
)
#: All that may be matched with each other: the twins, and more copies of that HTTP exchange.
FAMILIES = (
    *map(frozenset, TWINS[:10]),
    frozenset(
        {
            "http/get.pcap", "http/get_nosyn.pcap", "http/get-without-fins.pcap", "http-qinq-0.pcap",
            "http-vlan-0.pcap", "postgresql/http-on-port-5432.pcap", "tcp/handshake-reorder.pcap",
            "tcp/http-on-irc-port-missing-syn.pcapng", "tcp/no-handshake.pcap", "tcp/syn.pcap",
            "tcp/syn-bad.pcap", "tcp/syn-synack.pcap", "vlan-collisions.pcap", "vlan-qinqinq.pcap",
        }
    ),
)  # fmt: skip
#: Made by one script with the same addresses, sequence numbers and identifications: two runs are two runs.
SCRIPTED = (
    "finger/long-request.pcapng",
    "finger/long-reply-line.pcapng",
    "websocket/oversized-close-frame.pcapng",
)
#: Captures whose times come so near are compared, and those that follow one another in one folder.
NEAR_NS = 60_000_000_000


def translations(first: str, second: str) -> int:
    """Return how many translations are told between two captures."""
    report = nattrace.analyze(f"first={ZEEK / first}", f"second={ZEEK / second}")
    found = [t for flow in report.flows for t in flow.translations]
    return sum(t.from_point != t.to_point for t in found)


@pytest.mark.parametrize(("first", "second"), TWINS)
def test_twins_with_other_ports_are_translated(first: str, second: str) -> None:
    assert translations(first, second) == 1


@pytest.mark.parametrize(("first", "second"), list(combinations(SCRIPTED, 2)))
def test_two_runs_of_one_script_are_not(first: str, second: str) -> None:
    assert translations(first, second) == 0


def test_captures_of_one_time_have_nothing_to_do_with_each_other() -> None:
    spans: list[tuple[int, int, str, set[str]]] = []
    for path in sorted(ZEEK.rglob("*.pcap*")):
        try:
            report = nattrace.analyze(path, rows=False)
        except NattraceError:
            continue
        times = [time for point in report.points for time in (point.first, point.last) if time]
        if times and report.flows:
            protocols = {flow.protocol for flow in report.flows}
            spans.append((min(times), max(times), str(path.relative_to(ZEEK)), protocols))
    spans.sort(key=lambda span: span[:3])
    near = [
        (one[2], two[2])
        for one, two in combinations(spans, 2)
        if two[0] <= one[1] + NEAR_NS and one[3] & two[3]
    ]
    # parts of one series of tests
    series = [
        (one[2], two[2])
        for one, two in pairwise(spans)
        if Path(one[2]).parent == Path(two[2]).parent and one[3] & two[3]
    ]
    strangers = [
        pair for pair in sorted({*near, *series}) if not any(set(pair) <= family for family in FAMILIES)
    ]
    assert len(strangers) > 150
    assert [pair for pair in strangers if translations(*pair)] == []
