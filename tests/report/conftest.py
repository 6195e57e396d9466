"""The report of four containers that ping one address, written by hand.

Every value is somebody else's: ids, addresses and tuples are those of the kernel's conntrack list, times and
counts those of tshark, both recorded with the captures in nattrace/samples.
"""

from __future__ import annotations

from typing import Any

import pytest

from nattrace.model import (
    Accounting,
    Clock,
    Crossing,
    Endpoint,
    Finding,
    Flow,
    Latency,
    PacketRef,
    Point,
    ReportData,
    Rewrite,
    Rule,
    Sighting,
    Translation,
    Tuple,
    Unmatched,
)

BASE_NS = 1_795_451_155_000_000_000
PATH = ("docker0", "eth0")
RULE = Rule("-s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", "nat", "POSTROUTING", 1)


def point(name: str, first_us: int, last_us: int) -> Point:
    return Point(
        name=name,
        file=f"{name}.pcap",
        interface=None,
        link_type="EN10MB",
        snaplen=262144,
        packets=40,
        decoded=40,
        skipped={},
        first=BASE_NS + first_us * 1000,
        last=BASE_NS + last_us * 1000,
        truncated=False,
        dropped_by_kernel=None,
        clock=Clock("docker0"),
    )


def ping(number: int, host: int, ids: tuple[int, int], us: tuple[int, int], median_us: int) -> Flow:
    icmp_id, new_id = ids
    original = Tuple(f"172.17.0.{host}", "202.89.233.100", id=icmp_id)
    reply = Tuple("202.89.233.100", "203.0.113.10", id=new_id)
    latency = Latency(True, 27_000, median_us * 1000, 99_000, 99_000)
    back = Latency(True, 5_000, 7_000, 10_000, 10_000)
    return Flow(
        id=number,
        protocol="icmp",
        status="translated",
        path=PATH,
        initiator=original,
        translations=(
            Translation(
                *PATH,
                "snat",
                ("src",) if icmp_id == new_id else ("src", "id"),
                original,
                reply,
                RULE,
                BASE_NS + us[0] * 1000,
                BASE_NS + us[1] * 1000,
            ),
        ),
        packets_original=5,
        packets_reply=5,
        crossings=(
            Crossing(*PATH, "original", 5, 0, 0, 0, latency),
            Crossing(*PATH, "reply", 5, 0, 0, 0, back),
        ),
        first=BASE_NS + us[0] * 1000,
        last=BASE_NS + us[1] * 1000,
        endpoint_initiator=Endpoint(f"job{host}", "bridge", "alpine", {"b": "2", "a": "1"}),
    )


@pytest.fixture
def docker_ping() -> ReportData:
    return ReportData(
        version="0.1.0",
        points=(point("docker0", 280_642, 4_691_659), point("eth0", 280_741, 4_691_651)),
        flows=(
            ping(1, 2, (7, 7), (280_642, 4_282_369), 33),
            ping(2, 3, (8, 8), (290_435, 4_291_533), 31),
            ping(3, 4, (1, 1), (640_377, 4_641_912), 37),
            ping(4, 5, (1, 50024), (690_290, 4_691_659), 33),
        ),
        findings=(
            Finding(
                "icmp-id-rewritten",
                "info",
                "flow 4 got id 50024 because flow 3 already used id 1 towards 202.89.233.100",
                (4, 3),
                (PacketRef("eth0", 7),),
            ),
        ),
        accounting=Accounting(80, 80, {}, {}),
    )


@pytest.fixture
def rewrite() -> Rewrite:
    """Frame 7 of both captures: the echo request whose id the kernel changed."""
    shared: dict[str, Any] = {
        "protocol": "icmp",
        "dst": "202.89.233.100",
        "type": 8,
        "code": 0,
        "seq": 0,
        "ip_id": 0x125D,
    }
    return Rewrite(
        flow=4,
        direction="original",
        nat="snat",
        changed=("src", "id"),
        latency_ns=36_000,
        before=Sighting("docker0", 7, BASE_NS + 690_290_000, src="172.17.0.5", id=1, ttl=64, **shared),
        after=Sighting("eth0", 7, BASE_NS + 690_326_000, src="203.0.113.10", id=50024, ttl=63, **shared),
        evidence=("icmp-seq", "payload", "ip-id"),
    )


@pytest.fixture
def unmatched() -> Unmatched:
    segment = Sighting(
        "docker0", 9, None, "tcp", "2001:db8::5", "2001:db8::1", 64, None, 40000, 443,
        seq=7, ack=9, flags="P.", length=12,
    )  # fmt: skip
    return Unmatched(None, None, "ambiguous", segment, (PacketRef("eth0", 8), PacketRef("eth0", 9)))
