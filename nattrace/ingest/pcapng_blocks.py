"""Blocks of a pcapng file: where they are, in one byte order, as far as their lengths can be believed.

Finds and checks blocks; it knows nothing of what is in them. Format: draft-ietf-opsawg-pcapng section 3.1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nattrace.ingest.chunks import gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

#: libpcap refuses blocks over INITIAL_MAX_BLOCKSIZE, 16 MiB (sf-pcapng.c); Wireshark stops at 128 MiB.
MAX_BLOCK_BYTES = 16 << 20

#: Bytes of a block that are not its body: type, length, and the length again at the end.
BLOCK_OVERHEAD = 12

_Lengths = TypeVar("_Lengths", int, "NDArray[np.int64]")


class Layout:
    """The fixed block fields of one byte order as numpy dtypes and struct readers."""

    def __init__(self, order: str) -> None:
        u4, u2 = f"{order}u4", f"{order}u2"
        self.order = order
        self.length_of = struct.Struct(f"{order}I").unpack_from
        self.head = np.dtype([("type", u4), ("length", u4)])
        self.length = np.dtype([("length", u4)])
        #: Enhanced and obsolete packet blocks; a simple packet block has its wire length at `interface`.
        self.packet = np.dtype(
            [(n, u4) for n in ("type", "length", "interface", "high", "low", "captured", "wire")]
        )
        self.old_packet = np.dtype(
            {"names": ["interface", "drops"], "formats": [u2, u2], "offsets": [8, 10], "itemsize": 12}
        )


#: By struct's byte order sign.
LAYOUTS = {order: Layout(order) for order in "<>"}


@dataclass(frozen=True, slots=True)
class Blocks:
    """The sound and complete blocks of a buffer, columns of equal length."""

    offset: NDArray[np.int64]
    type: NDArray[np.int64]
    length: NDArray[np.int64]  #: up to the next block, so a multiple of 4 even where the file's is not
    resume: int  #: offset of what follows: an incomplete block, or the one with the error
    error: str | None  #: what is wrong with the block at `resume`


def padded(length: _Lengths) -> _Lengths:
    """Round up to the 32 bits that blocks and options are aligned to."""
    return length + (-length & 3)


def walk_blocks(data: NDArray[np.uint8], view: memoryview, layout: Layout, start: int) -> Blocks:
    """Find the blocks of ``view``, the valid part of `data`, from `start` on.

    A block is sound when its length is in range and stands again at its end.
    """
    offset, resume = _walk(view, start, layout.length_of)
    heads = gather(data, offset, layout.head)
    if (heads["length"] & 3).any():
        offset, resume = _walk_padded(view, start, layout.length_of)
        heads = gather(data, offset, layout.head)
    claimed = heads["length"].astype(np.int64)
    length = padded(claimed)
    error = None
    sound = offset.size
    if sound and (int(claimed.min()) < BLOCK_OVERHEAD or int(claimed.max()) > MAX_BLOCK_BYTES):
        sound = int(np.argmax((claimed < BLOCK_OVERHEAD) | (claimed > MAX_BLOCK_BYTES)))
        error = f"claims {claimed[sound]} bytes"
    trailers = gather(data, offset[:sound] + length[:sound] - 4, layout.length)["length"]
    differ = trailers != claimed[:sound]
    if differ.any():
        sound = int(np.argmax(differ))
        error = f"claims {claimed[sound]} bytes at its start and {trailers[sound]} at its end"
    if error is not None:
        resume = int(offset[sound])
    return Blocks(offset[:sound], heads["type"][:sound].astype(np.int64), length[:sound], resume, error)


def _walk(
    view: memoryview, start: int, length_of: Callable[[memoryview, int], tuple[int]]
) -> tuple[NDArray[np.int64], int]:
    """Return the offsets of the blocks that end inside the view, and where the first that does not begins."""
    end = len(view)

    def positions() -> Iterator[int]:
        # Like the walk of pcap records: one `unpack_from` a block, which raises beyond the view. A length of
        # 0 would never get there; other absurd lengths end the walk sooner or later and are then refused.
        position = start + 4
        try:
            while True:
                yield position
                position += length_of(view, position)[0] or end
        except struct.error:
            return

    return _complete(view, np.fromiter(positions(), np.int64), length_of)


def _walk_padded(
    view: memoryview, start: int, length_of: Callable[[memoryview, int], tuple[int]]
) -> tuple[NDArray[np.int64], int]:
    """Walk as Wireshark does where a length is no multiple of 4: the next block begins at the next one."""
    end = len(view)

    def positions() -> Iterator[int]:
        position = start + 4
        try:
            while True:
                yield position
                position += padded(length_of(view, position)[0]) or end
        except struct.error:
            return

    return _complete(view, np.fromiter(positions(), np.int64), length_of)


def _complete(
    view: memoryview, positions: NDArray[np.int64], length_of: Callable[[memoryview, int], tuple[int]]
) -> tuple[NDArray[np.int64], int]:
    offsets = positions - 4
    stop = int(offsets[-1])
    offsets = offsets[:-1]
    if stop > len(view):
        last = int(offsets[-1])
        if length_of(view, last + 4)[0] < BLOCK_OVERHEAD:
            return offsets, stop  # not incomplete but broken: the caller refuses it
        return offsets[:-1], last
    return offsets, stop
