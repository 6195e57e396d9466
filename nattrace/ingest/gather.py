"""Fixed-size pieces of many records at once: the one place where raw bytes become matrices.

It never decides whether bytes belong to a record; callers compare positions with captured lengths first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def gather(buffer: NDArray[np.uint8], at: NDArray[np.int64], width: int) -> NDArray[Any]:
    """Return `width` bytes at each position: shape (n,), dtype void of `width` bytes, a fresh copy.

    One fancy index over an overlapping view: a single copy a row, whatever the alignment. `view` the result
    with a structured dtype of the same size to read fields. Raises IndexError for a position that is not
    followed by `width` bytes, which `source.PADDING` rules out for positions inside or just after a record.
    """
    windows = np.ndarray((max(buffer.size - width + 1, 0),), f"V{width}", buffer, 0, (1,))
    return windows[at]


def gather_bytes(buffer: NDArray[np.uint8], at: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Return `width` bytes at each position as a matrix of shape (n, width), uint8, a fresh copy."""
    return gather(buffer, at, width).view(np.uint8).reshape(at.size, width)


def prefix_masks(width: int) -> NDArray[np.uint8]:
    """Return (width + 1, width) bytes; row k is 0xFF for the first k bytes and 0 after them."""
    return np.where(np.arange(width) < np.arange(width + 1)[:, None], 0xFF, 0).astype(np.uint8)
