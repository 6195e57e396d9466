"""Packets in tunnels against their plain or otherwise wrapped selves: what was simulated is what is told.

The simulator writes captures of a NAT box; one or both of them are then wrapped frame by frame, so that the truth
about frames and conversations stays what it was.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from ingest.test_tunnels import ethernet, geneve, gre, gtp, in_udp, ipv4, ipv6, vxlan
from simulation import Traffic, simulate, write_pcap
from verdict import check_accounting, judge_rows

from nattrace import analyze
from nattrace.match import workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from simulation import Simulated

    from nattrace import Report


def l2tp(packet: bytes, session: int) -> bytes:
    return in_udp(struct.pack(">HHH", 2, 7, session) + b"\xff\x03\x00\x21", packet, 1701)


def pptp(packet: bytes, call: int) -> bytes:
    return ipv4(struct.pack(">HHHH", 0x2001, 0x880B, len(packet) + 1, call) + b"\x21" + packet, 47)


#: By kind: an IP packet, and its number at the point, in a tunnel; the name of the tunnel.
WRAPS: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "ipip": (lambda packet, _: ipv4(packet, 4), "ipip"),
    "4in6": (lambda packet, _: ipv6(packet, 4), "4in6"),
    "gre": (lambda packet, _: ipv4(gre(0x0800, key=9) + packet, 47), "gre 9"),
    "gretap": (lambda packet, _: ipv4(gre(0x6558) + ethernet(packet), 47), "gre"),
    "vxlan": (lambda packet, _: in_udp(vxlan(42), ethernet(packet), 4789), "vxlan 42"),
    "geneve": (lambda packet, _: in_udp(geneve(5, bytes(8)), ethernet(packet), 6081), "geneve 5"),
    "gtp": (lambda packet, _: in_udp(gtp(packet, 77), b"", 2152), "gtp-u 77"),
    "l2tp": (lambda packet, _: l2tp(packet, 1), "l2tp 7/1"),
    "pptp": (lambda packet, _: pptp(packet, 6016), "pptp 6016"),
    "vxlan in gre": (
        lambda packet, _: ipv4(gre(0x0800) + in_udp(vxlan(3), ethernet(packet), 4789), 47),
        "vxlan 3",
    ),
}


def wrap(path: Path, wrapped: Callable[[bytes, int], bytes], *, snaplen: int = 262144) -> None:
    """Wrap every packet of a capture that the simulator wrote."""
    data = path.read_bytes()
    packets: list[tuple[int, bytes]] = []
    at = 24
    while at < len(data):
        seconds, rest, size, _ = struct.unpack_from("<IIII", data, at)
        inside = data[at + 16 + 14 : at + 16 + size]
        outside = wrapped(inside, len(packets))
        kind = 0x0800 if outside[0] >> 4 == 4 else 0x86DD
        packets.append((seconds * 10**9 + rest, ethernet(outside, kind)))
        at += 16 + size
    write_pcap(path, packets, snaplen)


def check(report: Report, truth: Simulated, *, missing: int = 0) -> None:
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert len(rows.missed) <= missing
    assert rows.right > 0
    check_accounting(report)


@pytest.mark.parametrize(("wrapped", "name"), WRAPS.values(), ids=WRAPS.keys())
def test_plain_inside_and_wrapped_outside(
    wrapped: Callable[[bytes, int], bytes], name: str, tmp_path: Path
) -> None:
    truth = simulate(tmp_path, Traffic(flows=12, loss_inside=0.1, loss_outside=0.1))
    wrap(truth.paths["outside"], wrapped)

    report = analyze(*truth.sources)

    check(report, truth)
    carried = [flow for flow in report.flows if flow.translations]
    assert len(carried) == 12
    assert {flow.path for flow in carried} == {("inside", "outside")}
    assert {flow.encapsulation for flow in carried} == {(None, name)}


@pytest.mark.parametrize(("wrapped", "name"), WRAPS.values(), ids=WRAPS.keys())
def test_wrapped_at_both_points_and_rewrapped(
    wrapped: Callable[[bytes, int], bytes], name: str, tmp_path: Path
) -> None:
    truth = simulate(tmp_path, Traffic(flows=12))
    wrap(truth.paths["inside"], WRAPS["gre"][0])
    wrap(truth.paths["outside"], wrapped)

    report = analyze(*truth.sources)

    check(report, truth)
    carried = [flow for flow in report.flows if flow.translations]
    assert len(carried) == 12
    assert {flow.encapsulation for flow in carried} == {("gre 9", name)}


def test_two_points_of_one_tunnel_match_carriers_and_what_they_carry(tmp_path: Path) -> None:
    # routed without NAT: the carriers are the same at both points, TTL apart
    truth = simulate(tmp_path, Traffic(flows=6, random_ports=False))
    plain = truth.paths["inside"].read_bytes()
    for path in truth.paths.values():
        path.write_bytes(plain)
        wrap(path, lambda packet, n: numbered(in_udp(vxlan(8), ethernet(packet), 4789), n))

    report = analyze(*(f"{name}={path}" for name, path in truth.paths.items()))

    assert {flow.path for flow in report.flows} == {("inside", "outside")}
    wraps = [flow.encapsulation for flow in report.flows]
    assert wraps.count(None) == 1
    assert wraps.count(("vxlan 8", "vxlan 8")) == len(wraps) - 1 == 6
    # every frame is counted once, though it is matched twice
    assert report.accounting.matched == 2 * 60
    check_accounting(report)


def numbered(packet: bytes, number: int) -> bytes:
    """Give an IPv4 packet an identification of its own."""
    return packet[:4] + struct.pack(">H", number + 1) + packet[6:]


def test_one_capture_that_shows_packets_plain_and_wrapped(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(flows=6))
    wrap(truth.paths["outside"], WRAPS["vxlan"][0])
    records = []
    for path in truth.paths.values():
        data, at = path.read_bytes(), 24
        while at < len(data):
            seconds, rest, size, _ = struct.unpack_from("<IIII", data, at)
            records.append((seconds * 10**9 + rest, data[at + 16 : at + 16 + size]))
            at += 16 + size
    both = tmp_path / "both.pcap"
    write_pcap(both, sorted(records))

    report = analyze(both)

    carried = [flow for flow in report.flows if flow.translations]
    assert len(carried) == 6
    assert {flow.path for flow in carried} == {("both", "both")}
    assert {flow.encapsulation for flow in carried} == {(None, "vxlan 42")}
    assert report.accounting.matched == report.accounting.packets == 2 * 60


def test_each_direction_may_be_wrapped_in_its_own_way(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(flows=6, protocols=("udp",)))

    def by_direction(packet: bytes, _: int) -> bytes:
        reply = struct.unpack_from(">H", packet, 20)[0] < 1024  # from the server's port
        return in_udp(gtp(packet, 200 if reply else 100), b"", 2152)

    wrap(truth.paths["outside"], by_direction)
    report = analyze(*truth.sources)

    check(report, truth)
    carried = [flow for flow in report.flows if flow.translations]
    assert {flow.encapsulation for flow in carried} == {(None, "gtp-u 100, back gtp-u 200")}
    for row in report.rewrites:
        outside = row.after if row.direction == "original" else row.before
        assert outside.encapsulation == ("gtp-u 100" if row.direction == "original" else "gtp-u 200")


@pytest.mark.parametrize("snaplen", [60, 74, 90, 106, 122, 138])
def test_a_snaplen_takes_matches_and_gives_no_wrong_one(snaplen: int, tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(flows=12, packets_per_flow=20))
    wrap(truth.paths["outside"], WRAPS["vxlan"][0], snaplen=snaplen)

    report = analyze(*truth.sources)

    assert not judge_rows(report, truth).wrong
    check_accounting(report)
    if snaplen >= 138:  # 64 bytes before the inner IP header, then 40 bytes of headers and 34 more
        check(report, truth)


def test_carriers_cut_into_fragments_show_what_their_first_one_holds(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(flows=6, protocols=("udp",)))
    wrap(truth.paths["outside"], first_fragment)
    report = analyze(*truth.sources)

    check(report, truth)
    assert {flow.encapsulation for flow in report.flows if flow.translations} == {(None, "vxlan 5")}


def first_fragment(packet: bytes, number: int) -> bytes:
    """A VXLAN datagram, or its first fragment, which ends 38 bytes behind the inner UDP header."""
    datagram = in_udp(vxlan(5), ethernet(packet), 4789)[20:]
    size = 8 + 8 + 14 + 20 + 8 + 38
    return numbered(ipv4(datagram[:size], 17, more=len(datagram) > size), number)


def test_workers_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = simulate(tmp_path, Traffic(flows=12, packets_per_flow=20, version=4))
    wrap(truth.paths["outside"], WRAPS["vxlan in gre"][0])
    here = analyze(*truth.sources)
    monkeypatch.setattr(workers, "WORKER_FILE_BYTES", 0)
    there = analyze(*truth.sources)

    assert list(here.flows) == list(there.flows)
    assert here.accounting == there.accounting
    assert list(here.rewrites.all()) == list(there.rewrites.all())
    check(there, truth)


def test_a_capture_of_nothing_but_nested_headers_costs_little(tmp_path: Path) -> None:
    nested = ipv4(bytes(8), 17)
    while len(nested) < 1500:
        nested = ipv4(nested, 4)
    packets = [(1_700_000_000 * 10**9 + n, ethernet(numbered(nested, n))) for n in range(3000)]
    for name in ("a", "b"):
        write_pcap(tmp_path / f"{name}.pcap", packets)

    report = analyze(tmp_path / "a.pcap", tmp_path / "b.pcap")

    check_accounting(report)
    assert report.accounting.packets == 6000


def test_two_clocks_an_hour_apart_cost_no_match_in_a_tunnel(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(flows=12, packets_per_flow=20, protocols=("tcp",)))
    outside = truth.paths["outside"]
    wrap(outside, WRAPS["vxlan"][0])
    data = bytearray(outside.read_bytes())
    at = 24
    while at < len(data):
        seconds, _, size, _ = struct.unpack_from("<IIII", data, at)
        struct.pack_into("<I", data, at, seconds + 3600)
        at += 16 + size
    outside.write_bytes(data)

    report = analyze(*truth.sources)

    check(report, truth)
    offsets = {point.name: point.clock.offset_ns for point in report.points}
    assert abs(offsets["outside"] - offsets["inside"]) == pytest.approx(3600 * 10**9, abs=10**7)
