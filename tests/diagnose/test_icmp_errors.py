"""Errors that a middlebox translated by halves, broke or lost are findings; what Linux does is none."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from error_frames import (
    CONTAINER,
    CONTAINER6,
    PUBLIC,
    PUBLIC6,
    ROUTER,
    ROUTER6,
    SERVER,
    SERVER6,
    TCP,
    Packet,
    Points,
    error,
    ip,
)

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

INSIDE = Packet(CONTAINER, 40000, SERVER, 53)
OUTSIDE = replace(INSIDE, src=PUBLIC, sport=61000)
INSIDE6 = Packet(CONTAINER6, 40000, SERVER6, 53)
OUTSIDE6 = replace(INSIDE6, src=PUBLIC6, sport=61000)


def report_of(points: Points, folder: Path) -> Report:
    points.frame()
    return nattrace.analyze(*points.write(folder))


def outward(before: Packet = INSIDE, after: Packet = OUTSIDE) -> Points:
    """A packet that went out through NAT, with other traffic before it."""
    points = Points()
    points.frame()
    points.out(before, after)
    return points


def rows(report: Report) -> list[tuple[str, str, str]]:
    return [
        (row.before.dst, row.after.dst, row.direction)
        for row in report.rewrites
        if row.before.protocol.startswith("icmp")
    ]


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


@pytest.mark.parametrize(
    ("before", "after", "router", "kind"),
    [(INSIDE, OUTSIDE, ROUTER, (11, 0)), (INSIDE6, OUTSIDE6, ROUTER6, (3, 0))],
)
def test_a_whole_translation_is_no_finding(
    before: Packet, after: Packet, router: str, kind: tuple[int, int], tmp_path: Path
) -> None:
    points = outward(before, after)
    points.back(
        error(router, after.src, after.ip(), kind=kind),
        error(router, before.src, before.ip(), kind=kind, ttl=59),
    )
    report = report_of(points, tmp_path)

    assert rows(report) == [(after.src, before.src, "reply")]
    assert codes(report) == []
    (errors,) = report.flows[2].icmp_errors
    assert (errors.type, errors.code, errors.mtu, errors.count) == (*kind, None, 1)
    assert report.accounting.unmatched == {}


@pytest.mark.parametrize(
    ("before", "after", "router"), [(INSIDE, OUTSIDE, ROUTER), (INSIDE6, OUTSIDE6, ROUTER6)]
)
def test_a_quote_left_as_it_was_is_a_finding(
    before: Packet, after: Packet, router: str, tmp_path: Path
) -> None:
    kind = (1, 4) if ":" in router else (3, 3)
    points = outward(before, after)
    points.back(
        error(router, after.src, after.ip(), kind=kind),
        error(router, before.src, after.ip(), kind=kind, ttl=59),
    )
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert finding.code == "icmp-error-quote-untranslated"
    assert "outer header translated and the quote not" in finding.message
    assert finding.flows == (3,)
    assert [(p.point, p.frame) for p in finding.packets] == [("docker0", 4)]
    assert rows(report) == [(after.src, before.src, "reply")]


def test_a_quote_with_the_address_translated_and_the_port_not_is_a_finding(tmp_path: Path) -> None:
    points = outward()
    half = replace(OUTSIDE, src=CONTAINER)
    points.back(error(ROUTER, PUBLIC, OUTSIDE.ip()), error(ROUTER, CONTAINER, half.ip(), ttl=59))

    assert codes(report_of(points, tmp_path)) == ["icmp-error-quote-untranslated"]


def test_an_outer_header_left_as_it_was_is_a_finding(tmp_path: Path) -> None:
    # from inside: the container refuses a published port, and its own address leaks in the outer header
    asked = Packet(SERVER, 50000, PUBLIC, 5353)
    got = replace(asked, dst=CONTAINER, dport=53, ttl=63)
    points = Points()
    points.frame()
    points.back(asked.ip(), got.ip())
    points.inside.append((points.now_ns, error(CONTAINER, SERVER, got.ip(), ttl=64)))
    points.outside.append((points.now_ns + 20_000, error(CONTAINER, SERVER, asked.ip(), ttl=63)))
    points.step()
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert finding.code == "icmp-error-quote-untranslated"
    assert "quote translated and the outer header not" in finding.message


def test_an_error_that_nobody_translated_is_a_finding(tmp_path: Path) -> None:
    asked = Packet(SERVER, 50000, PUBLIC, 5353)
    got = replace(asked, dst=CONTAINER, dport=53, ttl=63)
    points = Points()
    points.frame()
    points.back(asked.ip(), got.ip())
    points.inside.append((points.now_ns, error(CONTAINER, SERVER, got.ip(), ttl=64)))
    points.outside.append((points.now_ns + 20_000, error(CONTAINER, SERVER, got.ip(), ttl=63)))
    points.step()
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert finding.code == "icmp-error-quote-untranslated"
    assert "left as they were" in finding.message


def _broken(packet: Packet) -> bytes:
    return replace(packet, ip_id=packet.ip_id ^ 0x5500).ip()


def _with_broken_checksum(packet: Packet) -> bytes:
    data = packet.ip()
    return data[:26] + bytes([data[26] ^ 0x40]) + data[27:]


@pytest.mark.parametrize("broken", [_broken, _with_broken_checksum])
def test_a_quote_that_changed_otherwise_is_a_finding(broken: object, tmp_path: Path) -> None:
    assert callable(broken)
    points = outward()
    points.back(error(ROUTER, PUBLIC, OUTSIDE.ip()), error(ROUTER, CONTAINER, broken(INSIDE), ttl=59))
    report = report_of(points, tmp_path)

    assert codes(report) == ["icmp-error-quote-broken"]
    assert rows(report) == [(PUBLIC, CONTAINER, "reply")]


@pytest.mark.parametrize("quoted_bytes", [8, 18, 19])
def test_the_old_checksum_of_a_short_tcp_quote_is_what_linux_does(quoted_bytes: int, tmp_path: Path) -> None:
    syn = replace(INSIDE, protocol=TCP, dport=80, payload=b"")
    seen = replace(syn, src=PUBLIC, sport=61000)
    points = outward(syn, seen)
    old = seen.upper()[16:18]
    quote = bytearray(syn.ip()[: 20 + quoted_bytes])
    quote[36:38] = old[: max(quoted_bytes - 16, 0)]
    points.back(
        error(ROUTER, PUBLIC, seen.ip()[: 20 + quoted_bytes]),
        error(ROUTER, CONTAINER, bytes(quote), ttl=59),
    )
    report = report_of(points, tmp_path)

    assert rows(report) == [(PUBLIC, CONTAINER, "reply")]
    assert codes(report) == []


def test_the_same_in_a_whole_tcp_header_is_a_finding(tmp_path: Path) -> None:
    syn = replace(INSIDE, protocol=TCP, dport=80, payload=b"")
    seen = replace(syn, src=PUBLIC, sport=61000)
    points = outward(syn, seen)
    quote = bytearray(syn.ip())
    quote[36:38] = seen.upper()[16:18]
    points.back(error(ROUTER, PUBLIC, seen.ip()), error(ROUTER, CONTAINER, bytes(quote), ttl=59))

    assert codes(report_of(points, tmp_path)) == ["icmp-error-quote-broken"]


def test_an_error_that_the_translator_swallows_is_lost(tmp_path: Path) -> None:
    points = outward()
    points.back(error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 4), rest=1400), None)
    points.inside.append((points.now_ns, error("172.17.0.1", CONTAINER, replace(INSIDE, sport=9).ip())))
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert finding.code == "icmp-error-lost"
    assert "path MTU black hole" in finding.message
    assert report.accounting.unmatched == {"lost": 1, "icmp-error": 1}
    assert report.flows[2].icmp_errors[0].mtu == 1400


def test_nothing_is_lost_where_a_filter_may_have_left_icmp_out(tmp_path: Path) -> None:
    points = outward()
    points.back(error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 4), rest=1400), None)
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("icmp-error-not-seen", "info")
    assert "no ICMP at all" in finding.message
    assert report.accounting.unmatched == {"icmp-error": 1}


INSIDE64 = replace(INSIDE6, dst="64:ff9b::c633:6401", protocol=TCP, dport=80, seq=0x12345678)
OUTSIDE64 = replace(OUTSIDE, protocol=TCP, dport=80, seq=0x12345678)


def behind_a_nat64() -> Points:
    """A flow of IPv6 that leaves as one of IPv4."""
    points = Points()
    points.frame()
    for number in range(4):
        sent = {"seq": 0x12345678 + 100 * number, "payload": b"number %d of several" % number, "flags": 24}
        points.out(replace(INSIDE64, **sent), replace(OUTSIDE64, **sent))  # type: ignore[arg-type]
    return points


@pytest.mark.parametrize(
    ("four", "six"),
    [
        ((3, 0), (1, 0)), ((3, 1), (1, 0)), ((3, 2), (4, 1)), ((3, 3), (1, 4)), ((3, 9), (1, 1)), ((3, 13), (1, 1)),
        ((3, 15), (1, 1)), ((11, 0), (3, 0)), ((11, 1), (3, 1)), ((12, 0), (4, 0)),
        # the other way RFC 7915 says less
        ((3, 1), (1, 2)), ((3, 1), (1, 3)), ((3, 10), (1, 1)),
    ],
)  # fmt: skip
def test_an_error_becomes_one_of_the_other_ip_version(
    four: tuple[int, int], six: tuple[int, int], tmp_path: Path
) -> None:
    points = behind_a_nat64()
    points.back(
        error(ROUTER, PUBLIC, OUTSIDE64.ip(), kind=four),
        error("64:ff9b::cb00:7101", CONTAINER6, INSIDE64.ip(), kind=six, ttl=59),
    )
    report = report_of(points, tmp_path)

    assert rows(report) == [(PUBLIC, CONTAINER6, "reply")]
    assert codes(report) == []
    assert report.accounting.unmatched == {}
    told = [(e.type, e.code, e.count) for flow in report.flows for e in flow.icmp_errors]
    assert told == [(*six, 1)]


@pytest.mark.parametrize(
    ("kind", "found"), [((3, 13), ["icmp-error-lost"]), ((4, 0), []), ((3, 14), []), ((12, 1), [])]
)
def test_only_an_error_that_the_other_ip_version_has_is_lost(
    kind: tuple[int, int], found: list[str], tmp_path: Path
) -> None:
    points = behind_a_nat64()
    points.back(
        error(ROUTER, PUBLIC, OUTSIDE64.ip(), kind=(3, 3), ip_id=9),
        error("64:ff9b::cb00:7101", CONTAINER6, INSIDE64.ip(), kind=(1, 4), ttl=59),
    )
    points.back(error(ROUTER, PUBLIC, OUTSIDE64.ip(), kind=kind, ip_id=10), None)
    report = report_of(points, tmp_path)

    assert codes(report) == found


def test_an_error_of_the_translator_itself_is_not_lost(tmp_path: Path) -> None:
    points = outward()
    points.back(None, error("172.17.0.1", CONTAINER, INSIDE.ip(), kind=(3, 1)))
    points.outside.append((points.now_ns, error(ROUTER, PUBLIC, replace(OUTSIDE, sport=9).ip())))
    report = report_of(points, tmp_path)

    assert codes(report) == []
    assert report.accounting.unmatched == {"not-seen-upstream": 1, "icmp-error": 1}


def test_nothing_is_lost_behind_the_end_of_a_capture(tmp_path: Path) -> None:
    points = outward()
    points.back(error(ROUTER, PUBLIC, OUTSIDE.ip()), None)
    report = nattrace.analyze(*points.write(tmp_path))  # docker0 shows nothing after the error

    assert codes(report) == []
    assert report.accounting.unmatched == {"icmp-error": 1}


def test_the_path_mtu_is_told_with_the_flows_that_learned_it(tmp_path: Path) -> None:
    points = outward()
    points.back(
        error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 4), rest=1400),
        error(ROUTER, CONTAINER, INSIDE.ip(), kind=(3, 4), rest=1400, ttl=59),
    )
    report = report_of(points, tmp_path)

    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.flows) == ("path-mtu", "info", (3,))
    assert "1400 bytes" in finding.message


def test_an_old_router_names_no_mtu(tmp_path: Path) -> None:
    points = outward()
    points.back(
        error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 4)),
        error(ROUTER, CONTAINER, INSIDE.ip(), kind=(3, 4), ttl=59),
    )
    report = report_of(points, tmp_path)

    assert codes(report) == []
    (errors,) = report.flows[2].icmp_errors
    assert (errors.name, errors.mtu) == ("fragmentation-needed", None)


def test_frames_are_as_dpkt_reads_them() -> None:
    import dpkt  # noqa: PLC0415 - the frames' own check

    read = dpkt.ip.IP(error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 4), rest=1400))
    assert (read.icmp.type, read.icmp.code, read.icmp.data.mtu) == (3, 4, 1400)
    quoted = read.icmp.data.data
    assert isinstance(quoted, dpkt.ip.IP)
    assert (quoted.udp.sport, struct.unpack(">H", OUTSIDE.ip()[10:12])[0]) == (61000, quoted.sum)


def probes(points: Points, count: int, ip_id: int, ttl: int = 64) -> list[Packet]:
    """Packets of a bound flow that the host between the points does not forward."""
    sent = [replace(INSIDE, payload=b"probe %d" % n, ip_id=ip_id, ttl=ttl) for n in range(count)]
    for packet in sent:
        points.inside.append((points.now_ns, packet.ip()))
        points.step()
    return sent


def test_a_probe_that_expired_in_between_is_answered_and_not_lost(tmp_path: Path) -> None:
    points = outward()
    (probe,) = probes(points, 1, ttl=1, ip_id=78)
    points.back(None, error("172.17.0.1", CONTAINER, probe.ip(), kind=(11, 0)))
    report = report_of(points, tmp_path)

    answered = "1 packet was seen at docker0 and found nowhere else, and ICMP errors answered: "
    answered += "172.17.0.1 said ttl-exceeded to 1"
    assert [(f.code, f.severity, f.message, f.flows, f.advice) for f in report.findings] == [
        (
            "icmp-answered",
            "info",
            answered,
            (3,),
            None,
        )
    ]
    assert report.accounting.unmatched == {"icmp-answered": 1, "icmp-error": 1}
    assert [(c.lost, c.unknowable) for c in report.flows[2].crossings if c.direction == "original"] == [
        (0, 1)
    ]


def test_one_error_answers_one_packet_and_the_others_are_lost(tmp_path: Path) -> None:
    points = outward(replace(INSIDE, ip_id=0), replace(OUTSIDE, ip_id=0))
    refused = probes(points, 4, ip_id=0)[-1]
    points.back(None, error("172.17.0.1", CONTAINER, refused.ip(), kind=(3, 13)))
    report = report_of(points, tmp_path)

    assert report.accounting.unmatched == {"icmp-answered": 1, "lost": 3, "icmp-error": 1}
    (finding,) = report.findings
    assert finding.code == "icmp-answered"
    assert "172.17.0.1 said admin-prohibited to 1" in finding.message
    assert finding.advice is not None


def test_a_flow_that_only_errors_answer_is_not_lost(tmp_path: Path) -> None:
    points = outward()
    alone = replace(INSIDE, sport=40001, ttl=1, ip_id=79, payload=b"expires at once")
    points.inside.append((points.now_ns, alone.ip()))
    points.step()
    points.back(None, error("172.17.0.1", CONTAINER, alone.ip(), kind=(11, 0)))
    silent = replace(INSIDE, sport=40002, ip_id=80, payload=b"nobody answers this")
    points.inside.append((points.now_ns, silent.ip()))
    points.step()
    report = report_of(points, tmp_path)

    status = {flow.initiator.sport: flow.status for flow in report.flows}
    assert (status[40001], status[40002]) == ("one-sided", "lost")
    assert codes(report) == ["icmp-answered"]


def wrapped(data: bytes, ip_id: int, *, back: bool = False) -> bytes:
    """An IP packet in IP in IP, between the NAT host and a tunnel's far end."""
    ends = (SERVER, PUBLIC) if back else (PUBLIC, SERVER)
    return ip(*ends, 4, data, ip_id, 64)


