from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nattrace.model import (
    Accounting,
    Comment,
    Crossing,
    Finding,
    Flow,
    IcmpErrors,
    Latency,
    PacketRef,
    ReportData,
    Translation,
    Tuple,
)
from nattrace.report.table import write_table

UNMEASURED = Latency(False, None, None, None, None)


def printed(data: ReportData, *, limit: int = 40, width: int | None = None) -> list[str]:
    stream = io.StringIO()
    write_table(data, stream, limit=limit, width=width)
    return stream.getvalue().splitlines()


def flow(number: int, **changes: object) -> Flow:
    """A TCP connection that was seen on docker0 and left for eth0 unchanged."""
    unchanged = Flow(
        id=number,
        protocol="tcp",
        status="untranslated",
        path=("docker0", "eth0"),
        initiator=Tuple("172.17.0.3", "198.51.100.7", 40000, 80),
        translations=(),
        packets_original=3,
        packets_reply=2,
        crossings=(
            Crossing("docker0", "eth0", "original", 3, 0, 0, 0, UNMEASURED),
            Crossing("eth0", "docker0", "reply", 2, 0, 0, 0, UNMEASURED),
        ),
        first=0,
        last=0,
    )
    return replace(unchanged, **changes)  # type: ignore[arg-type]


def report(docker_ping: ReportData, *flows: Flow, **changes: object) -> ReportData:
    return replace(docker_ping, **({"flows": flows, "findings": ()} | changes))  # type: ignore[arg-type]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_docker_ping_on_a_wide_terminal(docker_ping: ReportData) -> None:
    assert (
        printed(docker_ping, width=140)
        == """\
docker0 -> eth0   2 points, 80 packets, 4.4 s together: 40 crossings matched, 0 lost, 0 ambiguous
4 flows, all translated (snat to 203.0.113.10)

  flow  who                   to              docker0          -> eth0                   packets  loss  median
  1     icmp 172.17.0.2 job2  202.89.233.100  172.17.0.2 id 7  -> 203.0.113.10 id 7      5+5      0     33 us
  2     icmp 172.17.0.3 job3  202.89.233.100  172.17.0.3 id 8  -> 203.0.113.10 id 8      5+5      0     31 us
  3     icmp 172.17.0.4 job4  202.89.233.100  172.17.0.4 id 1  -> 203.0.113.10 id 1      5+5      0     37 us
  4     icmp 172.17.0.5 job5  202.89.233.100  172.17.0.5 id 1  -> 203.0.113.10 id 50024  5+5      0     33 us

rule      nat POSTROUTING 1 (flows 1-4): -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE

info      icmp-id-rewritten   flow 4 got id 50024 because flow 3 already used id 1 towards 202.89.233.100
          packets eth0:7""".splitlines()
    )


def test_docker_ping_on_eighty_columns(docker_ping: ReportData) -> None:
    lines = printed(docker_ping, width=80)
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "docker0 -> eth0   2 points, 80 packets, 4.4 s together: 40 crossings matched,",
        "    0 lost, 0 ambiguous",
        "4 flows, all translated (snat to 203.0.113.10)",
    ]
    assert not any("\u00a0" in line for line in lines)
    start = lines.index("  4    icmp 172.17.0.5 job5 to 202.89.233.100")
    assert lines[start + 1 : start + 3] == [
        "       docker0 172.17.0.5 id 1 -> eth0 203.0.113.10 id 50024",
        "       5+5 packets, 0 lost, median 33 us, translated",
    ]


def test_the_same_facts_at_every_width(docker_ping: ReportData) -> None:
    wide = " ".join(" ".join(printed(docker_ping)).split())
    for width in range(80, 201, 10):
        lines = printed(docker_ping, width=width)
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        for fact in (
            "203.0.113.10 id 50024",
            "172.17.0.5 id 1 ->",
            "40 crossings matched, 0 lost",
            "MASQUERADE",
        ):
            assert fact in wide
            assert fact in text


