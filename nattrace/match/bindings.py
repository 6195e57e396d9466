"""Bindings: packets that cannot vouch for themselves, matched inside the binding of their flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.copies import may_be_copies
from nattrace.match.counters import by_chance
from nattrace.match.keys import ACK_END, M1, M2, has_ports, mix
from nattrace.match.outcome import Matches
from nattrace.match.pairing import group_ids, nearest_pairs, unique_pairs
from nattrace.match.unique import FAR_NS, REPEAT_NS
from nattrace.match.votes import FLOOR_NS, MARGIN
from nattrace.table import ICMP, ICMPV6, KIND, TCP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.lanes import Lanes
    from nattrace.match.rows import Rows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook

#: Packets with nothing of their own are paired inside a binding only when about as far apart as usual: half
#: as far again, plus what one interrupt more or less makes.
_NEAREST_FLOOR_NS = 20_000
#: Nearest neighbours are no match where two packets without their twins meet more often than this by chance.
NEAREST_RISK = 0.001
#: How many packets of the average group are added to a small one when its losses are estimated.
_PRIOR_PACKETS = 4
#: With less than this of a transport header neither the UDP checksum nor the TCP sequence number is there.
_UDP_HEADER_BYTES = 8


def match_by_binding(
    rows_a: Rows,
    rows_b: Rows,
    by: str,
    lanes: Lanes,
    usual: Usual,
    book: AddressBook,
    renumbered: int = 0,
    *,
    kept: bool = False,
) -> Matches:
    """Match packets with equal keys inside one binding: alone there, or clearly nearest in time.

    `lanes` are those of the rows. `renumbered` and `kept` say what boxes do to IP identifications, see `Identifications`.
    """
    on_a, on_b = np.flatnonzero(lanes.lane_a >= 0), np.flatnonzero(lanes.lane_b >= 0)
    if not on_a.size or not on_b.size:
        return Matches(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint16))
    lane_a, lane_b = lanes.lane_a[on_a].astype(np.uint64), lanes.lane_b[on_b].astype(np.uint64)
    key_a = mix(getattr(rows_a, by)[on_a] ^ lane_a * M1)
    key_b = mix(getattr(rows_b, by)[on_b] ^ lane_b * M1)
    for_a, for_b = _for_equals(rows_a, on_a, key_a, key_b), _for_equals(rows_b, on_b, key_b, key_a)
    on_a, key_a, lane_a = on_a[for_a], key_a[for_a], lane_a[for_a]
    on_b, key_b, lane_b = on_b[for_b], key_b[for_b], lane_b[for_b]
    # what shows nothing but a length has all packets of its lane for rivals, whatever their lengths
    rivals_a = np.where(_mute(rows_a, on_a, by), mix(lane_a * M2), key_a)
    rivals_b = np.where(_mute(rows_b, on_b, by), mix(lane_b * M2), key_b)
    group_a, group_b = group_ids(rivals_a, rivals_b)
    shift = lanes.due_a[on_a] - rows_a.table.time_ns[on_a]
    # what is said once, and by nobody else, may be late: the first packet of a flow waits for ARP
    own_a, own_b = _distinct(rows_a, on_a), _distinct(rows_b, on_b)
    ua, ub = unique_pairs(key_a[own_a], key_b[own_b])
    ua, ub = own_a[ua], own_b[ub]
    soon = np.abs(rows_b.table.time_ns[on_b[ub]] - rows_a.table.time_ns[on_a[ua]]) <= REPEAT_NS
    ua, ub = ua[soon], ub[soon]
    left_a, left_b = _others(on_a.size, ua), _others(on_b.size, ub)
    longest = usual.longest_ns()
    window_ns = FAR_NS if longest is None else longest + longest // 2 + _NEAREST_FLOOR_NS
    time_a, time_b = rows_a.table.time_ns[on_a[left_a]], rows_b.table.time_ns[on_b[left_b]]
    a, b = nearest_pairs(
        group_a[left_a], time_a + shift[left_a], group_b[left_b], time_b,
        window_ns=window_ns, floor_ns=FLOOR_NS if longest is None else max(longest // 2, FLOOR_NS),
        margin=MARGIN, rounds=4,
    )  # fmt: skip
    safe = _is_safe(group_a[left_a], time_a, group_b[left_b], time_b, a, b, window_ns)
    a, b = a[safe], b[safe]
    a, b = left_a[a], left_b[b]
    same = key_a[a] == key_b[b]
    near_a, near_b = np.concatenate([ua, a[same]]), np.concatenate([ub, b[same]])
    ranked = np.arange(near_a.size) >= ua.size  # by time, among packets that say the same
    a, b = on_a[near_a], on_b[near_b]
    # a packet of this way that is seen at the wrong end first is another one
    delta = rows_b.table.time_ns[b] - rows_a.table.time_ns[a]
    onward = np.sign(delta) * np.sign(shift[near_a]) >= 0
    a, b, ranked = a[onward], b[onward], ranked[onward]
    _, flags, conflict = evidence.weigh(rows_a.table, a, rows_b.table, b, book, renumbered=renumbered)
    flags |= np.uint16(evidence.BINDING) | ranked * np.uint16(evidence.NEAREST)
    good = (
        ~conflict
        & ~may_be_copies(rows_a, a, rows_b, b, longest, numbered=not renumbered, left=True)
        & ~by_chance(rows_a, a, rows_b, b, kept=kept)
    )
    return Matches(a[good], b[good], flags[good])


def _for_equals(
    rows: Rows, chosen: NDArray[np.int64], keys: NDArray[np.uint64], others: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Return which of the chosen packets wait for an equal one.

    TCP waits for pieces and shifted selves as well, and then says nothing of how many packets lack their twins.
    """
    result: NDArray[np.bool_] = np.isin(keys, others) | (rows.table.protocol[chosen] != TCP)
    return result


