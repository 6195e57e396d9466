"""Clock: offset and drift of one clock against another, from causality alone.

A packet that passes the reference first is seen later by the other point: the difference of the two readings is
an upper bound of the offset. A packet that comes the other way gives a lower bound. All offsets that are a
straight line in time and keep every bound form a convex polygon; the line of the middle is taken and the
polygon's extent is the error (Moon, Skelly, Towsley 1999; Zhang, Liu, Xia 2002). Where no line keeps the
bounds the clock was set in between: the bounds are divided and each part has a line of its own.

Pure array code: it knows no files, packets or points, and never decides which two sightings are one packet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

#: A clock that runs this wrong is broken: crystals stay below 200 ppm, NTP turns clocks by 500 ppm at most
#: (RFC 5905, CLOCK_TICK in ntp_adjtime(2)).
MAX_DRIFT = 1e-3

#: Bounds of one side that a line needs to be held from that side: fewer may be wrong pairs.
MIN_SIDE = 3

#: Bounds that a line of its own needs. A step that is followed by fewer packets is not told from wrong pairs.
MIN_PIECE = 8

#: Lines of one clock. A clock that is set more often than this in one capture is no clock.
MAX_PIECES = 16

#: Share of the bounds that may contradict all the others: wrong pairs, reordered timestamps.
MAX_WRONG = 0.02

#: No clock keeps a straight line to the nanosecond. When more than MAX_PIECES lines would be needed, bounds are
#: loosened in these steps, and the error grows by as much.
_SLACKS_NS = (0, 10_000, 100_000, 1_000_000, 10_000_000)

#: Rows after a contradiction that are looked at to tell a step from a wrong pair.
_AHEAD = 256

#: Passes over the points of a hull before it is finished one by one (only made-up data needs so many).
_HULL_PASSES = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """What causality says of an offset, one row a packet seen by both clocks, in the order in which they were sent.

    `time_ns` (int64) is the reading of the clock in question, `delta_ns` (int64) that reading less the
    reference's. `side` (int8) is 1 where delta_ns is an upper bound of the offset, -1 where it is a lower one,
    0 where the packet's way is not known.
    """

    time_ns: NDArray[np.int64]
    delta_ns: NDArray[np.int64]
    side: NDArray[np.int8]

    def __len__(self) -> int:
        """Packets."""
        return int(self.time_ns.size)

    def take(self, rows: NDArray[Any] | slice) -> Bounds:
        """Return the given rows."""
        return Bounds(self.time_ns[rows], self.delta_ns[rows], self.side[rows])


@dataclass(frozen=True, slots=True)
class Line:
    """An offset that changes evenly: offset(t) = offset_ns + drift * (t - at_ns), t a reading of the clock."""

    at_ns: int
    offset_ns: int
    drift: float  #: 1e-6 is 1 ppm
    bound_ns: (
        int | None
    )  #: the true offset is no further away, from the first to the last bound; None: unknown

    def offsets(self, time_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the offset at each reading, whole ns, shape of `time_ns`."""
        since = (time_ns - self.at_ns).astype(np.float64)
        return self.offset_ns + np.rint(self.drift * since).astype(np.int64)

    def offset(self, time_ns: int) -> int:
        """Return the offset at one reading."""
        return int(self.offsets(np.array([time_ns], np.int64))[0])


@dataclass(frozen=True, slots=True)
class Piece:
    """One line and the bounds it was made of: rows ``start`` to ``stop`` of the `Bounds` given."""

    line: Line
    start: int
    stop: int


def fit(bounds: Bounds, tick_ns: int) -> list[Piece] | None:
    """Return the lines that keep the bounds, in order; None where no few lines do.

    `tick_ns` is how coarse the readings are: 1000 for captures in microseconds. Each bound may be off by it.
    Offsets are believed here because bounds agree; whether the pairs behind them are to be believed at all is
    the caller's business.
    """
    if len(bounds) < MIN_PIECE:
        return None
    for slack_ns in _SLACKS_NS:
        parts = _parts(bounds, tick_ns + slack_ns)
        if parts is None:
            continue
        pieces = []
        for start, stop, wrong in parts:
            rows = np.setdiff1d(np.arange(start, stop), wrong)
            line = _line(bounds.take(rows), tick_ns + slack_ns)
            if line is None:
                break
            if _ends_wrong(bounds, start, stop, wrong):
                line = replace(line, bound_ns=None)
            pieces.append(Piece(line, start, stop))
        else:
            return pieces
    return None