def test_a_published_port_shows_the_destination(docker_ping: ReportData) -> None:
    inbound = flow(
        1,
        status="translated",
        path=("eth0", "docker0"),
        initiator=Tuple("198.51.100.9", "203.0.113.10", 5000, 8080),
        translations=(
            Translation(
                "eth0",
                "docker0",
                "dnat",
                ("dst", "dport"),
                Tuple("198.51.100.9", "203.0.113.10", 5000, 8080),
                Tuple("172.17.0.2", "198.51.100.9", 80, 5000),
            ),
        ),
    )
    lines = printed(report(docker_ping, inbound))
    assert lines[0].startswith("eth0 -> docker0   2 points")
    assert lines[1] == "1 flow, translated (dnat to 172.17.0.2)"
    assert cells(lines[3])[:5] == ["flow", "who", "to", "eth0", "-> docker0"]
    assert cells(lines[4])[:5] == [
        "1",
        "tcp 198.51.100.9:5000",
        "203.0.113.10:8080",
        "203.0.113.10:8080",
        "-> 172.17.0.2:80",
    ]


def test_both_ends_changed_over_ipv6(docker_ping: ReportData) -> None:
    twice = flow(
        1,
        status="translated",
        initiator=Tuple("2001:db8::5", "2001:db8::1", 40000, 8080),
        translations=(
            Translation(
                "docker0",
                "eth0",
                "snat+dnat",
                ("src", "dst", "dport"),
                Tuple("2001:db8::5", "2001:db8::1", 40000, 8080),
                Tuple("2001:db8:2::2", "2001:db8:9::9", 80, 40000),
            ),
        ),
    )
    text = "\n".join(printed(report(docker_ping, twice)))
    assert "[2001:db8::5]:40000 > [2001:db8::1]:8080  -> [2001:db8:9::9]:40000 > [2001:db8:2::2]:80" in text
    assert "snat+dnat to 2001:db8:9::9 > 2001:db8:2::2" in text


def test_what_was_not_seen_behind_the_nat_is_not_called_the_same(docker_ping: ReportData) -> None:
    lost = flow(
        2,
        status="lost",
        crossings=(Crossing("docker0", "eth0", "original", 0, 3, 0, 0, UNMEASURED),),
        packets_reply=0,
    )
    lines = printed(report(docker_ping, flow(1), lost))
    assert "3 lost" in lines[0]
    assert lines[1] == "2 flows: 1 untranslated, 1 lost"
    assert cells(lines[4]) == [
        "1", "tcp 172.17.0.3", "198.51.100.7:80", "172.17.0.3:40000", "-> same", "3+2", "0", "n/m", "untranslated",
    ]  # fmt: skip
    assert cells(lines[5]) == [
        "2", "tcp 172.17.0.3", "198.51.100.7:80", "172.17.0.3:40000", "-> not seen", "3+0", "3", "n/m", "lost",
    ]  # fmt: skip


def test_doubt_is_printed_only_where_there_is_any(docker_ping: ReportData) -> None:
    crossing = Crossing("docker0", "eth0", "original", 1, 0, 2, 4, UNMEASURED)
    lines = printed(report(docker_ping, flow(1, crossings=(crossing,))))
    assert lines[0].endswith("1 crossing matched, 0 lost, 4 ambiguous, 2 unknowable")
    assert cells(lines[3])[-5:] == ["loss", "unknowable", "ambiguous", "median", "status"]
    assert cells(lines[4])[-5:] == ["0", "2", "4", "n/m", "untranslated"]


def test_a_single_capture_is_said_to_be_one(docker_ping: ReportData) -> None:
    alone = flow(1, status="one-sided", path=("docker0",), crossings=())
    finding = Finding(
        "no-outside-point", "warning", "no point outside was captured", advice="tcpdump -i eth0"
    )
    lines = printed(report(docker_ping, alone, points=docker_ping.points[:1], findings=(finding,)))
    assert lines == [
        "docker0   1 point, 40 packets, 4.4 s: nothing to compare with",
        "1 flow, one-sided",
        "1 warning, see below",
        "",
        "  flow  who                   to               packets  status",
        "  1     tcp 172.17.0.3:40000  198.51.100.7:80  3+2      one-sided",
        "",
        "warning   no-outside-point   no point outside was captured",
        "          try: tcpdump -i eth0",
    ]


