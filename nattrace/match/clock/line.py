"""Clock line: the offset of one clock against another as a straight line in time, from causality alone.

A packet that passes the reference first is seen later by the other point: the difference of the two readings is
an upper bound of the offset. A packet that comes the other way gives a lower bound. All offsets that are a
straight line in time and keep every bound form a convex polygon; the line of the middle is taken and the
polygon's extent is the error (Moon, Skelly, Towsley 1999; Zhang, Liu, Xia 2002). Pure array code: it knows no
files, packets or points.
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
    upper_x, upper_y = lower_hull(x[above], y[above] + tick_ns)
    lower_x, lower_y = lower_hull(x[below], tick_ns - y[below])
    return _Hulls(upper_x, upper_y, lower_x, -lower_y, base_x, base_y)


def lower_hull(
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


def feasible(bounds: Bounds, tick_ns: int) -> bool:
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


def fit_line(bounds: Bounds, tick_ns: int) -> Line | None:
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
