"""Workers: a large file is prepared in a process of its own, so that two files take the time of one.

The worker is forked, so nothing is sent to it; its chunks come back through shared memory, two slots in
turn, and a pipe that carries only small messages. Small inputs, pipes, and programs with threads (forking
those is unsafe) are prepared in this process; the results are the same.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nattrace.errors import NattraceError
from nattrace.forking import may_fork
from nattrace.match.prepare import Layer, Outcome, Preparation, Prepared
from nattrace.match.rows import Rows
from nattrace.table import COLUMNS, PacketTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nattrace.ingest.source import Capture, ReadOptions
    from nattrace.match.flows import Flows

#: A worker pays for its start from about this size on.
WORKER_FILE_BYTES = 16 * 2**20

#: Shared slots a worker has: it fills one while the other is being read.
_SLOTS = 2

#: Bytes of one slot: a chunk and what one batch may add to it, at some 120 bytes a packet. A chunk that does
#: not fit (it never should) is sent through the pipe instead.
_SLOT_BYTES = 32 * 2**20


def worthwhile(size_bytes: int) -> bool:
    """Say whether a file of this size should be prepared by a worker."""
    return size_bytes >= WORKER_FILE_BYTES and may_fork()


class Worker:
    """Prepares one capture in a forked process; used like `Preparation`, and closed in every case."""

    def __init__(self, capture: Capture, options: ReadOptions) -> None:
        self._options = options
        self._slots = [mmap.mmap(-1, _SLOT_BYTES) for _ in range(_SLOTS)]
        self._pipe, theirs = socket.socketpair()
        self._outcome: Outcome | None = None
        self._pid = os.fork()
        if self._pid == 0:
            self._pipe.close()
            _work(capture, options, theirs, self._slots)
        theirs.close()

    def chunks(self) -> Iterator[Prepared]:
        """Give the packets, in file order for each point. Arrays of rows hold until the next chunk is asked for.

        Raises whatever the worker raised, and NattraceError when it was killed.
        """
        handles = np.empty(0, np.uint32)
        while True:
            try:
                kind, payload = pickle.loads(_receive(self._pipe))  # noqa: S301 - our own child wrote it
            except (EOFError, OSError) as error:
                raise NattraceError("a worker process was killed; memory may be short") from error
            if kind == "error":
                raise payload
            if kind == "end":
                self._outcome, addresses = cast("tuple[Outcome, list[bytes]]", payload)
                handles = np.concatenate([handles, self._options.book.extend(addresses)])
                for errors in chain.from_iterable(self._outcome.errors):
                    for table in (errors.packets, errors.quoted):
                        _translate(table, ("src", "dst"), handles)
                for unread in chain.from_iterable(self._outcome.unread):
                    _translate(unread.packets, ("src", "dst"), handles)
                for flows in self._outcome.flows.values():
                    _translate(flows, ("low_address", "high_address"), handles)
                for info in self._outcome.points:
                    info.openings.translate(handles)
                return
            slot, layout, point, layer, first_number, size_bytes, last, addresses = payload
            if addresses:
                handles = np.concatenate([handles, self._options.book.extend(addresses)])
            prepared = _assemble(point, layer, first_number, size_bytes, _read(self._slots[slot], layout))
            prepared.last = last
            _translate(prepared.rows.table, ("src", "dst"), handles)
            yield prepared
            del prepared  # the slot is free again: whoever took the chunk has copied it
            with suppress(OSError):  # a worker that is done waits for no slot any more
                self._pipe.send(b"\0")

    def outcome(self) -> Outcome:
        """Return what is known at the end."""
        assert self._outcome is not None
        return self._outcome

    def close(self) -> None:
        """End the worker, whatever it is doing, and give back its memory."""
        self._pipe.close()
        if self._pid:
            if self._outcome is None:  # unfinished, and nobody wants the rest
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        for slot in self._slots:
            with suppress(BufferError):  # a chunk was left unread: its memory goes when it does
                slot.close()


def _work(capture: Capture, options: ReadOptions, connection: socket.socket, slots: list[mmap.mmap]) -> None:
    """Run in the child: prepare, write chunks into the slots in turn, never return."""
    code = 0
    try:
        preparation = Preparation(capture, options)
        known = 0
        for sent, prepared in enumerate(preparation.chunks()):
            if sent >= _SLOTS:
                _exactly(connection, 1)  # the slot to be used next has been read
            slot = sent % _SLOTS
            layout = _write(slots[slot], _columns(prepared))
            new = options.book.addresses(known)
            known += len(new)
            first_number = int(prepared.rows.number[0])
            message = (
                slot, layout, prepared.point, prepared.layer, first_number, prepared.size_bytes, prepared.last, new,
            )  # fmt: skip
            _send(connection, ("chunk", message))
        _send(connection, ("end", (preparation.outcome(), options.book.addresses(known))))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        code = 1  # the parent has gone or does not want more
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        code = 1
        try:
            _send(connection, ("error", error))
        except Exception:  # noqa: BLE001 - an error that cannot be pickled, or nobody listens
            code = 2
    finally:
        os._exit(code)


def _send(connection: socket.socket, message: object) -> None:
    data = pickle.dumps(message, protocol=5)
    connection.sendall(len(data).to_bytes(8, "little") + data)


def _receive(connection: socket.socket) -> bytes:
    return _exactly(connection, int.from_bytes(_exactly(connection, 8), "little"))


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Read so many bytes; EOFError when the other side has gone."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 2**20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


_Layout = list[tuple[str, str, int, int]]  #: column, dtype, offset, rows


def _columns(prepared: Prepared) -> dict[str, NDArray[Any]]:
    columns = {f"table.{name}": getattr(prepared.rows.table, name) for name in COLUMNS}
    columns |= {f"rows.{name}": getattr(prepared.rows, name) for name in _ROW_COLUMNS}
    if prepared.carrier is not None:
        columns["carrier"] = prepared.carrier
    return columns


#: What else there is of fresh rows their first number tells.
_ROW_COLUMNS = ("content", "exact", "backward", "flow")


def _write(slot: mmap.mmap, columns: dict[str, NDArray[Any]]) -> _Layout | bytes:
    layout: _Layout = []
    offset = 0
    for name, column in columns.items():
        layout.append((name, column.dtype.str, offset, column.size))
        offset += -(-column.nbytes // 64) * 64
    if offset > len(slot):
        return pickle.dumps(columns, protocol=5)
    for (_, dtype, start, size), column in zip(layout, columns.values(), strict=True):
        np.ndarray(size, dtype, slot, start)[:] = column
    return layout


def _read(slot: mmap.mmap, layout: _Layout | bytes) -> dict[str, NDArray[Any]]:
    if isinstance(layout, bytes):
        return cast("dict[str, NDArray[Any]]", pickle.loads(layout))  # noqa: S301 - our own child wrote it
    return {name: np.ndarray(size, dtype, slot, start) for name, dtype, start, size in layout}


def _assemble(
    point: int, layer: Layer, first_number: int, size_bytes: int, columns: dict[str, NDArray[Any]]
) -> Prepared:
    def part(prefix: str) -> dict[str, NDArray[Any]]:
        return {k.removeprefix(prefix): v for k, v in columns.items() if k.startswith(prefix)}

    rows = Rows.numbered(PacketTable(**part("table.")), first_number=first_number, **part("rows."))
    carrier = columns["carrier"].copy() if "carrier" in columns else None
    return Prepared(point, rows, size_bytes, layer, carrier)


def _translate(columns: PacketTable | Flows, names: tuple[str, str], handles: NDArray[np.uint32]) -> None:
    """Turn the worker's IPv6 address handles in the named columns into this process's."""
    v6 = columns.version == 6
    if v6.any():
        for name in names:
            column = getattr(columns, name)
            column[v6] = handles[column[v6]]
