"""Tunnels: where packets that packets carry begin, for all datagrams of a block at once.

Looks only where an IP protocol number or a UDP port says so, checks the tunnel header (`tunnel_headers`) and
demands a plausible IP header behind it, for a UDP port alone is weak evidence. Encrypted tunnels (ESP,
WireGuard, TLS) stay what they are on the wire. Nothing here reads addresses or ports of what is carried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.encapsulation import FOUR_IN_SIX, IPIP, SIX_IN_FOUR, SIX_IN_SIX, encapsulation
from nattrace.ingest.gather import gather_bytes
from nattrace.ingest.link import Frames, find_ip_after
from nattrace.ingest.tunnel_headers import (
    NO_HEADER,
    Found,
    Payloads,
    read_geneve,
    read_gre,
    read_gtp,
    read_l2tp,
    read_teredo,
    read_vxlan,
)
from nattrace.table import FRAGMENT_OFFSET, MORE_FRAGMENTS, UDP

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nattrace.ingest.ip import Datagrams

#: Packets in packets in one frame. Overlay in a provider's tunnel in a lab's is three; what nests deeper is
#: an attack on the reader (RFC 2473 section 6.7 limits nesting to 4 by default).
TUNNEL_DEPTH_LIMIT: Final = 4

_IPV4_IN_IP, _IPV6_IN_IP, _GRE_PROTOCOL = 4, 41, 47
_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = 0x0800, 0x86DD

#: By protocol number: whether rows may carry packets.
_NOT, _IN_IP, _IN_GRE, _IN_UDP = range(4)
_CARRIER = np.zeros(256, np.uint8)
_CARRIER[[_IPV4_IN_IP, _IPV6_IN_IP]] = _IN_IP
_CARRIER[_GRE_PROTOCOL] = _IN_GRE
_CARRIER[UDP] = _IN_UDP

#: UDP ports (IANA; 8472 is Linux's VXLAN port from before there was one) and who reads what goes there.
_UDP_READERS: Final[dict[int, Callable[[Payloads, NDArray[np.uint8]], Found]]] = {
    4789: read_vxlan,
    4790: read_vxlan,
    8472: read_vxlan,
    6081: read_geneve,
    4754: read_gre,
    2152: read_gtp,
    1701: read_l2tp,
    3544: read_teredo,
}
#: Where answers come from such a port and go to any: the others send to it in both directions.
_ANSWERED_FROM: Final = frozenset({2152, 1701, 3544})
_TO_PORT = np.zeros(65536, np.bool_)
_TO_PORT[list(_UDP_READERS)] = True
_FROM_PORT = np.zeros(65536, np.bool_)
_FROM_PORT[list(_ANSWERED_FROM)] = True

_LONGEST = 65535
_FIXED_IPV4, _FIXED_IPV6 = 20, 40


@dataclass(slots=True)
class Carried:
    """Packets that datagrams carry, in the order of the datagrams."""

    row: NDArray[np.int64]  #: which of the datagrams
    frames: Frames  #: where their IP headers are; `record` as in the datagrams, as indices
    wrap: NDArray[np.uint64]  #: see `nattrace.encapsulation`

    def offset(self, start: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how far behind `start`, one position a record, each IP header begins."""
        result: NDArray[np.int64] = self.frames.at - start[self.frames.record]
        return result


def carried_packets(
    buffer: NDArray[np.uint8],
    rows: Datagrams,
    sport: NDArray[np.uint16] | None = None,
    dport: NDArray[np.uint16] | None = None,
) -> Carried | None:
    """Return the packets inside the given datagrams, at most one each; None when there are none.

    Later fragments carry none. What is returned begins with the version and length fields of an IP header.
    `sport` and `dport` are the ports where they are at hand: most captures pay for no more than a look at them.
    """
    carrier = _CARRIER[rows.protocol]
    if not carrier.any():
        return None
    found = []
    direct = np.flatnonzero((carrier != _NOT) & (carrier != _IN_UDP))
    if direct.size:
        found += _in_ip(buffer, rows, direct, carrier[direct])
    datagrams = np.flatnonzero(carrier == _IN_UDP)
    if datagrams.size:
        source = (rows.l4["word0"] if sport is None else sport)[datagrams]
        target = (rows.l4["word1"] if dport is None else dport)[datagrams]
        to_port = _TO_PORT[target]
        told = np.flatnonzero(to_port | _FROM_PORT[source])
        if told.size:
            port = np.where(to_port[told], target[told], source[told]).astype(np.uint16)
            found += _in_udp(buffer, rows, datagrams[told], port)
    return _merge(buffer, rows, found) if found else None


_Part = tuple["NDArray[np.int64]", Payloads, Found]


