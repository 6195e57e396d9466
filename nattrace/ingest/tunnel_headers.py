"""Tunnel headers: from the byte behind IP or UDP to what the tunnel carries, for many packets at once.

Each reader takes `Payloads` and says for every packet how long the tunnel's own headers are, what follows
them, and what the tunnel calls itself; a length of -1 says that this is no such header. Fixed bits must be as
the standards have them, since a UDP port is weak evidence. Nothing here looks at what is carried.

VXLAN RFC 7348 (with group policy and next protocol), Geneve RFC 8926, GRE RFC 2784 and 2890, NVGRE RFC 7637, PPTP
RFC 2637, ERSPAN draft-foschiano-erspan, WCCP draft-mclaggan-wccp, GTP-U 3GPP TS 29.281, L2TP RFC 2661,
Teredo RFC 4380.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.encapsulation import ERSPAN, GENEVE, GRE, GTP_U, L2TP, PPTP, TEREDO, VXLAN, encapsulation
from nattrace.ingest.gather import gather_bytes, prefix_masks
from nattrace.ingest.link import ETHERNET_FRAME, IP_PACKET, PPP_FRAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes that a reader looks at in one step: GRE with all fields (16) and the ERSPAN header behind it.
HEAD_BYTES: Final = 32
_CAPTURED = prefix_masks(HEAD_BYTES)

#: GTP-U extension headers followed in one packet. Release 17 defines eight types, each of use once.
GTP_EXTENSION_LIMIT: Final = 8

#: `Found.length` of what is no tunnel header.
NO_HEADER: Final = -1

#: GRE protocol types beside EtherTypes: transparent Ethernet bridging, ERSPAN II and III, WCCP, PPP.
_TEB, _ERSPAN_2, _ERSPAN_3, _WCCP, _PPP = 0x6558, 0x88BE, 0x22EB, 0x883E, 0x880B
_ETHERTYPE_IPV6 = 0x86DD
_ERSPAN_2_BYTES, _ERSPAN_3_BYTES, _ERSPAN_3_SUBHEADER_BYTES = 8, 12, 8

#: Next protocols of VXLAN-GPE (draft-ietf-nvo3-vxlan-gpe).
_GPE_IPV4, _GPE_IPV6, _GPE_ETHERNET = 1, 2, 3
_GPE_INSIDE = np.array([0, 0x0800, 0x86DD, ETHERNET_FRAME], np.int64)

#: Bytes behind an IP packet in an Ethernet frame: padding to 60 bytes (IEEE 802.3) and a check sequence.
_ETHERNET_SLACK = 50
#: Teredo's trailers (RFC 6081 section 4) follow a bubble; 64 bytes hold one of each kind.
_TEREDO_SLACK = 64

_G_PDU = 0xFF
_TEREDO_ORIGIN, _TEREDO_AUTHENTICATION = 0, 1
_TEREDO_ORIGIN_BYTES, _TEREDO_AUTHENTICATION_BYTES = 8, 13


@dataclass(slots=True)
class Payloads:
    """Bytes behind IP or UDP headers that may be tunnel headers, one row each."""

    at: NDArray[np.int64]  #: position in the buffer
    have: NDArray[np.int64]  #: bytes from there on that are captured and of this datagram, >= 0
    wire: NDArray[np.int64]  #: bytes from there to the end of the datagram, captured or not
    head: NDArray[np.uint8]  #: (n, HEAD_BYTES): the first bytes, zeros beyond `have`

    @classmethod
    def read(
        cls,
        buffer: NDArray[np.uint8],
        at: NDArray[np.int64],
        have: NDArray[np.int64],
        wire: NDArray[np.int64],
    ) -> Payloads:
        """Gather the first bytes of each payload."""
        head = gather_bytes(buffer, at, HEAD_BYTES)
        head &= _CAPTURED[np.minimum(have, HEAD_BYTES)]
        return cls(at, have, wire, head)

    def take(self, rows: NDArray[Any]) -> Payloads:
        """Return the given rows: indices or a mask."""
        return Payloads(*(getattr(self, f.name)[rows] for f in fields(self)))

    def word(self, at: int) -> NDArray[np.int64]:
        """Return the big-endian 16-bit word at a place of the head."""
        return self.head[:, at].astype(np.int64) << 8 | self.head[:, at + 1]

    def long(self, at: int) -> NDArray[np.int64]:
        """Return the big-endian 32-bit word at a place of the head."""
        return self.word(at) << 16 | self.word(at + 2)


@dataclass(slots=True)
class Found:
    """What a reader found, one row for each payload."""

    length: NDArray[np.int64]  #: bytes of tunnel headers; NO_HEADER where it is none
    inside: NDArray[np.int64]  #: what follows: an EtherType, or a constant of `link`
    wrap: NDArray[np.uint64]  #: see `encapsulation`
    slack: NDArray[np.int64]  #: bytes that may follow the packet inside


def read_vxlan(payloads: Payloads, _: NDArray[np.uint8]) -> Found:
    """VXLAN: the I flag and a VNI; a group policy is passed over, a next protocol is obeyed."""
    flags = payloads.head[:, 0]
    good = (flags & 0x78 == 0x08) & (payloads.head[:, 7] == 0)
    follows = np.where(flags & 0x04, payloads.head[:, 3], _GPE_ETHERNET)
    good &= (follows >= _GPE_IPV4) & (follows <= _GPE_ETHERNET)
    inside = _GPE_INSIDE[np.where(good, follows, 0)]
    found = _found(good, 8, inside, encapsulation(VXLAN, payloads.long(4) >> 8))
    found.slack[inside != ETHERNET_FRAME] = 0
    return found


def read_geneve(payloads: Payloads, _: NDArray[np.uint8]) -> Found:
    """Geneve: version 0, options of the length that is said, an EtherType and a VNI."""
    first = payloads.head[:, 0].astype(np.int64)
    good = (first >> 6 == 0) & (payloads.head[:, 1] & 0x3F == 0) & (payloads.head[:, 7] == 0)
    protocol = payloads.word(2)
    inside = np.where(protocol == _TEB, ETHERNET_FRAME, protocol)
    return _found(good, 8 + (first & 0x3F) * 4, inside, encapsulation(GENEVE, payloads.long(4) >> 8))


def read_gre(payloads: Payloads, _: NDArray[np.uint8]) -> Found:
    """GRE of version 0 with checksum, key and sequence number, and PPTP's version 1; no source routing."""
    flags, protocol = payloads.word(0), payloads.word(2)
    checksum, routing, key, sequence = (flags >> bit & 1 for bit in (15, 14, 13, 12))
    version, acknowledgement = flags & 7, flags >> 7 & 1
    # RFC 2784 section 2.3: reserved bits must be zero, where the meaning of version 1 is another.
    plain = (version == 0) & (routing == 0) & (flags & 0x0FF8 == 0)
    pptp = (version == 1) & (checksum == 0) & (routing == 0) & (key == 1) & (protocol == _PPP)
    pptp &= flags & 0x0F78 == 0
    length = 4 + 4 * (key + sequence + np.where(pptp, acknowledgement, checksum))
    inside = protocol.copy()
    inside[protocol == _TEB] = ETHERNET_FRAME
    inside[protocol == _PPP] = PPP_FRAME

    rows = np.arange(length.size)
    key_at = 4 + 4 * np.where(pptp, 0, checksum)
    keys = sum(payloads.head[rows, key_at + n].astype(np.int64) << (24 - 8 * n) for n in range(4))
    wrap = np.where(key == 1, encapsulation(GRE, np.asarray(keys)), encapsulation(GRE))
    # RFC 2637 section 4.1: the key is payload length and call id of the receiver.
    wrap = np.where(pptp, encapsulation(PPTP, np.asarray(keys) & 0xFFFF), wrap)

    mirrored = plain & ((protocol == _ERSPAN_3) | (protocol == _ERSPAN_2))
    if mirrored.any():
        third = protocol == _ERSPAN_3
        # Without a sequence number it is type I: no header of its own.
        second = (protocol == _ERSPAN_2) & (sequence == 1)
        start = np.minimum(length, HEAD_BYTES - _ERSPAN_3_BYTES)
        session = (payloads.head[rows, start + 2].astype(np.int64) & 3) << 8 | payloads.head[rows, start + 3]
        named = mirrored & (second | third)
        wrap = np.where(
            named, encapsulation(ERSPAN, session), np.where(mirrored, encapsulation(ERSPAN), wrap)
        )
        version_of = payloads.head[rows, start] >> 4
        last = payloads.head[rows, start + _ERSPAN_3_BYTES - 1]
        frame_type = (payloads.head[rows, start + 10] >> 2) & 0x1F
        plain &= ~second | (version_of == 1)
        plain &= ~third | ((version_of == 2) & (frame_type == 0))
        length += np.where(second, _ERSPAN_2_BYTES, 0)
        length += np.where(
            third, _ERSPAN_3_BYTES + (last & 1).astype(np.int64) * _ERSPAN_3_SUBHEADER_BYTES, 0
        )
        inside[mirrored] = ETHERNET_FRAME
    redirected = np.flatnonzero(plain & (protocol == _WCCP))
    if redirected.size:
        # Version 2 puts a header of four bytes before the packet, version 1 does not.
        first = payloads.head[redirected, np.minimum(length[redirected], HEAD_BYTES - 1)] >> 4
        length[redirected] += np.where((first == 4) | (first == 6), 0, 4)
        inside[redirected] = IP_PACKET
    return _found(plain | pptp, length, inside, wrap)


