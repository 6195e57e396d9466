"""PPTP through a NAT that rewrites call ids: GRE packets cross, beside what they carry, and none is called lost."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import dpkt
import pytest
from simulation import EPOCH_NS, address, write_pcap

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

SERVER, PUBLIC = "198.51.100.1", "203.0.113.10"


def gre(src: str, dst: str, call: int, seq: int, *, ttl: int) -> bytes:
    """Build an Ethernet frame with PPTP's GRE (RFC 2637 section 4.1) around PPP around UDP."""
    udp = dpkt.udp.UDP(sport=5, dport=6, data=b"said %d" % seq, ulen=8 + len(b"said %d" % seq))
    inner = dpkt.ip.IP(src=address("10.0.0.2"), dst=address("10.0.0.1"), p=17, id=seq + 1, data=udp)
    inner.len = len(inner)
    ppp = b"\xff\x03\x00\x21" + bytes(inner)
    data = struct.pack(">HHHHI", 0x3001, 0x880B, len(ppp), call, seq) + ppp
    outer = dpkt.ip.IP(src=address(src), dst=address(dst), p=47, ttl=ttl, id=700 + seq, data=data)
    outer.len = len(outer)
    return b"\2" * 6 + b"\4" * 6 + b"\x08\x00" + bytes(outer)


@pytest.mark.parametrize("call_outside", [100, 41000])
def test_a_rewritten_call_id_is_no_difference(call_outside: int, tmp_path: Path) -> None:
    inside, outside = [], []
    for seq in range(12):
        now = EPOCH_NS + seq * 1_000_000
        if seq % 2:
            outside.append((now, gre(SERVER, PUBLIC, call_outside, seq, ttl=64)))
            inside.append((now + 20_000, gre(SERVER, "172.17.0.2", 100, seq, ttl=63)))
        else:
            inside.append((now, gre("172.17.0.2", SERVER, 500, seq, ttl=64)))
            outside.append((now + 20_000, gre(PUBLIC, SERVER, 500, seq, ttl=63)))
    write_pcap(tmp_path / "inside.pcap", inside)
    write_pcap(tmp_path / "outside.pcap", outside)

    report = nattrace.analyze(tmp_path / "inside.pcap", tmp_path / "outside.pcap")

    carriers = [
        row for row in report.rewrites.all() if isinstance(row, Rewrite) and row.before.protocol == "gre"
    ]
    assert sorted((row.before.frame, row.after.frame) for row in carriers) == [(n, n) for n in range(1, 13)]
    (flow,) = (flow for flow in report.flows if flow.protocol == "gre")
    assert [t.nat for t in flow.translations] == ["snat"]
    assert not any(c.lost + c.ambiguous for each in report.flows for c in each.crossings)
