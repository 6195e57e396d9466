"""Clock: the lines that one clock follows against another: one, or more where it was set in between.

Where no line keeps the bounds that causality sets (see `line`), the bounds are divided, and each part has
a line of its own. A few bounds may be wrong. Pure array code: it never decides which two sightings are one
packet, and whether offsets are to be believed is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.clock.line import MIN_SIDE, Bounds, Line, feasible, fit_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bounds that a line of its own needs. A step that is followed by fewer packets is not told from wrong pairs.
MIN_PIECE = 8

#: Lines of one clock. A clock that is set more often than this in one capture is no clock.
MAX_PIECES = 16

#: Share of the bounds that may contradict all the others: wrong pairs, reordered timestamps.
MAX_WRONG = 0.02

#: No clock keeps a straight line to the nanosecond. When more than MAX_PIECES lines would be needed, bounds are
#: loosened in these steps, and the error grows by as much.
_SLACKS_NS = (0, 10_000, 100_000, 1_000_000, 10_000_000)

#: A clock was set where two lines are further apart than this many times their error; else it wandered.
_STEP_FACTOR = 8

#: Contradictions that are looked into: far more than clocks and stray pairs make, so that noise costs no time.
_ROUNDS = 48

#: Rows after a contradiction that are looked at to tell a step from a wrong pair.
_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """One line and the bounds it was made of: rows ``start`` to ``stop`` of the `Bounds` given."""

    line: Line
    start: int
    stop: int


def fit(bounds: Bounds, tick_ns: int) -> list[Piece] | None:
    """Return the lines that keep the bounds, in order; None where no few lines do.

    `tick_ns` is how coarse the readings are: 1000 for captures in microseconds. Each bound may be off by it.
    """
    if len(bounds) < MIN_PIECE or _parts(bounds, tick_ns + _SLACKS_NS[-1]) is None:
        return None
    for slack_ns in _SLACKS_NS:
        parts = _parts(bounds, tick_ns + slack_ns)
        if parts is None:
            continue
        pieces = []
        for start, stop, wrong in parts:
            rows = np.setdiff1d(np.arange(start, stop), wrong)
            line = fit_line(bounds.take(rows), tick_ns + slack_ns)
            if line is None:
                break
            if _ends_wrong(bounds, start, stop, wrong):
                line = replace(line, bound_ns=None)
            pieces.append(Piece(line, start, stop))
        else:
            return _wandering(bounds, pieces)
    return None


def _wandering(bounds: Bounds, pieces: list[Piece]) -> list[Piece]:
    """Widen the error where lines do not quite meet: the clock wandered, and was between the two or beyond."""
    for n in range(1, len(pieces)):
        before, after = pieces[n - 1 : n + 1]
        here = int(bounds.time_ns[after.start])
        gap_ns = abs(after.line.offset(here) - before.line.offset(here))
        known = [piece.line.bound_ns for piece in (before, after) if piece.line.bound_ns is not None]
        if len(known) == 2 and gap_ns <= _STEP_FACTOR * max(known):
            for place, piece in ((n - 1, before), (n, after)):
                line = replace(piece.line, bound_ns=(piece.line.bound_ns or 0) + gap_ns)
                pieces[place] = replace(piece, line=line)
    return pieces


def _parts(bounds: Bounds, tick_ns: int) -> list[tuple[int, int, NDArray[np.int64]]] | None:
    """Divide the bounds into parts that one line each can keep: (start, stop, rows that are wrong)."""
    total = len(bounds)
    spare = max(int(total * MAX_WRONG), min(MIN_PIECE, total // 5))
    found: list[tuple[int, int, NDArray[np.int64]]] = []
    rows = np.flatnonzero(bounds.side != 0)  # the others hold nothing
    if not rows.size:
        return [(0, total, np.empty(0, np.int64))]
    wrong: list[int] = []
    first = 0  #: row of `bounds` at which the part begins
    begin = 0  #: its first place in `rows`
    for _ in range(_ROUNDS):
        length = _longest(bounds, rows[begin:], tick_ns)
        end = begin + length
        if end == rows.size:
            return [*found, (first, total, np.array(wrong, np.int64))]
        side = bounds.side[rows[end]]
        ahead = rows[end : end + _AHEAD]
        ahead = ahead[bounds.side[ahead] == side][:MIN_PIECE]
        kept = bounds.take(rows[begin:end])
        refused = np.array([not feasible(_with(kept, bounds, row), tick_ns) for row in ahead.tolist()])
        if length >= MIN_PIECE and ahead.size >= MIN_SIDE and 2 * refused.sum() > ahead.size:
            if len(found) + 1 == MAX_PIECES:
                return None
            place = _boundary(bounds, rows[begin:end], rows[end:], tick_ns)
            stop = int(rows[begin + place])
            found.append((first, stop, np.array([w for w in wrong if w < stop], np.int64)))
            wrong = [w for w in wrong if w >= stop]
            first, begin = stop, begin + place
            continue
        # not many that agree with each other: what cannot be kept is wrong
        bad = ahead[refused] if length >= MIN_PIECE else rows[begin : begin + 1]
        spare -= bad.size
        if spare < 0:
            return None
        wrong.extend(bad.tolist())
        rows = rows[~np.isin(rows, bad)]
        if begin == rows.size:
            break
    return None


def _ends_wrong(bounds: Bounds, start: int, stop: int, wrong: NDArray[np.int64]) -> bool:
    """Say whether the last of one side's bounds were all put aside: too few for a step, too many for chance."""
    last = wrong[wrong >= start][-2:]
    if last.size < 2:
        return False
    side = bounds.side[last]
    rows = start + np.flatnonzero(bounds.side[start:stop] == side[1])
    return bool(side[0] == side[1] and np.array_equal(rows[-2:], last))