def read_gtp(payloads: Payloads, buffer: NDArray[np.uint8]) -> Found:
    """GTP-U version 1, type G-PDU: fixed header, optional fields, extension headers, then IP."""
    flags = payloads.head[:, 0]
    size = payloads.word(2)
    good = (flags & 0xF8 == 0x30) & (payloads.head[:, 1] == _G_PDU)
    good &= size + 8 == payloads.wire
    optional = flags & 7 != 0
    length = np.where(optional, 12, 8).astype(np.int64)
    following = np.where(flags & 4 != 0, payloads.head[:, 11], 0)
    active = np.flatnonzero(good & optional & (following != 0))
    for _ in range(GTP_EXTENSION_LIMIT):
        if not active.size:
            break
        cut = length[active] + 4 > payloads.have[active]
        good[active[cut]] = False
        active = active[~cut]
        units = buffer[payloads.at[active] + length[active]].astype(np.int64)
        good[active[units == 0]] = False
        length[active] += units * 4
        good[active[length[active] > payloads.have[active]]] = False
        active = active[good[active]]
        following[active] = buffer[payloads.at[active] + length[active] - 1]
        active = active[following[active] != 0]
    good[active] = False
    found = _found(good, length, IP_PACKET, encapsulation(GTP_U, payloads.long(4)))
    found.slack[:] = 0
    return found


