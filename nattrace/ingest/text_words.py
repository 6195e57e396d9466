"""The words tcpdump prints where a packet has numbers: services, IP protocols, ICMP messages.

Fixed tables: nothing here asks the machine (/etc/services, a resolver), because the same text must give
the same packets everywhere. A word that is not listed is unknown, never guessed.
"""

from __future__ import annotations

import re

from nattrace.table import DCCP, ICMP, ICMPV6, SCTP, TCP, UDP

#: Names that tcpdump without -n prints for ports (IANA service names and Debian's /etc/services).
#: Port 514 is ``shell`` over TCP and ``syslog`` over UDP; both names are listed, so both come back as 514.
SERVICES: dict[str, int] = {
    "echo": 7, "discard": 9, "daytime": 13, "chargen": 19, "ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23,
    "smtp": 25, "time": 37, "whois": 43, "tacacs": 49, "domain": 53, "bootps": 67, "bootpc": 68, "tftp": 69,
    "gopher": 70, "finger": 79, "http": 80, "www": 80, "kerberos": 88, "pop3": 110, "sunrpc": 111, "ntp": 123,
    "epmap": 135, "netbios-ns": 137, "netbios-dgm": 138, "netbios-ssn": 139, "imap": 143, "imap2": 143,
    "snmp": 161, "snmp-trap": 162, "snmptrap": 162, "bgp": 179, "ldap": 389, "https": 443, "microsoft-ds": 445,
    "kpasswd": 464, "submissions": 465, "isakmp": 500, "exec": 512, "login": 513, "shell": 514, "syslog": 514,
    "printer": 515, "route": 520, "ripng": 521, "dhcpv6-client": 546, "dhcpv6-server": 547, "rtsp": 554,
    "nntp": 119, "nntps": 563, "submission": 587, "ipp": 631, "ldaps": 636, "domain-s": 853, "rsync": 873,
    "ftps-data": 989, "ftps": 990, "telnets": 992, "imaps": 993, "pop3s": 995, "socks": 1080, "openvpn": 1194,
    "ms-sql-s": 1433, "ms-sql-m": 1434, "l2f": 1701, "radius": 1812, "radius-acct": 1813, "pptp": 1723,
    "mqtt": 1883, "nfs": 2049, "gtp-control": 2123, "gtp-user": 2152, "mysql": 3306, "ms-wbt-server": 3389,
    "svn": 3690, "epmd": 4369, "ipsec-nat-t": 4500, "vxlan": 4789, "sip": 5060, "sip-tls": 5061,
    "xmpp-client": 5222, "xmpp-server": 5269, "mdns": 5353, "postgresql": 5432, "amqps": 5671, "amqp": 5672,
    "x11": 6000, "redis": 6379, "ircd": 6667, "http-alt": 8080, "webcache": 8080, "mqtts": 8883,
    "secure-mqtt": 8883, "git": 9418, "zabbix-agent": 10050, "zabbix-trapper": 10051, "memcached": 11211,
}  # fmt: skip

#: First word of what tcpdump prints for an IP protocol without ports, to its number (IANA protocol numbers).
_PROTOCOLS: dict[str, int] = {
    "igmp": 2, "IP": 4, "tcp": TCP, "igrp": 9, "udp": UDP, "icmp": ICMP, "dccp": DCCP, "IP6": 41, "RSVPv1": 46,
    "GREv0": 47, "GREv1": 47, "gre": 47, "ipv6-icmp": ICMPV6, "EIGRP": 88, "OSPFv2": 89, "OSPFv3": 89,
    "PIMv1": 103, "PIMv2": 103, "mobility": 135, "VRRPv2": 112, "VRRPv3": 112, "CARPv2": 112, "sctp": SCTP,
}  # fmt: skip
_PROTOCOL_NUMBER = re.compile(r"ip-proto-(\d{1,3})\b", re.ASCII)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,15}", re.ASCII)


def protocol_number(words: str) -> int | None:
    """Return the IP protocol that `words`, printed after the addresses of a packet without ports, speak of."""
    if words.startswith("ip-proto-"):
        numbered = _PROTOCOL_NUMBER.match(words)
        return int(numbered[1]) & 0xFF if numbered else None
    if words.startswith("ESP("):
        return 50
    if words.startswith("AH("):
        return 51
    if words.startswith("IPComp("):
        return 108
    word = _WORD.match(words)
    return _PROTOCOLS.get(word[0]) if word else None


