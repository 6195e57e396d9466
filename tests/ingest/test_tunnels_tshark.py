"""Packets in tunnels against tshark, field by field, over every pcap of the shared captures.

tshark prints a field once for each time it occurs in a frame; the headers of depth d are those of the IP layer
number d in its list of protocols. How many packets a frame carries is compared as well, both ways. Every
disagreement is named below with its reason; one that is not, or one that is gone, fails.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from ingest.test_decode_tshark import (
    FIELDS,
    PREFERENCES,
    all_records,
    expected_fields,
    merge,
    number,
    pytestmark,  # noqa: F401  # this module needs what that one needs
)

from nattrace.ingest.decode import decode
from nattrace.ingest.source import Inner, ReadOptions
from nattrace.ingest.tunnels import TUNNEL_DEPTH_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ingest.test_decode_tshark import Disagreement, Record

#: Where decoder and tshark differ on purpose: why, in which fields, in which file and frame.
NAMED: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, int], ...]], ...] = (
    (
        "the packet inside says that it is longer than what carries it",
        ("depth",),
        (
            ("zeek/testing/btest/Traces/trunc/mpls-6in6-6in6-4in6-trunc.pcap", 1),
            ("zeek/testing/btest/Traces/tunnels/gtp/gtp9_unknown_or_too_short_payload.pcap", 11),
            ("zeek/testing/btest/Traces/tunnels/mpls-6in6-6in6-4in6-invalid-version-4.pcap", 1),
        ),
    ),
    (
        "one header of version 6 where the link layer says IPv4: tshark lists it as both",
        ("depth",),
        (
            ("tcpdump-tests/tests/LINKTYPE_IPV4_invalid.pcap", 1),
            ("tcpdump-tests/tests/bad-ipv4-version-pgm-heapoverflow.pcap", 1),
            ("tcpdump-tests/tests/kday1.pcap", 1),
            ("tcpdump-tests/tests/kday3.pcap", 2),
        ),
    ),
    (
        "Ethernet in IPv6 without GRE (RFC 8986) is not entered",
        ("depth",),
        (("tcpdump-tests/tests/ipv6-srh-ipproto-ether.pcap", 1),),
    ),
    (
        "GTP' carries charging records (3GPP TS 32.295): what stands behind its header is no packet on its way",
        ("depth",),
        tuple(("zeek/testing/btest/Traces/tunnels/gtp/gtp_control_prime.pcap", frame) for frame in (9, 10)),
    ),
    (
        "BIG TCP: lengths of 0, where this tshark reads no further",
        ("depth",),
        tuple(
            (f"tcpdump-tests/tests/bigtcp-{outer}.pcap", 1)
            for outer in (
                "ipv4-geneve-ipv4", "ipv4-geneve-ipv6", "ipv4-vxlan-ipv4", "ipv4-vxlan-ipv6",
                "ipv6-geneve-ipv4", "ipv6-geneve-ipv6", "ipv6-vxlan-ipv4", "ipv6-vxlan-ipv6",
            )
        ),
    ),
)  # fmt: skip

IP_LAYERS = ("ip", "ipv6")

#: What tshark reads behind these is no packet that the frame forwards: quotes of ICMP, samples of sFlow, registers
#: of PIM, NHRP. Or it is a tunnel that is not entered: AH over IPv4, IPComp, AYIYA, Cisco metadata, NSH, MPLS over
#: UDP, Aruba's 802.11 over GRE.
NOT_ENTERED = {"icmp", "icmpv6", "sflow", "pim", "nhrp", "ip-ah", "ipcomp", "ayiya", "cmd", "nsh", "wlan"}


def layers_of(protocols: str) -> list[str]:
    """IP headers of a frame as tshark lists them, as far as tunnels are entered."""
    found: list[str] = []
    for name in protocols.replace("ip:ah", "ip-ah").replace("udp:mpls", "nsh").split(":"):
        if name in NOT_ENTERED:
            break
        if name in IP_LAYERS:
            found.append(name)
    return found


def tshark(path: Path) -> dict[int, dict[str, list[str]]]:
    """Every occurrence of every field by frame number, of frames with more than one IP header."""
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "occurrence=a", "-E", "separator=/t"]
    command += [word for preference in PREFERENCES for word in ("-o", preference)]
    command += ["-d", "udp.port==8472,vxlan"]  # Linux's default, which tshark does not know
    command += [word for field in FIELDS for word in ("-e", field)]
    done = subprocess.run(command, capture_output=True, check=True)
    rows = (line.split("\t") for line in done.stdout.decode(errors="replace").splitlines())
    return {
        int(row[0]): {name: text.split(",") for name, text in zip(FIELDS, row, strict=True)} for row in rows
    }


def said_at(said: dict[str, list[str]], depth: int, field: str) -> str:
    """The value of a field in the packet of that depth; empty where it has none."""
    layer, *_ = field.split(".")
    protocols = said["frame.protocols"][0].split(":")
    starts = [at for at, name in enumerate(protocols) if name in IP_LAYERS]
    end = starts[depth + 1] if depth + 1 < len(starts) else len(protocols)
    if field == "ipv6.fraghdr.ident":
        layer = "ipv6.fraghdr"
    if layer not in protocols[starts[depth] : end]:
        return ""
    before = protocols[: starts[depth]].count(layer)
    values = said[field]
    return values[before] if before < len(values) else ""


def in_fragment(said: dict[str, list[str]], depth: int) -> bool:
    """Whether the carrier of the packet of that depth is a fragment."""
    return said_at(said, depth - 1, "ip.flags.mf") in ("1", "True")


def disagreements(link_type: int, records: list[Record], folder: Path) -> Iterator[tuple[Disagreement, str]]:
    path = folder / f"{link_type}.pcap"
    raw = merge(link_type, records, path)
    options = ReadOptions()
    inner: list[list[Inner]] = []
    decode(raw, options, inner)
    tables = [Inner.concatenate(parts).table for parts in inner]
    rows = [{frame: row for row, frame in enumerate(table.frame.tolist())} for table in tables]
    seen = tshark(path)
    assert len(seen) == len(records)
    for frame, (name, in_file, _, _) in enumerate(records, start=1):
        said = seen[frame]
        protocols = said["frame.protocols"][0]
        expected = min(max(len(layers_of(protocols)) - 1, 0), TUNNEL_DEPTH_LIMIT)
        found = sum(frame in of_depth for of_depth in rows)
        if found != expected:
            yield (name, in_file, "depth"), f"{found} carried packets, not {expected} in {protocols}"
        for depth in range(1, min(found, expected) + 1):
            row = rows[depth - 1][frame]
            for field, value in expected_fields(tables[depth - 1], row, options.book):
                if field == "tcp.len" and in_fragment(said, depth):
                    continue  # tshark counts what is in the fragment, the table what the IP header says
                printed = said_at(said, depth, field)
                same = printed == value if isinstance(value, str) else number(printed) == int(value)
                if not same:
                    yield (
                        (name, in_file, field),
                        f"{value} is not {printed!r} at depth {depth} in {protocols}",
                    )


def test_every_field_of_a_carried_packet_is_what_tshark_prints(tmp_path: Path) -> None:
    found: dict[Disagreement, str] = {}
    for link_type, records in all_records().items():
        found.update(disagreements(link_type, records, tmp_path))
    excused = {(name, frame): fields for _, fields, places in NAMED for name, frame in places}
    assert not {key: text for key, text in found.items() if key[2] not in excused.get(key[:2], ())}
    needed = {
        (name, frame) for reason, _, places in NAMED if "this tshark" not in reason for name, frame in places
    }
    assert not needed - {key[:2] for key in found}
