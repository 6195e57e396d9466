"""Captures of any link layer, through tshark: asked for with ``--dissector tshark``, never used unasked.

tshark is asked one question a packet: where in the frame does the outermost IP header begin? From there on the
bytes go through `decode` like those of any other capture, so every column means the same, hashes included. It
runs as a process of its own, without an event loop, bounded in time and memory; pyshark reads what it prints.

Some 1,000 to 3,000 packets a second: for rare link layers and small captures.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from nattrace.errors import InputError, MissingToolError
from nattrace.ingest.decode import comparable_bytes, decode
from nattrace.ingest.quotes import read_quotes
from nattrace.ingest.source import PADDING, Batch, Inner, PointInfo, Records
from nattrace.table import ALL_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nattrace.ingest.source import ReadOptions

#: Seconds that tshark may be silent. It starts in under one; a packet that takes longer than this hangs it.
SILENCE_SECONDS: Final = 60
#: Bytes of JSON of one packet: 256 KiB of frame (libpcap's MAXIMUM_SNAPLEN) as hex, several times over.
MAX_PACKET_BYTES: Final = 16 << 20
#: Interfaces of one capture, as for capture files read natively.
MAX_POINTS: Final = 1024
_BATCH_PACKETS: Final = 1000
_READ_BYTES: Final = 1 << 16
#: LINKTYPE_RAW: the packet begins with its IP header.
_RAW: Final = 101

_EPOCH = re.compile(r"(-?)(\d{1,10})\.(\d{1,9})\d{0,9}\Z", re.ASCII)
_ISO = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{1,9})Z\Z", re.ASCII)


class _Piece:
    """One packet as tshark found it."""

    __slots__ = (
        "data",
        "encapsulation",
        "frame",
        "interface",
        "name",
        "reason",
        "start",
        "time_ns",
        "wire_length",
    )

    def __init__(self) -> None:
        self.frame = 0
        self.time_ns = 0
        self.wire_length = 0
        self.data = b""  #: the frame as captured
        self.start = 0  #: where in it the IP header begins
        self.reason: str | None = None  #: why there is no IP header to decode
        self.interface = 0
        self.name: str | None = None
        self.encapsulation = "UNKNOWN"


class TsharkCapture:
    """A capture file that tshark reads; one point per interface, named as the native readers name them.

    Packets without IP are counted as ``not-ip``; IP headers that exist only after decompression or reassembly
    (6LoWPAN), not in the frame, as ``not-in-frame``; what pyshark cannot read as ``tshark-unparsed``.
    """

    def __init__(self, path: Path | str, name: str | None, label: str) -> None:
        """Look for tshark; raises MissingToolError without it."""
        tshark = shutil.which("tshark")
        if tshark is None:
            raise MissingToolError(
                f"{label}: tshark is not installed; install it (Debian, Ubuntu: apt install tshark; Fedora: "
                "dnf install wireshark-cli), or leave --dissector tshark out"
            )
        self.points: list[PointInfo] = []
        self._tshark = tshark
        self._path = Path(path)
        self._base = name if name is not None else self._path.stem
        self._label = label
        self._index: dict[int, int] = {}
        self._pieces: Iterator[list[_Piece]] | None = None
        self._first: list[_Piece] | None = None

    def comparable_bytes(self) -> int:
        """Return the IP bytes of the most truncated of the first 1000 packets, 65535 if none is truncated.

        Raises InputError when tshark cannot read the file.
        """
        if self._first is None:
            self._first = next(self._read(), [])
        records = [
            self._records(0, found) for found in [[p for p in self._first if p.reason is None]] if found
        ]
        return min((comparable_bytes(r) for r in records), default=ALL_BYTES)

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        """Yield decoded rows, in file order per point; may be called once.

        Raises InputError when tshark cannot read the file; when it stops later, the points are `truncated`.
        """
        pieces = self._read()
        block = self._first if self._first is not None else next(pieces, [])
        self._first = None
        while block:
            for index in sorted({self._point(piece) for piece in block}):
                yield from self._decode(index, [p for p in block if self._point(p) == index], options)
            block = next(pieces, [])
        if not self.points:
            self.points.append(PointInfo(self._base, self._label))

    def _read(self) -> Iterator[list[_Piece]]:
        if self._pieces is None:
            self._pieces = self._blocks()
        return self._pieces

    def _decode(self, index: int, pieces: list[_Piece], options: ReadOptions) -> Iterator[Batch]:
        info = self.points[index]
        info.packets += len(pieces)
        times = [piece.time_ns for piece in pieces]
        info.first_ns = min(times) if info.first_ns is None else min(info.first_ns, *times)
        info.last_ns = max(times) if info.last_ns is None else max(info.last_ns, *times)
        for piece in pieces:
            if piece.reason is not None:
                info.skipped[piece.reason] += 1
        found = [piece for piece in pieces if piece.reason is None]
        if not found:
            return
        records = self._records(index, found)
        inner: list[list[Inner]] = []
        table, skipped = decode(records, options, inner)
        info.skipped.update(skipped)
        info.decoded += len(table)
        quotes = read_quotes(records, table, options)
        # lengths count the link header again, as for any other capture
        start = np.array([piece.start for piece in found], np.uint32)
        start = start[np.searchsorted(records.frame, table.frame)]
        table.captured_length = table.captured_length + start
        table.wire_length = table.wire_length + start
        if len(table):
            yield Batch(index, table, quotes=quotes, inner=tuple(map(Inner.concatenate, inner)))

    @staticmethod
    def _records(index: int, pieces: list[_Piece]) -> Records:
        packets = [piece.data[piece.start :] for piece in pieces]
        captured = np.array([len(packet) for packet in packets], np.uint32)
        wire = np.array([max(p.wire_length - p.start, len(p.data) - p.start) for p in pieces], np.uint32)
        return Records(
            point=index,
            link_type=_RAW,
            buffer=np.frombuffer(b"".join(packets) + bytes(PADDING), np.uint8),
            offset=np.cumsum(captured, dtype=np.int64) - captured,
            captured_length=captured,
            wire_length=wire,
            time_ns=np.array([piece.time_ns for piece in pieces], np.int64),
            frame=np.array([piece.frame for piece in pieces], np.uint32),
        )

    def _point(self, piece: _Piece) -> int:
        index = self._index.get(piece.interface)
        if index is None:
            if len(self.points) == MAX_POINTS:
                raise InputError(
                    f"{self._label}: more than {MAX_POINTS} interfaces; filter the capture first"
                )
            index = self._index[piece.interface] = len(self.points)
            self.points.append(
                PointInfo(self._base, self._label, interface=piece.name, link_type=piece.encapsulation)
            )
            if len(self.points) > 1:
                for interface, place in self._index.items():
                    info = self.points[place]
                    info.name = info.interface or f"{self._base}:{interface}"
        return index

    def _blocks(self) -> Iterator[list[_Piece]]:
        """Run tshark and yield its packets, some at a time."""
        parse = _parser()
        command = [
            self._tshark, "-r", str(self._path), "-n", "-T", "json", "-x", "--no-duplicate-keys",
            "-j", "frame ip ipv6", "-o", "ip.defragment:FALSE", "-o", "ipv6.defragment:FALSE",
        ]  # fmt: skip
        read_any = False
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(  # noqa: S603 - a fixed command; the path is one argument of its own
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            )
            try:
                block: list[_Piece] = []
                assert process.stdout is not None
                for text in _packets(process.stdout, self._label):
                    block.append(_piece(parse, text, block[-1].frame + 1 if block else None))
                    if len(block) == _BATCH_PACKETS:
                        read_any = True
                        yield block
                        block = []
                if process.wait(SILENCE_SECONDS) and not block and not read_any:
                    raise InputError(f"{self._label}: tshark: {_complaint(complaints)}")
                if block:
                    yield block
                if process.returncode:
                    for info in self.points:
                        info.truncated = True
            except subprocess.TimeoutExpired as error:
                raise InputError(f"{self._label}: tshark does not end; try a smaller capture") from error
            finally:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def _packets(stdout: IO[bytes], label: str) -> Iterator[bytes]:
    """Yield the JSON object of each packet from ``tshark -T json``; its lines stand two spaces in.

    Raises InputError when tshark is silent for SILENCE_SECONDS.
    """
    descriptor = stdout.fileno()
    packet: list[bytes] = []
    size = 0
    rest = b""
    while True:
        if not select.select([descriptor], [], [], SILENCE_SECONDS)[0]:
            raise InputError(f"{label}: tshark says nothing for {SILENCE_SECONDS} s; try a smaller capture")
        block = os.read(descriptor, _READ_BYTES)
        if not block:
            return
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_PACKET_BYTES:
            rest = rest[:1]  # no such line is a packet's: it will not parse, and is counted
        for line in lines:
            if line.startswith(b"  {"):
                packet, size = [], 0
            size += len(line)
            if size <= MAX_PACKET_BYTES:
                packet.append(line)
            if line.startswith(b"  }"):
                yield b"\n".join(packet).rstrip().removesuffix(b",")
                packet, size = [], 0


def _parser() -> Callable[[bytes], Any]:
    """Return pyshark's function from JSON to a packet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pyshark's own, of no use to whoever runs this
        from pyshark.tshark.output_parser.tshark_json import (  # noqa: PLC0415 - slow, and on request only
            packet_from_json_packet,
        )

    return lambda text: packet_from_json_packet(text, deduplicate_fields=False)


