"""The slow matcher agrees with tshark on what packets carry, and with payload tokens on who is who."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from lab import pieces
from lab.check import read_points
from lab.oracle import ExpectedRow, Seen, UndecidableError, expected_rows, read, token_rows
from lab.truth import Addressing, Entry, Hop, Truth

RECORDED = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "lab").iterdir())
IDS = [folder.name for folder in RECORDED]
#: Those in which packets keep their sizes.
KEPT = [folder for folder in RECORDED if not Truth.load(folder / "truth.json").resized]
TSHARK_FIELDS = [
    "frame.number",
    "ip.src",
    "ip.dst",
    "ipv6.src",
    "ipv6.dst",
    "tcp.srcport",
    "tcp.dstport",
    "udp.srcport",
    "udp.dstport",
    "icmp.type",
    "icmp.ident",
    "icmpv6.type",
    "icmpv6.echo.identifier",
    "ip.ttl",
    "ipv6.hlim",
]


@pytest.mark.parametrize("folder", RECORDED, ids=IDS)
def test_reads_packets_as_tshark_does(folder: Path) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark")
    path = next(iter(sorted(folder.glob("*.pcap"))))
    # Port 53 carries the lab's tokens, which are not DNS: the dissectors above UDP and TCP stay off.
    words = ["tshark", "-r", str(path), "-n", "-T", "fields", "-o", "tcp.desegment_tcp_streams:FALSE"]
    for field in TSHARK_FIELDS:
        words += ["-e", field]
    # The first fragment of a datagram has its ports; the others' are from it and not tshark's affair.
    for protocol in ("ip", "ipv6"):
        words += ["-o", f"{protocol}.defragment:FALSE"]
    packets = "tcp || udp || icmp.type in {0, 8} || icmpv6.type in {128, 129}"
    errors = "icmp.type in {3, 4, 5, 11, 12} || icmpv6.type in {1, 2, 3, 4}"
    words += ["-Y", f"({packets}) && !({errors})"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout

    resized = Truth.load(folder / "truth.json").resized
    seen = (
        [p for p in pieces.whole(pieces.read(path)) if not p.cut or p.start == 0] if resized else read(path)
    )
    assert {packet.frame: (packet.addressing, packet.ttl) for packet in seen} == dict(
        _from_tshark(line.split("\t")) for line in printed.splitlines()
    )


def _from_tshark(cells: list[str]) -> tuple[int, tuple[Addressing, int]]:
    """Build the same from tshark's text; it shows ICMP ids as decimal or hexadecimal."""

    def number(*values: str) -> int:
        return next((int(value, 0) for value in values if value), -1)

    frame, src4, dst4, src6, dst6, tsport, tdport, usport, udport, type4, id4, type6, id6, ttl, hops = cells
    addressing = Addressing(
        src4 or src6,
        dst4 or dst6,
        number(tsport, usport),
        number(tdport, udport),
        number(type4, type6),
        number(id4.split(",")[0], id6),
    )
    return int(frame), (addressing, number(ttl, hops))


@pytest.mark.parametrize("folder", KEPT, ids=[folder.name for folder in KEPT])
def test_kernel_entries_and_payload_tokens_pair_the_same_packets(folder: Path) -> None:
    truth = Truth.load(folder / "truth.json")
    points = read_points(folder)
    for hop in truth.hops:
        expected = expected_rows(hop, points)
        for inner, outer in pairwise(hop.chain):
            rows = {
                (row.before_frame, row.after_frame)
                if row.before_point == inner
                else (row.after_frame, row.before_frame)
                for row in expected
                if {row.before_point, row.after_point} == {inner, outer}
            }
            changed, same = token_rows(Hop(inner, outer, hop.conntrack, hop.entries), points)
            assert not same & rows
            if not truth.unique_payloads:
                continue  # a payload of which a proxy sends copies says nothing of who crossed
            assert changed <= rows
            # Beyond the tokens there are only TCP segments without data.
            protocol = {packet.frame: packet.protocol for packet in points[inner]}
            assert {protocol[frame] for frame, _ in rows - changed} <= {"tcp"}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("icmp_id_collision", [40]),  # 4 containers, 5 requests, 5 replies
        ("icmp_random_fully", [480]),  # 12 pings of 20
        ("conntrack_flushed", [96]),  # 3 lives, 4 rounds, 2 containers, ping and UDP both ways
        ("identical_ipv6_pings", [80]),  # 4 containers, 10 requests, 10 replies
        ("identical_keepalives", [120]),  # 6 sockets, 10 rounds, both ways
        ("host_traffic", [40]),  # 2 containers, 5 rounds; the host's own 30 packets never cross
        ("partial_capture", [20]),  # rounds 5 to 9 of 15
        ("routed", [0]),
    ],
)
def test_rows_are_as_many_as_the_senders_made(name: str, rows: list[int]) -> None:
    folder = next(folder for folder in RECORDED if folder.name == name)
    truth = Truth.load(folder / "truth.json")
    points = read_points(folder)

    assert [len(expected_rows(hop, points)) for hop in truth.hops] == rows


def test_every_packet_of_the_router_is_a_row_or_was_dropped() -> None:
    folder = next(folder for folder in RECORDED if folder.name == "dropped_in_forward")
    truth = Truth.load(folder / "truth.json")
    points = read_points(folder)

    rows = len(expected_rows(truth.hops[0], points))

    assert truth.dropped > 0
    assert sum(len(packets) for packets in points.values()) - 2 * rows == truth.dropped


def _ping(frame: int, src: str, id_: int, ttl: int, ip_id: int) -> Seen:
    addressing = Addressing(src, "198.51.100.1", type=8, id=id_)
    return Seen(frame, "icmp", addressing, ttl, (ip_id,), b"")


ENTRY = Entry(
    "icmp",
    Addressing("172.17.0.2", "198.51.100.1", type=8, id=1),
    Addressing("198.51.100.1", "203.0.113.10", type=0, id=9),
)
HOP = Hop("docker0", "eth0", "conntrack.txt", (ENTRY,))


def test_pairs_by_the_kernels_entry() -> None:
    points = {
        "docker0": [_ping(1, "172.17.0.2", 1, 64, 7), _ping(2, "172.17.0.3", 1, 64, 7)],
        "eth0": [_ping(5, "203.0.113.10", 1, 63, 7), _ping(6, "203.0.113.10", 9, 63, 7)],
    }

    assert expected_rows(HOP, points) == {ExpectedRow("docker0", 1, "eth0", 6, "original")}


def test_refuses_to_choose_between_equal_packets() -> None:
    points = {
        "docker0": [_ping(1, "172.17.0.2", 1, 64, 7), _ping(2, "172.17.0.2", 1, 64, 7)],
        "eth0": [_ping(1, "203.0.113.10", 9, 63, 7)],
    }

    with pytest.raises(UndecidableError):
        expected_rows(HOP, points)