def test_nothing_at_all(docker_ping: ReportData) -> None:
    empty = replace(
        docker_ping.points[0], packets=0, decoded=0, first=None, last=None, file="x.pcap", truncated=True
    )
    lines = printed(report(docker_ping, points=(empty,), accounting=Accounting(0, 0, {}, {})))
    assert lines == [
        "docker0   1 point, 0 packets, no time known: nothing to compare with",
        "no flow was found",
        "",
        "damaged   docker0: x.pcap is cut or damaged; what follows the damage is missing here",
    ]


def test_each_path_has_its_own_table(docker_ping: ReportData) -> None:
    through = flow(
        2,
        path=("veth1", "docker0", "eth0"),
        crossings=(
            Crossing("veth1", "docker0", "original", 3, 0, 0, 0, Latency(True, 0, 2000, 0, 0)),
            Crossing("docker0", "eth0", "original", 3, 0, 0, 0, Latency(True, 0, 21_000, 0, 0)),
        ),
    )
    points = (replace(docker_ping.points[0], name="veth1"), *docker_ping.points)
    lines = printed(report(docker_ping, flow(1), through, points=points))
    assert lines[0].startswith("docker0 -> eth0    2 points, 80 packets")
    assert lines[1].startswith("veth1 -> docker0   2 points, 80 packets")
    assert "docker0 -> eth0   1 flow" in lines
    assert "veth1 -> docker0 -> eth0   1 flow" in lines
    assert "2 us + 21 us" in lines[-1]


def test_flows_both_ways_through_one_pair_share_its_headline(docker_ping: ReportData) -> None:
    back = flow(2, path=("eth0", "docker0"))
    lines = printed(report(docker_ping, flow(1), back))
    assert lines[0].startswith("docker0 <-> eth0   2 points")
    assert "10 crossings matched" in lines[0]


def test_captures_without_common_time(docker_ping: ReportData) -> None:
    later = replace(docker_ping.points[1], first=2**62, last=2**62)
    lines = printed(report(docker_ping, flow(1), points=(docker_ping.points[0], later)))
    assert "no time in common" in lines[0]


def test_a_clock_that_is_ahead_is_set_back_before_times_are_compared(docker_ping: ReportData) -> None:
    inside, outside = docker_ping.points
    ahead_ns = 3600 * 10**9
    assert outside.first is not None
    assert outside.last is not None
    shifted = replace(
        outside,
        first=outside.first + ahead_ns,
        last=outside.last + ahead_ns,
        clock=replace(outside.clock, offset_ns=ahead_ns),
    )
    assert "4.4 s together" in printed(report(docker_ping, flow(1), points=(inside, shifted)))[0]


def test_a_limit_says_what_it_hides_and_never_hides_the_trouble(docker_ping: ReportData) -> None:
    flows = [flow(number) for number in range(1, 101)] + [flow(101, status="lost")]
    lines = printed(report(docker_ping, *flows), limit=3)
    assert [cells(line)[0] for line in lines[4:7]] == ["1", "2", "101"]
    assert lines[7] == "  ... 98 more flows: --limit 0 shows all, -f json has all"
    assert sum("198.51.100.7:80" in line for line in printed(report(docker_ping, *flows), limit=0)) == 101


def test_what_was_skipped_or_damaged_is_said(docker_ping: ReportData) -> None:
    point = replace(
        docker_ping.points[0],
        truncated=True,
        dropped_by_kernel=5,
        comments=(Comment(None, "taken by hand"), Comment(3, "here\nit is")),
        dated=False,
    )
    accounting = Accounting(90, 80, {"one-sided": 4, "lost": 1}, {"arp": 3, "truncated": 2})
    lines = printed(
        report(docker_ping, flow(1), points=(point, docker_ping.points[1]), accounting=accounting)
    )
    assert lines[-7:] == [
        "skipped   5 of 90 packets: 3 arp, 2 truncated",
        "unmatched 5 of 90 packets: 4 one-sided, 1 lost",
        "damaged   docker0: docker0.pcap is cut or damaged; what follows the damage is missing here",
        "dropped   docker0: the capturing kernel dropped 5 packets; they may look like losses",
        "undated   docker0: docker0.pcap has times without dates; instants are left out",
        "comment   docker0: taken by hand",
        r"comment   docker0:3: here\x0ait is",
    ]


