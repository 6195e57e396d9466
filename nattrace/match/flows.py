"""Flows at one point: packets grouped into conversations, both directions (RFC 5103 biflow).

A flow here is what one point alone can see: a protocol and two endpoints. Partial groups are made window
by window and merged once at the end, so that windows, processes and machines can work apart.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.encapsulation import common
from nattrace.table import ECHO_REPLY, ECHO_REPLY_V6, ECHO_REQUEST, ECHO_REQUEST_V6, ICMP, ICMPV6

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.table import PacketTable

#: Bits of `Flows.hint`: who certainly opened the conversation.
LOW_OPENED, HIGH_OPENED = 1, 2

_SYN, _SYN_ACK = 0x02, 0x12
_INT64 = np.iinfo(np.int64)


@dataclass(slots=True)
class Flows:
    """Conversations at one point, one row each. "Low" is the endpoint with the smaller hash (see `flow_hash`).

    "Forward" packets go from low to high. Counts are packets, times ns since the epoch.
    """

    hash: NDArray[np.uint64]
    version: NDArray[np.uint8]
    protocol: NDArray[np.uint8]
    low_address: NDArray[np.uint32]
    low_port: NDArray[np.uint16]
    high_address: NDArray[np.uint32]
    high_port: NDArray[np.uint16]
    forward: NDArray[np.int64]
    backward: NDArray[np.int64]
    first_ns: NDArray[np.int64]
    last_ns: NDArray[np.int64]
    first_backward: NDArray[np.bool_]  #: the first packet went from high to low
    hint: NDArray[np.uint8]  #: LOW_OPENED, HIGH_OPENED, both (contradiction) or 0
    wrap_forward: NDArray[np.uint64]  #: what the forward packets are wrapped in, see `nattrace.encapsulation`
    wrap_backward: NDArray[np.uint64]

    def __len__(self) -> int:
        """Conversations."""
        return int(self.hash.size)

    @classmethod
    def concatenate(cls, parts: Sequence[Flows]) -> Flows:
        """Return all rows in order."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def sorted_groups(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (order, starts): rows ordered so that equal keys are neighbours, and where each group starts.

    Inside a group the rows ascend. One sort of values that carry their index in the low bits; where the
    shortened key confuses two groups (checked), a full sort is done instead.
    """
    rows = keys.size
    if rows == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    bits = max(int(rows - 1).bit_length(), 1)
    mask = np.uint64((1 << bits) - 1)
    packed = keys & ~mask
    packed |= np.arange(rows, dtype=np.uint64)
    packed.sort()
    order = (packed & mask).astype(np.int64)
    packed >>= np.uint64(bits)
    new = np.empty(rows, np.bool_)
    new[0] = True
    np.not_equal(packed[1:], packed[:-1], out=new[1:])
    ordered = keys[order]
    if (np.not_equal(ordered[1:], ordered[:-1]) & ~new[1:]).any():
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return order, np.flatnonzero(new)


def members(order: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the group number of every row, given the grouped order and where groups start."""
    label = np.zeros(order.size, np.int64)
    label[starts[1:]] = 1
    member = np.empty(order.size, np.int64)
    member[order] = np.cumsum(label)
    return member


