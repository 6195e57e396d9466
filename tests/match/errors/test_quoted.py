"""ICMP errors of random networks: no pair is wrong and no fault is seen, whatever is missing, repeated or alike."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
from error_frames import (
    PUBLIC,
    PUBLIC6,
    ROUTER,
    ROUTER6,
    SERVER,
    SERVER6,
    TCP,
    UDP,
    Packet,
    Points,
    checksum,
    error,
    ip,
)

import nattrace
from nattrace.match import prepare
from nattrace.match.renumber.renumbered import EVERYWHERE, Identifications
from nattrace.model import PacketRef, Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

ROUTERS = {4: (ROUTER, "192.0.2.9"), 6: (ROUTER6, "2001:db8:9::9")}
KINDS = {4: [(3, 3), (11, 0), (3, 13)], 6: [(1, 4), (3, 0), (1, 1)]}


@dataclass
class Network:
    """Points and, for each recorded error by its time, which error it is."""

    points: Points = field(default_factory=Points)
    serial: int = 0
    inside: dict[int, int] = field(default_factory=dict)  #: time to serial number
    outside: dict[int, int] = field(default_factory=dict)


def network(
    seed: int, *, version: int, errors: int, loss: float, ids: bool, alike: bool, outbound_loss: float = 0.0
) -> Network:
    """Containers behind one address send probes, and routers answer them with errors.

    `ids` gives packets IP identifications; `alike` makes all payloads and routers one.
    """
    draw = random.Random(seed)
    net = Network()
    public, server = (PUBLIC, SERVER) if version == 4 else (PUBLIC6, SERVER6)
    prefix = "172.17.0." if version == 4 else "fd00:17::"
    flows = []
    for number in range(24):
        container = f"{prefix}{number % 6 + 2}"
        protocol = draw.choice([UDP, TCP])
        before = Packet(
            container,
            40000 + number % 3,
            server,
            33434 + number // 12,
            protocol=protocol,
            seq=draw.getrandbits(32),
        )
        flows.append((before, replace(before, src=public, sport=20000 + number * 7)))
    net.points.frame()
    for n in range(errors):
        before, after = draw.choice(flows)
        payload = b"alike in all packets" if alike else draw.randbytes(20)
        own_id = draw.randrange(1, 65536) if ids else 0
        seq = before.seq if alike else draw.getrandbits(32)
        before, after = (
            replace(packet, payload=payload, ip_id=own_id, seq=seq) for packet in (before, after)
        )
        net.points.latency_ns = draw.randrange(8_000, 60_000)
        now = net.points.now_ns
        if draw.random() >= outbound_loss:
            net.points.inside.append((now, before.ip()))
        if draw.random() >= outbound_loss:
            net.points.outside.append((now + net.points.latency_ns, replace(after, ttl=63).ip()))
        net.points.step(draw.randrange(100_000, 3_000_000))
        router = ROUTERS[version][0 if alike else draw.randrange(2)]
        kind = KINDS[version][0 if alike else draw.randrange(3)]
        ip_id = n + 1 if ids else 0
        quoted = [replace(packet, ttl=62).ip() for packet in (after, before)]
        if version == 4 and draw.random() < 0.5:
            quoted = [quote[:28] for quote in quoted]
        coming = error(router, public, quoted[0], kind=kind, ip_id=ip_id)
        going = error(router, before.src, quoted[1], kind=kind, ip_id=ip_id, ttl=59)
        here, there = net.points.now_ns, net.points.now_ns + net.points.latency_ns
        if draw.random() >= loss:
            net.points.outside.append((here, coming))
            net.outside[here] = n
        if draw.random() >= loss:
            net.points.inside.append((there, going))
            net.inside[there] = n
        net.points.step(draw.randrange(100_000, 3_000_000))
    net.points.frame()
    return net


def judged(report: Report, net: Network) -> tuple[int, int]:
    """Return how many rows of errors are right and wrong."""
    count = Counter[bool]()
    for row in report.rewrites:
        if row.before.type is None or row.before.id is not None:
            continue
        assert (row.before.point, row.after.point, row.direction) == ("eth0", "docker0", "reply")
        assert row.before.time is not None
        assert row.after.time is not None
        count[net.outside[row.before.time] == net.inside[row.after.time]] += 1
    return count[True], count[False]


def check(net: Network, folder: Path) -> tuple[float, Report]:
    """Analyse, check that nothing is wrong, and return recall."""
    report = nattrace.analyze(*net.points.write(folder))
    right, wrong = judged(report, net)
    assert wrong == 0
    a = report.accounting
    assert a.packets == a.matched + sum(a.unmatched.values()) + sum(a.skipped.values())
    assert not [f.code for f in report.findings if f.code.startswith("icmp-error-quote")]
    lost_inside = set(net.outside.values()) - set(net.inside.values())
    lost_frames = [packet for f in report.findings if f.code == "icmp-error-lost" for packet in f.packets]
    times = [time for time, _ in sorted(net.points.outside, key=lambda item: item[0])]
    assert {net.outside[times[packet.frame - 1]] for packet in lost_frames} <= lost_inside
    both = set(net.outside.values()) & set(net.inside.values())
    return right / max(len(both), 1), report


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_all_errors_are_found_where_none_is_missing(seed: int, version: int, tmp_path: Path) -> None:
    recall, report = check(
        network(seed, version=version, errors=120, loss=0.0, ids=version == 4, alike=False), tmp_path
    )

    assert recall == 1.0
    assert sum(e.count for flow in report.flows for e in flow.icmp_errors) == 120


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("loss", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_missing_makes_no_wrong_pair(seed: int, loss: float, version: int, tmp_path: Path) -> None:
    recall, _ = check(
        network(seed, version=version, errors=120, loss=loss, ids=version == 4, alike=False), tmp_path
    )

    assert recall == 1.0


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_errors_that_are_all_alike_are_told_apart_or_not_at_all(
    seed: int, loss: float, ids: bool, tmp_path: Path
) -> None:
    recall, _ = check(network(seed, version=4, errors=120, loss=loss, ids=ids, alike=True), tmp_path)

    assert recall == 1.0 if ids else recall >= 0.0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_quoted_packets_that_were_not_captured_make_no_wrong_pair(
    seed: int, version: int, tmp_path: Path
) -> None:
    net = network(
        seed, version=version, errors=120, loss=0.2, ids=version == 4, alike=False, outbound_loss=0.5
    )

    check(net, tmp_path)


def test_two_errors_that_one_could_be_are_named(tmp_path: Path) -> None:
    before = Packet("172.17.0.2", 40000, SERVER, 53, ip_id=0)
    after = replace(before, src=PUBLIC, sport=61000)
    points = Points()
    points.frame()
    points.out(replace(before, ip_id=5), replace(after, ip_id=5))
    now = points.now_ns
    for later in (0, 30_000):  # two of them outside, one inside, and nothing to tell which
        points.outside.append((now + later, error(ROUTER, PUBLIC, after.ip()[:28], ip_id=0)))
    points.inside.append((now + 45_000, error(ROUTER, before.src, before.ip()[:28], ip_id=0, ttl=59)))
    points.step()
    points.frame()
    report = nattrace.analyze(*points.write(tmp_path))

    left = [row for row in report.rewrites.all() if isinstance(row, Unmatched)]
    assert {(row.packet.point, row.packet.frame, row.reason) for row in left} == {
        ("docker0", 4, "ambiguous"),
        ("eth0", 4, "ambiguous"),
        ("eth0", 5, "ambiguous"),
    }
    assert [row.candidates for row in left if row.packet.point == "docker0"] == [
        (PacketRef("eth0", 4), PacketRef("eth0", 5))
    ]
    assert {row.flow for row in left} == {3}


def test_an_hour_between_two_clocks_changes_nothing(tmp_path: Path) -> None:
    net = network(1, version=4, errors=120, loss=0.1, ids=True, alike=False)
    hour_ns = 3600 * 10**9
    for n in range(40):  # answers, without which nobody can compare two clocks
        asked = Packet("172.17.0.2", 44000, SERVER, 53, b"asked and answered %d" % n, ip_id=3000 + n)
        seen = replace(asked, src=PUBLIC, sport=45000)
        answer = replace(seen, src=seen.dst, sport=seen.dport, dst=seen.src, dport=seen.sport, ip_id=7000 + n)
        got = replace(answer, dst=asked.src, dport=asked.sport, ttl=63)
        net.points.out(asked, seen)
        net.points.back(answer.ip(), got.ip())
    net.points.outside = [(time + hour_ns, data) for time, data in net.points.outside]
    net.outside = {time + hour_ns: serial for time, serial in net.outside.items()}
    recall, report = check(net, tmp_path)

    assert recall == 1.0
    assert "clock" in " ".join(f.code for f in report.findings)


def test_only_so_many_errors_are_kept_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "ERRORS_LIMIT", 50)
    net = network(1, version=4, errors=120, loss=0.0, ids=True, alike=False)
    report = nattrace.analyze(*net.points.write(tmp_path))

    right, wrong = judged(report, net)
    assert (right, wrong) == (50, 0)
    assert report.accounting.unmatched == {"icmp-error": 2 * 70}


def test_a_mirror_port_shows_no_error_twice(tmp_path: Path) -> None:
    net = network(1, version=4, errors=120, loss=0.0, ids=True, alike=False)
    errors = [(time, data) for time, data in net.points.inside if data[9] == 1]
    net.points.inside += [(time + 5_000, data) for time, data in errors]
    net.inside |= {time + 5_000: net.inside[time] for time, _ in errors}
    recall, report = check(net, tmp_path)

    assert recall == 1.0
    assert report.accounting.unmatched["duplicate"] == 120
    assert sum(e.count for flow in report.flows for e in flow.icmp_errors) == 120


@pytest.mark.parametrize("learned", [True, False])
def test_a_box_that_writes_ip_identifications_of_its_own_loses_no_error(
    learned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(1, version=4, errors=120, loss=0.0, ids=True, alike=False)
    own = random.Random(5)

    def renumbered(data: bytes) -> bytes:
        data = data[:4] + own.randrange(1, 65536).to_bytes(2, "big") + data[6:10] + bytes(2) + data[12:]
        return data[:10] + checksum(data[:20]).to_bytes(2, "big") + data[12:]

    net.points.inside = [
        (time, renumbered(data) if data[9] == 1 else data) for time, data in net.points.inside
    ]
    if learned:
        monkeypatch.setattr(Identifications, "renumbered", property(lambda _: EVERYWHERE))
    recall, report = check(net, tmp_path)

    assert not [f.code for f in report.findings if f.code.startswith("icmp-error")]
    if learned:
        assert recall == 1.0
    else:  # then two identifications are two errors, but nobody says that one of them was lost
        assert report.accounting.unmatched == {"ambiguous": 240}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("loss", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_errors_inside_a_tunnel_are_those_outside_of_it(
    seed: int, loss: float, version: int, tmp_path: Path
) -> None:
    net = network(seed, version=version, errors=120, loss=loss, ids=version == 4, alike=False)
    net.points.outside = [
        (time, ip(PUBLIC, ROUTER, 4 if data[0] >> 4 == 4 else 41, data, number % 65536, 64))
        for number, (time, data) in enumerate(sorted(net.points.outside), 1)
    ]
    recall, report = check(net, tmp_path)

    assert recall == 1.0
    told = sum(e.count for flow in report.flows for e in flow.icmp_errors)
    assert told == len(set(net.inside.values()) | set(net.outside.values()))
