"""Clocks: which captures were taken on one clock, and how far apart the others are.

Works on the samples of all captures (see `sample`) after they have been read once. Two captures share a clock
as long as nothing contradicts it (see `pairs`). Otherwise lines are fitted (see `fit`) along the shortest
chain to the reference. An offset is believed only when many packets with numbers of their own agree on it; this
module never pairs packets for the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match import evidence
from nattrace.match.clock.fit import Piece, fit
from nattrace.match.clock.line import MIN_SIDE, Bounds, Line
from nattrace.match.clock.pairs import MIN_KEYS, CapturePair, contradicts, pairs_of
from nattrace.match.clock.sample import Sampled, distinct
from nattrace.match.windows import REACH_NS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.clock.pairs import Matched
    from nattrace.match.clock.sample import Sample

#: Share of the packets in common that must agree.
MIN_SHARE = 0.5

#: Bits of agreement (see `evidence`) of a TCP connection's two random initial sequence numbers (RFC 6528), of one
#: direction's IP identifications, which may be a counter that any run starts at random, and of each
#: identification that does not follow from the one before.
_BITS_CONNECTION, _BITS_COUNTER, _BITS_JUMP, _BITS_LANE = 48, 16, 8, 24

#: A host's counter of identifications may be this much further than the packets that a point saw.
_COUNTED = 16


#: So many packets at an end of a capture that contradict all others are too few for a line, and too many for chance.
_AT_AN_END = 2


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
    whole: bool = True  #: False: some packets' times are nobody's, for which no line is believed

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

    reference: tuple[int, ...]  #: the capture whose clock is the measure: one for all that a chain connects
    corrections: tuple[Correction | None, ...]  #: None: the reference's clock
    bounds_ns: tuple[int | None, ...]  #: error of the correction; None: unknown
    group: tuple[int, ...]  #: captures of one clock have one number
    #: references whose clocks contradict each other although no line was found
    apart: frozenset[frozenset[int]]

    def between(self, first: int, second: int) -> int | None:
        """Return how wrong the difference of two corrected times of two captures may be; None: unknown."""
        if self.group[first] == self.group[second]:
            return 0
        references = frozenset((self.reference[first], self.reference[second]))
        if len(references) == 2:
            return None if references in self.apart else 0
        one, other = self.bounds_ns[first], self.bounds_ns[second]
        return None if one is None or other is None else one + other


def compare(
    samples: Sequence[Sample], known: Sequence[str | None], order: Sequence[int], matched: Matched
) -> Clocks | None:
    """Return the clocks of the captures; None when nothing speaks against all of them being one.

    `known` are names of clocks that captures are known to be taken on, None where that is not known.
    The reference is the first capture in `order` of those that packets connect. Packets without a number of their
    own count only where matching found them at both captures.
    """
    bits = max(sample.bits for sample in samples)
    kept = []
    for sample in samples:
        sample.thin(bits)
        packets = sample.packets()
        kept.append(None if packets is None else packets.take(distinct(packets)))
    tick_ns = max((_tick_ns(each.time_ns) for each in kept if each is not None), default=0)
    pairs = pairs_of(kept, known, matched)
    apart = {key for key, pair in pairs.items() if contradicts(pair, tick_ns)}
    if not apart:
        return None
    return _place(_groups(known, pairs, apart), order, pairs, apart, tick_ns)


def _tick_ns(time_ns: NDArray[np.int64]) -> int:
    """Return how coarse readings are: 0 for ns, 1000 for us, 1000000 for ms."""
    return next((size for size in (10**9, 10**6, 10**3) if not (time_ns % size).any()), 0)


def _groups(
    known: Sequence[str | None], pairs: dict[tuple[int, int], CapturePair], apart: set[tuple[int, int]]
) -> list[int]:
    """Return one number for each capture, the same for captures of one clock; `known` as in `compare`.

    The pairs with least room for an offset are joined first: neighbours on one host are closest.
    """
    group = [n if clock is None else list(known).index(clock) for n, clock in enumerate(known)]

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
    """A group whose way to a reference clock is known."""

    reference: int  #: capture
    bound_ns: int | None
    corrections: dict[int, Correction] = field(default_factory=dict)  #: by capture; none for the reference


def _place(
    group: list[int],
    order: Sequence[int],
    pairs: dict[tuple[int, int], CapturePair],
    apart: set[tuple[int, int]],
    tick_ns: int,
) -> Clocks:
    """Give every group its way to a reference: the first capture in `order` that is not on any way yet."""
    placed: dict[int, _Placed] = {}
    for capture in order:
        if group[capture] not in placed:
            placed[group[capture]] = _Placed(capture, 0)
            _extend(placed, group, pairs, tick_ns)
    reference = tuple(placed[g].reference for g in group)
    return Clocks(
        reference=reference,
        corrections=tuple(placed[g].corrections.get(n) for n, g in enumerate(group)),
        bounds_ns=tuple(placed[g].bound_ns for g in group),
        group=tuple(group),
        apart=frozenset(frozenset((reference[i], reference[j])) for i, j in apart),
    )


def _extend(
    placed: dict[int, _Placed], group: list[int], pairs: dict[tuple[int, int], CapturePair], tick_ns: int
) -> None:
    """Fit groups against those that are placed, the one with the smallest error first, as far as chains lead."""
    linked = {(group[i], group[j]) for i, j in pairs if group[i] != group[j]}
    ways = sorted(linked | {way[::-1] for way in linked})
    tried: dict[tuple[int, int], tuple[int | None, dict[int, Correction]] | None] = {}
    while True:
        best: tuple[tuple[bool, int, int, int], int, _Placed] | None = None
        for parent, child in ways:
            if parent not in placed or child in placed:
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
                best = rank, child, _Placed(placed[parent].reference, bound, link[1])
        if best is None:
            return
        placed[best[1]] = best[2]


def _link(
    group: list[int],
    parent: int,
    above: _Placed,
    child: int,
    pairs: dict[tuple[int, int], CapturePair],
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
    pieces = None if pieces is None else _believed(bounds, far, lane, pieces)
    if not pieces:
        return None
    errors = [piece.line.bound_ns for piece in pieces]
    known = [error for error in errors if error is not None]
    bound = max(known) if len(known) == len(errors) else None
    captures = [n for n, g in enumerate(group) if g == child]
    whole = _is_whole(bounds, pieces)
    return bound, {n: _correction(pieces, far, owner == n, whole=whole) for n in captures}


def _believed(
    bounds: Bounds, far: Sampled, lane: NDArray[np.uint64], pieces: list[Piece]
) -> list[Piece] | None:
    """Return the lines to be believed; None where that leaves too much of what was compared.

    A clock that is set just after a capture began, or before it ends, leaves few packets to say so. Lines that are as
    near to a believed one as packets are matched without any are kept all the same; a short one that is further away
    is left out: its packets, taken for the next line's, are found nowhere, and nobody knows what the capture missed.
    """
    sure = [piece for piece in pieces if _to_be_believed(bounds, far, lane, piece)]
    kept = []
    for piece in pieces:
        here = bounds.take(slice(piece.start, piece.stop))
        at_ns = int(here.time_ns[0])
        agree = np.abs(here.delta_ns - piece.line.offsets(here.time_ns)) <= REACH_NS
        away_ns = min(
            (abs(each.line.offset(at_ns) - piece.line.offset(at_ns)) for each in sure), default=2**62
        )
        if piece in sure or (away_ns <= REACH_NS and agree.mean() >= MIN_SHARE):
            kept.append(piece)
        elif piece.stop - piece.start > 2 * MIN_KEYS:
            return None
    return kept if 2 * sum(piece.stop - piece.start for piece in kept) > len(bounds) else None


def _is_whole(bounds: Bounds, pieces: list[Piece]) -> bool:
    """Say whether the lines hold from the first packet to the last: none was left out, nor put aside at an end."""
    agree = np.zeros(len(bounds), np.bool_)
    for piece in pieces:
        of = bounds.take(slice(piece.start, piece.stop))
        agree[piece.start : piece.stop] = np.abs(of.delta_ns - piece.line.offsets(of.time_ns)) <= REACH_NS
    whole = sum(piece.stop - piece.start for piece in pieces) == len(bounds)
    return whole and bool(agree[:_AT_AN_END].any() and agree[-_AT_AN_END:].any())


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
    ids = packets.ip_id[order].astype(np.int64) & 0xFFFF
    # a counter, in either byte order, goes up by what its host sends: about what the point saw at most
    sent = np.abs(np.diff(packets.number[order])) + _COUNTED
    gone_on = np.zeros(sent.size, np.bool_)
    for counter in (ids, ids >> 8 | (ids & 0xFF) << 8):
        gone_on |= np.diff(counter) % 65536 <= sent
    jump = np.append(False, ~gone_on & (place.reshape(-1)[1:] == place.reshape(-1)[:-1]))
    bits = np.minimum(
        _BITS_COUNTER + _BITS_JUMP * np.bincount(place.reshape(-1), jump, lanes.size), _BITS_LANE
    )
    return connections * _BITS_CONNECTION + int(bits.sum())


def _correction(pieces: list[Piece], far: Sampled, mine: NDArray[np.bool_], *, whole: bool) -> Correction:
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
    return Correction(tuple(piece.line for piece in pieces), tuple(turns), whole)
