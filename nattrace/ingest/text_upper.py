"""What tcpdump prints after the addresses: TCP, UDP, ICMP and whatever else, read into numbers.

Lax: what is not understood costs only itself. This module knows no lines, no state and no names of hosts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nattrace.ingest.text_endpoint import ADDRESSES, endpoint
from nattrace.ingest.text_words import icmp_type_code, icmpv6_type_code, protocol_number
from nattrace.table import DCCP, FRAGMENT_OFFSET, ICMP, ICMPV6, SCTP, TCP, UDP

if TYPE_CHECKING:
    from nattrace.ingest.text_packet import Printed

_U32 = 0xFFFFFFFF

#: tcpdump's letters (print-tcp.c, tcp_flag_values).
_FLAG_LETTERS = {"F": 1, "S": 2, "R": 4, "P": 8, ".": 16, "U": 32, "E": 64, "W": 128, "e": 256}
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
_MTU = re.compile(r"\bmtu (\d{1,10})\b", re.ASCII)
_ICMP_QUERY = re.compile(r"[^,]{0,40}?,? ?id (\d{1,5}),? seq (\d{1,5})", re.ASCII)
#: UDP payload length, where tcpdump prints the UDP one: plainly, or at the end of a line of DNS.
_UDP_LENGTH = re.compile(r"UDP, (?:bad length \d{1,10} > \d{1,10}|length:? (\d{1,10}))", re.ASCII)
_DNS_LENGTH = re.compile(r"\((\d{1,5})\)\Z", re.ASCII)
_NTP_LENGTH = re.compile(r"(?:NTPv\d|BOOTP/DHCP), .{0,200}length:? (\d{1,5})\b", re.ASCII)
#: Protocols whose first printed length is that of the IP payload: GRE, ESP, PIM, VRRP.
_LENGTH_PROTOCOLS = frozenset((47, 50, 103, 112))
_NUMBERED_LENGTH = re.compile(r"ip-proto-\d{1,3} (\d{1,10})\b", re.ASCII)
_DNS_PORTS = frozenset((53, 5353, 5355))
_PORT_PROTOCOLS = frozenset((TCP, UDP, SCTP, DCCP, 136))
_CHECKSUM_NOTE = re.compile(r"\[(?:no cksum|[^\]]{0,100}(?:sum ok|cksum)[^\]]{0,100})\] ?", re.ASCII)


def read_upper(rest: str, printed: Printed, sport: int | None, dport: int | None) -> str | None:
    """Read what follows the addresses into `printed`; return None, or why the packet cannot be used.

    `sport` and `dport` are the ports that stood with the addresses, None where there were none. The reasons are
    "text-unparsed", "truncated" and "fragment" (a later fragment whose offset is not printed).
    """
    rest = rest.lstrip()
    note = _CHECKSUM_NOTE.match(rest)
    if note is not None:
        rest = rest[note.end() :]
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
        printed.protocol = _tunnel(rest) if " > " in rest[:600] else protocol_number(rest)
    if printed.protocol is None:
        return "text-unparsed"
    if printed.protocol in _PORT_PROTOCOLS or printed.protocol in (ICMP, ICMPV6):
        # no ports although the protocol has them: a later fragment whose offset is not printed, or cut off
        return "truncated" if "[|" in rest[:80] else "fragment"
    if printed.ip_length and printed.header_length:
        printed.payload_length = max(0, printed.ip_length - printed.header_length)
    elif (length := _NUMBERED_LENGTH.match(rest)) is not None or (
        printed.protocol in _LENGTH_PROTOCOLS and (length := _LENGTH.search(rest)) is not None
    ):
        printed.payload_length = int(length[1]) & _U32
    return None


def _tunnel(rest: str) -> int | None:
    """Return the protocol where addresses follow the addresses: IPv4 4, IPv6 41, or PGM (RFC 3208) 113."""
    inner = ADDRESSES.match(rest)
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
    if (mtu := _MTU.search(rest)) is not None:
        printed.mtu = int(mtu[1]) & _U32
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
