"""Usual: how long packets take from one point to another, learned from pairs that are beyond doubt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A pair of unique but repeatable packets (no IP id to tell repeats apart) is believed at once only when it
#: is no further apart than this many times the usual latency of the pair of points.
_REACH_FACTOR = 4
_REACH_FLOOR_NS = 100_000
#: Latencies kept to learn what is usual between two points.
_SAMPLE = 4_096
#: Fewer latencies than this show less than the whole range.
_FEW = 16


@dataclass(slots=True)
class Usual:
    """Latencies seen so far between two points, a sample of them."""

    _deltas: list[NDArray[np.int64]] = field(default_factory=list)
    _count: int = 0
    _longest: int | None = None  #: worked out when asked for; None again when something was learned

    def longest_ns(self) -> int | None:
        """Return how far apart two sightings of one packet usually are at most; None while unknown."""
        if self._longest is None and self._deltas:
            self._longest = int(percentile(np.abs(np.concatenate(self._deltas)), 99.5))
            if self._count < _FEW:
                self._longest = max(self._longest, _REACH_FLOOR_NS)
        return self._longest

    def reach_ns(self) -> int | None:
        """Return how far apart two unique sightings may be without an IP id to vouch for them."""
        usual = self.longest_ns()
        return None if usual is None else max(_REACH_FACTOR * usual, _REACH_FLOOR_NS)

    def learn(self, deltas: NDArray[np.int64]) -> None:
        """Remember latencies of pairs that are beyond doubt."""
        if deltas.size and self._count < _SAMPLE:
            step = max(1, deltas.size // (_SAMPLE // 4))
            self._deltas.append(deltas[::step][:_SAMPLE])
            self._count += self._deltas[-1].size
            self._longest = None


def percentile(values: NDArray[np.int64], percent: float) -> float:
    """Return what `np.percentile` returns, which would first load numpy's masked arrays: 10 ms for every command."""
    place = (values.size - 1) * (percent / 100)
    below = int(place)
    above = min(below + 1, values.size - 1)
    parted = np.partition(values, (below, above))
    low, high, share = int(parted[below]), int(parted[above]), place - below
    # from the nearer end, as numpy does it: the same rounding
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