def _with(kept: Bounds, bounds: Bounds, row: int) -> Bounds:
    one = bounds.take(slice(row, row + 1))
    return Bounds(*(np.append(getattr(kept, f), getattr(one, f)) for f in ("time_ns", "delta_ns", "side")))


def _longest(bounds: Bounds, rows: NDArray[np.int64], tick_ns: int) -> int:
    """Return how many of the rows, from the first on, one line can keep: at least one."""
    if feasible(bounds.take(rows), tick_ns):
        return int(rows.size)
    low, high = 1, 2
    while high < rows.size and feasible(bounds.take(rows[:high]), tick_ns):
        low, high = high, high * 2
    high = min(high, rows.size)
    while high - low > 1:
        middle = (low + high) // 2
        if feasible(bounds.take(rows[:middle]), tick_ns):
            low = middle
        else:
            high = middle
    return low


def _boundary(bounds: Bounds, before: NDArray[np.int64], after: NDArray[np.int64], tick_ns: int) -> int:
    """Return how many of the rows `before` a step belong to the line that ends there.

    A step is noticed when a bound of one side breaks; bounds of the other side pass for slow packets until
    then. They go to the line on which all packets together took less time.
    """
    later = after[: _longest(bounds, after, tick_ns)]
    # the rows just before the contradiction may already be on the new line: leave them out of the old one
    old = fit_line(
        bounds.take(before[: max(len(before) - 2 * MIN_PIECE, min(MIN_PIECE, len(before)))]), tick_ns
    )
    new = fit_line(bounds.take(later), tick_ns)
    if old is None or new is None:
        return int(before.size)
    of = bounds.take(before)
    spent = []
    for line in (old, new):
        taken = ((of.delta_ns - line.offsets(of.time_ns)) * of.side).astype(np.float64)
        spent.append(np.where(taken < -tick_ns - (line.bound_ns or 0), 1e18, np.maximum(taken, 0)))
    total = np.concatenate([[0], np.cumsum(spent[0])]) + np.concatenate(
        [np.cumsum(spent[1][::-1])[::-1], [0]]
    )
    return max(int(total.size - 1 - np.argmin(total[::-1])), 1)
