"""Quoted packets are what tshark shows of them, and no cut makes more of them than there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from error_frames import (
    CONTAINER,
    CONTAINER6,
    INTERFACE,
    MPLS,
    ROUTER,
    ROUTER6,
    SERVER,
    SERVER6,
    TCP,
    UDP,
    Packet,
    Points,
    error,
    extended,
    extension_length,
)

import nattrace
from nattrace.ingest import ReadOptions, open_capture, parse_sources

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures" / "lab"
SHARED = TESTS.parent.parent / "shared" / "captures"
#: Captures of strangers: quotes of every length, behind IPv6 extension headers, with RFC 4884 extensions.
STRANGERS = {
    "tcpdump-tests/tests/afs.pcap": 25,
    "tcpdump-tests/tests/dhcp-rfc4388.pcap": 3,
    "tcpdump-tests/tests/icmp-cksum-oobr-1.pcap": 1,
    "tcpdump-tests/tests/icmp-cksum-oobr-4.pcapng": 1,
    "tcpdump-tests/tests/icmp-rfc5837.pcap": 1,
    "tcpdump-tests/tests/icmp_inft_name_length_zero.pcap": 1,
    "tcpdump-tests/tests/mpls-traceroute.pcap": 9,
    "zeek/testing/btest/Traces/icmp/icmp-destunreach-ip.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp-destunreach-udp.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp-timeexceeded.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp6-destunreach-ip6ext-udp.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp6-paramprob.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp6-timeexceeded.pcap": 1,
    "zeek/testing/btest/Traces/icmp/icmp6-toobig.pcap": 1,
}
#: Errors that quote nothing, or an extension header cut off before the ports.
ILLEGIBLE = (
    "tcpdump-tests/tests/extract_read2_asan.pcap",
    "zeek/testing/btest/Traces/icmp/icmp-destunreach-no-context.pcap",
    "zeek/testing/btest/Traces/icmp/icmp6-destunreach-no-context.pcap",
    "zeek/testing/btest/Traces/icmp/icmp6-destunreach-ip6ext-trunc.pcap",
)
FIELDS = [
    "frame.number",
    "ip.src",
    "ip.dst",
    "ip.id",
    "ip.ttl",
    "ipv6.src",
    "ipv6.dst",
    "ipv6.hlim",
    "udp.srcport",
    "udp.dstport",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq",
    "icmp.mtu",
    "icmpv6.mtu",
]


def quotes(path: Path) -> list[dict[str, Any]]:
    """Every quote of a file, as plain values."""
    options = ReadOptions()
    (capture,) = (open_capture(source, options) for source in parse_sources([str(path)]))
    found = []
    for batch in capture.batches(options):
        if batch.quotes is None:
            continue
        q = batch.quotes
        for n in range(len(q)):
            row = {name: getattr(q.packets, name)[n].item() for name in ("frame", "ttl", "ip_id", "protocol")}
            row |= {
                name: getattr(q.packets, name)[n].item() for name in ("sport", "dport", "seq", "icmp_type")
            }
            version = int(q.packets.version[n])
            row |= {name: options.book.text(version, getattr(q.packets, name)[n]) for name in ("src", "dst")}
            row |= {"rest": int(q.rest[n]), "l4_length": int(q.l4_length[n]), "row": int(q.row[n])}
            assert int(batch.table.frame[q.row[n]]) == row["frame"]
            found.append(row)
    return sorted(found, key=lambda row: row["frame"])


def of_tshark(path: Path) -> list[dict[str, Any]]:
    """The same, as tshark prints it: the quoted value of a field comes second."""
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark")
    words = ["tshark", "-r", str(path), "-n", "-T", "fields", "-o", "tcp.relative_sequence_numbers:FALSE"]
    for field in FIELDS:
        words += ["-e", field]
    words += ["-Y", "icmp.type in {3, 4, 5, 11, 12} || icmpv6.type in {1, 2, 3, 4}"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    found = []
    for line in printed.splitlines():
        cells = dict(zip(FIELDS, (cell.split(",") for cell in line.split("\t")), strict=True))

        def second(*names: str, of: dict[str, list[str]] = cells) -> str:
            return next((of[name][1] for name in names if len(of[name]) > 1), "0")

        def only(*names: str, of: dict[str, list[str]] = cells) -> int:
            return next((int(of[name][0], 0) for name in names if of[name][0]), 0)

        found.append(
            {
                "frame": only("frame.number"),
                "src": second("ip.src", "ipv6.src"),
                "dst": second("ip.dst", "ipv6.dst"),
                "ip_id": int(second("ip.id"), 0),
                "ttl": int(second("ip.ttl", "ipv6.hlim"), 0),
                "ports": (only("udp.srcport", "tcp.srcport"), only("udp.dstport", "tcp.dstport")),
                "seq": only("tcp.seq"),
                "mtu": only("icmp.mtu", "icmpv6.mtu"),
            }
        )
    return found


def compare(path: Path) -> int:
    """Compare all quotes of a file; return how many there are."""
    ours, theirs = quotes(path), of_tshark(path)
    plain = []
    for row in ours:
        ported = row["protocol"] in (6, 17)
        plain.append(
            {
                **{name: row[name] for name in ("frame", "src", "dst", "ip_id", "ttl")},
                "ports": (row["sport"], row["dport"]) if ported else (0, 0),
                "seq": row["seq"] if row["protocol"] == 6 else 0,
            }
        )
    assert plain == [{name: value for name, value in row.items() if name != "mtu"} for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert other["mtu"] in (0, row["rest"] & 0xFFFFFFFF), (row, other)
    return len(ours)


@pytest.mark.parametrize(
    ("name", "errors"),
    [("traceroute", 30), ("path_mtu", 3), ("path_mtu_v6", 3), ("errors_v6", 24), ("prohibited", 15)],
)
def test_quotes_of_the_lab_are_those_of_tshark(name: str, errors: int) -> None:
    assert compare(FIXTURES / name / "docker0.pcap") == errors


@pytest.mark.parametrize("name", STRANGERS)
def test_quotes_in_captures_of_strangers_are_those_of_tshark(name: str) -> None:
    if not SHARED.exists():
        pytest.skip("shared captures are not here")
    assert compare(SHARED / name) == STRANGERS[name]


@pytest.mark.parametrize("name", ILLEGIBLE)
def test_an_error_that_quotes_nothing_legible_is_only_counted(name: str) -> None:
    if not SHARED.exists():
        pytest.skip("shared captures are not here")
    assert quotes(SHARED / name) == []
    accounting = nattrace.analyze(SHARED / name).accounting
    assert accounting.unmatched == {"icmp-error": 1}


def test_quotes_of_every_size_and_with_extensions_are_those_of_tshark(tmp_path: Path) -> None:
    """As routers send them, from 8 bytes behind an IPv4 header to all that fits, and as RFC 4884 has it."""
    points = Points()
    for version, sizes in ((4, (28, 36, 128, 548)), (6, (60, 128, 1232))):
        six = version == 6
        source, target, router = (CONTAINER6, SERVER6, ROUTER6) if six else (CONTAINER, SERVER, ROUTER)
        for protocol in (UDP, TCP):
            packet = Packet(
                source, 40000, target, 443, b"payload " * 200, protocol=protocol, ip_id=4711, ttl=1
            )
            bodies = [(packet.ip()[:size], 0) for size in sizes]
            bodies += [
                (extended(packet.ip(), *objects), extension_length(version))
                for objects in ((MPLS,), (INTERFACE,), (MPLS, INTERFACE), ())
            ]
            for body, rest in bodies:
                kind = (3, 0) if six else (11, 0)
                points.back(None, error(router, source, body, kind=kind, rest=rest))
    path, _ = points.write(tmp_path)

    assert compare(path) == 2 * (4 + 4) + 2 * (3 + 4)
