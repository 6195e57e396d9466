"""The whole journey: same input, same bytes, whatever the order, the place or the size of the pieces."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import dpkt
import pytest
from simulation import Network, Simulated, Traffic, masquerade, routed, simulate, write_pcap
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace
from nattrace.match import intake, prepare, windows
from nattrace.model import Rewrite, Unmatched
from nattrace.report import write_report

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

CLIENT, SERVER, PUBLIC = "172.17.0.2", "198.51.100.1", "203.0.113.10"


def as_json(report: Report) -> str:
    stream = io.StringIO()
    write_report(report, stream, "json")
    return stream.getvalue()


def three_points(folder: Path, version: int = 4) -> Simulated:
    """Capture two NAT hops with losses, strangers, repeats and a binding renewed at the second hop."""
    network = Network(5)
    client, server, middle, public = (
        ("172.17.0.", SERVER, "10.0.0.1", PUBLIC) if version == 4 else ("fd00::", "2001:db8:1::1", "fd01::1", "2001:db8::10")
    )  # fmt: skip
    points = ("inside", "middle", "outside")
    talks = [
        routed(
            protocol, (f"{client}{n}", 4000), (server, 80), {"client": (middle, 5000 + n)},
            {"client": (public, 6000 + n)}, points=points,
        )
        for n, protocol in enumerate(("tcp", "udp", "icmp", "udp", "tcp", "sctp"), 2)
    ]  # fmt: skip
    renewed = routed(
        "udp", (f"{client}3", 4000), (server, 80), {"client": (middle, 5003)}, {"client": (public, 7003)},
        points=points,
    )  # fmt: skip
    stranger = routed("udp", (server, 9), (public, 9), points=("outside",))
    for n in range(12):
        for c in [*talks, stranger]:
            network.wait_us(200)
            lost = "middle" if network.rng.random() < 0.1 else None
            network.send(
                renewed if c is talks[1] and n >= 6 else c, network.rng.randbytes(20), reply=n % 2 == 1,
                lost_after=lost, ip_id=0 if n % 3 == 0 else None,
            )  # fmt: skip
    return network.write(folder)


@pytest.mark.parametrize("version", [4, 6])
def test_the_order_of_the_arguments_changes_no_byte(version: int, tmp_path: Path) -> None:
    truth = three_points(tmp_path, version)
    texts = {as_json(nattrace.analyze(*order)) for order in itertools.permutations(truth.sources)}
    assert len(texts) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_the_order_of_the_arguments_changes_no_row(version: int, tmp_path: Path) -> None:
    truth = three_points(tmp_path, version)
    rows = [list(nattrace.analyze(*order).rewrites.all()) for order in itertools.permutations(truth.sources)]
    assert all(other == rows[0] for other in rows)
    assert [row for row in rows[0] if isinstance(row, Rewrite)]
    assert [row for row in rows[0] if isinstance(row, Unmatched)]


def test_the_hash_seed_and_the_place_change_no_byte(tmp_path: Path) -> None:
    truth = three_points(tmp_path, 6)
    command = [sys.executable, "-m", "nattrace", "analyze", "-f", "json", *truth.sources]
    texts = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C"},
            check=True,
            capture_output=True,
        ).stdout
        for seed, zone in (("0", "UTC"), ("1234", "Asia/Tokyo"))
    }
    assert len(texts) == 1
    assert json.loads(texts.pop())["schema"] == "nattrace/report/1"


@pytest.mark.parametrize("version", [4, 6])
def test_workers_and_this_process_say_the_same(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = three_points(tmp_path, version)
    reports = []
    for forked in (False, True):
        monkeypatch.setattr(intake, "worthwhile", lambda _size, forked=forked: forked)
        reports.append(nattrace.analyze(*truth.sources))
    assert as_json(reports[0]) == as_json(reports[1])
    assert list(reports[0].rewrites.all()) == list(reports[1].rewrites.all())


def test_workers_hand_over_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than slots, several IPv6 addresses new in each."""
    monkeypatch.setattr(prepare, "CHUNK_PACKETS", 64)
    truth = simulate(tmp_path, Traffic(flows=60, packets_per_flow=10, version=6))
    texts = []
    for forked in (False, True):
        monkeypatch.setattr(intake, "worthwhile", lambda _size, forked=forked: forked)
        texts.append(as_json(nattrace.analyze(*truth.sources)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("window", "chunk"), [(100, 40), (300, 64), (1000, 1000)])
@pytest.mark.parametrize("version", [4, 6])
def test_small_windows_tell_the_same_flows(
    window: int, chunk: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = simulate(tmp_path, Traffic(flows=30, packets_per_flow=20, version=version))
    whole = nattrace.analyze(*truth.sources)
    monkeypatch.setattr(windows, "WINDOW_PACKETS", window)
    monkeypatch.setattr(windows, "COMPACT_EDGES", 10)
    monkeypatch.setattr(prepare, "CHUNK_PACKETS", chunk)
    pieces = nattrace.analyze(*truth.sources)
    assert not judge_rows(pieces, truth).wrong
    assert not judge_rows(pieces, truth).missed
    assert as_json(pieces) == as_json(whole)


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("hard", [False, True])
def test_small_windows_never_tell_a_wrong_row(
    loss: float, hard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_PACKETS", 90)
    monkeypatch.setattr(prepare, "CHUNK_PACKETS", 30)
    for seed in range(6):
        truth = simulate(
            tmp_path,
            Traffic(
                seed=seed, flows=20, packets_per_flow=15, loss_inside=loss, loss_outside=loss, zero_ids=hard,
                constant_payload=hard, spacing_us=200,
            ),
        )  # fmt: skip
        report = nattrace.analyze(*truth.sources)
        assert not judge_rows(report, truth).wrong
        check_accounting(report)
        assert {flow for flow in flows_told(report) if flow[3]} <= set(expected_flows(truth))


def test_rates_that_differ_a_thousandfold_still_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outside point sees a flood that the inside one does not; packets of one instant meet all the same."""
    monkeypatch.setattr(windows, "WINDOW_PACKETS", 400)
    monkeypatch.setattr(prepare, "CHUNK_PACKETS", 128)
    network = Network()
    own = masquerade("tcp", (CLIENT, 4000), (SERVER, 443), 5000)
    flood = routed("udp", ("192.0.2.1", 9), (PUBLIC, 9), points=("outside",))
    for n in range(20):
        network.send(own, network.rng.randbytes(20), reply=n % 2 == 1, flags={0: 2, 1: 0x12}.get(n, 0x18))
        for _ in range(100):
            network.wait_us(100)
            network.send(flood, network.rng.randbytes(20))
    truth = network.write(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong
    assert not rows.missed


def test_the_path_is_found_whatever_the_points_are_called(tmp_path: Path) -> None:
    network = Network()
    c = routed("tcp", (CLIENT, 4000), (SERVER, 80), {"client": ("10.0.0.1", 5000)}, {"client": (PUBLIC, 6000)},
               points=("one", "two", "three"))  # fmt: skip
    for n in range(6):
        network.wait_us(1000)
        network.send(c, network.rng.randbytes(20), reply=n % 2 == 1, flags={0: 2, 1: 0x12}.get(n, 0x18))
    truth = network.write(tmp_path)
    for names in itertools.permutations("abc"):
        sources = [
            f"{name}={truth.paths[point]}" for name, point in zip(names, ("one", "two", "three"), strict=True)
        ]
        (flow,) = nattrace.analyze(*sources).flows
        assert flow.path == names


def test_one_capture_alone_is_a_report_too(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic())
    report = nattrace.analyze(truth.paths["inside"])
    check_accounting(report)
    assert {flow.status for flow in report.flows} == {"one-sided"}
    assert len(report.flows) == 10
    assert not list(report.rewrites)


def test_open_files_are_sources(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic())
    streams = [io.BytesIO(path.read_bytes()) for path in truth.paths.values()]
    report = nattrace.analyze(*streams)
    assert report.accounting.matched == 200


def test_without_rows_the_flows_are_the_same(tmp_path: Path) -> None:
    truth = three_points(tmp_path)
    with_rows, without = (nattrace.analyze(*truth.sources, rows=rows) for rows in (True, False))
    assert as_json(with_rows) == as_json(without)
    assert not list(without.rewrites)


def test_a_point_without_packets_and_one_with_packets_of_no_use(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic())
    write_pcap(tmp_path / "empty.pcap", [])
    arp = b"\xff" * 6 + b"\2" * 6 + b"\x08\x06" + b"\0" * 28
    write_pcap(tmp_path / "arp.pcap", [(1_700_000_000_000_000_000 + n, arp) for n in range(3)])
    report = nattrace.analyze(*truth.sources, str(tmp_path / "empty.pcap"), str(tmp_path / "arp.pcap"))
    check_accounting(report)
    assert flows_told(report) == expected_flows(truth)
    assert report.accounting.skipped == {"arp": 3}
    assert {p.name: p.packets for p in report.points} == {"inside": 100, "outside": 100, "empty": 0, "arp": 3}


def test_one_file_given_twice_is_two_points_of_untranslated_packets(tmp_path: Path) -> None:
    truth = simulate(tmp_path, Traffic(protocols=("tcp",)))
    report = nattrace.analyze(f"a={truth.paths['inside']}", f"b={truth.paths['inside']}")
    check_accounting(report)
    assert {flow.status for flow in report.flows} == {"untranslated"}
    assert not list(report.rewrites)


def test_rows_come_in_the_order_of_time_and_as_often_as_asked(tmp_path: Path) -> None:
    truth = three_points(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = list(report.rewrites)
    times = [row.before.time for row in rows]
    assert times == sorted(t for t in times if t is not None)
    assert rows == list(report.rewrites)
    assert {row.flow for row in rows} <= {flow.id for flow in report.flows}


def test_rows_and_flows_count_the_same_packets(tmp_path: Path) -> None:
    truth = three_points(tmp_path)
    report = nattrace.analyze(*truth.sources)
    rows = [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    told = {
        (row.before.point, row.before.frame, row.after.point, row.after.frame) for row in rows
    }  # fmt: skip
    assert len(told) == len(rows), "a crossing is told twice"
    per_hop: dict[tuple[int, str, str, str], int] = {}
    for row in rows:
        key = (
            (row.before.point, row.after.point)
            if row.direction == "original"
            else (row.after.point, row.before.point)
        )
        per_hop[row.flow, *key, row.direction] = per_hop.get((row.flow, *key, row.direction), 0) + 1
    assert per_hop == {
        (flow.id, c.from_point, c.to_point, c.direction): c.matched
        for flow in report.flows
        for c in flow.crossings
        if c.matched
    }


def test_a_snaplen_that_shows_late_costs_no_packet(tmp_path: Path) -> None:
    """One side cut at 60 bytes, its first megabyte of packets too short to show it; the other side whole."""
    noise = random.Random(5)
    payloads = [noise.randbytes(12 if n < 20_000 else 500) for n in range(20_100)]
    paths = []
    for name, source, port, ttl, snaplen in (
        ("inside", "172.17.0.2", 40000, 64, 60),
        ("outside", "203.0.113.10", 50000, 63, 262144),
    ):
        parts = [struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snaplen, 1)]
        for n, payload in enumerate(payloads):
            datagram = dpkt.udp.UDP(sport=port, dport=53, data=payload, ulen=8 + len(payload))
            packet = dpkt.ip.IP(
                src=socket.inet_aton(source), dst=bytes([198, 51, 100, 1]), p=17, ttl=ttl, id=0, data=datagram
            )
            packet.len = len(packet)
            frame = bytes(dpkt.ethernet.Ethernet(type=0x0800, data=packet))
            time_ns = n * 1_000_000 + (64 - ttl) * 20_000
            cut = frame[:snaplen]
            head = struct.pack(
                "<IIII", 1_700_000_000 + time_ns // 10**9, time_ns % 10**9, len(cut), len(frame)
            )
            parts.append(head + cut)
        path = tmp_path / f"{name}.pcap"
        path.write_bytes(b"".join(parts))
        paths.append(path)
    accounting = nattrace.analyze(*paths).accounting
    assert accounting.matched == accounting.packets == 2 * len(payloads)