def through_a_tunnel(points: Points) -> None:
    """A packet goes out through NAT and into a tunnel, and frames before and after it."""
    points.frame()
    points.inside.append((points.now_ns, INSIDE.ip()))
    points.outside.append((points.now_ns + points.latency_ns, wrapped(replace(OUTSIDE, ttl=63).ip(), 900)))
    points.step()


def test_an_error_inside_a_tunnel_is_the_plain_one_elsewhere(tmp_path: Path) -> None:
    points = Points()
    through_a_tunnel(points)
    coming = error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(11, 0))
    points.back(wrapped(coming, 901, back=True), error(ROUTER, CONTAINER, INSIDE.ip(), kind=(11, 0), ttl=59))
    report = report_of(points, tmp_path)

    assert rows(report) == [(PUBLIC, CONTAINER, "reply")]
    assert codes(report) == []
    # its carrier counts as matched with it
    assert report.accounting.unmatched == {}


def test_an_error_about_the_packet_that_carries_is_the_tunnels(tmp_path: Path) -> None:
    points = Points()
    through_a_tunnel(points)
    carrier = wrapped(replace(OUTSIDE, ttl=63).ip(), 900)
    points.back(error(ROUTER, PUBLIC, carrier, kind=(3, 4), rest=1380), None)
    report = report_of(points, tmp_path)

    (told,) = [(flow.protocol, flow.path, flow.icmp_errors) for flow in report.flows if flow.icmp_errors]
    assert told[:2] == ("ipip", ("eth0",))
    assert [(e.name, e.mtu, e.count) for e in told[2]] == [("fragmentation-needed", 1380, 1)]
    # nobody looks for it inside, where the tunnel is not
    assert codes(report) == []


def test_an_error_lost_on_its_way_out_of_a_tunnel_is_found_lost(tmp_path: Path) -> None:
    points = Points()
    through_a_tunnel(points)
    for number in range(2):
        coming = error(ROUTER, PUBLIC, OUTSIDE.ip(), kind=(3, 3 + 10 * number), ip_id=600 + number)
        going = error(ROUTER, CONTAINER, INSIDE.ip(), kind=(3, 3), ip_id=600, ttl=59)
        points.back(wrapped(coming, 901 + number, back=True), None if number else going)
    report = report_of(points, tmp_path)

    assert codes(report) == ["icmp-error-lost"]
    assert report.findings[0].packets[0].point == "eth0"
