"""Probes as traceroute, mtr and tcptraceroute send them: raw packets with a chosen TTL, ports, id and payload.

Each probe is often a flow of its own, all probes say the same, and only an error comes back.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from lab.traffic import checksum

if TYPE_CHECKING:
    from lab.topology import Namespace

#: What Linux traceroute fills its packets with (60 bytes in all over IPv4).
TRACEROUTE_PAYLOAD: Final = bytes(range(0x40, 0x60))
#: mtr's filling.
MTR_PAYLOAD: Final = bytes(36)

_UDP, _TCP, _ICMP, _ICMPV6 = (
    socket.IPPROTO_UDP,
    socket.IPPROTO_TCP,
    socket.IPPROTO_ICMP,
    socket.IPPROTO_ICMPV6,
)
_DF, _SYN = 0x4000, 2
#: linux/in6.h; Python's socket module does not have it.
_IPV6_HDRINCL = 36


class Probes:
    """Sends probes of one host to one target, and waits for none of the answers."""

    def __init__(self, host: Namespace, source: str, target: str) -> None:
        self._addresses = ip_address(source).packed, ip_address(target).packed
        self._target, self._v6 = target, ":" in target
        with host.inside():
            family = socket.AF_INET6 if self._v6 else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        if self._v6:
            self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def udp(
        self, ttl: int, sport: int, dport: int, *, df: bool = False, payload: bytes = TRACEROUTE_PAYLOAD
    ) -> None:
        """Send a datagram."""
        upper = struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload
        self._send(_UDP, upper, 6, ttl, df=df)

    def tcp(self, ttl: int, sport: int, dport: int, seq: int, *, df: bool = True) -> None:
        """Send a SYN without options."""
        upper = struct.pack(">HHIIBBHHH", sport, dport, seq, 0, 0x50, _SYN, 5840, 0, 0)
        self._send(_TCP, upper, 16, ttl, df=df)

    def echo(self, ttl: int, id_: int, seq: int, *, df: bool = False, payload: bytes = MTR_PAYLOAD) -> None:
        """Send an echo request."""
        upper = struct.pack(">BBHHH", 128 if self._v6 else 8, 0, 0, id_, seq) + payload
        self._send(_ICMPV6 if self._v6 else _ICMP, upper, 2, ttl, df=df)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, protocol: int, upper: bytes, checksum_at: int, ttl: int, *, df: bool) -> None:
        """Send an upper layer; the kernel gives an IPv4 packet its length, identification and checksum."""
        pseudo = b"".join(self._addresses) + struct.pack(">II", len(upper), protocol)
        total = checksum((b"" if protocol == _ICMP else pseudo) + upper)
        upper = upper[:checksum_at] + struct.pack(">H", total or 0xFFFF) + upper[checksum_at + 2 :]
        if self._v6:
            head = struct.pack(">IHBB", 6 << 28, len(upper), protocol, ttl)
        else:
            head = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, _DF if df else 0, ttl, protocol, 0)
        self._socket.sendto(head + b"".join(self._addresses) + upper, (self._target, 0))
