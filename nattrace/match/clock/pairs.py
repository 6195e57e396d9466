"""Clock pairs: what two captures that share packets say of their clocks, before anything is fitted.

Puts the packets in the order in which they were sent, finds out which capture each passed first, and says whether
the two captures can have been taken on one clock. It estimates no offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nattrace.match.clock.fit import MIN_PIECE
from nattrace.match.clock.line import MIN_SIDE
from nattrace.match.clock.sample import Sampled, shared
from nattrace.match.counters import counts_up
from nattrace.match.edges import ttl_drop
from nattrace.match.keys import M1, mix
from nattrace.match.unique import FAR_NS
from nattrace.match.windows import REACH_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.match.clock.sample import Shared

#: Packets with numbers of their own that must agree before an offset is believed.
MIN_KEYS = 8

#: Timestamps of one host never contradict their order by more (processors' clocks, timestamps of drivers).
SAME_CLOCK_NS = 10_000

#: Copies of a packet do contradict it: a bridge that floods, or whose tap also gets what only passes it, shows both
#: directions later than another tap, or earlier, and how much is up to how busy the host is (18 us were measured).
#: Nothing routes a copy, so its TTL is the same.
COPIES_NS = 100_000

#: Packets that all went one way speak of another clock when all come earlier by so much than they can.
_EARLY_NS = 100_000_000

#: Share of packets that may contradict that two captures share a clock: wrong pairs.
_STRAY_SHARE = 0.01

#: Two packets of one conversation are compared for causality when clocks cannot run apart by much in between.
_RUN_APART = 2e-4

#: Pairs of captures that are compared: those with most packets in common.
_MOST_PAIRS = 512


#: Says which packets of a point were matched at another point: (point, other point, packet numbers) -> bool array.
Matched: TypeAlias = "Callable[[int, int, NDArray[np.int64]], NDArray[np.bool_]]"


@dataclass(slots=True)
class CapturePair:
    """Packets that two captures share, in the order in which they were sent."""

    first: Sampled  #: same rows as `second`
    second: Sampled
    side: NDArray[np.int8]  #: 1: passed the first capture first, -1: the second, 0: not known
    lane: NDArray[np.uint64]  #: one number for each conversation and direction

    @property
    def delta_ns(self) -> NDArray[np.int64]:
        """The second capture's readings less the first's, int64 ns."""
        return self.second.time_ns - self.first.time_ns


def pairs_of(
    kept: Sequence[Sampled | None], known: Sequence[str | None], matched: Matched
) -> dict[tuple[int, int], CapturePair]:
    """Return the pairs of captures, not known to be of one clock, that have enough packets in common."""
    found: dict[tuple[int, int], CapturePair] = {}
    for i, j in _in_common(kept):
        if known[i] is not None and known[i] == known[j]:
            continue
        first, second = kept[i], kept[j]
        assert first is not None
        assert second is not None
        both = shared(first, second)
        pair = _in_order(first, second, _believable(first, second, both, matched))
        if len(pair.first) >= MIN_KEYS:
            found[i, j] = pair
    return found


def _in_common(kept: Sequence[Sampled | None]) -> list[tuple[int, int]]:
    """Return the pairs of captures with at least MIN_KEYS keys in common, at most _MOST_PAIRS of them."""
    present = [n for n, each in enumerate(kept) if each is not None and len(each) >= MIN_KEYS]
    if len(present) <= 2:
        return [(present[0], present[1])] if len(present) == 2 else []
    keys = [_ascending(each.key) for each in kept if each is not None and len(each) >= MIN_KEYS]
    merged = np.concatenate(keys)
    owner = np.repeat(np.array(present), [each.size for each in keys])
    order = np.lexsort((owner, merged))
    merged, owner = merged[order], owner[order]
    total = len(kept)
    counts = np.zeros(0, np.int64)
    codes = np.zeros(0, np.int64)
    # a packet that many captures share links each of them with the next few, which is enough for a chain
    for step in range(1, min(len(present), 16)):
        same = merged[step:] == merged[:-step]
        if not same.any():
            break
        code, count = np.unique(owner[:-step][same] * total + owner[step:][same], return_counts=True)
        codes, place = np.unique(np.concatenate([codes, code]), return_inverse=True)
        counts = np.bincount(place.reshape(-1), np.concatenate([counts, count]), codes.size).astype(np.int64)
    best = np.argsort(-counts, kind="stable")[:_MOST_PAIRS]
    return sorted(divmod(int(codes[n]), total) for n in best if counts[n] >= MIN_KEYS)


def _ascending(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return ascending keys without repetitions."""
    first = np.append(True, keys[1:] != keys[:-1])
    return keys[np.flatnonzero(first)]