def added_up(member: NDArray[np.int64], groups: int, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of the values of each group, `member` being the group of each value.

    In place: to put values in order for `reduceat` takes several times as long, where groups are small.
    """
    result = np.zeros(groups, np.int64)
    np.add.at(result, member, values.astype(np.int64, copy=False))  # of one type: numpy is slow otherwise
    return result


def extremes(
    member: NDArray[np.int64], groups: int, low: NDArray[np.int64], high: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the least of `low` and the greatest of `high` in each group, see `added_up`. No group is empty."""
    least, greatest = np.full(groups, _INT64.max), np.full(groups, _INT64.min)
    np.minimum.at(least, member, low)
    np.maximum.at(greatest, member, high)
    return least, greatest


def group_flows(
    table: PacketTable,
    hashes: NDArray[np.uint64],
    backward: NDArray[np.bool_],
    wrap: NDArray[np.uint64] | None = None,
) -> tuple[Flows, NDArray[np.int64]]:
    """Group the rows of a table into conversations.

    Returns the flows and, for each row, the index of its flow. `hashes` and `backward` are from `flow_hash`;
    `wrap` says what each row is wrapped in, None for nothing.
    """
    order, starts = sorted_groups(hashes)
    member = members(order, starts)
    leader = order[starts]
    turned = backward[leader]
    src, dst = table.src[leader], table.dst[leader]
    sport, dport = table.sport[leader], table.dport[leader]
    sizes = np.diff(np.append(starts, order.size))
    if not starts.size:
        backwards = first = last = np.empty(0, np.int64)
    else:
        backwards = np.add.reduceat(backward[order], starts, dtype=np.int64)
        if (table.time_ns[1:] >= table.time_ns[:-1]).all():
            # in order of time, as captures mostly are: a group's first row is its earliest
            first, last = table.time_ns[leader], table.time_ns[order[starts + sizes - 1]]
        else:
            first, last = extremes(member, starts.size, table.time_ns, table.time_ns)
    hint = np.zeros(starts.size, np.uint8)
    telling, opened = _openers(table, backward)
    np.bitwise_or.at(hint, member[telling], opened)
    protocol = table.protocol[leader]
    if wrap is None:
        wrap_forward = wrap_backward = unwrapped(starts.size)
    else:
        zero = np.uint64(0)
        wrap_forward = common(np.where(backward, zero, wrap)[order], starts)
        wrap_backward = common(np.where(backward, wrap, zero)[order], starts)
    return (
        Flows(
            hash=hashes[leader],
            version=table.version[leader],
            protocol=protocol,
            low_address=np.where(turned, dst, src),
            low_port=np.where(turned, dport, sport),
            high_address=np.where(turned, src, dst),
            high_port=np.where(turned, sport, dport),
            forward=sizes - backwards,
            backward=backwards,
            first_ns=first,
            last_ns=last,
            first_backward=turned,
            hint=hint,
            wrap_forward=wrap_forward,
            wrap_backward=wrap_backward,
        ),
        member,
    )


def _openers(table: PacketTable, backward: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the packets that tell who opened their conversation (SYNs, queries, their answers), and who."""
    # flags are 0 without TCP, so the few packets that matter are found without looking at the protocol
    syn = np.flatnonzero((table.tcp_flags & np.uint16(_SYN)) != 0)
    by_receiver = (table.tcp_flags[syn] & np.uint16(_SYN_ACK)) == _SYN_ACK
    icmp = np.flatnonzero((table.protocol == ICMP) | (table.protocol == ICMPV6))
    if not icmp.size:
        rows, answered = syn, by_receiver
    else:
        kind, v4 = table.icmp_type[icmp], table.protocol[icmp] == ICMP
        answer = np.where(
            v4,
            (kind == ECHO_REPLY) | (kind == 14) | (kind == 16) | (kind == 18),
            kind == ECHO_REPLY_V6,
        )
        query = np.where(
            v4, (kind == ECHO_REQUEST) | (kind == 13) | (kind == 15) | (kind == 17), kind == ECHO_REQUEST_V6
        )
        telling = answer | query
        rows = np.concatenate([syn, icmp[telling]])
        answered = np.concatenate([by_receiver, answer[telling]])
    high = backward[rows] ^ answered
    return rows, np.where(high, np.uint8(HIGH_OPENED), np.uint8(LOW_OPENED))


def merge_flows(parts: Sequence[Flows]) -> tuple[Flows, NDArray[np.int64]]:
    """Merge partial groups into one row a conversation.

    Returns the merged flows and, for each row of the concatenated parts, its index among them.
    """
    if not parts:
        return group_flows_empty(), np.empty(0, np.int64)

    def column(name: str) -> NDArray[Any]:
        # one column at a time: the parts of a long capture are large, and all of them at once larger
        return np.concatenate([getattr(part, name) for part in parts])

    hashes = column("hash")
    order, starts = sorted_groups(hashes)
    member = members(order, starts)
    leader = order[starts]
    first_ns = column("first_ns")
    earliest, latest = extremes(member, starts.size, first_ns, column("last_ns"))
    # the earliest part speaks for its group, so that "first packet" stays true; of several the first, written last
    spot = np.flatnonzero(first_ns == earliest[member])[::-1]
    opener = np.empty(starts.size, np.int64)
    opener[member[spot]] = spot
    merged = Flows(
        hash=hashes[leader],
        version=column("version")[leader],
        protocol=column("protocol")[leader],
        low_address=column("low_address")[leader],
        low_port=column("low_port")[leader],
        high_address=column("high_address")[leader],
        high_port=column("high_port")[leader],
        forward=added_up(member, starts.size, column("forward")),
        backward=added_up(member, starts.size, column("backward")),
        first_ns=earliest,
        last_ns=latest,
        first_backward=column("first_backward")[opener],
        hint=np.bitwise_or.reduceat(column("hint")[order], starts),
        wrap_forward=_common([part.wrap_forward for part in parts], order, starts),
        wrap_backward=_common([part.wrap_backward for part in parts], order, starts),
    )
    return merged, member


def unwrapped(flows: int) -> NDArray[np.uint64]:
    """Return zeros that take no memory: what flows are wrapped in that stand in no tunnel, as nearly all do."""
    return np.broadcast_to(np.uint64(0), (flows,))


def _common(
    wraps: Sequence[NDArray[np.uint64]], order: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.uint64]:
    if all(wrap.strides == (0,) for wrap in wraps):
        return unwrapped(starts.size)
    return common(np.concatenate(wraps)[order], starts)


def group_flows_empty() -> Flows:
    """Return a table of no flows."""
    kinds: dict[str, Any] = {
        "hash": np.uint64, "version": np.uint8, "protocol": np.uint8, "low_address": np.uint32,
        "low_port": np.uint16, "high_address": np.uint32, "high_port": np.uint16, "forward": np.int64,
        "backward": np.int64, "first_ns": np.int64, "last_ns": np.int64, "first_backward": np.bool_,
        "hint": np.uint8, "wrap_forward": np.uint64, "wrap_backward": np.uint64,
    }  # fmt: skip
    return Flows(**{name: np.empty(0, kind) for name, kind in kinds.items()})
