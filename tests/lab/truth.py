"""What the kernel did, read from what ``conntrack -E -o timestamp,extended,id`` and ``-L`` print.

This parser is written from conntrack-tools' own output (src/conntrack.c, libnetfilter_conntrack
snprintf_default.c) and shares nothing with nattrace's, so that the two can disagree.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: conntrack's words for protocols that nattrace names alike.
PROTOCOLS = ("icmp", "icmpv6", "tcp", "udp", "udplite", "sctp", "dccp")

#: ICMP echo request and reply types, each with its answer (RFC 792, RFC 4443).
ANSWERING_TYPE = {8: 0, 0: 8, 128: 129, 129: 128}

_LINE = re.compile(
    r"^(?:\[(?P<time>\d+\.\d+)\s*\]\s*)?(?:\[(?P<event>NEW|UPDATE|DESTROY)\]\s*)?"
    r"ipv[46]\s+\d+\s+(?P<protocol>\w+)\s+\d+\s"
)
_FIELD = re.compile(r"\b([a-z-]+)=(\S+)")


@dataclass(frozen=True, slots=True, order=True)
class Addressing:
    """Addresses and ports of one direction; for ICMP the type and the id instead of ports."""

    src: str
    dst: str
    sport: int = -1
    dport: int = -1
    type: int = -1
    id: int = -1

    def inverted(self) -> Addressing:
        """Return what an answer to this carries."""
        kind = ANSWERING_TYPE.get(self.type, -1)
        return Addressing(self.dst, self.src, self.dport, self.sport, kind, self.id)


@dataclass(frozen=True, slots=True)
class Entry:
    """One conntrack entry, as the kernel made it. Times are ns since the epoch, None where not seen."""

    protocol: str
    original: Addressing
    reply: Addressing
    start_ns: int | None = None
    end_ns: int | None = None

    @property
    def translated(self) -> bool:
        """Whether NAT changed anything."""
        return self.reply != self.original.inverted()

    @property
    def halves(self) -> tuple[Addressing, ...]:
        """What a packet can carry after DNAT and before SNAT; nothing where NAT changes one end only.

        SNAT decides an ICMP id, so a flow's first packet carries the old one between the two; later ones
        carry the new one, because DNAT's part writes the final tuple's id as well (icmp_manip_pkt).
        """
        first, after = self.original, self.reply.inverted()
        found = {
            Addressing(first.src, after.dst, first.sport, after.dport, first.type, each.id)
            for each in (first, after)
        } - {first, after}
        # an id alone is no second end
        ends = (first.src, first.sport) != (after.src, after.sport)
        return tuple(sorted(found)) if ends and (first.dst, first.dport) != (after.dst, after.dport) else ()


@dataclass(frozen=True, slots=True)
class Hop:
    """One NAT box between two points: `inner` towards the containers, `outer` towards the internet."""

    inner: str
    outer: str
    conntrack: (
        str  #: file with what conntrack printed; empty for a stateless box, whose configuration says all
    )
    entries: tuple[Entry, ...]
    keeps: str = "all"  #: what of a packet the box leaves alone, see `oracle.KEPT`
    via: tuple[str, ...] = ()  #: further points of the same host between the two, in order from `inner`
    repeats: bool = (
        False  #: whether a point shows one packet several times unchanged; the first is then meant
    )

    @property
    def chain(self) -> tuple[str, ...]:
        """All points of the hop, from the inside to the outside; one that is on both sides stands once."""
        return tuple(dict.fromkeys((self.inner, *self.via, self.outer)))


@dataclass(frozen=True, slots=True)
class Truth:
    """What the kernel says about one recording."""

    hops: tuple[Hop, ...]
    dropped: int = 0  #: packets that the lab dropped inside a router, by the rule's own counter
    unique_payloads: bool = False  #: whether every data packet carries a token of its own
    partial: bool = False  #: whether the points were not captured for the same time
    tied: bool = (
        False  #: whether packets are alike in all that NAT keeps, so that ambiguous is an honest answer
    )
    resized: bool = False  #: whether packets have other sizes on the other side of a hop

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read what `save` wrote."""
        data: dict[str, Any] = json.loads(path.read_text())
        data["hops"] = tuple(
            Hop(
                **{
                    **hop,
                    "entries": tuple(_entry(each) for each in hop["entries"]),
                    "via": tuple(hop.get("via", ())),
                }
            )
            for hop in data["hops"]
        )
        return cls(**data)


def _entry(data: dict[str, Any]) -> Entry:
    both = {side: Addressing(**data[side]) for side in ("original", "reply")}
    return Entry(**{**data, **both})


def parse_conntrack(text: str) -> list[Entry]:
    """Return every entry that conntrack printed, events and list alike, in order of first sight.

    Updates of one entry are one entry; the same tuples under a new conntrack id are a new one. Raises
    ValueError on a line that looks like an entry and cannot be read.
    """
    found: dict[tuple[Any, ...], Entry] = {}
    for line in text.splitlines():
        head = _LINE.match(line)
        if head is None or head["protocol"] not in PROTOCOLS:
            continue
        original, reply, conntrack_id = _tuples(line)
        key = (head["protocol"], original, reply, conntrack_id)
        time_ns = _nanoseconds(head["time"]) if head["time"] else None
        known = found.get(key)
        start = known.start_ns if known else time_ns if head["event"] == "NEW" else None
        end = time_ns if head["event"] == "DESTROY" else None
        found[key] = Entry(head["protocol"], original, reply, start, end)
    return list(found.values())


def _tuples(line: str) -> tuple[Addressing, Addressing, int]:
    """Split the fields of a line at each ``src=``; an ``id=`` after the second full tuple is conntrack's own."""
    sides: list[dict[str, str]] = []
    conntrack_id = 0
    for name, value in _FIELD.findall(line):
        if name == "src":
            sides.append({})
        if not sides:
            continue
        if name == "id" and ("sport" in sides[-1] or "id" in sides[-1]):
            conntrack_id = int(value)
        elif name in ("src", "dst", "sport", "dport", "type", "id"):
            sides[-1][name] = value
    if len(sides) != 2:
        raise ValueError(f"not two tuples: {line}")
    first, second = (
        Addressing(
            str(ipaddress.ip_address(side["src"])),
            str(ipaddress.ip_address(side["dst"])),
            *(int(side.get(name, -1)) for name in ("sport", "dport", "type", "id")),
        )
        for side in sides
    )
    return first, second, conntrack_id


def _nanoseconds(seconds: str) -> int:
    whole, fraction = seconds.split(".")
    return int(whole) * 10**9 + int(fraction.ljust(9, "0")[:9])


def translations(entries: Iterable[Entry]) -> set[tuple[str, Addressing, Addressing]]:
    """Return the bindings that NAT changed, without their times."""
    return {(each.protocol, each.original, each.reply) for each in entries if each.translated}
