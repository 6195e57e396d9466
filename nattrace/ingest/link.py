"""Link layers: from a record to the first byte of its IP header, for all records of a block at once.

It finds where IP begins and says why where it does not. It never looks into IP beyond the version nibble.
Formats: tcpdump.org/linktypes.html, IEEE 802.1Q, IEEE 802.2, RFC 1042, RFC 1661, RFC 1662, RFC 2516, RFC 3032.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.ingest.gather import gather_bytes, prefix_masks

if TYPE_CHECKING:
    from collections import Counter

    from numpy.typing import NDArray

    from nattrace.ingest.source import Records

#: LINKTYPE_ numbers. 12 and 14 are what DLT_RAW is on other systems; files carry them by mistake.
NULL, ETHERNET, PPP, PPP_HDLC, PPP_ETHER, RAW, C_HDLC, LOOP, LINUX_SLL = 0, 1, 9, 50, 51, 101, 104, 108, 113
IPV4, IPV6, LINUX_SLL2 = 228, 229, 276
RAW_TYPES: Final = frozenset({RAW, 12, 14, IPV4, IPV6})

#: Link types that `find_ip` reads; records of any other are skipped as ``link-type-N``.
KNOWN_LINK_TYPES: Final = RAW_TYPES | {
    NULL,
    ETHERNET,
    PPP,
    PPP_HDLC,
    PPP_ETHER,
    C_HDLC,
    LOOP,
    LINUX_SLL,
    LINUX_SLL2,
}

#: Bytes before the IP header where nothing lies between: what a snaplen leaves of a packet is less these.
LINK_HEADER_BYTES: Final = dict.fromkeys(RAW_TYPES, 0) | {
    NULL: 4,
    ETHERNET: 14,
    PPP_HDLC: 4,
    C_HDLC: 4,
    LOOP: 4,
    LINUX_SLL: 16,
    LINUX_SLL2: 20,
}

#: VLAN tags, PPPoE, PPP, LLC and MPLS headers that are followed in one frame. Two VLAN tags and PPPoE are
#: common, providers stack some six labels; what nests deeper than this is an attack on the reader.
LINK_DEPTH_LIMIT: Final = 16

_ETHERTYPE_IPV4, _ETHERTYPE_IPV6, _MPLS, _MPLS_MULTICAST, _PPPOE_SESSION = (
    0x0800,
    0x86DD,
    0x8847,
    0x8848,
    0x8864,
)
_VLAN_TAGS = (0x8100, 0x88A8, 0x9100, 0x9200)
#: The highest IEEE 802.3 length; such an "EtherType" says that an LLC header follows.
_LENGTH_MAX = 0x05DC

#: What stands next, where no EtherType says so: numbers that no EtherType can have.
_STEP_PPP, _STEP_LLC, _STEP_IP, _STEP_PPP_HDLC = 0x10000, 0x10001, 0x10002, 0x10003
#: The end of the way: no IP in the frame, or none in its LLC header.
_STEP_NONE, _STEP_LLC_OTHER = 0x10004, 0x10005
#: What a tunnel may carry beside what an EtherType names; see `find_ip_after`.
PPP_FRAME, IP_PACKET, ETHERNET_FRAME = _STEP_PPP, _STEP_IP, 0x10006
_FINAL = (_ETHERTYPE_IPV4, _ETHERTYPE_IPV6, _STEP_IP)

_REASON_OF_ETHERTYPE: Final = {
    0x0806: "arp",
    0x8035: "rarp",
    0x8863: "pppoe-discovery",
    0x888E: "eapol",
    0x88CC: "lldp",
    _STEP_LLC: "llc",
    _STEP_LLC_OTHER: "llc",
    _MPLS: "mpls",
    _MPLS_MULTICAST: "mpls",
}

#: AF_INET, and AF_INET6 as NetBSD and OpenBSD (24), FreeBSD (28), macOS (30) and Linux (10) number it.
_FAMILIES_IPV6 = (10, 24, 28, 30)
_FAMILY_IPV4 = 2

#: ARPHRD_NETLINK: the protocol field of a cooked header is a netlink family, not an EtherType.
_ARPHRD_NETLINK = 824
#: LINUX_SLL_P_802_2: an LLC header follows a cooked header.
_SLL_LLC = 4


@dataclass(slots=True)
class Frames:
    """Records of a block in which an IP header begins, in record order."""

    record: slice | NDArray[np.int64]  #: which records, as an index into the columns of `Records`
    at: NDArray[np.int64]  #: position of the IP header in the buffer, shape (n,)
    have: NDArray[np.int64]  #: captured bytes from there on, >= 0
    wire: NDArray[np.int64]  #: bytes from there to the end of the frame on the wire; may be negative nonsense

    def take(self, keep: NDArray[Any]) -> Frames:
        """Return the frames that a mask keeps."""
        record = self.record
        if isinstance(record, slice):
            record = np.arange(record.start, record.stop)
        return Frames(record[keep], self.at[keep], self.have[keep], self.wire[keep])


def find_ip(records: Records, block: slice, skipped: Counter[str]) -> Frames:
    """Return the frames of `block` that carry IP; count every other record once, by reason, in `skipped`."""
    offset = records.offset[block]
    captured = records.captured_length[block].astype(np.int64)
    wire = records.wire_length[block].astype(np.int64)
    link_type = records.link_type
    if link_type in RAW_TYPES:
        return Frames(block, offset, captured, wire)
    if link_type not in KNOWN_LINK_TYPES:
        if offset.size:
            skipped[f"link-type-{link_type}"] += offset.size
        none = np.zeros(0, np.int64)
        return Frames(none, none, none, none)
    header = _uniform_header(records.buffer, link_type, offset, captured)
    if header:
        return Frames(block, offset + header, captured - header, wire - header)
    position, step, cut = _walk(records.buffer, link_type, offset, captured)
    frames = Frames(block, offset + position, captured - position, wire - position)
    keep = np.isin(step, _FINAL) & ~cut
    if keep.all():
        return frames
    _count(step[~keep], cut[~keep], skipped)
    return frames.take(keep)


def find_ip_after(
    buffer: NDArray[np.uint8],
    inside: NDArray[np.int64],
    at: NDArray[np.int64],
    have: NDArray[np.int64],
    wire: NDArray[np.int64],
) -> Frames:
    """Return where IP begins behind other headers than a record's own; `record` are indices into the arguments.

    `inside` says what stands at each position: an EtherType, ETHERNET_FRAME, PPP_FRAME or IP_PACKET. `have`
    are captured bytes from there on, >= 0, `wire` those on the wire. What holds no IP is left out.
    """
    position, step = np.zeros(at.size, np.int64), inside.copy()
    frame = np.flatnonzero(inside == ETHERNET_FRAME)
    cut = np.zeros(at.size, np.bool_)
    cut[frame] = have[frame] < 14
    step[frame] = _ethertype(gather_bytes(buffer, at[frame], 14), 12)
    position[frame] = 14
    _pass_headers(buffer, at, have, position, step, cut)
    rows = np.flatnonzero(np.isin(step, _FINAL) & ~cut)
    passed = position[rows]
    return Frames(rows, at[rows] + passed, have[rows] - passed, wire[rows] - passed)


def _uniform_header(
    buffer: NDArray[np.uint8], link_type: int, offset: NDArray[np.int64], captured: NDArray[np.int64]
) -> int:
    """Return the link header's length when all records are plain Ethernet or SLL with IPv4, else 0."""
    length, type_at = {ETHERNET: (14, 12), LINUX_SLL: (16, 14), LINUX_SLL2: (20, 0)}.get(link_type, (0, 0))
    if not length or not offset.size or int(captured.min()) < length:
        return 0
    if not (buffer[offset + type_at] == _ETHERTYPE_IPV4 >> 8).all():
        return 0
    if (buffer[offset + (type_at + 1)] != _ETHERTYPE_IPV4 & 0xFF).any():
        return 0
    if link_type != ETHERNET:
        hardware = offset + (2 if link_type == LINUX_SLL else 8)
        netlink = (buffer[hardware] == _ARPHRD_NETLINK >> 8) & (
            buffer[hardware + 1] == _ARPHRD_NETLINK & 0xFF
        )
        if netlink.any():
            return 0
    return length


