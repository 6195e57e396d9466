"""Packets that an ICMP error answered: probes that expired, what was refused. They are not lost.

A packet that was seen at one point and not at the next, but of which an error at the same point says what became of
it, was turned back in between, or passed the next point unseen. Where the capture does not hold what an error quotes,
nobody knows what became of any packet whose sender it went to. Nothing here pairs errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.errors.quoted import flows_of_quotes
from nattrace.match.errors.unread import ANSWER_NS
from nattrace.match.keys import M1, SEQ_END, mix
from nattrace.match.pairing import group_ids
from nattrace.nat.hops import ICMP_ANSWERED, ONE_SIDED, UNKNOWABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.errors.unread import Unread
    from nattrace.match.flows import Flows
    from nattrace.match.outcome import Unmatched


@dataclass(slots=True)
class IcmpAnswers:
    """What the errors of each layer quote. Lists are by layer, their arrays by row of the layer's errors."""

    flows: Sequence[Flows]  #: merged flows
    unread: Sequence[Unread]  #: errors that could quote any of them
    flow: list[NDArray[np.int64]]
    backward: list[NDArray[np.bool_]]
    key: list[NDArray[np.uint64]]
    whole: list[NDArray[np.bool_]]  #: False: what has a sequence number is cut off before it
    time_ns: list[NDArray[np.int64]]
    #: by layer: (packet numbers, errors that answer them), as far as they were asked for
    found: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = field(default_factory=dict)
    doubtful: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)  #: by layer: packet numbers

    @classmethod
    def of(cls, errors: Sequence[Errors], unread: Sequence[Unread], flows: Sequence[Flows]) -> IcmpAnswers:
        """Look up the flows that errors quote; all lists are by layer."""
        answers = cls(flows, unread, [], [], [], [], [])
        for own, at in zip(errors, flows, strict=True):
            flow, backward = flows_of_quotes(own, at)
            answers.flow.append(flow)
            answers.backward.append(backward)
            answers.key.append(_key(flow, backward, own.quoted.ip_id, own.quoted_seq()))
            answers.whole.append(own.quoted.l4_visible >= SEQ_END)
            answers.time_ns.append(own.packets.time_ns)
        return answers

    def spoken_of(self, layer: int, flow: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which merged flows of a layer some error there speaks of."""
        spoken_of: NDArray[np.bool_] = np.isin(flow, self.flow[layer])
        return spoken_of

    def answered(self, layer: int, record: Unmatched) -> NDArray[np.bool_]:
        """Say which unmatched packets of a layer were answered: each error answers the last one that it can quote."""
        result = np.zeros(record.flow.size, np.bool_)
        about = np.flatnonzero(self.flow[layer] >= 0)
        rows = np.flatnonzero(self.spoken_of(layer, record.flow)) if about.size else about
        if not rows.size:
            return result
        for whole in (True, False):
            quoting = about[self.whole[layer][about] == whole]
            if quoting.size:
                packet, error = self._last_quoted(layer, record, rows, quoting, whole=whole)
                result[packet] = True
                self.found.setdefault(layer, []).append((record.number[packet], error))
        return result

    def _last_quoted(
        self,
        layer: int,
        record: Unmatched,
        rows: NDArray[np.int64],
        about: NDArray[np.int64],
        *,
        whole: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the packets, of `rows`, that the errors `about` answer, and these errors."""
        seq = record.seq[rows] if whole else np.zeros(rows.size, np.uint32)
        key = _key(record.flow[rows], record.backward[rows], record.ip_id[rows], seq)
        group = np.concatenate(group_ids(key, self.key[layer][about]))
        time = np.concatenate([record.time_ns[rows], self.time_ns[layer][about]])
        order = np.lexsort((np.arange(time.size), time, group))
        place = np.arange(time.size)
        last = np.maximum.accumulate(np.where(order < rows.size, place, -1))
        error = place[order >= rows.size]
        packet = last[error]
        error, packet = order[error[packet >= 0]], order[packet[packet >= 0]]
        good = (group[packet] == group[error]) & (time[error] - time[packet] <= ANSWER_NS)
        return rows[packet[good]], about[error[good] - rows.size]

    def maybe_answered(self, layer: int, record: Unmatched) -> NDArray[np.bool_]:
        """Say about which unmatched packets of a layer an error may be whose quote the capture does not hold."""
        at = self.flows[layer]
        low, high = at.low_address[record.flow], at.high_address[record.flow]
        src = np.where(record.backward, high, low)
        asked = self.unread[layer].may_answer(at.version[record.flow], src, record.time_ns, record.time_ns)
        if asked.any():
            self.doubtful.setdefault(layer, []).append(record.number[asked])
        return asked

    def last_word(self, reasons: Mapping[int, NDArray[np.uint8]]) -> dict[int, NDArray[np.int64]]:
        """Return by layer the errors that answered packets of which nothing else is known.

        `reasons` are those of all packets, by layer and packet number.
        """
        told = {}
        for layer, parts in self.found.items():
            numbers, errors = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            told[layer] = np.unique(errors[reasons[layer][numbers] == ICMP_ANSWERED])
        return told

    def in_doubt(self, reasons: Mapping[int, NDArray[np.uint8]]) -> dict[int, int]:
        """Return by layer of how many packets nothing is known because errors cannot be read."""
        told = {}
        for layer, parts in self.doubtful.items():
            reason = reasons[layer][np.unique(np.concatenate(parts))]
            if count := int(((reason == ONE_SIDED) | (reason == UNKNOWABLE)).sum()):
                told[layer] = count
        return told


def _key(
    flow: NDArray[np.int64], backward: NDArray[np.bool_], ip_id: NDArray[np.uint32], seq: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    word = (flow.astype(np.uint64) << np.uint64(1)) | backward
    return mix(word * M1 ^ (ip_id.astype(np.uint64) << np.uint64(32) | seq))