def _piece(parse: Callable[[bytes], Any], text: bytes, next_frame: int | None) -> _Piece:
    """Read one packet; what is wrong with it becomes its `reason`."""
    piece = _Piece()
    piece.frame = next_frame or 1
    try:
        packet = parse(text)
        piece.frame = int(packet.number) & 0xFFFFFFFF
        piece.wire_length = int(packet.length) & 0xFFFFFFFF
        piece.time_ns = _time_ns(str(packet.sniff_timestamp))
        piece.encapsulation = f"WTAP_ENCAP {int(packet.frame_info.encap_type)}"
        if packet.interface_captured is not None:
            _read_interface(piece, packet)
        piece.data = bytes.fromhex(_raw(packet.frame_raw)[0])
        headers = [_raw(packet[layer]) for layer in ("ip_raw", "ipv6_raw") if layer in packet]
        if not headers:
            piece.reason = "not-ip"
            return piece
        header, piece.start = min(headers, key=lambda found: found[1])
        if not header or not piece.data.startswith(bytes.fromhex(header), piece.start):
            piece.reason = "not-in-frame"
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        piece.reason = "tshark-unparsed"
    return piece


def _read_interface(piece: _Piece, packet: Any) -> None:
    captured = packet.interface_captured
    piece.interface = int(captured) & 0xFFFF
    try:
        name = str(packet.frame_info.interface_id.interface_name)
    except AttributeError:
        return
    piece.name = name if name != "unknown" else None


