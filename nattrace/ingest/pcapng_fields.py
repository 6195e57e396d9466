"""Options and timestamps of pcapng blocks.

Pure functions on bytes and columns; they never read a file. Format: draft-ietf-opsawg-pcapng sections 3.5
(options), 4.2 (if_tsresol, if_tsoffset) and 4.3 (timestamps).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Option codes. Those below 16 mean different things in different blocks, except the comment.
END_OF_OPTIONS, COMMENT = 0, 1
IF_NAME, IF_TSRESOL, IF_TSOFFSET = 2, 9, 14
EPB_DROPCOUNT = 4
ISB_IFDROP = 5

#: Options looked at in one block: real ones have some ten, and a block of 16 MiB could hold four million.
MAX_OPTIONS = 256

_MAX_NS = (1 << 63) - 1
_NS_DIGITS = 9
#: Fractions of a second are kept to this many bits: 10**9 times that still fits 64, and it is 0.06 ns.
_FRACTION_BITS = 34


def options(view: memoryview, start: int, end: int, order: str) -> tuple[list[tuple[int, bytes]], bool]:
    """Return the (code, value) options in ``view[start:end]``, and whether all of them were readable."""
    found: list[tuple[int, bytes]] = []
    head = struct.Struct(f"{order}HH").unpack_from
    while start + 4 <= end and len(found) < MAX_OPTIONS:
        code, length = head(view, start)
        if code == END_OF_OPTIONS:
            break
        start += 4
        if start + length > end:
            return found, False
        found.append((code, bytes(view[start : start + length])))
        start += length + (-length & 3)
    return found, True


def rows_with_options(
    data: NDArray[np.uint8],
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    order: str,
    codes: tuple[int, ...],
) -> NDArray[np.int64]:
    """Return the rows whose options ``data[start:end]`` hold one of `codes`, in ascending order.

    All rows take a step from option to option together, so packets that carry only flags cost no loop.
    """
    halves = np.ndarray((data.size - 1,), f"{order}u2", data, 0, (1,))
    rows = np.arange(start.size)
    start = start.copy()
    hits = []
    for _ in range(MAX_OPTIONS):
        here = start + 4 <= end
        rows, start, end = rows[here], start[here], end[here]
        if not rows.size:
            break
        code = halves[start]
        length = halves[start + 2].astype(np.int64)
        hit = np.isin(code, codes)
        hits.append(rows[hit])
        live = ~hit & (code != END_OF_OPTIONS)
        rows, end = rows[live], end[live]
        start = start[live] + 4 + ((length[live] + 3) & ~3)
    return np.sort(np.concatenate(hits)) if hits else np.empty(0, np.int64)


def timestamps_ns(
    high: NDArray[np.uint32], low: NDArray[np.uint32], resolution: int, offset_s: int
) -> NDArray[np.int64]:
    """Return packet times in ns since 1970, shape (n,), from the two halves of pcapng timestamps.

    `resolution` is the if_tsresol byte: 10**-n s, or 2**-n s when its top bit is set; any value is
    accepted, and digits finer than 1 ns are cut off. Times beyond the range of int64 (after the year 2262)
    become its limits.
    """
    ticks = high.astype(np.uint64)
    ticks <<= np.uint64(32)
    ticks |= low
    exponent = resolution & 0x7F
    offset_ns = max(-_MAX_NS, min(_MAX_NS, offset_s * 10**9))
    room = np.uint64(min(_MAX_NS, _MAX_NS - offset_ns))
    if resolution & 0x80:
        seconds, time_ns = _from_binary(ticks, exponent)
        most = np.uint64(_MAX_NS // 10**9 - 1)
        over = seconds > most
        time_ns += np.minimum(seconds, most) * np.uint64(10**9)
        time_ns[over] = _MAX_NS
    elif exponent <= _NS_DIGITS:
        unit_ns = 10 ** (_NS_DIGITS - exponent)
        most = np.uint64(_MAX_NS // unit_ns)
        over = ticks > most
        time_ns = np.minimum(ticks, most) * np.uint64(unit_ns)
        time_ns[over] = _MAX_NS
    elif exponent - _NS_DIGITS <= 19:  # 10**19 is the largest power that 64 bits hold
        time_ns = np.minimum(ticks // np.uint64(10 ** (exponent - _NS_DIGITS)), np.uint64(_MAX_NS))
    else:
        time_ns = np.zeros_like(ticks)
    return np.minimum(time_ns, room).astype(np.int64) + np.int64(offset_ns)


def _from_binary(ticks: NDArray[np.uint64], bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return whole seconds and the rest in ns of ticks of 2**-bits s."""
    if bits < 64:
        seconds = ticks >> np.uint64(bits)
        fraction = ticks & np.uint64((1 << bits) - 1)
    else:
        seconds = np.zeros_like(ticks)
        fraction = ticks
    spare = max(0, bits - _FRACTION_BITS)
    fraction = fraction >> np.uint64(spare) if spare < 64 else np.zeros_like(ticks)
    return seconds, (fraction * np.uint64(10**9)) >> np.uint64(bits - spare)
