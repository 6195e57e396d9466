"""One packet as tcpdump prints it: link header, IP header and upper layer, read into numbers.

The grammar is that of tcpdump 4.x and 5.x (print-ip.c, print-ip6.c, print-tcp.c, print-icmp.c, ...), lax: what
is not understood after the addresses costs only itself. This module knows no time, no interface and no state,
and opens nothing. Every pattern is anchored and without nested repetition, so a line costs linear time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton

from nattrace.ingest.text_words import SERVICES, icmp_type_code, icmpv6_type_code, protocol_number
from nattrace.table import DCCP, DONT_FRAGMENT, FRAGMENT_OFFSET, ICMP, ICMPV6, MORE_FRAGMENTS, SCTP, TCP, UDP

#: Endpoints remembered by their text: a busy capture's worth, some 10 MB.
_ENDPOINT_CACHE = 1 << 15
#: Characters of a line in which the IP header must begin: -e with several VLAN tags and MPLS labels is under 300.
_LINK_REACH = 512
#: Places in a line that are tried as the beginning of an IP header; two were needed in all of tcpdump's tests.
_LINK_TRIES = 4
#: Extension headers of one IPv6 packet: as many as decode follows.
_EXTENSIONS = 8

_U32 = 0xFFFFFFFF


@dataclass(slots=True)
class Printed:
    """One printed packet. Numbers are 0 where tcpdump did not print them, None where that has a meaning."""

    version: int = 0
    ttl: int = 0
    ip_id: int = 0
    fragment: int = 0  #: as `PacketTable.fragment`
    ip_length: int = 0
    header_length: int = 0  #: IP header bytes; 0 if options or extension headers make it unknown
    protocol: int | None = None
    frame_length: int = 0  #: -e
    addressed: bool = False  #: the addresses have been read
    src: bytes = b""
    dst: bytes = b""
    src_text: str = ""  #: endpoints as printed: names of a TCP connection
    dst_text: str = ""
    sport: int = 0
    dport: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    seq: int | None = None  #: as printed: may be relative for TCP
    ack: int | None = None
    tcp_flags: int = 0
    window: int = 0
    checksum: int | None = None
    checksum_correct: bool = False
    payload_length: int = 0
    l4_length: int = 0  #: header bytes whose fields the text holds: PacketTable.l4_visible


#: tcpdump's letters (print-tcp.c, tcp_flag_values).
_FLAG_LETTERS = {"F": 1, "S": 2, "R": 4, "P": 8, ".": 16, "U": 32, "E": 64, "W": 128, "e": 256}

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
_ADDRESSES = re.compile(r"(\S{1,300}) > (\S{1,300}):(?: |$)", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,300}\Z", re.ASCII)
_CHECKSUM_NOTE = re.compile(r"\[(?:no cksum|[^\]]{0,100}(?:sum ok|cksum)[^\]]{0,100})\] ?", re.ASCII)
_TCP = re.compile(
    r"Flags \[([^\]]{1,16})\](?:, cksum 0x([0-9a-f]{1,4}) \(([^)]{0,40})\))?(?:, seq (\d{1,10})(?::(\d{1,10}))?)?"
    r"(?:, ack (\d{1,10}))?(?:, win (\d{1,5}))?(?:, urg \d{1,5})?(?:, options \[[^\]]{0,400}\])?"
    r"(?:, length (\d{1,10}))?",
    re.ASCII,
)
#: tcpdump before 4.1 (2010): ``S 123:123(0) ack 7 win 5840``.
_OLD_TCP = re.compile(
    r"([SFRPWEU.]{1,8}) (?:\[[^\]]{0,60}\] ?,? ?)?(?:(\d{1,10}):(\d{1,10})\((\d{1,10})\) )?(?:ack (\d{1,10}) )?win (\d{1,5})",
    re.ASCII,
)
_QUIET_TCP = re.compile(r"tcp (\d{1,10})\b", re.ASCII)
_LENGTH = re.compile(r", length (\d{1,10})", re.ASCII)
_ICMP_QUERY = re.compile(r"[^,]{0,40}?,? ?id (\d{1,5}),? seq (\d{1,5})", re.ASCII)
#: UDP payload length, where tcpdump prints the UDP one: plainly, or at the end of a line of DNS.
_UDP_LENGTH = re.compile(r"UDP, (?:bad length \d{1,10} > \d{1,10}|length:? (\d{1,10}))", re.ASCII)
_DNS_LENGTH = re.compile(r"\((\d{1,5})\)\Z", re.ASCII)
_NTP_LENGTH = re.compile(r"(?:NTPv\d|BOOTP/DHCP), .{0,200}length:? (\d{1,5})\b", re.ASCII)
#: Protocols whose first printed length is that of the IP payload: GRE, ESP, PIM, VRRP.
_LENGTH_PROTOCOLS = frozenset((47, 50, 103, 112))
_DNS_PORTS = frozenset((53, 5353, 5355))
_EXTENSION = re.compile(r"(?:HBH|DSTOPT|RT6|srcrt|frag|AH)\b ?", re.ASCII)
_FRAGMENT6 = re.compile(r"\((?:0x([0-9a-f]{1,8}):)?(\d{1,5})\|(\d{1,5})\)", re.ASCII)
_LATE_PORTS = re.compile(r"(\S{1,40}) > (\S{1,40}): ?", re.ASCII)
_EXTENSION_HEADERS = frozenset((0, 43, 44, 51, 60))
_PORT_PROTOCOLS = frozenset((TCP, UDP, SCTP, DCCP, 136))


def is_arp(text: str) -> bool:
    """Return whether a packet line (without its time) is ARP or RARP."""
    return (
        text.startswith(("ARP, ", "arp "))
        or "ethertype ARP" in text[:300]
        or "ethertype Reverse ARP" in text[:300]
    )


def port_number(text: str) -> int | None:
    """Return the port that tcpdump printed as a number or as a service name."""
    if text.isascii() and text.isdigit():
        return int(text) if len(text) <= 5 and int(text) <= 0xFFFF else None
    return SERVICES.get(text)


@lru_cache(_ENDPOINT_CACHE)
def endpoint(text: str) -> tuple[bytes, int | None] | str:
    """Return (address in network order, port or None) of ``ADDRESS`` or ``ADDRESS.PORT``, or why not.

    The reasons are "name-not-address", "service-name" and "text-unparsed".
    """
    if ":" in text:
        head, _, tail = text.rpartition(".")
        for address, port in ((text, None), (head, tail)):
            try:
                packed = inet_pton(AF_INET6, address)
            except (OSError, ValueError):
                continue
            if port is None:
                return packed, None
            number = port_number(port)
            return (packed, number) if number is not None else "service-name"
        return "text-unparsed"
    parts = text.split(".")
    if len(parts) in (4, 5) and all(part.isdigit() for part in parts[:4]):
        try:
            packed = inet_pton(AF_INET, ".".join(parts[:4]))
        except (OSError, ValueError):
            return "text-unparsed"
        if len(parts) == 4:
            return packed, None
        number = port_number(parts[4])
        return (packed, number) if number is not None else "service-name"
    return "name-not-address" if _HOST_NAME.match(text) else "text-unparsed"


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
        if found == "not-ip":
            found = reason  # the outermost header says what is wrong
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
    match = _ADDRESSES.match(text)
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
    while (note := _CHECKSUM_NOTE.match(rest)) is not None:
        rest = rest[note.end() :]
    return _read_upper(rest, printed, sport, dport)


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


def _read_upper(rest: str, printed: Printed, sport: int | None, dport: int | None) -> str | None:
    if printed.fragment & FRAGMENT_OFFSET:
        return _read_later_fragment(rest, printed)
    if sport is not None and dport is not None:
        printed.sport, printed.dport = sport, dport
        return _read_ported(rest, printed)
    if rest.startswith("ICMP "):
        return _read_icmp(rest[5:], printed, ICMP)
    if rest.startswith("ICMP6, "):
        return _read_icmp(rest[7:], printed, ICMPV6)
    if rest.startswith("[|") and printed.protocol is None:
        return "truncated"
    if printed.protocol is None:
        printed.protocol = _tunnel(rest) if " > " in rest[:_LINK_REACH] else protocol_number(rest)
    if printed.protocol is None:
        return "text-unparsed"
    if printed.protocol in _PORT_PROTOCOLS or printed.protocol in (ICMP, ICMPV6):
        # no ports although the protocol has them: a later fragment whose offset is not printed, or cut off
        return "truncated" if "[|" in rest[:80] else "fragment"
    if printed.ip_length and printed.header_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length)
    elif printed.protocol in _LENGTH_PROTOCOLS and (length := _LENGTH.search(rest)) is not None:
        printed.payload_length = int(length[1]) & _U32
    return None


def _tunnel(rest: str) -> int | None:
    """Return the protocol where addresses follow the addresses: IPv4 4, IPv6 41, or PGM (RFC 3208) 113."""
    inner = _ADDRESSES.match(rest)
    if inner is None:
        return protocol_number(rest)
    if rest.startswith("PGM", inner.end()):
        return 113
    source = endpoint(inner[1])
    return None if isinstance(source, str) else 4 if len(source[0]) == 4 else 41


def _read_later_fragment(rest: str, printed: Printed) -> str | None:
    if printed.protocol is None:
        printed.protocol = protocol_number(rest)
    if printed.protocol is None:
        return "fragment"
    if printed.ip_length and printed.header_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length)
    return None


def _read_ported(rest: str, printed: Printed) -> str | None:
    if rest.startswith("Flags ["):
        return _read_tcp(rest, printed)
    if printed.protocol is None:
        if rest.startswith("[|"):
            return "truncated"
        if (quiet := _QUIET_TCP.match(rest)) is not None:
            printed.protocol = TCP
            printed.payload_length = int(quiet[1]) & _U32
            printed.l4_length = 4
            return None
        if (old := _OLD_TCP.match(rest)) is not None:
            _read_old_tcp(old, printed)
            return None
        word = rest[:5].lower()
        printed.protocol = SCTP if word.startswith("sctp") else DCCP if word.startswith("dccp") else UDP
    if printed.protocol == UDP:
        _read_udp(rest, printed)
    elif printed.protocol == SCTP and printed.ip_length and printed.header_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length - 12)
    printed.l4_length = 8 if printed.protocol == UDP else 4
    return None


def _flags(letters: str) -> int:
    flags = 0
    if letters != "none":
        for letter in letters:
            flags |= _FLAG_LETTERS.get(letter, 0)
    return flags


def _read_tcp(rest: str, printed: Printed) -> str | None:
    match = _TCP.match(rest)
    if match is None:
        return "text-unparsed"
    letters, checksum, verdict, seq, end, ack, window, length = match.groups()
    printed.protocol = TCP
    printed.tcp_flags = _flags(letters)
    printed.seq = None if seq is None else int(seq) & _U32
    printed.ack = None if ack is None else int(ack) & _U32
    printed.window = int(window or 0) & 0xFFFF
    if checksum is not None:
        printed.checksum = int(checksum, 16)
        printed.checksum_correct = verdict == "correct"
    if length is None and (late := _LENGTH.search(rest, match.end(), match.end() + 600)) is not None:
        length = late[1]
    if length is not None:
        printed.payload_length = int(length) & _U32
    elif seq is not None and end is not None:
        printed.payload_length = (int(end) - int(seq)) & _U32
    printed.l4_length = 20 if window is not None else 4
    return None


def _read_old_tcp(match: re.Match[str], printed: Printed) -> None:
    letters, seq, _, length, ack, window = match.groups()
    printed.protocol = TCP
    printed.tcp_flags = _flags(letters.replace(".", "")) | (16 if ack is not None else 0)
    printed.seq = None if seq is None else int(seq) & _U32
    printed.ack = None if ack is None else int(ack) & _U32
    printed.window = int(window) & 0xFFFF
    printed.payload_length = int(length or 0) & _U32
    printed.l4_length = 20


def _read_udp(rest: str, printed: Printed) -> None:
    """Find the UDP payload length: from the IP length if that was printed, else from the words."""
    if printed.ip_length and printed.header_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length - 8)
        return
    length = _UDP_LENGTH.match(rest) or _NTP_LENGTH.match(rest)
    if length is None and (printed.sport in _DNS_PORTS or printed.dport in _DNS_PORTS):
        length = _DNS_LENGTH.search(rest[-8:])
    if length is not None and length[1] is not None:
        printed.payload_length = int(length[1]) & _U32
        if printed.header_length:
            printed.ip_length = printed.header_length + 8 + printed.payload_length


def _read_icmp(rest: str, printed: Printed, protocol: int) -> str | None:
    printed.protocol = protocol
    known = icmp_type_code(rest) if protocol == ICMP else icmpv6_type_code(rest)
    if known is None:
        return "text-unparsed"
    printed.icmp_type, printed.icmp_code = known
    query = printed.icmp_type in ((0, 8, 13, 14) if protocol == ICMP else (128, 129))
    if query:
        match = _ICMP_QUERY.match(rest)
        if match is None:
            return "truncated" if "[|icmp" in rest[:200] else "text-unparsed"
        printed.sport = printed.dport = int(match[1]) & 0xFFFF
        printed.seq = int(match[2]) & 0xFFFF
    lengths = _LENGTH.findall(rest[-400:])
    if lengths:
        whole = int(lengths[-1]) & _U32  # the last one is ICMP's own
        printed.payload_length = max(0, whole - 8)
        if printed.header_length and not printed.ip_length:
            printed.ip_length = printed.header_length + whole
    elif printed.header_length and printed.ip_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length - 8)
    printed.l4_length = 8
    return None