def _raw(layer: Any) -> tuple[str, int]:
    """Return (hex, position in the frame) of a ``-x`` layer: [hex, position, ...], or a list of such lists.

    pyshark takes any list for repeated layers: its first item is the value, the others are duplicates.
    """
    first = layer.value
    if isinstance(first, str):
        return first, max(0, int(layer.duplicate_layers[0].value))
    return str(first[0]), max(0, int(first[1]))


def _time_ns(text: str) -> int:
    """Return ns since 1970 from frame.time_epoch: decimal seconds, or ISO 8601 since Wireshark 4.2."""
    epoch = _EPOCH.match(text)
    if epoch is not None:
        time_ns = int(epoch[2]) * 1_000_000_000 + int(epoch[3].ljust(9, "0"))
        time_ns = -time_ns if epoch[1] else time_ns
    elif (iso := _ISO.match(text)) is not None:
        since = datetime.fromisoformat(iso[1]).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
        time_ns = since // timedelta(seconds=1) * 1_000_000_000 + int(iso[2].ljust(9, "0"))
    else:
        raise ValueError(text)
    if abs(time_ns) >= 1 << 63:
        raise ValueError(text)
    return time_ns


def _complaint(complaints: IO[bytes]) -> str:
    """Return the last line that tshark wrote to stderr, printable."""
    complaints.seek(0)
    lines = [
        line for line in complaints.read(1 << 16).decode("utf-8", "replace").splitlines() if line.strip()
    ]
    text = lines[-1] if lines else "cannot read this file"
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