def holds(bounds: Bounds, line: Line, slack_ns: int) -> NDArray[np.bool_]:
    """Return which bounds the line keeps, or breaks by no more than `slack_ns`."""
    apart = bounds.delta_ns - line.offsets(bounds.time_ns)
    kept: NDArray[np.bool_] = apart * bounds.side >= -slack_ns
    return kept


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
    while True:
        length = _longest(bounds, rows[begin:], tick_ns)
        end = begin + length
        if end == rows.size:
            found.append((first, total, np.array(wrong, np.int64)))
            break
        side = bounds.side[rows[end]]
        ahead = rows[end : end + _AHEAD]
        ahead = ahead[bounds.side[ahead] == side][:MIN_PIECE]
        kept = bounds.take(rows[begin:end])
        refused = np.array([not _feasible(_with(kept, bounds, row), tick_ns) for row in ahead.tolist()])
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
            return None
    return found


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
    if _feasible(bounds.take(rows), tick_ns):
        return int(rows.size)
    low, high = 1, 2
    while high < rows.size and _feasible(bounds.take(rows[:high]), tick_ns):
        low, high = high, high * 2
    high = min(high, rows.size)
    while high - low > 1:
        middle = (low + high) // 2
        if _feasible(bounds.take(rows[:middle]), tick_ns):
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
    old = _line(bounds.take(before[: max(len(before) - 2 * MIN_PIECE, min(MIN_PIECE, len(before)))]), tick_ns)
    new = _line(bounds.take(later), tick_ns)
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


# -- one line ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hulls:
    """The bounds that matter: lower hull of the upper ones, upper hull of the lower ones, relative to a base.

    A side without bounds is empty.
    """

    upper_x: NDArray[np.float64]
    upper_y: NDArray[np.float64]
    lower_x: NDArray[np.float64]
    lower_y: NDArray[np.float64]
    base_x: int
    base_y: int

    def ceiling(self, drift: float) -> float:
        """Return the highest line of this drift, by its value at x = 0."""
        return float((self.upper_y - drift * self.upper_x).min())

    def floor(self, drift: float) -> float:
        """Return the lowest line of this drift, by its value at x = 0."""
        return float((self.lower_y - drift * self.lower_x).max())

    def gap(self, drift: float) -> float:
        """Return how much room the bounds leave lines of this drift; negative for none."""
        return self.ceiling(drift) - self.floor(drift)

    def reach(self, x: float, drifts: NDArray[np.float64]) -> tuple[float, float]:
        """Return the highest and the lowest value at x of any line of the given drifts that keeps its bounds."""

        def high(drift: float) -> float:
            return self.ceiling(drift) + drift * x

        def low(drift: float) -> float:
            return -self.floor(drift) - drift * x

        return high(_best(high, drifts)), -low(_best(low, drifts))

    def slopes(self) -> NDArray[np.float64]:
        """Return the drifts at which the room may turn, ascending, within what clocks do."""
        sides = ((self.upper_x, self.upper_y), (self.lower_x, self.lower_y))
        edges = [np.diff(y) / np.diff(x) for x, y in sides]
        inside = np.clip(np.concatenate(edges), -MAX_DRIFT, MAX_DRIFT)
        return np.unique(np.concatenate([inside, [-MAX_DRIFT, 0.0, MAX_DRIFT]]))


def _hulls(bounds: Bounds, tick_ns: int) -> _Hulls:
    base_x, base_y = int(bounds.time_ns[0]), int(bounds.delta_ns[0])
    x = (bounds.time_ns - base_x).astype(np.float64)
    y = (bounds.delta_ns - base_y).astype(np.float64)
    above, below = bounds.side > 0, bounds.side < 0
    upper_x, upper_y = _lower_hull(x[above], y[above] + tick_ns)
    lower_x, lower_y = _lower_hull(x[below], tick_ns - y[below])
    return _Hulls(upper_x, upper_y, lower_x, -lower_y, base_x, base_y)


