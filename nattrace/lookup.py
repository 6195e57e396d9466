"""Look-ups in sorted values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def contains(values: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which keys are among the values, which ascend, shape of `keys`.

    What `np.isin` says as well, but that sorts both, and where either is small it takes longer to see what it is about.
    """
    if not values.size:
        return np.zeros(keys.shape, np.bool_)
    found: NDArray[np.bool_] = values[np.minimum(np.searchsorted(values, keys), values.size - 1)] == keys
    return found


def occurrences(values: NDArray[Any], keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return how often each key stands among the values, which ascend; shape of `keys`."""
    found: NDArray[np.int64] = np.searchsorted(values, keys, "right") - np.searchsorted(values, keys, "left")
    return found
