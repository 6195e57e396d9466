"""What a helper rewrites and the kernel then cuts over IPv6 has nothing in common but its flow: it is not lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import dpkt
from simulation import EPOCH_NS, address, write_pcap

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

INSIDE, PUBLIC, SERVER = ("fd00:17::2", 5060), ("2001:db8:1::10", 5060), ("2001:db8:2::1", 5060)
FIRST_BYTES = 1448


def packets(src: tuple[str, int], dst: tuple[str, int], body: bytes, hops: int, cut: int = 0) -> list[bytes]:
    """Return Ethernet frames of one datagram, cut in two with the identification `cut` where there is one."""
    head = src[1].to_bytes(2, "big") + dst[1].to_bytes(2, "big") + (8 + len(body)).to_bytes(2, "big")
    ends = address(src[0]) + address(dst[0])
    check = dpkt.in_cksum(ends + (8 + len(body)).to_bytes(4, "big") + b"\0\0\0\x11" + head + b"\0\0" + body)
    datagram = head + check.to_bytes(2, "big") + body
    parts = [(17, datagram)]
    if cut:
        parts = [
            (44, b"\x11\0" + (at | more).to_bytes(2, "big") + cut.to_bytes(4, "big") + part)
            for at, more, part in ((0, 1, datagram[:FIRST_BYTES]), (FIRST_BYTES, 0, datagram[FIRST_BYTES:]))
        ]
    ethernet = b"\2" * 6 + b"\4" * 6 + b"\x86\xdd"
    return [
        ethernet + b"\x60\0\0\0" + len(part).to_bytes(2, "big") + bytes([kind, hops]) + ends + part
        for kind, part in parts
    ]


def report_of(folder: Path, missed: int) -> Report:
    """Analyze six long messages that grow on the way, each answered; of the last ones nothing arrives outside."""
    inside: list[tuple[int, bytes]] = []
    outside: list[tuple[int, bytes]] = []
    for n in range(6):
        now_ns = EPOCH_NS + n * 100_000_000
        said = b"MESSAGE %d " % n + b"." * 1700
        inside += [(now_ns, each) for each in packets(INSIDE, SERVER, said + b"from fd00:17::2", 64)]
        if n < 6 - missed:
            grown = packets(PUBLIC, SERVER, said + b"from 2001:db8:1::10", 63, 0x12345678 + 7777777 * n)
            outside += [(now_ns + 30_000, each) for each in grown]
        answer = b"answer number %d, which nobody changes" % n
        outside += [(now_ns + 50_000_000, each) for each in packets(SERVER, PUBLIC, answer, 60)]
        inside += [(now_ns + 50_030_000, each) for each in packets(SERVER, INSIDE, answer, 59)]
    write_pcap(folder / "inside.pcap", inside)
    write_pcap(folder / "outside.pcap", outside)
    return nattrace.analyze(folder / "inside.pcap", folder / "outside.pcap")


def test_it_is_in_other_sizes(tmp_path: Path) -> None:
    report = report_of(tmp_path, missed=0)
    assert report.accounting.matched == 12
    assert report.accounting.unmatched == {"resized": 18}


def test_what_did_not_arrive_is_lost(tmp_path: Path) -> None:
    report = report_of(tmp_path, missed=2)
    assert report.accounting.matched == 12
    assert report.accounting.unmatched == {"resized": 12, "lost": 2}
