"""Absolute TCP numbers from the relative ones tcpdump prints.

tcpdump without -S prints sequence and acknowledgement numbers of a connection as they are only in segments
without ACK, in SYN+ACK, and in the first segment with ACK that it prints of the connection; from there on it
counts from those (print-tcp.c). This module replays that bookkeeping. It never passes a relative number off as
an absolute one: what cannot be made absolute is 0.
"""

from __future__ import annotations

SYN, ACK = 0x02, 0x10

#: Connections remembered, oldest forgotten first: what conntrack tracks by default, some 130 MB at worst.
MAX_CONNECTIONS = 1 << 18

#: A first number this close to 0 is taken for a relative one whose beginning is not in the text (16 MiB of data
#: either way). Where it was absolute after all (1 in 128), the connection's numbers stay unknown: harmless.
RELATIVE_REACH = 1 << 24

_MASK = 0xFFFFFFFF


def _distance(a: int, b: int) -> int:
    """Return how far apart two 32-bit sequence numbers are, the shorter way round."""
    ahead = (a - b) & _MASK
    return min(ahead, 0x100000000 - ahead)


class SequenceNumbers:
    """The connections of one run of tcpdump, whatever interface it printed them from."""

    def __init__(self, *, absolute: bool = False) -> None:
        """Start with no connection; `absolute` says that the text is known to be printed with -S."""
        #: whether the numbers are absolute throughout (-S); None until a number tells
        self._absolute = True if absolute else None
        #: (lower, higher endpoint text) to [base of lower, of higher, next expected of lower, of higher]
        self._connections: dict[tuple[str, str], list[int | None]] = {}

    def absolute(self, src: str, dst: str, flags: int, seq: int | None, ack: int | None) -> tuple[int, int]:
        """Return (seq, ack) as they stand in the header; 0 for what was not printed or cannot be known.

        `src` and `dst` are the endpoints as printed, port included; `flags` the TCP flags.
        """
        if self._absolute or not flags & ACK:
            return seq or 0, ack or 0
        forward = src < dst
        key = (src, dst) if forward else (dst, src)
        mine, other = (0, 1) if forward else (1, 0)
        state = self._connections.get(key)
        if state is None or flags & SYN:
            if state is None and len(self._connections) >= MAX_CONNECTIONS:
                del self._connections[next(iter(self._connections))]
            if not flags & SYN and any(
                number is not None and _distance(number, 0) < RELATIVE_REACH for number in (seq, ack)
            ):
                seq = ack = None
            state = [None] * 4
            if seq is not None:
                state[mine], state[mine + 2] = seq, (seq + (flags & SYN > 0)) & _MASK
            if ack is not None:
                state[other], state[other + 2] = (ack - 1) & _MASK, ack
            self._connections[key] = state
            return seq or 0, ack or 0
        seq = self._resolve(seq, state[mine], state[mine + 2])
        ack = self._resolve(ack, state[other], state[other + 2])
        if seq is not None:
            state[mine + 2] = seq
        if ack is not None:
            state[other + 2] = ack
        return seq or 0, ack or 0

    def _resolve(self, printed: int | None, base: int | None, last: int | None) -> int | None:
        """Return `printed` as an absolute number.

        The first number that continues its connection read one way, and not at all read the other way, tells
        how the whole run was printed: a text made with -S mostly does not say so.
        """
        if printed is None or base is None or last is None:
            return None
        relative = (base + printed) & _MASK
        if self._absolute is None and relative != printed:
            as_relative, as_absolute = _distance(relative, last), _distance(printed, last)
            if 0 in (as_relative, as_absolute):
                self._absolute = as_absolute == 0
            elif (as_relative < RELATIVE_REACH) != (as_absolute < RELATIVE_REACH):
                self._absolute = as_absolute < RELATIVE_REACH
            else:
                return None  # both readings fit, or none: better unknown than wrong
        return printed if self._absolute else relative