def test_errors_come_before_warnings_and_are_announced(docker_ping: ReportData) -> None:
    findings = (
        Finding("just-so", "info", "c"),
        Finding("odd", "warning", "b"),
        Finding("leak", "error", "a", packets=tuple(PacketRef("eth0", frame) for frame in range(1, 10))),
    )
    lines = printed(report(docker_ping, flow(1), findings=findings))
    assert lines[2] == "1 error and 1 warning, see below"
    assert lines[-4:] == [
        "error     leak   a",
        "          packets eth0:1, eth0:2, eth0:3, eth0:4, eth0:5, eth0:6 and 3 more",
        "warning   odd   b",
        "info      just-so   c",
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=()), min_size=1), st.sampled_from([None, 80]))
def test_no_captured_text_reaches_the_terminal_as_it_is(
    docker_ping: ReportData, text: str, width: int | None
) -> None:
    point = replace(docker_ping.points[0], name=text, file=text, truncated=True, comments=(Comment(1, text),))
    finding = Finding("x", "info", text, packets=(PacketRef(text, 1),), advice=text)
    hostile = flow(1, path=(text, "eth0"))
    stream = io.StringIO()
    data = report(docker_ping, hostile, points=(point, docker_ping.points[1]), findings=(finding,))
    write_table(data, stream, width=width)
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))


@pytest.mark.parametrize("width", [80, 120, None])
def test_there_is_no_trailing_space(docker_ping: ReportData, width: int | None) -> None:
    assert all(line == line.rstrip() for line in printed(docker_ping, width=width))


def test_thousands_of_points_do_not_push_the_verdict_out_of_reach(docker_ping: ReportData) -> None:
    points = [replace(docker_ping.points[0], name=f"p{number}", truncated=True) for number in range(5000)]
    flows = [flow(number + 1, path=(f"p{number}",), crossings=()) for number in range(5000)]
    lines = printed(report(docker_ping, *flows, points=points))
    assert lines[41] == "5,000 flows, all untranslated"
    assert "... 4,960 flows on 4,960 more paths: -f json has all" in lines
    assert len(lines) < 300


def test_interfaces_that_saw_nothing_share_a_line(docker_ping: ReportData) -> None:
    idle = [
        replace(docker_ping.points[0], name=name, packets=0, first=None, last=None)
        for name in ("lo", "wlan0")
    ]
    lines = printed(report(docker_ping, flow(1), points=[*docker_ping.points, *idle]))
    assert lines[0].startswith("docker0 -> eth0   2 points")
    assert lines[1] == "2 points without packets: lo, wlan0"


def test_paths_that_could_be_compared_come_first(docker_ping: ReportData) -> None:
    alone = [flow(number, path=("eth0",), crossings=()) for number in (1, 2)]
    lines = printed(report(docker_ping, *alone, flow(3)))
    assert lines.index("docker0 -> eth0   1 flow") < lines.index("eth0   2 flows")


def test_icmp_errors_are_named_with_their_flows_where_there_are_any(docker_ping: ReportData) -> None:
    refused = (
        IcmpErrors(3, 4, "fragmentation-needed", 1400, 1),
        IcmpErrors(3, 3, "port-unreachable", None, 6),
        IcmpErrors(11, 0, "ttl-exceeded", None, 2),
    )
    data = report(docker_ping, flow(1, icmp_errors=refused), flow(2))

    header, first, second = (line for line in printed(data) if line.startswith(("  flow", "  1 ", "  2 ")))
    assert cells(header)[-1] == "icmp errors"
    assert cells(first)[-1] == "6 port-unreachable, 2 ttl-exceeded and 1 more"
    assert cells(second)[-1] == "untranslated"
    assert "icmp errors" not in "\n".join(printed(report(docker_ping, flow(1), flow(2))))


@pytest.mark.parametrize("width", [60, 80])
def test_icmp_errors_have_a_line_of_their_own_where_the_table_is_too_wide(
    docker_ping: ReportData, width: int
) -> None:
    errors = (IcmpErrors(3, 4, "fragmentation-needed", 1400, 1),)
    lines = printed(report(docker_ping, flow(1, icmp_errors=errors), flow(2)), width=width)

    assert "       icmp errors: 1 fragmentation-needed mtu 1400" in lines
    assert sum("icmp errors" in line for line in lines) == 1