def _count(step: NDArray[np.int64], cut: NDArray[np.bool_], skipped: Counter[str]) -> None:
    """Count rows that hold no IP: cut off before it, or of another protocol."""
    truncated = int(np.count_nonzero(cut))
    if truncated:
        skipped["truncated"] += truncated
    kinds, counts = np.unique(step[~cut], return_counts=True)
    deep = (*_VLAN_TAGS, _PPPOE_SESSION, _STEP_PPP, _STEP_PPP_HDLC)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        reason = "link-depth" if kind in deep else _REASON_OF_ETHERTYPE.get(kind, "not-ip")
        skipped[reason] += count


def _walk(
    buffer: NDArray[np.uint8], link_type: int, offset: NDArray[np.int64], captured: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Follow link headers of any make; return position in the record, last step, and "cut off", shape (n,)."""
    position, step, cut = _first_header(buffer, link_type, offset, captured)
    _pass_headers(buffer, offset, captured, position, step, cut)
    return position, step, cut


def _pass_headers(
    buffer: NDArray[np.uint8],
    offset: NDArray[np.int64],
    captured: NDArray[np.int64],
    position: NDArray[np.int64],
    step: NDArray[np.int64],
    cut: NDArray[np.bool_],
) -> None:
    """Go on from `position` and `step` as far as it goes; change them, and `cut`, in place."""
    for _ in range(LINK_DEPTH_LIMIT):
        moved = False
        for kinds, need, advance in _STEPS:
            rows = np.flatnonzero(np.isin(step, kinds) & ~cut)
            if not rows.size:
                continue
            short = captured[rows] - position[rows] < need
            cut[rows[short]] = True
            rows = rows[~short]
            if rows.size:
                head = gather_bytes(buffer, offset[rows] + position[rows], _LOOKAHEAD)
                head &= _CAPTURED[np.minimum(captured[rows] - position[rows], _LOOKAHEAD)]
                step[rows], length = advance(head, step[rows])
                position[rows] += length
                moved = True
        if not moved:
            break
    # A two-byte PPP protocol or an LLC/SNAP header may end beyond the capture; IP then has not begun.
    cut |= position > captured
    np.minimum(position, captured, out=position)


def _first_header(
    buffer: NDArray[np.uint8], link_type: int, offset: NDArray[np.int64], captured: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Read the fixed header that the link type begins with; same result as `_walk`."""
    length = {ETHERNET: 14, LINUX_SLL: 16, LINUX_SLL2: 20, NULL: 4, LOOP: 4}.get(link_type, 0)
    position = np.full(offset.size, length, np.int64)
    cut = captured < length
    head = gather_bytes(buffer, offset, 20)
    if link_type == ETHERNET:
        step = _ethertype(head, 12)
    elif link_type in (LINUX_SLL, LINUX_SLL2):
        type_at, hardware_at = (14, 2) if link_type == LINUX_SLL else (0, 8)
        step = _word(head, type_at)
        step[step == _SLL_LLC] = _STEP_LLC
        step[(step <= _LENGTH_MAX) | (_word(head, hardware_at) == _ARPHRD_NETLINK)] = _STEP_NONE
    elif link_type in (NULL, LOOP):
        # The writer's byte order, which need not be the file's: a family number is small in just one of them.
        big = _word(head, 0) << 16 | _word(head, 2)
        little = (
            (head[:, 3].astype(np.int64) << 8 | head[:, 2]) << 16
            | head[:, 1].astype(np.int64) << 8
            | head[:, 0]
        )
        family = np.minimum(big, little)
        step = np.full(offset.size, _STEP_NONE)
        step[(family == _FAMILY_IPV4) | np.isin(family, _FAMILIES_IPV6)] = _STEP_IP
    else:
        first = {
            PPP_ETHER: _PPPOE_SESSION,
            PPP: _STEP_PPP_HDLC,
            PPP_HDLC: _STEP_PPP_HDLC,
            C_HDLC: _STEP_PPP_HDLC,
        }
        step = np.full(offset.size, first[link_type])
    return position, step, cut


#: Bytes of a header that a step may look at.
_LOOKAHEAD = 8
_CAPTURED = prefix_masks(_LOOKAHEAD)


def _word(head: NDArray[np.uint8], at: int) -> NDArray[np.int64]:
    """Return the big-endian 16-bit word at a column, shape (n,)."""
    return head[:, at].astype(np.int64) << 8 | head[:, at + 1]


def _ethertype(head: NDArray[np.uint8], at: int) -> NDArray[np.int64]:
    """Return the EtherType at a column, or the LLC step where it is an IEEE 802.3 length."""
    step = _word(head, at)
    step[step <= _LENGTH_MAX] = _STEP_LLC
    return step


def _vlan(head: NDArray[np.uint8], _: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    return _ethertype(head, 2), 4


def _pppoe(head: NDArray[np.uint8], _: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    return np.full(len(head), _STEP_PPP), 6


def _mpls(head: NDArray[np.uint8], step: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    """Pass one label (RFC 3032); below the last one the payload's first nibble is all there is to go by."""
    version = head[:, 4] >> 4
    last = head[:, 2] & 1 == 1
    is_ip = (version == 4) | (version == 6)  # RFC 4928: other payloads avoid these two values
    return np.where(last, np.where(is_ip, _STEP_IP, _STEP_NONE), step), 4


def _llc(head: NDArray[np.uint8], _: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    """IP over LLC (DSAP and SSAP 6) or LLC/SNAP with an EtherType (RFC 1042, or 802.1H)."""
    unnumbered = head[:, 2] == 3
    raw = (head[:, 0] == 6) & (head[:, 1] == 6) & unnumbered
    snap = (head[:, 0] == 0xAA) & (head[:, 1] == 0xAA) & unnumbered & (head[:, 3] == 0) & (head[:, 4] == 0)
    snap &= (head[:, 5] == 0) | (head[:, 5] == 0xF8)
    inner = _word(head, 6)
    inner[inner <= _LENGTH_MAX] = _STEP_NONE
    return np.where(raw, _STEP_IP, np.where(snap, inner, _STEP_LLC_OTHER)), np.where(
        raw, 3, np.where(snap, 8, 0)
    )


def _ppp(head: NDArray[np.uint8], step: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
    """PPP with or without address and control, the protocol in one byte or two; Cisco HDLC where it can be."""
    framed = (head[:, 0] == 0xFF) & (head[:, 1] == 0x03)
    cisco = (step == _STEP_PPP_HDLC) & ((head[:, 0] == 0x0F) | (head[:, 0] == 0x8F)) & (head[:, 1] == 0)
    body = np.where(framed[:, None], head[:, 2:4], head[:, 0:2])
    compressed = (
        body[:, 0] & 1 == 1
    )  # RFC 1661 section 6.5: the low byte of a protocol is odd, the high one even
    protocol = np.where(compressed, body[:, 0], _word(body, 0))
    inner = np.full(len(head), _STEP_NONE)
    for number, means in ((0x21, _ETHERTYPE_IPV4), (0x57, _ETHERTYPE_IPV6), (0x281, _MPLS), (0x283, _MPLS)):
        inner[protocol == number] = means
    length = framed * 2 + np.where(compressed, 1, 2)
    return np.where(cisco, _word(head, 2), inner), np.where(cisco, 4, length)


#: Header kinds, the bytes one needs at least, and what passes it: (head, step) -> (next step, length).
_STEPS: Final = (
    (_VLAN_TAGS, 4, _vlan),
    ((_PPPOE_SESSION,), 6, _pppoe),
    ((_STEP_PPP, _STEP_PPP_HDLC), 1, _ppp),
    ((_STEP_LLC,), 3, _llc),
    ((_MPLS, _MPLS_MULTICAST), 5, _mpls),
)