def _believable(
    first: Sampled, second: Sampled, both: Shared, matched: Matched
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shared packets without those that neither have a number of their own nor were matched.

    Nor do those count that a counter may have given their number.
    """
    sure = first.strong[both.a] & second.strong[both.b]
    weak = np.flatnonzero(~sure)
    if weak.size:
        codes = first.point[both.a[weak]] << 32 | second.point[both.b[weak]]
        for code in np.unique(codes).tolist():
            rows = weak[codes == code]
            p, q = code >> 32, code & 0xFFFFFFFF
            sure[rows] = matched(p, q, first.number[both.a[rows]])
            sure[rows] &= matched(q, p, second.number[both.b[rows]])
    sure &= ~_merely_counted(first, second, both)
    return both.a[sure], both.b[sure]


def _merely_counted(first: Sampled, second: Sampled, both: Shared) -> NDArray[np.bool_]:
    """Return which shared packets say what others of their capture say, and differ from these by a counter only.

    Two counters that overlap by chance give such packets the same numbers some packets earlier or later. Captures of
    times that have nothing in common hold no other packets for them.
    """
    result = np.zeros(both.a.size, np.bool_)
    alike = _repeated(first.content)[both.a] | _repeated(second.content)[both.b]
    alike &= _within(first.time_ns[both.a], second.time_ns) | _within(second.time_ns[both.b], first.time_ns)
    asked = np.flatnonzero(alike)
    if asked.size:
        packets = first.take(both.a[asked])
        _, lane = np.unique(mix(packets.flow ^ packets.backward * M1), return_inverse=True)
        result[asked] = counts_up(lane.reshape(-1), packets.time_ns, packets.ip_id)
    return result


def _within(times_ns: NDArray[np.int64], span_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which times are not before the first nor behind the last of the others."""
    result: NDArray[np.bool_] = (times_ns >= span_ns.min()) & (times_ns <= span_ns.max())
    return result


def _repeated(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which keys are there more than once."""
    _, place, count = np.unique(keys, return_inverse=True, return_counts=True)
    result: NDArray[np.bool_] = (count > 1)[place.reshape(-1)]
    return result


def steady(packets: Sampled) -> NDArray[np.int64]:
    """Return for each row the latest reading up to its frame: time that never runs backwards."""
    order = np.lexsort((packets.time_ns, packets.frame))
    steady = np.empty(len(packets), np.int64)
    steady[order] = np.maximum.accumulate(packets.time_ns[order])
    return steady


def _in_order(
    first: Sampled, second: Sampled, rows: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> CapturePair:
    a, b = rows
    order = np.lexsort((second.frame[b], first.frame[a], steady(second)[b], steady(first)[a]))
    one, other = first.take(a[order]), second.take(b[order])
    points = one.point.astype(np.uint64) << np.uint64(32) | other.point.astype(np.uint64)
    flow = mix(one.flow ^ (points + np.uint64(1)) * M1)
    side = _sides(one, other, flow, one.backward)
    if not side.all():
        # the first capture may show the two directions as two conversations, the second as one (a redirect)
        there = mix(other.flow ^ (points + np.uint64(2)) * M1)
        side = np.where(side == 0, _sides(one, other, there, other.backward), side)
    return CapturePair(one, other, side, flow ^ one.backward)


def _sides(
    first: Sampled, second: Sampled, flow: NDArray[np.uint64], backward: NDArray[np.bool_]
) -> NDArray[np.int8]:
    """Return for each packet which capture it passed first: 1, -1, or 0 where nothing tells.

    `flow` is one number for each conversation, `backward` one of its directions.

    Inside a conversation, the two directions tell: a request is seen later where it comes to, a reply earlier,
    and their difference is the time on the way, whatever the clocks. The TTL, which falls, tells where that
    does not, unless it is found to rise: routers may set it.
    """
    if not flow.size:
        return np.zeros(0, np.int8)
    _, member = np.unique(flow, return_inverse=True)
    member = member.reshape(-1)
    total = int(member.max()) + 1
    turned = np.where(backward, -1, 1)
    drop = ttl_drop(first.ttl, second.ttl) * turned
    by_ttl = np.sign(np.bincount(member, drop, total))

    order = np.argsort(member, kind="stable")
    here, there = order[:-1], order[1:]
    facing = (member[here] == member[there]) & (backward[here] != backward[there])
    here, there = here[facing], there[facing]
    delta = second.time_ns - first.time_ns
    on_way = (delta[here] - delta[there]) * turned[here]
    between = np.abs(first.time_ns[here] - first.time_ns[there])
    clear = np.abs(on_way) > _RUN_APART * between
    votes = np.bincount(member[here[clear]], np.sign(on_way[clear]), total)
    count = np.bincount(member[here[clear]], minlength=total)
    by_time = np.where(np.abs(votes) >= 0.8 * np.maximum(count, 1), np.sign(votes), 0)

    both = (by_time != 0) & (by_ttl != 0)
    if 2 * (by_time[both] != by_ttl[both]).sum() > both.sum():
        by_ttl = np.zeros_like(by_ttl)
    way = np.where(by_time != 0, by_time, by_ttl)
    return (way[member] * turned).astype(np.int8)


def contradicts(pair: CapturePair, tick_ns: int) -> bool:
    """Say whether two captures cannot have been taken on one clock."""
    delta = pair.delta_ns
    allowed = np.where(pair.first.ttl == pair.second.ttl, COPIES_NS, SAME_CLOCK_NS) + tick_ns
    strays = delta * pair.side < -allowed
    strays |= np.abs(delta) > REACH_NS
    upper, lower = int((pair.side > 0).sum()), int((pair.side < 0).sum())
    if min(upper, lower) < MIN_SIDE:
        # all went one way, and which one may be a TTL's word only: the quickest of them must have taken longer
        # than any queue holds all packets, or have come far too early
        least = np.where(delta * pair.side < 0, _EARLY_NS, FAR_NS)
        strays = np.full(delta.size, bool((np.abs(delta) > least).all()))
    count = int(strays.sum())
    if count < MIN_SIDE:
        return False
    if count > _STRAY_SHARE * strays.size:
        return True
    together = np.convolve(strays[pair.side != 0], np.ones(MIN_PIECE), "valid")
    return bool(together.size and together.max() >= MIN_PIECE // 2)