def _lower_hull(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of the lower convex hull, ascending in x."""
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    if x.size:
        first = np.append(True, x[1:] != x[:-1])
        x, y = x[first], y[first]
    for _ in range(_HULL_PASSES):
        if x.size < 3:
            return x, y
        # a point on or above the chord of any two others is no corner, whichever of them are corners
        left, right = np.diff(y)[:-1] * np.diff(x)[1:], np.diff(y)[1:] * np.diff(x)[:-1]
        corner = np.append(np.append(True, left < right), True)
        if corner.all():
            return x, y
        x, y = x[corner], y[corner]
    stack: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(stack) > 1 and (stack[-1][1] - stack[-2][1]) * (point[0] - stack[-1][0]) >= (
            point[1] - stack[-1][1]
        ) * (stack[-1][0] - stack[-2][0]):
            stack.pop()
        stack.append(point)
    corners = np.array(stack)
    return corners[:, 0], corners[:, 1]


def _feasible(bounds: Bounds, tick_ns: int) -> bool:
    """Say whether one line can keep all bounds."""
    hulls = _hulls(bounds, tick_ns)
    if not hulls.upper_x.size or not hulls.lower_x.size:
        return True
    return hulls.gap(_best(hulls.gap, hulls.slopes())) >= 0


def _best(value: Callable[[float], float], places: NDArray[np.float64]) -> float:
    """Return the place where a concave function, linear between `places` (ascending), is highest."""
    low, high = 0, places.size - 1
    while high - low > 2:
        middle = (low + high) // 2
        if value(float(places[middle])) < value(float(places[middle + 1])):
            low = middle + 1
        else:
            high = middle
    return max((float(place) for place in places[low : high + 1]), key=lambda p: (value(p), -abs(p)))


def _line(bounds: Bounds, tick_ns: int) -> Line | None:
    """Return the line in the middle of what the bounds allow; None when they allow none."""
    upper, lower = int((bounds.side > 0).sum()), int((bounds.side < 0).sum())
    if min(upper, lower) < MIN_SIDE:
        return _one_way(bounds)
    hulls = _hulls(bounds, tick_ns)
    slopes = hulls.slopes()
    drift = _best(hulls.gap, slopes)
    room = hulls.gap(drift)
    if room < 0:
        return None
    # no drift where that is nearly as good: a short capture says nothing of it
    if hulls.gap(0.0) >= room / 2:
        drift = 0.0
    level = (hulls.ceiling(drift) + hulls.floor(drift)) / 2
    inside = _inside(hulls, drift)
    places = np.unique(np.concatenate([np.clip(slopes, *inside), inside]))
    error = 0.0
    for x in (float((bounds.time_ns - hulls.base_x).min()), float((bounds.time_ns - hulls.base_x).max())):
        here = level + drift * x
        top, bottom = hulls.reach(x, places)
        error = max(error, top - here, here - bottom)
    return Line(hulls.base_x, hulls.base_y + round(level), drift, int(np.ceil(error)) + 1)


def _inside(hulls: _Hulls, drift: float) -> tuple[float, float]:
    """Return the lowest and the highest drift that keeps the bounds, given one that does."""
    ends = []
    for outside in (-MAX_DRIFT, MAX_DRIFT):
        good, bad = drift, outside
        if hulls.gap(bad) >= 0:
            ends.append(bad)
            continue
        for _ in range(60):  # halves 1e-3 down to what a float can tell apart
            middle = (good + bad) / 2
            if hulls.gap(middle) >= 0:
                good = middle
            else:
                bad = middle
        ends.append(bad)  # just outside: an error is never understated
    return ends[0], ends[1]


def _one_way(bounds: Bounds) -> Line:
    """Return a line for packets that all went one way: as if the quickest took no time. Its error is unknown."""
    side = 1 if (bounds.side > 0).sum() >= (bounds.side < 0).sum() else -1
    rows = bounds.side == side if (bounds.side == side).any() else np.ones(len(bounds), np.bool_)
    turned = replace(bounds, delta_ns=bounds.delta_ns * side).take(rows)
    hulls = _hulls(replace(turned, side=np.ones(len(turned), np.int8)), 0)
    x, y = hulls.upper_x, hulls.upper_y
    middle = float((turned.time_ns - hulls.base_x).mean())
    drift = 0.0
    if x.size > 1:
        place = min(max(int(np.searchsorted(x, middle)), 1), x.size - 1)
        drift = float(np.clip((y[place] - y[place - 1]) / (x[place] - x[place - 1]), -MAX_DRIFT, MAX_DRIFT))
    away = (turned.delta_ns - hulls.base_y).astype(np.float64)
    since = (turned.time_ns - hulls.base_x).astype(np.float64)

    def spent(slope: float) -> float:
        return float((away - slope * since - hulls.ceiling(slope)).mean())

    if spent(drift) > spent(0.0) / 2:
        drift = 0.0
    level = hulls.base_y + round(hulls.ceiling(drift))
    return Line(hulls.base_x, level * side, drift * side, None)
