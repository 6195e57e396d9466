"""Clocks: which captures were taken on one clock, and how far apart the others are.

Works on the samples of all captures (see `clock_sample`) after they have been read once. Two captures share a clock
as long as nothing contradicts it: packets of both directions are then seen in the order in which they passed.
Otherwise lines are fitted (see `clock`) along the shortest chain to the reference. An offset is believed only
when many packets with numbers of their own agree on it; this module never pairs packets for the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nattrace.match import evidence
from nattrace.match.clock import MIN_PIECE, MIN_SIDE, Bounds, Line, Piece, fit
from nattrace.match.clock_sample import Sampled, distinct, shared
from nattrace.match.keys import M1, mix
from nattrace.match.unique import FAR_NS
from nattrace.match.windows import REACH_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nattrace.match.clock_sample import Sample, Shared

#: Packets with numbers of their own that must agree before an offset is believed.
MIN_KEYS = 8

#: Share of the packets in common that must agree.
MIN_SHARE = 0.5

#: Timestamps of one host never contradict their order by more (processors' clocks, timestamps of drivers).
SAME_CLOCK_NS = 10_000

#: Share of packets that may contradict that two captures share a clock: wrong pairs.
_STRAY_SHARE = 0.01

#: Bits of agreement (see `evidence`) of a TCP connection's two random initial sequence numbers (RFC 6528), of one
#: direction's IP identifications, which may be a counter that any run starts at random, and of each
#: identification that does not follow from the one before.
_BITS_CONNECTION, _BITS_COUNTER, _BITS_JUMP, _BITS_LANE = 48, 16, 8, 24

#: Two packets of one conversation are compared for causality when clocks cannot run apart by much in between.
_RUN_APART = 2e-4

#: Pairs of captures that are compared: those with most packets in common.
_MOST_PAIRS = 512


@dataclass(frozen=True, slots=True)
class Turn:
    """Where one capture passes from one line to the next: between two frames of its file, or two readings."""

    frame_before: int
    frame_after: int
    time_before_ns: int
    time_after_ns: int


@dataclass(frozen=True, slots=True)
class Correction:
    """What to take off one capture's timestamps. `turns` has one item less than `lines`."""

    lines: tuple[Line, ...]
    turns: tuple[Turn, ...] = ()

    def reference_time(self, frame: NDArray[np.uint32], time_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the reference clock's time (int64 ns) for readings at the given frames of the file."""
        result = time_ns - self.lines[0].offsets(time_ns)
        for line, turn in zip(self.lines[1:], self.turns, strict=True):
            later = frame >= turn.frame_after
            # in between nothing was compared: the nearer reading decides
            nearer = np.abs(time_ns - turn.time_after_ns) < np.abs(time_ns - turn.time_before_ns)
            later |= (frame > turn.frame_before) & nearer
            result = np.where(later, time_ns - line.offsets(time_ns), result)
        return result


@dataclass(frozen=True, slots=True)
class Clocks:
    """What is known of the clocks of all captures; lists are by capture."""

    reference: int
    corrections: tuple[Correction | None, ...]  #: None: the reference's clock, or not known
    bounds_ns: tuple[int | None, ...]  #: error of the correction; None: unknown
    known: tuple[bool, ...]  #: False: this clock contradicts the others, and no line was found
    group: tuple[int, ...]  #: captures of one clock have one number

    def between(self, first: int, second: int) -> int | None:
        """Return how wrong the difference of two corrected times of two captures may be; None: unknown."""
        if self.group[first] == self.group[second]:
            return 0
        if not (self.known[first] and self.known[second]):
            return None
        one, other = self.bounds_ns[first], self.bounds_ns[second]
        return None if one is None or other is None else one + other


#: Says which packets of a point were matched at another point: (point, other point, packet numbers) -> bool array.
Matched: TypeAlias = "Callable[[int, int, NDArray[np.int64]], NDArray[np.bool_]]"


@dataclass(slots=True)
class _Pair:
    """Packets that two captures share, in the order in which they were sent."""

    first: Sampled  #: same rows as `second`
    second: Sampled
    side: NDArray[np.int8]  #: 1: passed the first capture first, -1: the second, 0: not known
    lane: NDArray[np.uint64]  #: one number for each conversation and direction

    @property
    def delta_ns(self) -> NDArray[np.int64]:
        return self.second.time_ns - self.first.time_ns


def compare(samples: Sequence[Sample], reference: int, matched: Matched) -> Clocks | None:
    """Return the clocks of the captures; None when nothing speaks against all of them being one.

    Packets without a number of their own count only where matching found them at both captures.
    """
    bits = max(sample.bits for sample in samples)
    kept = []
    for sample in samples:
        sample.thin(bits)
        packets = sample.packets()
        kept.append(None if packets is None else packets.take(distinct(packets)))
    tick_ns = max((_tick_ns(each.time_ns) for each in kept if each is not None), default=0)
    pairs = _pairs(kept, matched)
    apart = {key for key, pair in pairs.items() if _contradicts(pair, tick_ns)}
    if not apart:
        return None
    group = _groups(len(samples), pairs, apart)
    return _place(group, reference, pairs, tick_ns)


def _tick_ns(time_ns: NDArray[np.int64]) -> int:
    """Return how coarse readings are: 0 for ns, 1000 for us, 1000000 for ms."""
    return next((size for size in (10**9, 10**6, 10**3) if not (time_ns % size).any()), 0)


# -- pairs of captures ------------------------------------------------------------------------------------


def _pairs(kept: Sequence[Sampled | None], matched: Matched) -> dict[tuple[int, int], _Pair]:
    """Return the pairs of captures that have enough packets in common."""
    found: dict[tuple[int, int], _Pair] = {}
    for i, j in _in_common(kept):
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
    keys = [np.empty(0, np.uint64) if each is None else np.unique(each.key) for each in kept]
    present = [n for n, each in enumerate(keys) if each.size]
    if len(present) < 2:
        return []
    merged = np.concatenate([keys[n] for n in present])
    owner = np.repeat(np.array(present), [keys[n].size for n in present])
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


def _believable(
    first: Sampled, second: Sampled, both: Shared, matched: Matched
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shared packets without those that neither have a number of their own nor were matched."""
    sure = first.strong[both.a] & second.strong[both.b]
    weak = np.flatnonzero(~sure)
    if weak.size:
        codes = first.point[both.a[weak]] << 32 | second.point[both.b[weak]]
        for code in np.unique(codes).tolist():
            rows = weak[codes == code]
            p, q = code >> 32, code & 0xFFFFFFFF
            sure[rows] = matched(p, q, first.number[both.a[rows]])
            sure[rows] &= matched(q, p, second.number[both.b[rows]])
    return both.a[sure], both.b[sure]


def _steady(packets: Sampled) -> NDArray[np.int64]:
    """Return for each row the latest reading up to its frame: time that never runs backwards."""
    order = np.argsort(packets.frame, kind="stable")
    steady = np.empty(len(packets), np.int64)
    steady[order] = np.maximum.accumulate(packets.time_ns[order])
    return steady


def _in_order(first: Sampled, second: Sampled, rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> _Pair:
    a, b = rows
    order = np.lexsort((second.frame[b], first.frame[a], _steady(second)[b], _steady(first)[a]))
    one, other = first.take(a[order]), second.take(b[order])
    points = one.point.astype(np.uint64) << np.uint64(32) | other.point.astype(np.uint64)
    lane = mix(one.flow ^ (points + np.uint64(1)) * M1)
    return _Pair(one, other, _sides(one, other, lane), lane ^ one.backward)


def _sides(first: Sampled, second: Sampled, flow: NDArray[np.uint64]) -> NDArray[np.int8]:
    """Return for each packet which capture it passed first: 1, -1, or 0 where nothing tells.

    Inside a conversation, the two directions tell: a request is seen later where it comes to, a reply earlier,
    and their difference is the time on the way, whatever the clocks. The TTL, which falls, tells where that
    does not, unless it is found to rise: routers may set it.
    """
    if not flow.size:
        return np.zeros(0, np.int8)
    _, member = np.unique(flow, return_inverse=True)
    member = member.reshape(-1)
    total = int(member.max()) + 1
    turned = np.where(first.backward, -1, 1)
    drop = (first.ttl.astype(np.int64) - second.ttl) * turned
    by_ttl = np.sign(np.bincount(member, drop, total))

    order = np.argsort(member, kind="stable")
    here, there = order[:-1], order[1:]
    facing = (member[here] == member[there]) & (first.backward[here] != first.backward[there])
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


def _contradicts(pair: _Pair, tick_ns: int) -> bool:
    """Say whether two captures cannot have been taken on one clock."""
    delta = pair.delta_ns
    strays = delta * pair.side < -(SAME_CLOCK_NS + tick_ns)
    strays |= np.abs(delta) > REACH_NS
    upper, lower = int((pair.side > 0).sum()), int((pair.side < 0).sum())
    if min(upper, lower) < MIN_SIDE and int(np.abs(delta).min()) > FAR_NS:
        # all went one way, and the quickest of them took longer than any queue holds all packets
        strays |= True
    count = int(strays.sum())
    if count < MIN_SIDE:
        return False
    if count > _STRAY_SHARE * strays.size:
        return True
    together = np.convolve(strays[pair.side != 0], np.ones(MIN_PIECE), "valid")
    return bool(together.size and together.max() >= MIN_PIECE // 2)


# -- groups of captures -----------------------------------------------------------------------------------


def _groups(captures: int, pairs: dict[tuple[int, int], _Pair], apart: set[tuple[int, int]]) -> list[int]:
    """Return one number for each capture, the same for captures of one clock.

    The pairs with least room for an offset are joined first: neighbours on one host are closest.
    """
    group = list(range(captures))

    def room(key: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        delta, side = pairs[key].delta_ns, pairs[key].side
        if (side > 0).sum() < MIN_SIDE or (side < 0).sum() < MIN_SIDE:
            return float("inf"), key
        return float(np.quantile(delta[side > 0], 0.05) - np.quantile(delta[side < 0], 0.95)), key

    for i, j in sorted(set(pairs) - apart, key=room):
        if any({group[p], group[q]} == {group[i], group[j]} for p, q in apart):
            continue
        old, new = max(group[i], group[j]), min(group[i], group[j])
        group = [new if g == old else g for g in group]
    return group


@dataclass(slots=True)
class _Placed:
    """A group whose way to the reference clock is known."""

    bound_ns: int | None
    corrections: dict[int, Correction] = field(default_factory=dict)  #: by capture; none for the reference


def _place(group: list[int], reference: int, pairs: dict[tuple[int, int], _Pair], tick_ns: int) -> Clocks:
    """Fit every group against one that is placed already, the one with the smallest error first."""
    placed = {group[reference]: _Placed(0)}
    linked = {frozenset((group[i], group[j])) for i, j in pairs}
    tried: dict[tuple[int, int], tuple[int | None, dict[int, Correction]] | None] = {}
    while True:
        best: tuple[tuple[bool, int, int, int], int, _Placed] | None = None
        for parent, child in sorted((p, c) for p in placed for c in set(group) - set(placed)):
            if frozenset((parent, child)) not in linked:
                continue
            if (parent, child) not in tried:
                tried[parent, child] = _link(group, parent, placed[parent], child, pairs, tick_ns)
            link = tried[parent, child]
            if link is None:
                continue
            so_far, own = placed[parent].bound_ns, link[0]
            bound = None if so_far is None or own is None else so_far + own
            rank = (bound is None, bound or 0, parent, child)
            if best is None or rank < best[0]:
                best = rank, child, _Placed(bound, link[1])
        if best is None:
            break
        placed[best[1]] = best[2]
    alone = {g for g in group if not any(g in link and len(link) > 1 for link in linked)}
    return Clocks(
        reference=reference,
        corrections=tuple(placed[g].corrections.get(n) if g in placed else None for n, g in enumerate(group)),
        bounds_ns=tuple(placed[g].bound_ns if g in placed else None for g in group),
        # what shares no packet with anything contradicts nothing
        known=tuple(g in placed or g in alone for g in group),
        group=tuple(group[reference] if g in alone else g for g in group),
    )


def _link(
    group: list[int],
    parent: int,
    above: _Placed,
    child: int,
    pairs: dict[tuple[int, int], _Pair],
    tick_ns: int,
) -> tuple[int | None, dict[int, Correction]] | None:
    """Fit one group's clock against another group's, which is corrected already.

    Returns the error that comes on top of the parent's (None: unknown) and the corrections of the group's
    captures; None where no offset is to be believed.
    """
    parts = []
    for (i, j), pair in pairs.items():
        if {group[i], group[j]} != {parent, child}:
            continue
        turn = group[i] == child  # the child's packets are the pair's first ones
        near, far = (pair.second, pair.first) if turn else (pair.first, pair.second)
        up, own = (j, i) if turn else (i, j)
        correction = above.corrections.get(up)
        reference_ns = (
            near.time_ns if correction is None else correction.reference_time(near.frame, near.time_ns)
        )
        side = -pair.side if turn else pair.side
        parts.append((own, far, reference_ns, side, pair.lane))
    if not parts:
        return None
    far = Sampled.concatenate([part[1] for part in parts])
    reference_ns = np.concatenate([part[2] for part in parts])
    side = np.concatenate([part[3] for part in parts])
    lane = np.concatenate([part[4] for part in parts])
    owner = np.repeat(np.array([part[0] for part in parts]), [len(part[1]) for part in parts])
    steady_near = np.concatenate([np.maximum.accumulate(part[2]) for part in parts])
    steady_far = np.concatenate([np.maximum.accumulate(part[1].time_ns) for part in parts])
    if len(parts) > 1:
        order = np.lexsort((steady_far, steady_near))
        far, owner = far.take(order), owner[order]
        reference_ns, side, lane = reference_ns[order], side[order], lane[order]
    bounds = Bounds(far.time_ns, far.time_ns - reference_ns, side)
    pieces = fit(bounds, tick_ns)
    if pieces is None or not all(_to_be_believed(bounds, far, lane, piece) for piece in pieces):
        return None
    errors = [piece.line.bound_ns for piece in pieces]
    known = [error for error in errors if error is not None]
    bound = max(known) if len(known) == len(errors) else None
    captures = [n for n, g in enumerate(group) if g == child]
    return bound, {n: _correction(pieces, far, owner == n) for n in captures}


def _to_be_believed(bounds: Bounds, far: Sampled, lane: NDArray[np.uint64], piece: Piece) -> bool:
    """Say whether the packets that agree on a line are many, and no repetition of earlier ones.

    Runs of one test may repeat payloads, and counters of IP identifications may even start alike; connections'
    initial sequence numbers and unsteady identifications do not.
    """
    rows = slice(piece.start, piece.stop)
    of, packets, lanes = bounds.take(rows), far.take(np.arange(piece.start, piece.stop)), lane[rows]
    agree = np.abs(of.delta_ns - piece.line.offsets(of.time_ns)) <= REACH_NS
    if agree.sum() < MIN_KEYS or agree.mean() < MIN_SHARE:
        return False
    if int(np.abs(of.delta_ns[agree]).max()) <= REACH_NS:
        return True  # near enough to have been matched as they are
    agree &= packets.strong
    return (
        int(agree.sum()) >= MIN_KEYS
        and _bits(packets.take(np.flatnonzero(agree)), lanes[agree]) >= evidence.STRONG
    )


def _bits(packets: Sampled, lane: NDArray[np.uint64]) -> int:
    """Return how much the numbers of packets found at another time say, in bits."""
    connections = np.unique(packets.flow[packets.numbered]).size
    counted = np.flatnonzero(~packets.numbered & (packets.ip_id != 0))
    if not counted.size:
        return connections * _BITS_CONNECTION
    order = counted[np.lexsort((packets.frame[counted], lane[counted]))]
    lanes, place = np.unique(lane[order], return_inverse=True)
    ids = packets.ip_id[order].astype(np.int64)
    # counters go up by one, in either byte order; what else follows is another throw of the dice
    gone_on = np.isin(np.diff(ids) % 65536, (0, 1, 256))
    jump = np.append(False, ~gone_on & (place.reshape(-1)[1:] == place.reshape(-1)[:-1]))
    bits = np.minimum(
        _BITS_COUNTER + _BITS_JUMP * np.bincount(place.reshape(-1), jump, lanes.size), _BITS_LANE
    )
    return connections * _BITS_CONNECTION + int(bits.sum())


def _correction(pieces: list[Piece], far: Sampled, mine: NDArray[np.bool_]) -> Correction:
    """Return one capture's correction: lines are its clock's, frames its own."""
    turns = []
    for piece in pieces[1:]:
        rows = np.arange(len(far))
        before, after = rows[(rows < piece.start) & mine], rows[(rows >= piece.start) & mine]
        turns.append(
            Turn(
                frame_before=int(far.frame[before].max(initial=0)),
                frame_after=int(far.frame[after].min(initial=2**32 - 1)),
                time_before_ns=int(far.time_ns[piece.start - 1]),
                time_after_ns=int(far.time_ns[piece.start]),
            )
        )
    return Correction(tuple(piece.line for piece in pieces), tuple(turns))
