"""How many ICMP errors of which kind speak of a conversation. Data only; `icmp_errors` counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(slots=True)
class ErrorCounts:
    """ICMP errors about conversations, by kind; one row for each kind, in the order of the conversations."""

    conversation: NDArray[np.int64]
    version: NDArray[
        np.int64
    ]  #: of the errors: a translator between IP versions does not translate all of them
    type: NDArray[np.int64]
    code: NDArray[np.int64]
    mtu: NDArray[np.int64]  #: -1 for none
    count: NDArray[np.int64]

    @classmethod
    def none(cls) -> ErrorCounts:
        """Return no rows, as nearly all captures have it."""
        return cls(*(np.empty(0, np.int64) for _ in range(6)))

    def between(self, start: int, stop: int) -> dict[int, list[tuple[int, int, int, int | None, int]]]:
        """Return (version, type, code, MTU, count) by conversation, for conversations `start` to `stop` (excluded)."""
        found: dict[int, list[tuple[int, int, int, int | None, int]]] = {}
        if self.count.size:
            low, high = np.searchsorted(self.conversation, [start, stop])
            rows = slice(int(low), int(high))
            columns = (self.conversation, self.version, self.type, self.code, self.mtu, self.count)
            for row, version, kind, code, mtu, count in zip(
                *(c[rows].tolist() for c in columns), strict=True
            ):
                found.setdefault(row, []).append((version, kind, code, mtu if mtu >= 0 else None, count))
        return found
