"""One packet as tcpdump prints it: link header, IP header and upper layer, read into numbers.

The grammar is that of tcpdump 4.x and 5.x (print-ip.c, print-ip6.c, print-tcp.c, print-icmp.c, ...), lax: what
is not understood after the addresses costs only itself. This module knows no time, no interface and no state,
and opens nothing. Every pattern is anchored and without nested repetition, so a line costs linear time.
"""

from __future__ import annotations

import re

from nattrace.ingest.text_endpoint import ADDRESSES, endpoint, port_number
from nattrace.ingest.text_packet import Printed
from nattrace.ingest.text_upper import read_upper
from nattrace.table import DONT_FRAGMENT, FRAGMENT_OFFSET, MORE_FRAGMENTS

#: Characters of a line in which the IP header must begin: -e with several VLAN tags and MPLS labels is under 300.
_LINK_REACH = 512
#: Places in a line that are tried as the beginning of an IP header; two were needed in all of tcpdump's tests.
_LINK_TRIES = 4
#: Extension headers of one IPv6 packet: as many as decode follows.
_EXTENSIONS = 8

_U32 = 0xFFFFFFFF


#: Where the IP header begins: behind PPP's or Ethernet's protocol number (-e), behind ``IP``, or ``ip:`` (raw, -e).
_IP_START = re.compile(
    r"IPv?([46])? \((?:0x)?[0-9a-f]{1,4}\), (?:length (\d{1,10}): )?|(?<![^\s:,)\]])IP(6?) |(?<!\S)ip(6?): ",
    re.ASCII,
)
_FRAME_LENGTH = re.compile(r" length (\d{1,10}): ", re.ASCII)
_TRUNCATED_IP = re.compile(r"truncated-ip6? - \d{1,10} bytes missing! ?", re.ASCII)
_V4_HEADER = re.compile(
    r"\(tos 0x[0-9a-f]{1,2}[^ ]{0,10} ?(?:ttl +(\d{1,3}), )?id (\d{1,5}), offset (\d{1,5}), flags \[([^\]]{0,20})\], "
    r"proto:? ?[^(]{0,40}\((\d{1,3})\), length:? (\d{1,5})",
    re.ASCII,
)
_V6_HEADER = re.compile(
    r"\((?:class 0x[0-9a-f]{1,2}, )?(?:flowlabel 0x[0-9a-f]{1,5}, )?(?:hlim (\d{1,3}), )?"
    r"next-header:? [^(]{0,40}\((\d{1,3})\),? (?:payload )?length:? (\d{1,10})\) ?",
    re.ASCII,
)
_EXTENSION = re.compile(r"(?:HBH|DSTOPT|RT6|srcrt|frag|AH)\b ?", re.ASCII)
_FRAGMENT6 = re.compile(r"\((?:0x([0-9a-f]{1,8}):)?(\d{1,5})\|(\d{1,5})\)", re.ASCII)
_LATE_PORTS = re.compile(r"(\S{1,40}) > (\S{1,40}): ?", re.ASCII)
_EXTENSION_HEADERS = frozenset((0, 43, 44, 51, 60))


def is_arp(text: str) -> bool:
    """Return whether a packet line (without its time) is ARP or RARP."""
    return (
        text.startswith(("ARP, ", "arp "))
        or "ethertype ARP" in text[:300]
        or "ethertype Reverse ARP" in text[:300]
    )


def read_packet(text: str) -> Printed | str:
    """Read a packet line without its time and interface; return the packet, or why it is none.

    With -v the addresses stand on the next line: then `Printed.addressed` is False, see `read_addresses`.
    The reasons are those of `endpoint`, and "arp", "not-ip", "truncated" and "fragment".
    """
    if is_arp(text):
        return "arp"
    found = "not-ip"
    for tries, start in enumerate(_IP_START.finditer(text, 0, _LINK_REACH)):
        if tries == _LINK_TRIES:
            break
        printed = Printed()
        # -e prints the frame's length once, in the outermost header
        length = _FRAME_LENGTH.search(text, 0, start.end())
        if length is not None:
            printed.frame_length = int(length[1]) & _U32
        six = "6" in (start[1], start[3], start[4])
        reason = read_ip(text[start.end() :], printed, 6 if six else 4)
        if reason is None:
            return printed
        if text.startswith("(", start.end()) or ADDRESSES.match(text, start.end()) is not None:
            return reason  # the outermost header: what may follow is inside a tunnel
        found = reason
    return found


