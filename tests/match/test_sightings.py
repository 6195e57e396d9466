"""One capture that shows packets more than once: merged files, mirror ports, hairpins, doubled records.

The recorded kernel NAT of tests/fixtures/lab is merged into one file, so the truth is what the separate
files say: the same translations and the same pairs of packets, or fewer, never others.
"""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from simulation import EPOCH_NS, Conversation, Endpoint, Seen, address, packet_at, write_pcap

import nattrace
from nattrace.model import Rewrite, Sighting

LAB = Path(__file__).parents[1] / "fixtures" / "lab"
#: LINKTYPE_LINUX_SLL2 in the header of a little endian pcap: its interfaces stay points of their own.
SLL2 = b"\x14\x01"
FOLDERS = [
    folder
    for folder in sorted(LAB.iterdir())
    if not any(path.read_bytes()[20:22] == SLL2 for path in folder.glob("*.pcap"))
]
#: Nothing numbers these packets: no IP id, a new one at every point, or equal payloads everywhere. Alone they
#: stay unmatched. And where all numbers are shifted, no packet is seen again as itself.
HARDLY_TOLD = {
    "identical_ipv6_pings",
    "identical_keepalives",
    "fragments_ipv6",
    "synproxy",
    "trace_udp",
    "trace_udp_fixed_ids",
    "trace_v6",
    "nat64_errors",
}

Record = tuple[int, bytes, bytes]  #: time, header, packet


def records(path: Path) -> list[Record]:
    data = path.read_bytes()
    assert data[:4] == b"\x4d\x3c\xb2\xa1"  # little endian, nanoseconds
    found, at = [], 24
    while at < len(data):
        seconds, nanoseconds, captured, _ = struct.unpack_from("<IIII", data, at)
        found.append(
            (
                seconds * 10**9 + nanoseconds,
                data[at : at + 16],
                data[at + 16 : at + 16 + captured],
            )
        )
        at += 16 + captured
    return found


def as_file(header: bytes, packets: list[Record]) -> BytesIO:
    return BytesIO(header + b"".join(head + packet for _, head, packet in packets))


def spoken(flow: nattrace.Flow) -> set[tuple[object, ...]]:
    return {(flow.protocol, t.nat, t.original, t.reply) for t in flow.translations}


def said(sighting: Sighting) -> Sighting:
    """Return what a packet says of itself wherever it is seen."""
    return replace(sighting, point="", frame=0, time=None, ttl=None)


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_points_merged_into_one_file_say_what_they_say_apart(folder: Path) -> None:
    paths = sorted(folder.glob("*.pcap"))
    if any(path.read_bytes()[:4] != b"\x4d\x3c\xb2\xa1" for path in paths):
        pytest.fail(f"{folder.name} is not in nanoseconds")
    apart = nattrace.analyze(*paths)
    merged, origin = [], []
    for path in paths:
        for frame, record in enumerate(records(path), 1):
            merged.append(record)
            origin.append((path.stem, frame))
    order = sorted(range(len(merged)), key=lambda n: merged[n][0])
    together = nattrace.analyze(as_file(paths[0].read_bytes()[:24], [merged[n] for n in order]))

    expected = set().union(*(spoken(flow) for flow in apart.flows))
    told = set().union(*(spoken(flow) for flow in together.flows))
    assert told <= expected
    if folder.name not in HARDLY_TOLD:
        assert told == expected

    pairs: set[tuple[object, object]]
    shown: set[tuple[object, object]]
    pairs = {((r.before.point, r.before.frame), (r.after.point, r.after.frame)) for r in apart.rewrites}
    shown = {(origin[order[r.before.frame - 1]], origin[order[r.after.frame - 1]]) for r in together.rewrites}
    if any(isinstance(row, Rewrite) and not row.changed for row in apart.rewrites.all()):
        # what several points show alike is told once, at whichever was first: compare packets, not places
        pairs = {(said(r.before), said(r.after)) for r in apart.rewrites}
        shown = {(said(r.before), said(r.after)) for r in together.rewrites}
    assert shown <= pairs
    assert sum(c.lost for flow in together.flows for c in flow.crossings) <= sum(
        c.lost for flow in apart.flows for c in flow.crossings
    )
    accounting = together.accounting
    assert len(together.points) == 1
    assert accounting.packets == len(merged)
    assert accounting.packets == accounting.matched + sum(accounting.unmatched.values()) + sum(
        accounting.skipped.values()
    )


def test_doubled_records_are_one_packet_each() -> None:
    folder = LAB / "port_collision"
    doubled = []
    for name in ("docker0", "eth0"):
        path = folder / f"{name}.pcap"
        doubled.append(as_file(path.read_bytes()[:24], [r for r in records(path) for _ in range(2)]))
    once = nattrace.analyze(folder / "docker0.pcap", folder / "eth0.pcap")
    twice = nattrace.analyze(*doubled)

    assert [
        (f.initiator, f.translations[0].reply, f.packets_original) for f in once.flows if f.translations
    ] == [(f.initiator, f.translations[0].reply, f.packets_original) for f in twice.flows if f.translations]
    assert len(list(twice.rewrites)) == len(list(once.rewrites))
    assert twice.accounting.unmatched["duplicate"] == once.accounting.matched


def test_three_sightings_of_a_packet_are_told_whatever_their_order(tmp_path: Path) -> None:
    """A container reaches its own published port: the bridge shows every packet untranslated, whole and by halves.

    So it was seen on a Docker engine without its proxy while docker0 was captured: answers are translated in another
    order than questions, and one sighting was routed. No two of them share a flow's layer.
    """
    asked = Endpoint(address("172.17.0.2"), 38596)
    halves = (
        Seen(asked, Endpoint(address("203.0.113.10"), 8080)),
        Seen(asked, Endpoint(address("172.17.0.2"), 80)),
        Seen(Endpoint(address("172.17.0.1"), 38596), Endpoint(address("172.17.0.2"), 80)),
    )
    talk = Conversation("tcp", ("veth",) * 3, halves, seq=1_000_000, ack=2_000_000)
    rng, at_ns, frames = random.Random(4), EPOCH_NS, []
    for turn in range(10):
        reply, payload, ip_id = turn % 2 == 1, rng.randbytes(30), rng.randint(1, 65_535)
        at_ns += 200_000
        for n, place in enumerate((2, 0, 1) if reply else (0, 2, 1)):
            packet = packet_at(
                talk, halves[place], payload, reply=reply, ip_id=ip_id, ttl=63 if place == 1 else 64
            )
            frames.append((at_ns + n * 15_000, b"\2" * 12 + b"\x08\x00" + packet))
        talk.seq, talk.ack = (talk.seq + 30 * (not reply), talk.ack + 30 * reply)
    write_pcap(tmp_path / "veth.pcap", frames)
    report = nattrace.analyze(tmp_path / "veth.pcap")
    assert report.accounting.matched == len(frames)
    (flow,) = report.flows
    assert [(t.nat, t.original.dst, t.reply.dst) for t in flow.translations] == [
        ("dnat", "203.0.113.10", "172.17.0.2"),
        ("snat", "172.17.0.2", "172.17.0.1"),
    ]
    rows = list(report.rewrites)
    assert len(rows) == 20
    assert all((row.before.frame - 1) // 3 == (row.after.frame - 1) // 3 for row in rows)