def _in_ip(
    buffer: NDArray[np.uint8], rows: Datagrams, at: NDArray[np.int64], carrier: NDArray[np.uint8]
) -> list[_Part]:
    """Read what follows the IP headers of the rows `at`."""
    whole = rows.fragment[at] & FRAGMENT_OFFSET == 0
    at, carrier = at[whole], carrier[whole]
    offset = rows.l4_offset[at]
    # Of a fragmented datagram the first fragment's header does not tell the length of the whole.
    length = np.where(rows.fragment[at] & MORE_FRAGMENTS, _LONGEST, rows.ip_length[at])
    payloads = Payloads.read(buffer, rows.at[at] + offset, rows.available[at] - offset, length - offset)
    parts: list[_Part] = []
    plain = np.flatnonzero(carrier == _IN_IP)
    if plain.size:
        inner_six = rows.protocol[at[plain]] == _IPV6_IN_IP
        outer_six = rows.version[at[plain]] == 6
        kind = np.where(
            outer_six,
            np.where(inner_six, SIX_IN_SIX, FOUR_IN_SIX),
            np.where(inner_six, SIX_IN_FOUR, IPIP),
        )
        inside = np.where(inner_six, _ETHERTYPE_IPV6, _ETHERTYPE_IPV4)
        none = np.zeros(plain.size, np.int64)
        found = Found(none, inside, encapsulation(kind), np.full(plain.size, _LONGEST))
        parts.append((at[plain], payloads.take(plain), found))
    routed = np.flatnonzero(carrier == _IN_GRE)
    if routed.size:
        these = payloads.take(routed)
        parts.append((at[routed], these, read_gre(these, buffer)))
    return parts


def _in_udp(
    buffer: NDArray[np.uint8], rows: Datagrams, at: NDArray[np.int64], port: NDArray[np.uint16]
) -> list[_Part]:
    """Read what follows the UDP headers of the rows `at`, as the port says."""
    whole = (rows.fragment[at] & FRAGMENT_OFFSET == 0) & (rows.available[at] - rows.l4_offset[at] >= 8)
    at, port = at[whole], port[whole]
    offset = rows.l4_offset[at] + 8
    said = rows.l4["word2"][at].astype(np.int64) - 8
    # 0 in jumbograms (RFC 2675) and BIG TCP; of a fragmented datagram it tells the length of the whole.
    wire = np.where(said < 0, rows.ip_length[at] - offset, said)
    have = np.minimum(rows.available[at] - offset, wire)
    payloads = Payloads.read(buffer, rows.at[at] + offset, have, wire)
    parts: list[_Part] = []
    for number in np.unique(port).tolist():
        chosen = np.flatnonzero(port == number)
        these = payloads.take(chosen)
        parts.append((at[chosen], these, _UDP_READERS[number](these, buffer)))
    return parts


def _merge(buffer: NDArray[np.uint8], rows: Datagrams, parts: list[_Part]) -> Carried | None:
    """Pass link headers, drop what is not plausible, and put the rest in order."""
    row = np.concatenate([part[0] for part in parts])
    at, have, wire = (
        np.concatenate([getattr(part[1], name) for part in parts]) for name in ("at", "have", "wire")
    )
    length, inside, wrap, slack = (
        np.concatenate([getattr(part[2], name) for part in parts])
        for name in ("length", "inside", "wrap", "slack")
    )
    good = np.flatnonzero((length != NO_HEADER) & (length <= have))
    good = good[np.argsort(row[good], kind="stable")]
    length = length[good]
    begin = find_ip_after(buffer, inside[good], at[good] + length, have[good] - length, wire[good] - length)
    chosen = good[begin.record]
    plausible = _plausible(buffer, begin, inside[chosen], slack[chosen])
    begin, chosen = begin.take(plausible), chosen[plausible]
    if not chosen.size:
        return None
    row = row[chosen]
    begin.record = row + rows.record.start if isinstance(rows.record, slice) else rows.record[row]
    return Carried(row, begin, wrap[chosen])


def _plausible(
    buffer: NDArray[np.uint8], frames: Frames, inside: NDArray[np.int64], slack: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Say where an IP header may stand: version, header length, and a total length that fits the carrier.

    `slack` are the bytes that may follow the packet. A total length of 0 fits where segmentation offload made
    the packet longer than the field can say.
    """
    head = gather_bytes(buffer, frames.at, 6)
    version = head[:, 0] >> 4
    words = head.astype(np.int64)
    four, six = version == 4, version == 6
    total = np.where(four, words[:, 2] << 8 | words[:, 3], (words[:, 4] << 8 | words[:, 5]) + _FIXED_IPV6)
    unsaid = np.where(four, total == 0, total == _FIXED_IPV6)
    spare = frames.wire - total
    fits = (unsaid & (frames.wire > _LONGEST)) | ((spare >= 0) & (spare <= slack))
    good = frames.have >= np.where(four, _FIXED_IPV4, _FIXED_IPV6)
    good &= (four & (words[:, 0] & 15 >= 5)) | six
    good &= (inside != _ETHERTYPE_IPV4) | four
    good &= (inside != _ETHERTYPE_IPV6) | six
    result: NDArray[np.bool_] = good & fits
    return result
