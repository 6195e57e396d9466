"""ICMP errors that did not do their work: translated by halves, broken, or lost; and what they say of the path.

A host looks up the packet that an error quotes among its own connections. When a translator rewrote only the outer
header, or only the quote, or dropped the error, the host never learns: path MTU discovery then stalls, and refused
connections time out (RFC 5508 section 7, RFC 2923). This module reads what was matched; it matches nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.icmp import FRAGMENTATION_NEEDED, PACKET_TOO_BIG, error_name
from nattrace.match.errors.icmp_errors import (
    BROKEN,
    NO_FAULT,
    OUTER_UNTRANSLATED,
    QUOTE_UNTRANSLATED,
    UNTRANSLATED,
)
from nattrace.model import Finding, PacketRef
from nattrace.nat.icmp_errors import mtu_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.nat.icmp_errors import ErrorOutcome
    from nattrace.nat.paths import Hops
    from nattrace.table import AddressBook, PacketTable

#: Flows and packets listed in one finding.
MAX_LISTED: Final = 100

_HOW: Final = {
    UNTRANSLATED: "left as they were, outside and in the quote",
    OUTER_UNTRANSLATED: "with the quote translated and the outer header not",
    QUOTE_UNTRANSLATED: "with the outer header translated and the quote not",
}
_IGNORED = "the host that gets them finds no connection of its own in the quote and ignores them"
_TRANSLATOR: Final = (
    "look at the translator between the two points: it has to rewrite an ICMP error's quote together with the "
    "outer header (RFC 5508 section 7). Linux does, unless its rules keep the errors from connection tracking "
    "(notrack) or the connection's entry is gone"
)
_LOST_ADVICE: Final = (
    "look for rules that drop ICMP between the two points, as firewalls that block all ICMP do (RFC 4890); what "
    "belongs to a connection passes with: -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
)
#: What routers say of packets that ran out of hops, as those of traceroute do on purpose.
_EXPIRED: Final = {error_name(4, 11, 0), error_name(6, 3, 0)}
_REFUSED: Final = (
    "look at the host that sent them: it has no route, no neighbour that answers, nobody who listens on that port, or "
    "a rule with -j REJECT"
)
#: Senders of errors named in one finding.
_SENDERS: Final = 4


@dataclass(slots=True)
class _Group:
    """Errors that one finding speaks of; sets because an error may be noted from several sides."""

    packets: list[PacketRef] = field(default_factory=list)
    flows: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    example: str = ""

    def add(self, packet: PacketRef, flow: int, name: str) -> bool:
        """Note an error; return whether it is the first."""
        self.packets.append(packet)
        self.flows.add(flow)
        self.names.add(name)
        return len(self.packets) == 1

    def finding(self, code: str, severity: str, message: str, advice: str | None) -> Finding:
        """Make the finding."""
        return Finding(
            code=code,
            severity=severity,  # type: ignore[arg-type]
            message=message,
            flows=tuple(sorted(flow for flow in self.flows if flow > 0)[:MAX_LISTED]),
            packets=tuple(sorted(self.packets, key=lambda p: (p.point, p.frame))[:MAX_LISTED]),
            advice=advice,
        )


def icmp_error_findings(
    outcome: ErrorOutcome, hops: Hops, names: Sequence[str], book: AddressBook
) -> list[Finding]:
    """Return the findings about ICMP errors, the most severe first.

    ``icmp-error-quote-untranslated``: outer header and quote do not show the same side of the translation.
    ``icmp-error-quote-broken``: the quote changed in what NAT leaves alone. ``icmp-error-lost``: it reached
    one point and provably not the next; ``icmp-error-not-seen`` where the next point's filter may have left
    it out. ``path-mtu``: a router said how large packets may be, and the word arrived. ``icmp-answered``:
    errors say what became of packets that were found at one point only. ``icmp-quotes-missing``: they would,
    if the capture held what they quote.
    """
    faults: dict[tuple[str, str, int], _Group] = defaultdict(_Group)
    mtus: dict[tuple[str, str, int], _Group] = defaultdict(_Group)
    for crossed in outcome.crossed:
        i, j = crossed.points
        first_is_a = crossed.reply == hops.reverse[crossed.hop]
        mtu = mtu_of(outcome.errors[i], crossed.a)
        # all that is ordinary is passed over without a step of Python for each error
        for k in np.flatnonzero((crossed.fault != NO_FAULT) | (mtu >= 0)).tolist():
            (before, row), (after, other) = (i, int(crossed.a[k])), (j, int(crossed.b[k]))
            if not first_is_a[k]:
                (before, row), (after, other) = (after, other), (before, row)
            errors, packets = outcome.errors[after], outcome.errors[after].packets
            packet = PacketRef(names[after], int(packets.frame[other]))
            flow = int(outcome.conversation[after][other]) + 1
            fault = int(crossed.fault[k])
            way = (names[before], names[after])
            if fault != NO_FAULT:
                group = faults[*way, fault]
                if group.add(packet, flow, _name(packets, other)):
                    group.example = _example(names[after], errors, other, book)
            else:
                mtus[*way, int(mtu[k])].add(packet, flow, _name(packets, other))
    lost: dict[tuple[str, str, bool], _Group] = defaultdict(_Group)
    for missing in outcome.missing:
        packets = outcome.errors[missing.point].packets
        group = lost[names[missing.point], names[missing.other], missing.proven]
        for row, owner in zip(missing.row.tolist(), missing.conversation.tolist(), strict=True):
            packet = PacketRef(names[missing.point], int(packets.frame[row]))
            group.add(packet, owner + 1, _name(packets, row))
    told = [*_faults(faults), *_lost(lost), *_path_mtus(mtus), *_answered(outcome, names, book)]
    return [*told, *_unread(outcome, names)]


def _faults(groups: Mapping[tuple[str, str, int], _Group]) -> list[Finding]:
    found = []
    for (before, after, fault), group in sorted(groups.items()):
        count, way = _count(group), f"{_printable(before)} -> {_printable(after)}"
        if fault == BROKEN:
            message = (
                f"{count} crossed {way} with a quote that changed in what NAT leaves alone (IP id, length, sequence "
                f"number or checksum); {group.example}. {_IGNORED[0].upper()}{_IGNORED[1:]}, or takes them for forged"
            )
            found.append(group.finding("icmp-error-quote-broken", "warning", message, _TRANSLATOR))
        else:
            message = f"{count} crossed {way} {_HOW[fault]}: {group.example}; {_IGNORED}"
            found.append(group.finding("icmp-error-quote-untranslated", "warning", message, _TRANSLATOR))
    return found


def _lost(groups: Mapping[tuple[str, str, bool], _Group]) -> list[Finding]:
    found = []
    for (point, other, proven), group in sorted(groups.items()):
        too_big = {error_name(4, *FRAGMENTATION_NEEDED), error_name(6, *PACKET_TOO_BIG)} & group.names
        hole = "go on being dropped (path MTU black hole)"
        message = f"{_count(group)} reached {_printable(point)} and never {_printable(other)}"
        if proven:
            message += ", so the host that they are about does not learn of it"
            message += f": its large packets {hole}" if too_big else ""
            found.append(group.finding("icmp-error-lost", "warning", message, _LOST_ADVICE))
        else:
            message += (
                ", which shows no ICMP at all: dropped in between, or left out by that capture's filter"
            )
            message += f". If they were dropped, large packets {hole}" if too_big else ""
            found.append(group.finding("icmp-error-not-seen", "info", message, _LOST_ADVICE))
    return found


def _path_mtus(groups: Mapping[tuple[str, str, int], _Group]) -> list[Finding]:
    return [
        group.finding(
            "path-mtu",
            "info",
            f"{_count(group)} crossed {_printable(before)} -> {_printable(after)}: packets of more than {mtu} bytes do "
            "not fit on the way",
            None,
        )
        for (before, after, mtu), group in sorted(groups.items())
    ]


def _answered(outcome: ErrorOutcome, names: Sequence[str], book: AddressBook) -> list[Finding]:
    groups: dict[str, _Group] = defaultdict(_Group)
    senders: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for layer, answering in sorted(outcome.answering.items()):
        packets, name = outcome.errors[layer].packets, names[layer]
        for row in answering[outcome.reason[layer][answering] != 0].tolist():
            what = _name(packets, row)
            groups[name].add(
                PacketRef(name, int(packets.frame[row])), int(outcome.conversation[layer][row]) + 1, what
            )
            senders[name][book.text(int(packets.version[row]), int(packets.src[row])), what] += 1
    found = []
    for name, group in sorted(groups.items()):
        told = senders[name].most_common(_SENDERS)
        words = [f"{sender} said {what} to {count}" for (sender, what), count in told]
        more = len(senders[name]) - len(told)
        words += [f"{more} more did so"] * (more > 0)
        count = len(group.packets)
        seen = f"{count} packets were" if count > 1 else "1 packet was"
        message = f"{seen} seen at {_printable(name)} and found nowhere else, and ICMP errors answered: "
        message += ", ".join(words)
        found.append(
            group.finding("icmp-answered", "info", message, _REFUSED if group.names - _EXPIRED else None)
        )
    return found


def _unread(outcome: ErrorOutcome, names: Sequence[str]) -> list[Finding]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for layer, (errors, packets) in outcome.unread.items():
        counts[names[layer]]["errors"] = max(counts[names[layer]]["errors"], errors)
        counts[names[layer]]["packets"] += packets
    return [
        Finding(
            code="icmp-quotes-missing",
            severity="info",
            message=f"{_printable(name)} does not hold what {count['errors']} of its ICMP errors quote: {count['packets']} "
            "packets that were found nowhere else may be what they are about, or lost",
            advice="capture 128 bytes of each packet or more (tcpdump -s 128), and give the capture itself rather than "
            "its text (or the text of tcpdump -v)",
        )
        for name, count in sorted(counts.items())
        if count["errors"]
    ]


def _count(group: _Group) -> str:
    """Return how many errors of which names: ``2 ICMP errors (port-unreachable, ttl-exceeded)``."""
    size = len(group.packets)
    return f"{size} ICMP error{'s' if size > 1 else ''} ({', '.join(sorted(group.names))})"


def _name(packets: PacketTable, row: int) -> str:
    return error_name(int(packets.version[row]), int(packets.icmp_type[row]), int(packets.icmp_code[row]))


def _example(point: str, errors: Errors, row: int, book: AddressBook) -> str:
    packets, quoted = errors.packets, errors.quoted
    version = int(packets.version[row])
    addresses = [
        book.text(version, int(table_column[row])) for table_column in (packets.dst, quoted.src, quoted.dst)
    ]
    ports = (int(quoted.sport[row]), int(quoted.dport[row]))
    source, target = (
        (f"[{a}]:{p}" if version == 6 else f"{a}:{p}") if p else a
        for a, p in zip(addresses[1:], ports, strict=True)
    )
    return (
        f"{_printable(point)}:{int(packets.frame[row])} goes to {addresses[0]} and quotes {source} > {target}"
    )


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)
