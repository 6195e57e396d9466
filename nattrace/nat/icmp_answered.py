"""Packets that an ICMP error answered: probes that expired, what was refused. They are not lost.

A packet that was seen at one point and not at the next, but of which an error at the same point says what became of
it, was turned back in between, or passed the next point unseen. Nothing here pairs errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.match.errors.quoted import flows_of_quotes
from nattrace.match.keys import M1, mix
from nattrace.match.pairing import group_ids
from nattrace.nat.hops import ICMP_ANSWERED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows
    from nattrace.match.outcome import Unmatched

#: Errors come at once, or when a neighbour has not answered ARP for three seconds (kernel: mcast_solicit).
_ANSWER_NS: Final = 5_000_000_000


@dataclass(slots=True)
class IcmpAnswers:
    """What the errors of each layer quote. Lists are by layer, their arrays by row of the layer's errors."""

    flow: list[NDArray[np.int64]]
    backward: list[NDArray[np.bool_]]
    key: list[NDArray[np.uint64]]
    time_ns: list[NDArray[np.int64]]
    #: by layer: (packet numbers, errors that answer them), as far as they were asked for
    found: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, errors: Sequence[Errors], flows: Sequence[Flows]) -> IcmpAnswers:
        """Look up the flows that errors quote; both lists are by layer."""
        answers = cls([], [], [], [])
        for own, at in zip(errors, flows, strict=True):
            flow, backward = flows_of_quotes(own, at)
            answers.flow.append(flow)
            answers.backward.append(backward)
            answers.key.append(_key(flow, backward, own.quoted.ip_id, own.quoted.seq))
            answers.time_ns.append(own.packets.time_ns)
        return answers

    def flows(self, layer: int, flow: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which merged flows of a layer some error there speaks of."""
        spoken_of: NDArray[np.bool_] = np.isin(flow, self.flow[layer])
        return spoken_of

    def answered(self, layer: int, record: Unmatched) -> NDArray[np.bool_]:
        """Say which unmatched packets of a layer were answered: each error answers the last one that it can quote."""
        result = np.zeros(record.flow.size, np.bool_)
        about = np.flatnonzero(self.flow[layer] >= 0)
        rows = np.flatnonzero(self.flows(layer, record.flow)) if about.size else about
        if not rows.size:
            return result
        key = _key(record.flow[rows], record.backward[rows], record.ip_id[rows], record.seq[rows])
        group = np.concatenate(group_ids(key, self.key[layer][about]))
        time = np.concatenate([record.time_ns[rows], self.time_ns[layer][about]])
        order = np.lexsort((np.arange(time.size), time, group))
        place = np.arange(time.size)
        last = np.maximum.accumulate(np.where(order < rows.size, place, -1))
        error = place[order >= rows.size]
        packet = last[error]
        error, packet = order[error[packet >= 0]], order[packet[packet >= 0]]
        good = (group[packet] == group[error]) & (time[error] - time[packet] <= _ANSWER_NS)
        error, packet = error[good], packet[good]
        result[rows[packet]] = True
        self.found.setdefault(layer, []).append((record.number[rows[packet]], about[error - rows.size]))
        return result

    def last_word(self, reasons: Mapping[int, NDArray[np.uint8]]) -> dict[int, NDArray[np.int64]]:
        """Return by layer the errors that answered packets of which nothing else is known.

        `reasons` are those of all packets, by layer and packet number.
        """
        told = {}
        for layer, parts in self.found.items():
            numbers, errors = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            told[layer] = np.unique(errors[reasons[layer][numbers] == ICMP_ANSWERED])
        return told


def _key(
    flow: NDArray[np.int64], backward: NDArray[np.bool_], ip_id: NDArray[np.uint32], seq: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    word = (flow.astype(np.uint64) << np.uint64(1)) | backward
    return mix(word * M1 ^ (ip_id.astype(np.uint64) << np.uint64(32) | seq))