def read_l2tp(payloads: Payloads, _: NDArray[np.uint8]) -> Found:
    """L2TP version 2, data messages: optional length, sequence numbers and offset, then PPP."""
    flags = payloads.word(0)
    good = flags & 0xB4FF == 0x0002  # a data message, reserved bits 0, version 2
    with_length, with_sequence, with_offset = (flags >> bit & 1 for bit in (14, 11, 9))
    at = 2 + 2 * with_length
    rows = np.arange(at.size)

    def word(place: NDArray[np.int64]) -> NDArray[np.int64]:
        high: NDArray[np.int64] = payloads.head[rows, place].astype(np.int64) << 8
        return high | payloads.head[rows, place + 1]

    session = word(at) << 16 | word(at + 2)
    length = at + 4 + 4 * with_sequence
    length += np.where(with_offset == 1, 2 + word(length), 0)
    good &= (with_length == 0) | (payloads.word(2) == payloads.wire)
    found = _found(good, length, PPP_FRAME, encapsulation(L2TP, session))
    found.slack[:] = 0
    return found


def read_teredo(payloads: Payloads, buffer: NDArray[np.uint8]) -> Found:
    """Teredo: an authentication and an origin indication, either or both or none, then IPv6."""
    length = np.zeros(payloads.at.size, np.int64)
    kind = payloads.word(0)
    authenticated = np.flatnonzero((kind == _TEREDO_AUTHENTICATION) & (payloads.have >= 4))
    names = payloads.head[authenticated, 2].astype(np.int64) + payloads.head[authenticated, 3]
    length[authenticated] = _TEREDO_AUTHENTICATION_BYTES + names
    room = np.flatnonzero(length + 2 <= payloads.have)
    then = gather_bytes(buffer, payloads.at[room] + length[room], 2)
    origin = room[(then[:, 0] == 0) & (then[:, 1] == _TEREDO_ORIGIN)]
    length[origin] += _TEREDO_ORIGIN_BYTES
    found = _found(np.ones(length.size, np.bool_), length, _ETHERTYPE_IPV6, encapsulation(TEREDO))
    found.slack[:] = _TEREDO_SLACK
    return found


def _found(
    good: NDArray[np.bool_],
    length: NDArray[np.int64] | int,
    inside: NDArray[np.int64] | int,
    wrap: NDArray[np.uint64],
) -> Found:
    shape = good.shape
    return Found(
        np.where(good, length, NO_HEADER),
        np.broadcast_to(np.asarray(inside, np.int64), shape).copy(),
        np.broadcast_to(wrap, shape).copy(),
        np.full(shape, _ETHERNET_SLACK),
    )
