"""Traceroutes of random networks: every probe is a flow of its own and says what all others say.

No row is wrong and no translation invented, whatever identifications hosts and routers use, whoever is not captured,
and whatever is missing; what the packets tell is found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from error_frames import PUBLIC, PUBLIC6, SERVER, SERVER6, TCP, UDP, Packet, Points, error

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

ROUTERS = {
    4: ["203.0.113.1", "192.0.2.9", "192.0.2.17", "192.0.2.33"],
    6: ["2001:db8:9::1", "2001:db8:9::2", "2001:db8:9::3", "2001:db8:9::4"],
}
SAME = bytes(range(0x40, 0x60))


@dataclass
class Traced:
    """Points and, for each recorded packet by point and time, which it is and how NAT translated its flow."""

    points: Points = field(default_factory=Points)
    serial: dict[tuple[str, int], int] = field(default_factory=dict)
    translation: dict[tuple[str, int, int], tuple[str, int]] = field(default_factory=dict)

    def show(self, point: str, serial: int, time_ns: int, data: bytes) -> None:
        """Record a packet at a point, at a time that no other packet of the point has."""
        while (point, time_ns) in self.serial:
            time_ns += 1
        self.serial[point, time_ns] = serial
        (self.points.inside if point == "docker0" else self.points.outside).append((time_ns, data))


def network(
    seed: int,
    *,
    version: int = 4,
    hosts: int = 3,
    loss: float = 0.0,
    hidden: int = 0,
    host_ids: str = "counter",
    router_ids: str = "counter",
    fixed_port: bool = False,
    protocol: int = UDP,
    short: bool = False,
    silent: float = 0.0,
    nat64: bool = False,
) -> Traced:
    """Hosts trace one target at the same time, three probes a hop; the last `hidden` of them are not captured inside.

    `host_ids` and `router_ids` are ``counter`` (each its own), ``zero``, or ``step`` (all hosts alike, or one number
    in all errors). With `fixed_port` all hosts send from one port, as busybox does. A share `silent` of the probes
    gets no answer. With `nat64` hosts of IPv6 trace a target of IPv4, each behind an address of its own.
    """
    draw = random.Random(seed)
    traced = Traced()
    server, public = (SERVER, PUBLIC) if version == 4 else (SERVER6, PUBLIC6)
    if nat64:
        server = embedded(SERVER)
    prefix = "172.17.0." if version == 4 else "fd00:17::"
    counters = [draw.randrange(2000, 60000) for _ in range(hosts)]
    router_counter = {router: draw.randrange(2000, 60000) for router in ROUTERS[version]}
    used: set[tuple[int, int]] = set()
    events: list[tuple[int, int, str, bytes]] = []  # time, serial, point, bytes
    serial = 0
    start = traced.points.now_ns + 1_000_000
    for host in range(hosts):
        now = start + draw.randrange(0, 2_000_000)
        for number in range(3 * len(ROUTERS[version])):
            hop = number // 3
            now += draw.randrange(200_000, 3_000_000)
            sport = 33000 if fixed_port else draw.randrange(32768, 61000)
            dport = 80 if protocol == TCP else 33434 + number
            if protocol == TCP and fixed_port:
                sport += number
            port = sport
            while (port, dport) in used:
                port = draw.randrange(1024, 65536)
            used.add((port, dport))
            ip_id = {"counter": counters[host] + number, "zero": 0, "step": 41000 + number}[host_ids]
            before = Packet(
                f"{prefix}{host + 2}", sport, server, dport, b"" if protocol == TCP else SAME,
                protocol=protocol, ip_id=ip_id if version == 4 else 0, ttl=hop + 2, seq=draw.getrandbits(32),
            )  # fmt: skip
            after = replace(before, src=public, sport=port)
            if nat64:
                after = replace(before, src=f"198.18.0.{host + 2}", dst=SERVER, ip_id=ip_id)
            traced.translation[before.src, sport, dport] = (after.src, after.sport)
            late = draw.randrange(8_000, 60_000)
            serial += 1
            if draw.random() >= loss and host < hosts - hidden:
                events.append((now, serial, "docker0", before.ip()))
            if draw.random() >= loss:
                events.append((now + late, serial, "eth0", replace(after, ttl=hop + 1).ip()))
            if draw.random() < silent:
                continue
            back = now + late + draw.randrange(100_000, 30_000_000)
            router = ROUTERS[version][hop]
            router_counter[router] += 1
            own_id = {"counter": router_counter[router], "zero": 0, "step": 4242}[router_ids]
            quotes = [replace(packet, ttl=1).ip() for packet in (before, after)]
            if short and version == 4:
                quotes = [quote[:28] for quote in quotes]
            kind = (11, 0) if version == 4 else (3, 0)
            serial += 1
            if draw.random() >= loss:
                sender, sent = (ROUTERS[4][hop], (11, 0)) if nat64 else (router, kind)
                data = error(sender, after.src, quotes[1], kind=sent, ip_id=own_id)
                events.append((back, serial, "eth0", data))
            if draw.random() >= loss and host < hosts - hidden:
                sender = embedded(ROUTERS[4][hop]) if nat64 else router
                data = error(sender, before.src, quotes[0], kind=kind, ip_id=own_id, ttl=59)
                events.append((back + draw.randrange(8_000, 60_000), serial, "docker0", data))
            if draw.random() < 0.5:
                now = back
    traced.points.frame()
    for time_ns, number, point, data in sorted(events):
        traced.show(point, number, time_ns, data)
    traced.points.now_ns = max(time_ns for time_ns, *_ in events) + 50_000_000
    traced.points.frame()
    return traced


def embedded(address: str) -> str:
    """An IPv4 address as IPv6 hosts write it (RFC 6052)."""
    return str(ip_address(f"64:ff9b::{address}"))


def check(traced: Traced, folder: Path) -> tuple[float, Report]:
    """Analyse, check that nothing is wrong, and return how many of the packets seen at both points were found."""
    report = nattrace.analyze(*traced.points.write(folder))
    found = 0
    for row in report.rewrites.all():
        if not isinstance(row, Rewrite) or row.before.time is None or row.after.time is None:
            continue
        one, other = (row.before, row.after) if row.before.point == "docker0" else (row.after, row.before)
        mine, theirs = (
            traced.serial.get(("docker0", one.time or 0)),
            traced.serial.get(("eth0", other.time or 0)),
        )
        assert mine == theirs, row
        found += mine is not None
    for flow in report.flows:
        for each in flow.translations:
            before = each.original
            assert before.sport is not None
            assert before.dport is not None
            known = traced.translation.get((before.src, before.sport, before.dport))
            assert known in (None, (each.reply.dst, each.reply.dport)), flow
    assert not [f.code for f in report.findings if f.code.startswith("icmp-error-quote")]
    a = report.accounting
    assert a.packets == a.matched + sum(a.unmatched.values()) + sum(a.skipped.values())
    both = {s for (point, _), s in traced.serial.items() if point == "docker0"}
    both &= {s for (point, _), s in traced.serial.items() if point == "eth0"}
    return found / max(len(both), 1), report


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize(
    ("host_ids", "router_ids"), [("counter", "zero"), ("zero", "counter"), ("counter", "step")]
)
@pytest.mark.parametrize("seed", range(3))
def test_probes_that_something_numbers_are_all_found(
    seed: int, host_ids: str, router_ids: str, protocol: int, tmp_path: Path
) -> None:
    recall, report = check(
        network(seed, host_ids=host_ids, router_ids=router_ids, protocol=protocol), tmp_path
    )

    assert recall == 1.0
    assert not [f for f in report.flows if f.status == "lost"]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_one_host_without_identifications_is_found(seed: int, version: int, tmp_path: Path) -> None:
    recall, _ = check(network(seed, version=version, hosts=1, host_ids="zero", router_ids="zero"), tmp_path)

    assert recall == 1.0


@pytest.mark.parametrize("fixed_port", [True, False])
@pytest.mark.parametrize("hidden", [0, 1])
@pytest.mark.parametrize("router_ids", ["counter", "zero", "step"])
@pytest.mark.parametrize("host_ids", ["counter", "zero", "step"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_wrong_whatever_is_missing(
    seed: int, host_ids: str, router_ids: str, hidden: int, fixed_port: bool, tmp_path: Path
) -> None:
    check(
        network(
            seed, host_ids=host_ids, router_ids=router_ids, loss=0.3 * (seed != 1), hidden=hidden, fixed_port=fixed_port,
            short=seed % 2 == 1, silent=0.0 if seed == 0 else 0.66,
        ),
        tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("fixed_port", [True, False])
@pytest.mark.parametrize("hidden", [0, 1])
@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_wrong_without_identifications_at_all(
    seed: int, loss: float, hidden: int, fixed_port: bool, tmp_path: Path
) -> None:
    check(network(seed, version=6, hosts=4, loss=loss, hidden=hidden, fixed_port=fixed_port), tmp_path)


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("loss", [0.0, 0.3])
@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_wrong_behind_a_nat64(
    seed: int, hosts: int, loss: float, protocol: int, tmp_path: Path
) -> None:
    recall, report = check(
        network(seed, version=6, nat64=True, hosts=hosts, loss=loss, protocol=protocol, fixed_port=seed == 3),
        tmp_path,
    )

    assert recall == 1.0 or loss or (protocol == UDP and hosts > 1)
    kinds = {(each.type, each.code, each.name) for flow in report.flows for each in flow.icmp_errors}
    assert kinds <= {(3, 0, "hop-limit-exceeded"), (11, 0, "ttl-exceeded")}
