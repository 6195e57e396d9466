"""What will be captured: points and options as data, and the tcpdump command lines that follow from them.

Pure: nothing is started or looked up here, so that ``--dry-run`` prints exactly what would run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

#: Snapshot length: any packet that a network card takes whole, super-frames too (Linux makes them of up to 65,226
#: bytes). With 96 bytes of its own (tpacket2_hdr, sockaddr_ll, a VLAN tag) it fits a slot of 64 KiB. From some 65,460 bytes
#: on a slot takes 128 KiB (packet_mmap: whole powers of two), and the same memory holds half as many packets.
WHOLE_SNAPLEN: Final = 65400

#: tcpdump's buffers in KiB: of one point at most, of all together, of one at least. In immediate mode each packet takes a
#: slot of the snaplen, whatever its size, unless the interface does no offload; tcpdump's 2 MiB are 8 slots at its own
#: snaplen, and a burst of 50 packets lost 24. With 512 slots a busy host lost 2,156 of 4,938 packets on docker0.
_POINT_KIB: Final = 262_144
_TOTAL_KIB: Final = 524_288
_LEAST_KIB: Final = 4_096
#: The kernel never swaps them out, so a small machine gives no more than this part of its memory.
_MEMORY_SHARE: Final = 16

#: Longest capture without --duration: one that somebody forgot must end.
DEFAULT_DURATION_S: Final = 3600.0

#: Bytes of all points together without --max-size, for the same reason.
DEFAULT_SIZE_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class PointPlan:
    """One interface to capture on."""

    name: str
    interface: str
    ifindex: int | None = None
    namespace: str = "host"  #: as the manifest says it: ``host`` or ``container:NAME``
    container: str | None = None  #: whose traffic it carries, where that is known
    joins: str = "host"  #: the namespace, as ``docker run --network`` names it for a helper
    process_id: int | None = None  #: a process in that namespace, None for the host's
    held_by: str | None = None  #: the network whose bridge it is, where that is there only with a container

    @property
    def file_name(self) -> str:
        """The capture file's name; interface names may hold anything but a slash and white space."""
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "._@-") else "_" for c in self.name)
        return f"{safe.lstrip('.-') or 'point'}.pcap"

    def owns(self, file_name: str) -> bool:
        """Tell whether tcpdump made a file of this name for the point: its own, or one of a rotation.

        -C adds a number at the end, -G a time before the suffix. eth0 does not own eth0.100.pcap.
        """
        stem = re.escape(self.file_name.removesuffix(".pcap"))
        return re.fullmatch(rf"{stem}(\.\d{{8}}T\d{{6}})?\.pcap\d*", file_name, re.ASCII) is not None


@dataclass(frozen=True, slots=True)
class Options:
    """How every point is captured, and when the capture ends."""

    filter: str = ""
    snaplen: int = WHOLE_SNAPLEN
    buffer_kib: int | None = (
        None  #: tcpdump -B, of each point; None until `with_buffers` has shared out the memory
    )
    duration_s: float = DEFAULT_DURATION_S
    count: int | None = None  #: packets at one point that end the capture
    max_bytes: int = DEFAULT_SIZE_BYTES  #: of all points together
    rotate_mb: int | None = None  #: tcpdump -C: a new file after so many million bytes
    rotate_s: int | None = None  #: tcpdump -G: a new file after so many seconds
    ring_files: int | None = None  #: tcpdump -W: files kept of each point
    #: False is tcpdump -p. A bridge in promiscuous mode takes what only passes it, and routes it a second time: the
    #: hairpin of a container that reaches a published port then shows three packets for two
    promiscuous: bool = True


def with_buffers(options: Options, points: int, memory_bytes: int | None) -> Options:
    """Return the options with a buffer for each of so many points, unless they say one.

    `memory_bytes` is what the machine that captures has in all, None where nobody knows.
    """
    if options.buffer_kib is not None:
        return options
    total = _TOTAL_KIB if memory_bytes is None else min(_TOTAL_KIB, memory_bytes // 1024 // _MEMORY_SHARE)
    return replace(options, buffer_kib=max(_LEAST_KIB, min(_POINT_KIB, total // max(points, 1))))


def tcpdump_arguments(point: PointPlan, options: Options, path: str) -> list[str]:
    """Return tcpdump's arguments, without the program, that capture one point into the file `path`.

    ``--immediate-mode -U`` writes each packet at once: a tcpdump without it, stopped right after the last packet,
    wrote 0 of 80 packets and reported none dropped.
    """
    words = [
        "--immediate-mode",
        "-U",
        "-s",
        str(options.snaplen),
        "-B",
        str(options.buffer_kib or _LEAST_KIB),
    ]
    words += ["--time-stamp-precision=nano", "-n", "-i", point.interface]
    words += [] if options.promiscuous else ["-p"]
    if options.rotate_mb is not None:
        words += ["-C", str(options.rotate_mb)]
    if options.rotate_s is not None:
        words += ["-G", str(options.rotate_s)]
        # -G overwrites a file whose name does not change with time (tcpdump(1)).
        path = path.removesuffix(".pcap").replace("%", "%%") + ".%Y%m%dT%H%M%S.pcap"
    # With -G, -W ends the capture after so many files instead of overwriting the oldest.
    if options.ring_files is not None and options.rotate_s is None:
        words += ["-W", str(options.ring_files)]
    words += ["-w", path]
    # After "--" a filter can hold no option, whatever it begins with.
    return words + (["--", options.filter] if options.filter else [])


def distinct(points: list[PointPlan]) -> list[PointPlan]:
    """Return the points, each interface of each namespace once, with names that are all different."""
    found: dict[tuple[str, str], PointPlan] = {}
    files: set[str] = set()
    for point in points:
        if (point.namespace, point.interface) in found:
            continue
        made, number = point, 1
        while made.file_name in files:
            number += 1
            made = replace(point, name=f"{point.name}-{number}")
        files.add(made.file_name)
        found[point.namespace, point.interface] = made
    return list(found.values())
