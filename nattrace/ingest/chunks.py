"""A reused window over a byte stream: fill, walk what is complete, carry the incomplete tail over.

Reads forward only, so pipes work like files, and memory stays at one chunk unless a single record is
larger. It never interprets the bytes; `gather` only copies fixed-size headers out of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nattrace.errors import InputError
from nattrace.ingest.source import PADDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes read at a time. Measured: 1 MiB stays in the second-level cache through walk, gather and decode;
#: 8 MiB costs a third more per packet.
CHUNK_BYTES = 1 << 20


class Readable(Protocol):
    """What a chunk is filled from: raw or buffered binary files, decompressors, sockets' makefile."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer from the front, return the bytes stored, 0 at the end."""


class ChunkBuffer:
    """A stream's bytes `position` .. `position + length` in ``data[:length]``, followed by PADDING zeros.

    The array is reused: what `refill` is called on is overwritten.
    """

    def __init__(self, stream: Readable, label: str, position: int = 0) -> None:
        self._stream = stream
        self._label = label
        self._capacity = CHUNK_BYTES
        self.data: NDArray[np.uint8] = np.zeros(self._capacity + PADDING, np.uint8)
        self.length = 0
        self.position = position  #: bytes of the stream before data[0]

    @property
    def view(self) -> memoryview:
        """The valid bytes."""
        return self.data.data[: self.length]

    def refill(self, consumed: int) -> bool:
        """Drop the first `consumed` bytes and read on; False when the stream has no more.

        Raises InputError when the file system or the pipe fails.
        """
        tail = self.length - consumed
        old = self.data
        if tail * 2 > self._capacity:
            # One record larger than half the chunk: doubling keeps the number of copies logarithmic, and
            # memory follows the bytes that arrive, not the length that a header claims.
            self._capacity *= 2
            self.data = np.zeros(self._capacity + PADDING, np.uint8)
        self.data[:tail] = old[consumed : self.length]
        self.position += consumed
        self.length = tail
        whole = self.data.data[: self._capacity]
        while self.length < self._capacity:
            try:
                got = self._stream.readinto(whole[self.length :])
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self._label}: reading fails after byte {self.position + self.length}: {error}"
                ) from error
            if not got:
                break
            self.length += got
        self.data[self.length : self.length + PADDING] = 0
        return self.length > tail


def gather(data: NDArray[np.uint8], offsets: NDArray[np.int64], header: np.dtype[Any]) -> NDArray[Any]:
    """Copy the header at each offset into a structured array, shape (n,).

    Needs ``header.itemsize`` readable bytes at every offset, which PADDING gives for headers up to it.
    """
    # Overlapping windows, one starting at every byte: a single fancy index then copies all headers.
    size = header.itemsize
    windows = np.ndarray((data.size - size + 1,), f"V{size}", data, 0, (1,))
    rows: NDArray[Any] = windows[offsets].view(header)
    return rows
