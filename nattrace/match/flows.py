"""Flows at one point: conversations, both directions (RFC 5103 biflow), as tables, and grouping in general.

A flow here is what one point alone can see: a protocol and two endpoints. `roll` numbers them while packets are read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Bits of `Flows.hint`: who certainly opened the conversation.
LOW_OPENED, HIGH_OPENED = 1, 2

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

    def take(self, rows: NDArray[Any] | slice) -> Flows:
        """Return the given rows."""
        return Flows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Flows]) -> Flows:
        """Return all rows in order."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    @classmethod
    def empty(cls, rows: int = 0) -> Flows:
        """Return a table of `rows` rows of zeros."""
        return cls(**{name: np.zeros(rows, kind) for name, kind in _KINDS.items()})


_KINDS: dict[str, Any] = {
    "hash": np.uint64, "version": np.uint8, "protocol": np.uint8, "low_address": np.uint32,
    "low_port": np.uint16, "high_address": np.uint32, "high_port": np.uint16, "forward": np.int64,
    "backward": np.int64, "first_ns": np.int64, "last_ns": np.int64, "first_backward": np.bool_,
    "hint": np.uint8, "wrap_forward": np.uint64, "wrap_backward": np.uint64,
}  # fmt: skip


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


def unwrapped(flows: int) -> NDArray[np.uint64]:
    """Return zeros that take no memory: what flows are wrapped in that stand in no tunnel, as nearly all do."""
    return np.broadcast_to(np.uint64(0), (flows,))