_ICMP_NUMBER = re.compile(r"type-#(\d{1,3})\b", re.ASCII)

#: What follows "ICMP " (print-icmp.c). Information and address mask messages (types 15 to 18) have an id that
#: tcpdump does not print: they stay unknown.
_ICMP_STARTS: tuple[tuple[str, int, int], ...] = (
    ("echo reply", 0, 0), ("source quench", 4, 0), ("echo request", 8, 0), ("router advertisement", 9, 0),
    ("router solicitation", 10, 0), ("time exceeded in-transit", 11, 0), ("ip reassembly time exceeded", 11, 1),
    ("parameter problem", 12, 0), ("time stamp query", 13, 0), ("time stamp reply", 14, 0),
)  # fmt: skip
#: What an ICMP unreachable ends with, and its code (RFC 792, RFC 1812 section 5.2.7.1); the first hit counts.
_UNREACHABLE_ENDS: tuple[tuple[str, int], ...] = (
    ("unreachable - need to frag", 4), ("unreachable - source route failed", 5), ("- source host isolated", 8),
    ("unreachable - admin prohibited filter", 13), ("- host precedence violation", 14),
    ("- precedence cutoff", 15),
)  # fmt: skip
#: Codes of unreachables that name a network or a host: plain, unknown, admin prohibited, tos prohibited.
_UNREACHABLE_KINDS = {"net": (0, 6, 9, 11), "host": (1, 7, 10, 12)}


def icmp_type_code(words: str) -> tuple[int, int] | None:
    """Return ICMP type and code (RFC 792) of what tcpdump prints after ``ICMP ``, None if it is unknown."""
    for start, kind, code in _ICMP_STARTS:
        if words.startswith(start):
            return kind, code
    if words.startswith("redirect"):
        return 5, (2 if words.startswith("redirect-tos") else 0) + (" to host " in words)
    if " unreachable" in words or "- source host isolated" in words:
        for end, code in _UNREACHABLE_ENDS:
            if end in words:
                return 3, code
        if " port " in words:
            return 3, 3
        if " protocol " in words:
            return 3, 2
        codes = _UNREACHABLE_KINDS.get(words.split(" ", 1)[0])
        if codes is None:
            return None
        kinds = ("- unknown", "- admin prohibited", "- tos prohibited")
        return 3, next((codes[i] for i, kind in enumerate(kinds, 1) if kind in words), codes[0])
    if "protocol" in words and "unreachable" in words:
        return 3, 2
    numbered = _ICMP_NUMBER.match(words)
    return (int(numbered[1]) & 0xFF, 0) if numbered else None


#: What follows "ICMP6, " (print-icmp6.c); the first hit counts.
_ICMPV6_STARTS: tuple[tuple[str, int, int], ...] = (
    ("echo request", 128, 0), ("echo reply", 129, 0),
    ("destination unreachable, unreachable route", 1, 0),
    ("destination unreachable,  unreachable prohibited", 1, 1), ("destination unreachable, unreachable prohibited", 1, 1),
    ("destination unreachable, beyond scope", 1, 2),
    ("destination unreachable, unreachable address", 1, 3),
    ("destination unreachable, unreachable port", 1, 4),
    ("destination unreachable", 1, 0), ("packet too big", 2, 0),
    ("time exceeded in-transit (reassembly)", 3, 1), ("time exceeded in-transit", 3, 0),
    ("ip reassembly time exceeded", 3, 1), ("parameter problem, next header", 4, 1),
    ("parameter problem, option", 4, 2), ("parameter problem", 4, 0),
    ("multicast listener query", 130, 0), ("multicast listener report v2", 143, 0),
    ("multicast listener report", 131, 0), ("multicast listener done", 132, 0),
    ("router solicitation", 133, 0), ("router advertisement", 134, 0), ("neighbor solicitation", 135, 0),
    ("neighbor advertisement", 136, 0), ("redirect", 137, 0), ("router renumbering", 138, 0),
)  # fmt: skip
_ICMPV6_NUMBER = re.compile(r"unknown icmp6 type \((\d{1,3})\)", re.ASCII)


def icmpv6_type_code(words: str) -> tuple[int, int] | None:
    """Return ICMPv6 type and code (RFC 4443) of what tcpdump prints after ``ICMP6, ``, None if unknown."""
    for start, kind, code in _ICMPV6_STARTS:
        if words.startswith(start):
            return kind, code
    numbered = _ICMPV6_NUMBER.match(words)
    return (int(numbered[1]) & 0xFF, 0) if numbered else None