def read_ip(text: str, printed: Printed, version: int = 4) -> str | None:
    """Read from the IP header on (``(tos ...`` or the addresses); return None, or why that is impossible."""
    printed.version = version
    cut = _TRUNCATED_IP.match(text)
    if cut is not None:
        text = text[cut.end() :]
    if text.startswith("("):
        if (header := _V4_HEADER.match(text)) is not None:
            printed.version = 4
            _read_v4_header(header, printed)
            rest = text[header.end() :]
            printed.header_length = 0 if ", options (" in rest else 20
            # tcpdump before 4.0 printed the addresses on the same line
            single = rest.rpartition(") ")[2] if " > " in rest else ""
            return read_addresses(single, printed) if single else None
        if (header := _V6_HEADER.match(text)) is not None:
            printed.version = 6
            printed.ttl = int(header[1] or 0) & 0xFF
            printed.protocol = int(header[2]) & 0xFF
            payload = int(header[3])
            printed.ip_length = (payload + 40) & _U32 if payload else 0
            printed.header_length = 0 if printed.protocol in _EXTENSION_HEADERS else 40
            return read_addresses(text[header.end() :], printed)
        return "text-unparsed"
    printed.header_length = 20 if version == 4 else 40
    return read_addresses(text, printed)


def _read_v4_header(header: re.Match[str], printed: Printed) -> None:
    printed.ttl = int(header[1] or 0) & 0xFF
    printed.ip_id = int(header[2]) & 0xFFFF
    flags = header[4]
    printed.fragment = (
        (int(header[3]) // 8 & FRAGMENT_OFFSET)
        | (MORE_FRAGMENTS if "+" in flags else 0)
        | (DONT_FRAGMENT if "DF" in flags else 0)
    )
    printed.protocol = int(header[5]) & 0xFF
    printed.ip_length = int(header[6])


def read_addresses(text: str, printed: Printed) -> str | None:
    """Read ``SRC > DST: ...`` into `printed`; return None, or the reason why that is impossible."""
    match = ADDRESSES.match(text)
    if match is None:
        return "truncated" if "[|ip" in text[:100] else "text-unparsed"
    source, target = endpoint(match[1]), endpoint(match[2])
    if isinstance(source, str):
        return source
    if isinstance(target, str):
        return target
    printed.src, sport = source
    printed.dst, dport = target
    if len(printed.src) != len(printed.dst):
        return "text-unparsed"
    printed.version = 4 if len(printed.src) == 4 else 6
    printed.addressed = True
    printed.src_text, printed.dst_text = match[1], match[2]
    rest = text[match.end() :]
    if printed.version == 6:
        upper, sport, dport = _skip_extensions(rest, printed, sport, dport)
        if upper is None:
            return "text-unparsed"
        rest = upper
    return read_upper(rest, printed, sport, dport)


def _skip_extensions(
    rest: str, printed: Printed, sport: int | None, dport: int | None
) -> tuple[str | None, int | None, int | None]:
    """Pass over printed IPv6 extension headers; after them the ports stand alone, ``5645 > 5642: ``.

    Returns what follows (None if a header does not end) and the ports.
    """
    extended = False
    for _ in range(_EXTENSIONS):
        word = _EXTENSION.match(rest)
        if word is None:
            break
        extended = True
        printed.header_length = 0
        rest = rest[word.end() :]
        if word[0].startswith("frag"):
            piece = _FRAGMENT6.match(rest)
            if piece is not None:
                printed.ip_id = int(piece[1] or "0", 16)
                offset = int(piece[2])
                # M is not printed: a first fragment has it (an atomic one, RFC 6946, cannot be told apart)
                printed.fragment = (offset // 8 & FRAGMENT_OFFSET) | (0 if offset else MORE_FRAGMENTS)
                printed.payload_length = int(piece[3])
        while rest.startswith("("):
            closing = _closing(rest)
            if closing < 0:
                return None, None, None
            rest = rest[closing + 1 :].lstrip(" :")
    if extended:
        if printed.protocol in _EXTENSION_HEADERS:
            printed.protocol = None
        ports = _LATE_PORTS.match(rest)
        if ports is not None:
            sport, dport = port_number(ports[1]), port_number(ports[2])
            rest = rest[ports.end() :]
    return rest, sport, dport


def _closing(text: str) -> int:
    """Return the index of the parenthesis that closes the one at text[0], -1 if there is none."""
    depth = 0
    for index, character in enumerate(text[:_LINK_REACH]):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if not depth:
                return index
    return -1
