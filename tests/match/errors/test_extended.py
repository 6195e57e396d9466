"""Errors with extensions (RFC 4884) and with quotes of every size: tshark reads the quotes, and nothing is a fault.

The box between the points rewrites what a NAT has to: the outer header, the addresses and ports of the quote and its
checksum, and the error's own checksum, which is over the extensions as well.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from error_frames import (
    CONTAINER,
    CONTAINER6,
    INTERFACE,
    MPLS,
    PUBLIC,
    PUBLIC6,
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

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

#: Bytes of a quote: IP header and 8 bytes (RFC 792), what RFC 4884 asks for, an error of 576 bytes (RFC 1812 section
#: 4.3.2.3), and one of IPv6's least MTU (RFC 4443 section 2.4).
SIZES = {4: (28, 128, 548), 6: (128, 1232)}
OBJECTS = {"mpls": (MPLS,), "interface": (INTERFACE,), "both": (MPLS, INTERFACE)}


def sent(version: int, protocol: int) -> tuple[Packet, Packet]:
    """A large packet before and after translation."""
    six = version == 6
    before = Packet(
        CONTAINER6 if six else CONTAINER, 40000, SERVER6 if six else SERVER, 33434,
        b"a payload of its own" * 64, protocol=protocol, ttl=1, flags=16,
    )  # fmt: skip
    return before, replace(before, src=PUBLIC6 if six else PUBLIC, sport=61000)


def crossed(points: Points, version: int, quotes: tuple[bytes, bytes], rests: tuple[int, int]) -> None:
    """Let an error come in, with a quote and bytes 4 to 7 outside and inside."""
    six = version == 6
    router, public, container = (ROUTER6, PUBLIC6, CONTAINER6) if six else (ROUTER, PUBLIC, CONTAINER)
    kind = (3, 0) if six else (11, 0)
    points.back(
        error(router, public, quotes[0], kind=kind, rest=rests[0]),
        error(router, container, quotes[1], kind=kind, rest=rests[1], ttl=59),
    )


def analysed(points: Points, folder: Path) -> Report:
    """Check that tshark finds no error's checksum wrong, nor anything malformed, and analyse."""
    paths = points.write(folder)
    if shutil.which("tshark") is not None:
        for path in paths:
            words = ["tshark", "-r", str(path), "-n", "-T", "fields", "-Y", "icmp.type==11 || icmpv6.type==3"]
            words += ["-e", "icmp.checksum.status", "-e", "icmpv6.checksum.status"]
            words += ["-e", "icmp.ext.checksum.status", "-e", "_ws.malformed"]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
            for line in done.stdout.splitlines():
                four, six, extension, malformed = line.split("\t")
                assert (four or six) == "1", (path.name, line)
                assert (extension or "1", malformed) == ("1", ""), (path.name, line)
    return nattrace.analyze(*paths)


def check(report: Report, errors: int = 1) -> None:
    """Every error crossed, as a sighting of one error; nothing is wrong with it."""
    found = [row for row in report.rewrites if row.before.type in (3, 11) and row.before.protocol != "udp"]
    assert [(row.before.point, row.after.point) for row in found] == [("eth0", "docker0")] * errors
    assert not [f for f in report.findings if f.code.startswith("icmp-error")]
    assert report.accounting.unmatched == {}


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize(("version", "size"), [(v, size) for v, sizes in SIZES.items() for size in sizes])
def test_quotes_of_every_size_are_matched(version: int, size: int, protocol: int, tmp_path: Path) -> None:
    points, (before, after) = Points(), sent(version, protocol)
    points.frame()
    points.out(before, after)
    crossed(points, version, (after.ip()[:size], before.ip()[:size]), (0, 0))
    points.frame()

    check(analysed(points, tmp_path))


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("version", [4, 6])
def test_extensions_behind_a_quote_are_no_part_of_it(
    version: int, protocol: int, objects: str, tmp_path: Path
) -> None:
    points, (before, after) = Points(), sent(version, protocol)
    points.frame()
    points.out(before, after)
    rest = extension_length(version)
    quotes = extended(after.ip(), *OBJECTS[objects]), extended(before.ip(), *OBJECTS[objects])
    crossed(points, version, quotes, (rest, rest))
    points.frame()

    check(analysed(points, tmp_path))


@pytest.mark.parametrize("version", [4, 6])
def test_a_box_that_takes_extensions_away_breaks_no_quote(version: int, tmp_path: Path) -> None:
    points, (before, after) = Points(), sent(version, UDP)
    points.frame()
    points.out(before, after)
    quotes = extended(after.ip(), MPLS), before.ip()[:128]
    crossed(points, version, quotes, (extension_length(version), 0))
    points.frame()

    check(analysed(points, tmp_path))


def test_the_zeros_that_fill_up_a_short_quote_are_no_checksum(tmp_path: Path) -> None:
    """A router quotes 28 bytes and fills them up to 128; the NAT leaves the zeros alone, or adjusts them (Linux)."""
    points, (before, after) = Points(), sent(4, TCP)
    before, after = replace(before, payload=b""), replace(after, payload=b"")
    points.frame()
    points.out(before, after)
    rest = extension_length(4)
    quotes = [extended(packet.ip()[:28], MPLS) for packet in (after, before)]
    crossed(points, 4, (quotes[0], quotes[1]), (rest, rest))
    adjusted = quotes[1][:36] + struct.pack(">H", 0xBEEF) + quotes[1][38:]
    points.step(50_000_000)
    crossed(points, 4, (quotes[0], adjusted), (rest, rest))
    points.frame()

    check(analysed(points, tmp_path), errors=2)


def test_pointers_tell_errors_apart(tmp_path: Path) -> None:
    """Two errors that differ in nothing else, seen in the other order inside."""
    points, (before, after) = Points(), sent(4, UDP)
    points.frame()
    points.out(before, after)
    start = points.now_ns
    for place, pointer in enumerate((8, 16)):
        rest = pointer << 24
        outside = error(ROUTER, PUBLIC, after.ip()[:128], kind=(12, 0), rest=rest, ip_id=0)
        inside = error(ROUTER, CONTAINER, before.ip()[:128], kind=(12, 0), rest=rest, ip_id=0, ttl=59)
        points.outside.append((start + place * 4_000, outside))
        points.inside.append((start + 30_000 - place * 4_000, inside))
    points.step()
    points.frame()
    report = analysed(points, tmp_path)

    order = [(row.before.frame, row.after.frame) for row in report.rewrites if row.before.type == 12]
    assert sorted(order) == [(4, 5), (5, 4)]