def _distinct(rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return positions in `chosen` of packets that say something of their own.

    Inside one binding a ping's sequence number does, whatever its payload and those of others.
    """
    table = rows.table
    said = (table.content_length[chosen] >= 4) & (table.content_length[chosen] != KIND)
    telling = said | (table.ip_id[chosen] != 0)
    numbered = (table.protocol[chosen] == TCP) & (table.seq[chosen] != 0)
    telling |= numbered & (table.l4_visible[chosen] >= ACK_END)
    ping = ((table.protocol[chosen] == ICMP) | (table.protocol[chosen] == ICMPV6)) & (
        table.ip_id[chosen] != 0
    )
    return np.flatnonzero(telling & (~rows.common[chosen] | ping))


def _is_safe(
    group_a: NDArray[np.int64],
    time_a: NDArray[np.int64],
    group_b: NDArray[np.int64],
    time_b: NDArray[np.int64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    window_ns: int,
) -> NDArray[np.bool_]:
    """Return which pairs of nearest neighbours are hardly two packets that lost their own twins.

    That takes an unseen twin on either side, and the other's packet inside the window just then: the shares of
    a group's packets that stay alone (those of all groups stand in where it is small) and its pace say how
    likely it is.
    """
    if not a.size:
        return np.zeros(0, np.bool_)
    groups = int(max(group_a.max(), group_b.max())) + 1
    alone, many = [], np.zeros(groups, np.int64)
    for group, chosen in ((group_a, a), (group_b, b)):
        size, paired = np.bincount(group, minlength=groups), np.bincount(group[chosen], minlength=groups)
        overall = 1 - chosen.size / group.size
        alone.append((size - paired + _PRIOR_PACKETS * overall) / (size + _PRIOR_PACKETS))
        many = np.maximum(many, size)
    first, last = np.full(groups, 2**62), np.full(groups, -(2**62))
    for group, time in ((group_a, time_a), (group_b, time_b)):
        np.minimum.at(first, group, time)
        np.maximum.at(last, group, time)
    pace_ns = (last - first) / np.maximum(many - 1, 1)
    inside = np.where(many > 1, 2 * window_ns / np.maximum(pace_ns, 1), 0)
    result: NDArray[np.bool_] = (alone[0] * alone[1] * inside <= NEAREST_RISK)[group_a[a]]
    return result


def _mute(rows: Rows, chosen: NDArray[np.int64], by: str) -> NDArray[np.bool_]:
    """Return which of the chosen packets were cut so short that they show ports and lengths at most."""
    table = rows.table
    mute = (table.l4_visible[chosen] < _UDP_HEADER_BYTES) & has_ports(table.protocol[chosen])
    if by == "exact":
        mute &= table.ip_id[chosen] == 0
    return mute


def _others(rows: int, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices below `rows` that are not among `chosen`."""
    mask = np.ones(rows, np.bool_)
    mask[chosen] = False
    return np.flatnonzero(mask)
