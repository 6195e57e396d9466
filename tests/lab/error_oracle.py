"""The slow, obvious matcher of ICMP errors: the kernel's entries applied to the raw bytes of each quote.

The quoted packet of an error is one that a conntrack entry describes, so on the other side of the router the quote
has the entry's other tuple, and all other bytes are the same but for checksums. Nothing of nattrace is used.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lab.oracle import PROTOCOL_NAMES, Direction, ExpectedRow, UndecidableError, frames
from lab.truth import Addressing
from lab.unwrap import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lab.truth import Hop

#: Errors of RFC 792 and RFC 4443: all others are queries, answers, or neighbour discovery.
TYPES = {"icmp": (3, 4, 5, 11, 12), "icmpv6": tuple(range(1, 128))}
#: What a translator makes of an ICMP error in ICMPv6 (RFC 7915 section 4.2).
AS_ICMPV6 = {
    (3, 0): (1, 0), (3, 1): (1, 0), (3, 3): (1, 4), (3, 4): (2, 0), (3, 10): (1, 1), (3, 13): (1, 1),
    (11, 0): (3, 0),
}  # fmt: skip
_CHECKSUM_AT = {"tcp": 16, "udp": 6, "icmp": 2, "icmpv6": 2}


@dataclass(frozen=True, slots=True)
class SeenError:
    """One ICMP error at one point, cut into what NAT may change and what it must not."""

    frame: int
    protocol: str
    src: str
    dst: str
    type: int
    code: int
    quoted_protocol: str
    quoted: Addressing
    fixed: tuple[object, ...]  #: IP id, type, code, MTU, and the quote without addresses, ports and checksums
    quoted_ttl: int = 0
    mtu: int = 0  #: of what has one


def is_error(packet: object) -> bool:
    """Say whether a sighting of a report is an ICMP error."""
    return getattr(packet, "type", None) in TYPES.get(getattr(packet, "protocol", ""), ())


def read_errors(path: Path) -> list[SeenError]:
    """Return the ICMP errors of a pcap that quote TCP, UDP or ICMP echo."""
    return [error for errors in read_error_points(path).values() for error in errors]


def read_error_points(path: Path) -> dict[str, list[SeenError]]:
    """Return the same by point, each point of the file with at least an empty list; those in tunnels as well."""
    found: dict[str, list[SeenError]] = {}
    for name, frame, data in frames(path):
        layer: bytes | None = data
        while layer is not None:
            error = _error(frame, layer)
            found.setdefault(name, []).extend([] if error is None else [error])
            layer = unwrapped(layer)
    return found


def _addresses(ip: bytes) -> tuple[str, str]:
    pair = (ip[12:16], ip[16:20]) if ip[0] >> 4 == 4 else (ip[8:24], ip[24:40])
    return str(ipaddress.ip_address(pair[0])), str(ipaddress.ip_address(pair[1]))


def _split(ip: bytes) -> tuple[str | None, bytes, bytes]:
    """Return protocol, header without what NAT changes, and upper layer."""
    if ip[0] >> 4 == 4:
        header = (ip[0] & 15) * 4
        return PROTOCOL_NAMES.get(ip[9]), ip[:10] + ip[20:header], ip[header:]
    return PROTOCOL_NAMES.get(ip[6]), ip[:8], ip[40:]


def _error(frame: int, data: bytes) -> SeenError | None:
    if data[12:14] not in (b"\x08\x00", b"\x86\xdd"):
        return None
    ip = data[14:]
    length = int.from_bytes(ip[2:4], "big") if ip[0] >> 4 == 4 else 40 + int.from_bytes(ip[4:6], "big")
    protocol, _, icmp = _split(ip[:length])
    if protocol not in TYPES or icmp[0] not in TYPES[protocol]:
        return None
    quote = icmp[8:]
    quoted_protocol, fixed_header, upper = _split(quote)
    if quoted_protocol is None:
        return None
    if quoted_protocol in ("icmp", "icmpv6"):
        addressing = Addressing(*_addresses(quote), type=upper[0], id=int.from_bytes(upper[4:6], "big"))
        fixed = bytearray(upper)
        fixed[4:6] = b"\0\0"
    else:
        ports = int.from_bytes(upper[:2], "big"), int.from_bytes(upper[2:4], "big")
        addressing = Addressing(*_addresses(quote), *ports)
        fixed = bytearray(upper)
        fixed[:4] = bytes(4)
    at = _CHECKSUM_AT[quoted_protocol]
    fixed[at : at + 2] = b"\0\0"
    ip_id = ip[4:6] if ip[0] >> 4 == 4 else b""
    rest = (ip_id, icmp[0], icmp[1], icmp[4:8], fixed_header, bytes(fixed))
    ttl = quote[8] if quote[0] >> 4 == 4 else quote[7]
    mtu = int.from_bytes(icmp[4:8], "big")
    return SeenError(
        frame, protocol, *_addresses(ip), icmp[0], icmp[1], quoted_protocol, addressing, rest, ttl, mtu
    )


def expected_errors(hop: Hop, points: Mapping[str, Iterable[SeenError]]) -> set[ExpectedRow]:
    """Return every error about a packet of the hop that neighbouring points show with different quotes.

    Raises UndecidableError where two errors at one point are equal in every byte, and AssertionError where an error
    is not addressed to the host that it quotes.
    """
    rows = set()
    for entry in {(e.protocol, e.original, e.reply): e for e in hop.entries if e.translated}.values():
        # what the quoted packet can have carried, in the order in which NAT made it so
        forth = [entry.original, *entry.halves, entry.reply.inverted()]
        back = [entry.reply, *(half.inverted() for half in entry.halves), entry.original.inverted()]
        # the error goes the other way
        ways: tuple[tuple[Direction, list[Addressing]], ...] = (("reply", forth), ("original", back))
        for direction, states in ways:
            for sightings in _sightings(hop, points, entry.protocol, states):
                # the error meets the translations in the order opposite to that of the packet it quotes
                sightings.sort(key=lambda seen: -states.index(seen[1].quoted))
                if hop.keeps == "version":
                    _check_translated([error for _, error in sightings])
                for (here, first), (there, second) in pairwise(sightings):
                    if first.quoted != second.quoted:
                        rows.add(ExpectedRow(here, first.frame, there, second.frame, direction))
    return rows


def _sightings(
    hop: Hop, points: Mapping[str, Iterable[SeenError]], protocol: str, states: list[Addressing]
) -> list[list[tuple[str, SeenError]]]:
    """Return where each error about an entry's packets was seen, in the order of the hop's points."""
    found: dict[tuple[object, ...], list[tuple[str, SeenError]]] = defaultdict(list)
    for name in hop.chain:
        for error in points.get(name, ()):
            same = error.quoted_protocol == protocol or (error.quoted_protocol, protocol) == (
                "icmp",
                "icmpv6",
            )
            if same and error.quoted in states:
                assert error.dst == error.quoted.src, error
                seen = found[_either(error) if hop.keeps == "version" else error.fixed]
                for there, other in seen:
                    # a point on both sides of the router (hairpin) shows an error twice, with other quotes
                    if there == name and other.quoted == error.quoted:
                        raise UndecidableError(f"{name}: {other} and {error}")
                seen.append((name, error))
    return list(found.values())


def _either(error: SeenError) -> tuple[object, ...]:
    """Return what a translator between IP versions leaves of an error: its meaning, the quote's TTL and upper layer."""
    kind = (error.type, error.code)
    upper = error.fixed[-1]
    assert isinstance(upper, bytes)
    # an echo's type is another one in the other version
    said = upper[1:] if error.quoted_protocol.startswith("icmp") else upper
    return AS_ICMPV6[kind] if error.protocol == "icmp" else kind, error.quoted_ttl, said


def _check_translated(sightings: list[SeenError]) -> None:
    """Check that an MTU allows for the longer header (RFC 7915 section 4.2)."""
    for first, second in pairwise(sightings):
        four, six = (first, second) if first.protocol == "icmp" else (second, first)
        assert (four.type, four.code) != (3, 4) or six.mtu == (four.mtu & 0xFFFF) + 20, (four, six)
