"""Link layers through tshark: the same rows as natively where both can, and tshark's own fields elsewhere."""

from __future__ import annotations

import ipaddress
import shutil
import struct
import sys
from pathlib import Path

import dpkt
import pytest
from tshark_fields import tshark_fields

from nattrace.errors import InputError, MissingToolError
from nattrace.ingest import open_capture, parse_sources
from nattrace.ingest import tshark as tshark_module
from nattrace.ingest.source import Batch, PointInfo, ReadOptions
from nattrace.ingest.tshark import TsharkCapture
from nattrace.table import TCP, UDP, PacketTable

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
TESTS = SHARED / "tcpdump-tests" / "tests"
TRACES = SHARED / "zeek" / "testing" / "btest" / "Traces"
DOCKER_PING = Path(__file__).parents[1].parent / "nattrace" / "samples" / "docker0.pcap"

needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared captures")


def read(path: Path, options: ReadOptions | None = None) -> tuple[list[PointInfo], PacketTable, ReadOptions]:
    options = options or ReadOptions()
    capture = TsharkCapture(path, None, path.name)
    tables = [batch.table for batch in capture.batches(options)]
    return capture.points, PacketTable.concatenate(tables), options


@needs_tshark
def test_rows_equal_the_native_ones_in_every_column() -> None:
    options = ReadOptions()
    native: list[Batch] = list(open_capture(parse_sources([DOCKER_PING])[0], options).batches(options))
    expected = PacketTable.concatenate([batch.table for batch in native])
    points, got, _ = read(DOCKER_PING, options)
    assert len(expected) == 40  # capinfos
    for name in PacketTable.__dataclass_fields__:
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
    assert [(p.name, p.packets, p.decoded, p.dated) for p in points] == [("docker0", 40, 40, True)]


#: A capture of each link layer that has IP in it and that no native reader knows.
ODD_LINKS = [
    TESTS / "LINKTYPE_PKTAP.pcap",
    TESTS / "OSPFv3_NBMA_adjacencies.pcap",  # Frame Relay
    TESTS / "arcnet-rfc1051-arp-icmp-http.pcap",
    TESTS / "bgp-aigp.pcap",  # Juniper ATM
    TESTS / "e1000g.pcap",  # Solaris IPNET
    TESTS / "ieee802.11_htc.pcap",  # radiotap
    TESTS / "ipoib.pcap",
    TRACES / "llc.pcap",  # FDDI
    TESTS / "nflog.pcap",
    TRACES / "wlanmon.pcap",  # IEEE 802.11
]

#: What tshark is asked for.
FIELDS = [
    "frame.number", "ip.src", "ip.dst", "ip.proto", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport",
    "ipv6.src", "ipv6.dst", "frame.time_epoch", "frame.len",
]  # fmt: skip


@needs_tshark
@needs_shared
@pytest.mark.parametrize("path", ODD_LINKS, ids=lambda path: path.stem)
def test_addresses_and_ports_are_tsharks(path: Path) -> None:
    shown, code = tshark_fields(path, FIELDS)
    points, table, options = read(path)
    assert sum(p.packets for p in points) == len(shown)
    assert [p.truncated for p in points] == [code != 0] * len(points)  # llc.pcap ends inside a record
    rows = {int(frame): row for row, frame in enumerate(table.frame)}
    compared = 0
    for frame, src, dst, protocol, tcp_s, tcp_d, udp_s, udp_d, src6, dst6, epoch, length in shown:
        row = rows.get(int(frame))
        if row is None:
            continue
        version = int(table.version[row])
        got = [options.book.packed(version, int(column[row])) for column in (table.src, table.dst)]
        expected = [src, dst] if version == 4 else [src6, dst6]
        assert got == [ipaddress.ip_address(address).packed for address in expected]
        seconds, _, fraction = epoch.partition(".")
        assert int(table.time_ns[row]) == int(seconds) * 10**9 + int(fraction.ljust(9, "0"))
        assert int(table.wire_length[row]) == int(length)
        if version == 4 and int(protocol) in (TCP, UDP) and not int(table.fragment[row]) & 0x1FFF:
            ports = [tcp_s, tcp_d] if int(protocol) == TCP else [udp_s, udp_d]
            assert [int(table.sport[row]), int(table.dport[row])] == [int(port) for port in ports]
        compared += 1
    assert compared


@needs_tshark
@needs_shared
def test_every_packet_of_many_link_types_is_a_row_or_counted() -> None:
    for path in sorted(TESTS.glob("*.pcap"))[::40]:
        try:
            points, table, _ = read(path)
        except InputError:
            continue
        assert sum(p.packets for p in points) == len(table) + sum(sum(p.skipped.values()) for p in points), (
            path.name
        )


@needs_tshark
def test_a_truncated_capture_says_how_much_is_left(tmp_path: Path) -> None:
    path = tmp_path / "short.pcap"
    with DOCKER_PING.open("rb") as source, path.open("wb") as target:
        writer = dpkt.pcap.Writer(target, snaplen=60)
        for time, data in dpkt.pcap.Reader(source):
            writer.writepkt(bytes(data)[:60], time)
    # dpkt's writer takes the cut length for the wire length: put the true one back, at byte 12 of each record
    data = bytearray(path.read_bytes())
    for record in range(40):
        at = 24 + record * (16 + 60) + 12
        data[at : at + 4] = (98).to_bytes(4, sys.byteorder)
    path.write_bytes(data)
    capture = TsharkCapture(path, "here", "short.pcap")
    assert capture.comparable_bytes() == 60 - 14
    batches = list(capture.batches(ReadOptions(comparable_bytes=46)))
    assert capture.points[0].name == "here"
    assert batches[0].table.captured_length.tolist() == [60] * 40
    assert batches[0].table.wire_length.tolist() == [98] * 40
    assert batches[0].table.payload_length.tolist() == [56] * 40


def test_without_tshark_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(MissingToolError, match=r"x\.pcap: tshark is not installed; .*apt install tshark"):
        TsharkCapture(DOCKER_PING, None, "x.pcap")


@needs_tshark
def test_what_tshark_cannot_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 60000)  # no such link type
    path.write_bytes(header + struct.pack("<IIII", 0, 0, 4, 4) + b"abcd")
    with pytest.raises(InputError, match=r"\Ax\.pcap: tshark: .*60000") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs /bin/sh")
@pytest.mark.parametrize(
    ("prints", "skipped"),
    [
        ('[\n  {\n    "a": 1\n  },\n  {\n    "_source": {"layers": 7}\n  }\n]\n', {"tshark-unparsed": 2}),
        ("  {\n  }\n" * 3, {"tshark-unparsed": 3}),
        ("  }\n" + "[" * 5000 + "\n  }\n", {"tshark-unparsed": 2}),
        ("", {}),
    ],
    ids=["other fields", "empty", "deep", "nothing"],
)
def test_whatever_tshark_prints_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, skipped: dict[str, int]
) -> None:
    (tmp_path / "out").write_text(prints)
    fake = tmp_path / "tshark"
    fake.write_text(f"#!/bin/sh\ncat '{tmp_path / 'out'}'\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _name: str(fake))
    points, table, _ = read(DOCKER_PING)
    assert (len(table), dict(points[0].skipped)) == (0, skipped)


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs /bin/sh")
def test_a_silent_tshark_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "tshark"
    fake.write_text("#!/bin/sh\nexec sleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _name: str(fake))
    monkeypatch.setattr(tshark_module, "SILENCE_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"docker0\.pcap: tshark says nothing for"):
        read(DOCKER_PING)
