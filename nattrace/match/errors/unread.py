"""ICMP errors of which the capture does not hold what they quote: cut off, printed without it, or too many to keep.

Nobody knows which packet such an error is about, only whom it was sent to: the packet's sender. So nothing is matched
by them; they say of what it cannot be known whether it got lost. Data and look-ups only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.table import PacketTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Errors come at once, or when a neighbour has not answered ARP for three seconds (kernel: mcast_solicit).
ANSWER_NS: Final = 5_000_000_000
_NEVER_NS: Final = 2**62


@dataclass(slots=True)
class Unread:
    """The errors of one point, or of one depth of its tunnels, that nobody can read."""

    packets: PacketTable  #: the errors themselves, ERRORS_LIMIT at most: 20 MB
    unkept_ns: int  #: from then on there were more of which nothing was kept; 2**62 for never
    illegible: int = 0  #: how many there were in all whose quote the capture does not hold

    def __len__(self) -> int:
        """Errors that were kept."""
        return len(self.packets)

    @classmethod
    def none(cls) -> Unread:
        """Return no errors, as nearly all captures have it."""
        return cls(PacketTable.empty(), _NEVER_NS)

    @classmethod
    def first_of(cls, packets: PacketTable, at_most: int, illegible: int) -> Unread:
        """Return the first `at_most` errors, and when the next ones came."""
        kept, gone = packets.take(slice(0, max(at_most, 0))), packets.time_ns[max(at_most, 0) :]
        return cls(kept, int(gone.min(initial=_NEVER_NS)), illegible)

    @classmethod
    def concatenate(cls, parts: Sequence[Unread]) -> Unread:
        """Return the errors of all parts."""
        packets = PacketTable.concatenate([part.packets for part in parts])
        unkept_ns = min((part.unkept_ns for part in parts), default=_NEVER_NS)
        return cls(packets, unkept_ns, sum(part.illegible for part in parts))

    def may_answer(
        self,
        version: NDArray[np.uint8],
        src: NDArray[np.uint32],
        first_ns: NDArray[np.int64],
        last_ns: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Say about which of the packets that `src` sent from `first_ns` to `last_ns` some error may be."""
        late: NDArray[np.bool_] = last_ns + ANSWER_NS >= self.unkept_ns
        if not len(self):
            return late
        own = _host(self.packets.version, self.packets.dst)
        host = np.concatenate([_host(version, src), own])
        time = np.concatenate([first_ns, self.packets.time_ns])
        kind = np.repeat(np.array([0, 1]), [src.size, own.size])
        order = np.lexsort((kind, time, host))
        # the next error behind each place, of whatever host
        place = np.where(kind[order] == 1, np.arange(order.size), order.size)
        following = np.minimum.accumulate(place[::-1])[::-1]
        asked = np.flatnonzero(kind[order] == 0)
        asked = asked[following[asked] < order.size]
        error, packet = order[following[asked]], order[asked]
        good = (host[error] == host[packet]) & (time[error] <= last_ns[packet] + ANSWER_NS)
        late[packet[good]] = True
        return late

    def near(self, time_ns: NDArray[np.int64], reach_ns: int) -> NDArray[np.bool_]:
        """Say of which instants some error is no further away than `reach_ns`."""
        times = np.sort(self.packets.time_ns)
        low = np.searchsorted(times, time_ns - reach_ns, "left")
        high = np.searchsorted(times, time_ns + reach_ns, "right")
        found: NDArray[np.bool_] = (high > low) | (time_ns + reach_ns >= self.unkept_ns)
        return found


def _host(version: NDArray[np.uint8], address: NDArray[np.uint32]) -> NDArray[np.uint64]:
    return (version.astype(np.uint64) << np.uint64(32)) | address
