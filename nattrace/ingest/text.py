"""tcpdump's printed output as a capture: what a ticket or a chat holds when nobody kept the pcap.

Reads the lines that tcpdump prints with any of -n -e -v -vv -vvv -t... -S -q -# -x -xx -X -XX -A and -i any,
together with what is pasted around them: prompts, markdown fences, quoting, colours. Lines that are no packets
are passed over; packets that cannot be read are counted by reason. It never resolves a name, never takes a
relative TCP number for an absolute one (see `text_sequence`) and never raises for what a line holds.

A text has less than a capture. Without -v there is no TTL and no IP identification, a pure acknowledgement
shows no sequence number (it is 0 here), and there is never a payload to compare (``content_length`` is 0).
Packets printed with a hex dump are decoded from it instead. With -A a payload can forge whole lines; nothing in
the text tells them apart.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from nattrace.errors import InputError
from nattrace.ingest.quotes import PRINTED_BYTES
from nattrace.ingest.source import Batch, PointInfo
from nattrace.ingest.text_dump import Dump, decode_dumps
from nattrace.ingest.text_lines import read_addresses, read_ip, read_packet
from nattrace.ingest.text_packet import Printed
from nattrace.ingest.text_quotes import legible, take_quoted_line, with_printed
from nattrace.ingest.text_rows import ROW_WIDTH, row_of, table_of
from nattrace.ingest.text_sequence import SequenceNumbers
from nattrace.ingest.text_stream import read_lines
from nattrace.ingest.text_times import STAMP, Mode, PrintedClock, mode_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from nattrace.ingest.source import ReadOptions

#: Points of one text, as for capture files: a text that names an interface in every line must not set the pace.
MAX_POINTS = 1024
#: Lines at the start by which the meaning of printed times is told.
_HEAD_LINES = 200
_BATCH_ROWS = 16384

_COLUMN = re.compile(
    r"(?:(\S{1,64})\s+)?(?:In|Out|B|M|P)\s+(?:ifindex \d{1,10} |(?=IP6? |ethertype |\S{17} ethertype |ARP, ))",
    re.ASCII,
)
_BARE = re.compile(
    r"(?:(\d{1,10})\s{1,8})?(?=(?:\S{1,64}\s+(?:In|Out|B|M|P)\s+)?(?:IP6? (?:\(|truncated-ip|bad-|\S{1,300} > \S)|ARP, |MPLS \(|PPPoE  \[|ethertype IP"
    r"|[0-9a-f]{2}(?::[0-9a-f]{2}){5} > [0-9a-f]{2}:))",
    re.ASCII,
)
_HEADER = re.compile(
    r"(?:tcpdump: )?(?:listening on (\S{1,80})|reading from file .{1,400}), link-type (\S{1,60})(?: \([^)]{0,80}\))?,? ?"
    r"(?:(?:capture size|snapshot length) (\d{1,10}))?",
)
_PROMPT = re.compile(r"(?:^|.{0,100}[\s/])tcpdump (?=(?:.{0,200} )?-)")
_INTERFACE = re.compile(r"(?:^|\s)(?:-[a-hj-zA-Z#]{0,12}i\s{0,4}|--interface[= ])([^\s-]\S{0,63})")
_SHORT_OPTIONS = re.compile(r"(?:^|\s)-([a-zA-Z#]{1,12})(?=\s|$)")
_DROPPED = re.compile(r"(\d{1,15}) packets? dropped by kernel")
_COUNTS = re.compile(r"\d{1,15} packets? (?:captured|received by filter|dropped by (?:kernel|interface))")

#: How a tunnel's own line ends (VXLAN, OTV): with -t the next line is the packet inside, not one of its own.
_TUNNEL_END = re.compile(r"(?:vni (?:0x[0-9a-f]{1,6}|\d{1,8})|instance \d{1,8})\Z", re.ASCII)


class _Run:
    """One run of tcpdump in the text: its interface, clock and TCP connections."""

    def __init__(
        self, interface: str | None = None, mode: Mode = "time-of-day", *, absolute: bool = False
    ) -> None:
        self.interface = interface
        self.link_type = "UNKNOWN"
        self.snaplen: int | None = None
        self.mode = mode
        self.clock = PrintedClock(mode)
        self.sequence = SequenceNumbers(absolute=absolute)
        self.stamped: bool | None = None  #: whether its packets carry times; None before the first
        self.points: set[int] = set()


class _Pending:
    """The packet whose lines are being read."""

    __slots__ = ("dump", "ending", "frame", "packet", "point", "time_ns")

    def __init__(self, point: int, frame: int, time_ns: int, packet: Printed | str, text: str) -> None:
        self.point = point
        self.frame = frame
        self.time_ns = time_ns
        self.packet = packet  #: or why it could not be read
        self.ending = text[-40:]
        self.dump: Dump | None = None


class TextCapture:
    """Printed packets of one text, one point per interface that the text names.

    `name` is the point name that the user gave, `label` what to call the file in messages. A text that names no
    interface is one point named after its file. The stream needs ``read(size)`` only and is read once, forwards.
    """

    #: There are no packets behind the rows, only what was printed of them.
    printed = True

    def __init__(self, stream: BinaryIO, name: str | None, label: str) -> None:
        self._named = name is not None
        self._base = name if name is not None else _stem(label)
        #: the first is there from the start, and learns its interface with its first packet
        self.points: list[PointInfo] = [PointInfo(self._base, label, named=self._named)]
        self._stream = stream
        self._label = label
        self._index: dict[str | None, int] = {}
        self._run = _Run()
        self._pending: _Pending | None = None
        #: of each point, the values of its rows one after the other: plain integers keep the collector idle
        self._rows: list[list[int]] = []
        self._dumps: list[list[tuple[int, Dump, str | None]]] = []
        #: of each point, the rows of ICMP errors, what they quote, and the MTUs that they name
        self._quoted: list[list[tuple[int, tuple[int, ...], int]]] = []
        self._waiting = 0
        self._frame = 0
        self._recognised = False  #: a line that only tcpdump prints has been seen

    def comparable_bytes(self) -> int:
        """Return PRINTED_BYTES: an IPv4 and a TCP header without options are what printed fields can stand for."""
        return PRINTED_BYTES

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        """Yield the packets in batches of some ten thousand rows; may be called once.

        Raises InputError when the stream fails, or at its end when no line was tcpdump's.
        """
        try:
            lines = read_lines(self._stream, self._label)
            head = list(islice(lines, _HEAD_LINES))
            self._run = _Run(mode=mode_of(head))
            for line in chain(head, lines):
                self._line(line, options)
                if self._waiting >= _BATCH_ROWS:
                    yield from self._flush(options)
            self._finish(options)
            yield from self._flush(options)
            if not self._recognised:
                raise InputError(
                    f"{self._label}: no line of this text is a packet as tcpdump prints it; "
                    "give a pcap or pcapng file, or the output of tcpdump -n"
                )
        finally:
            self._stream.close()

    def _line(self, line: str, options: ReadOptions) -> None:
        text = line.strip()
        if not text:
            return
        if text.startswith("0x") and (pending := self._pending) is not None:
            if pending.dump is None:
                pending.dump = Dump()
            pending.dump.add(text)
            return
        text = text.removeprefix("[Error converting time] ")  # tcpdump, of times after 2038: as if by -t
        stamp = STAMP.match(text)
        if stamp is not None:
            self._run.stamped = True
            self._head(text[stamp.end() :], stamp, stamp[1], options)
        elif self._continues(text, indented=line[0] in " \t"):
            return
        elif not self._run.stamped and line[0] != "\t" and (bare := _BARE.match(text)) is not None:
            if self._run.stamped is None or not self._inside_tunnel():
                self._run.stamped = False
                self._head(text[bare.end() :], None, bare[1], options)
        else:
            if self._run.stamped is False and line[0] not in " \t":
                self._finish(options)  # with -t this may be a packet of any protocol: its dump is its own
            self._remark(text, options)

    def _inside_tunnel(self) -> bool:
        return self._pending is not None and _TUNNEL_END.search(self._pending.ending) is not None

    def _continues(self, text: str, *, indented: bool) -> bool:
        """Take a line as the rest of the pending packet's -v header, or as what an error quotes; say if it was."""
        pending = self._pending
        if pending is None:
            return False
        packet = pending.packet
        if isinstance(packet, Printed):
            if packet.addressed:
                # with -t a line that is not indented is a packet of its own
                return (indented or self._run.stamped is True) and take_quoted_line(text, packet)
            if " > " not in text:
                return False
            pending.packet = read_addresses(text, packet) or packet
            pending.ending = text[-40:]
            return True
        if packet in ("not-ip", "text-unparsed") and text.startswith(
            ("(tos ", "(class ", "(flowlabel ", "(hlim ")
        ):
            # -e -v prints MPLS labels and the like on a line of their own
            printed = Printed()
            pending.packet = read_ip(text, printed) or printed
            return True
        return False

    def _head(self, text: str, stamp: re.Match[str] | None, number: str | None, options: ReadOptions) -> None:
        """Begin a packet: `text` is its line after number and time."""
        self._finish(options)
        at = self._run.clock.read(stamp)
        time_ns, dated = at if at is not None else (0, False)
        if not dated and self._run.mode == "time-of-day":
            time_ns += options.day_ns
        interface = self._run.interface
        column = _COLUMN.match(text)
        if column is not None:
            if column[1] is not None:
                interface = _printable(column[1])
            text = text[column.end() :]
        # -# numbers are the frame numbers, as long as they count up
        self._frame = max(self._frame + 1, int(number) & 0xFFFFFFFF if number is not None else 0)
        index = self._point(interface)
        info = self.points[index]
        info.packets += 1
        packet = read_packet(text) if at is not None else "text-unparsed"
        # without a time, "IP ... > ..." may be prose, unless it can be read
        if not isinstance(packet, str) or packet == "arp" or (stamp is not None and packet != "not-ip"):
            self._recognised = True
        if at is not None:
            info.dated &= dated
            info.first_ns = time_ns if info.first_ns is None else min(info.first_ns, time_ns)
            info.last_ns = time_ns if info.last_ns is None else max(info.last_ns, time_ns)
        self._pending = _Pending(index, self._frame & 0xFFFFFFFF, time_ns, packet, text)

    def _finish(self, options: ReadOptions) -> None:
        """Make the pending packet a row, or count why it is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        packet = pending.packet
        if isinstance(packet, Printed) and not packet.addressed:
            packet = "text-unparsed"
        reason = None
        if isinstance(packet, str):
            if pending.dump is None or packet == "arp":
                self.points[pending.point].skipped[packet] += 1
                return
            reason, packet = packet, Printed()
        rows = self._rows[pending.point]
        if pending.dump is not None:
            pending.dump.src, pending.dump.dst = packet.src, packet.dst
            pending.dump.frame_length = packet.frame_length
            self._dumps[pending.point].append((len(rows) // ROW_WIDTH, pending.dump, reason))
        rows.extend(row_of(packet, pending.frame, pending.time_ns, self._run.sequence, options))
        self._waiting += 1
        if packet.quote is not None and packet.quote.addressed:
            # tcpdump counts the numbers of quoted segments like those of others
            quoted = row_of(packet.quote, pending.frame, pending.time_ns, self._run.sequence, options)
            if legible(packet):
                self._quoted[pending.point].append((len(rows) // ROW_WIDTH - 1, quoted, packet.mtu))

    def _flush(self, options: ReadOptions) -> Iterator[Batch]:
        for index, (info, rows, dumps, quoted) in enumerate(
            zip(self.points, self._rows, self._dumps, self._quoted, strict=False)
        ):
            if not rows:
                continue
            table = table_of(rows)
            quotes = None
            kept = np.ones(len(table), np.bool_)
            if dumps:
                unread, quotes = decode_dumps(table, [(row, dump) for row, dump, _ in dumps], options)
                lost = {row: reason for row, _, reason in dumps if reason is not None and row in unread}
                info.skipped.update(Counter(lost.values()))
                kept[list(lost)] = False
            if quoted:
                at, packets, mtus = zip(*quoted, strict=True)
                quotes = with_printed(quotes, table, at, table_of(list(chain.from_iterable(packets))), mtus)
            if not kept.all():
                table = table.take(kept)
                quotes = quotes and replace(quotes, row=np.cumsum(kept)[quotes.row] - 1)
            info.decoded += len(table)
            rows.clear()
            dumps.clear()
            quoted.clear()
            if len(table):
                yield Batch(index, table, quotes)
        self._waiting = 0

    def _remark(self, text: str, options: ReadOptions) -> None:
        """Learn from a line that is no packet: which interface, which link type, what the kernel dropped."""
        header = _HEADER.match(text)
        if header is not None:
            self._recognised = True
            interface = _printable(header[1].rstrip(",")) if header[1] else self._run.interface
            if self._run.points:
                self._begin(_Run(interface), options)
            self._run.interface = interface
            self._run.link_type = header[2].rstrip(",")
            self._run.snaplen = int(header[3]) if header[3] else None
        elif "tcpdump " in text and (prompt := _PROMPT.match(text)) is not None:
            arguments = text[prompt.end() :][:1000]
            found = _INTERFACE.search(arguments)
            options_given = "".join(_SHORT_OPTIONS.findall(arguments))
            times = options_given.count("t")
            mode: Mode = "since-previous" if times == 3 else "since-first" if times == 5 else "time-of-day"
            interface = _printable(found[1]) if found else None
            self._begin(_Run(interface, mode, absolute="S" in options_given), options)
        elif (counts := _COUNTS.search(text)) is not None and counts.start() < 8:
            self._recognised = True
            dropped = _DROPPED.match(text, counts.start())
            if dropped is not None and (int(dropped[1]) == 0 or len(self._run.points) == 1):
                # a count above 0 of several interfaces belongs to none of them in particular
                for index in self._run.points:
                    info = self.points[index]
                    info.dropped_by_kernel = (info.dropped_by_kernel or 0) + int(dropped[1])

    def _begin(self, run: _Run, options: ReadOptions) -> None:
        self._finish(options)
        self._run = run

    def _point(self, interface: str | None) -> int:
        """Return the index of the interface's point, making it when it is new."""
        index = self._index.get(interface)
        if index is None:
            if len(self._index) == MAX_POINTS:
                raise InputError(
                    f"{self._label}: more than {MAX_POINTS} interfaces; cut the text to those of interest"
                )
            index = self._index[interface] = len(self._index)
            if index:
                self.points.append(PointInfo(self._base, self._label, named=self._named))
            self.points[index].interface = interface
            self._rows.append([])
            self._dumps.append([])
            self._quoted.append([])
            for info in self.points:
                info.name = self._base if info.interface is None else info.interface
                if self._named:
                    info.name = self._base
                    if index and info.interface is not None:
                        info.name = f"{self._base}:{info.interface}"
        self._run.points.add(index)
        info = self.points[index]
        if info.link_type == "UNKNOWN":
            info.link_type = self._run.link_type
        if info.snaplen is None:
            info.snaplen = self._run.snaplen
        return index


def _stem(label: str) -> str:
    """Return what a point is called after its file: the name without suffixes of compression and of text."""
    path = PurePath(label)
    if path.suffix in (".gz", ".bz2", ".xz", ".zst"):
        path = path.with_suffix("")
    return path.stem or label


def _printable(interface: str) -> str | None:
    """Return an interface name, or None if no interface can be called that; tcpdump prints ? for unknown."""
    return interface if interface.isprintable() and interface not in ("-", "?") else None
