"""The arguments of ``nattrace capture``, what it prints, and nothing of what it does."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

from nattrace.errors import UsageError
from nattrace.report.escape import terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from nattrace.bundle.manifest import Manifest
    from nattrace.capture import Options
    from nattrace.capture.session import Progress

#: A week: longer than this is a monitoring system's work.
_LONGEST_S: Final = 7 * 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nattrace capture``."""
    parser.add_argument(
        "-w", "--write", dest="folder", metavar="DIR", help="the new bundle (nattrace-TIME in this folder)"
    )
    parser.add_argument(
        "-i",
        "--interface",
        dest="interfaces",
        action="append",
        default=[],
        metavar="IF",
        help="an interface of this machine; give it once for each",
    )
    parser.add_argument(
        "--container",
        dest="containers",
        action="append",
        default=[],
        metavar="NAME",
        help="a container: its eth0, in its namespace, and the host's side of it",
    )
    parser.add_argument(
        "--network",
        dest="networks",
        action="append",
        default=[],
        metavar="NAME",
        help="a Docker network: its bridge",
    )
    parser.add_argument(
        "--auto", action="store_true", help="find out bridges and outgoing interfaces; the default"
    )
    parser.add_argument(
        "--via", choices=("docker", "host"), help="tcpdump runs in helper containers (docker) or here (host)"
    )
    parser.add_argument("--tcpdump", metavar="PATH", help="the tcpdump to run here (the one on PATH)")
    add_image_arguments(parser)
    parser.add_argument("--filter", default="", metavar="EXPR", help="capture filter, as in pcap-filter(7)")
    parser.add_argument(
        "--snaplen", type=_number(42, 262_144), metavar="BYTES", help="bytes kept of each packet (65400)"
    )
    parser.add_argument(
        "-B",
        "--buffer-size",
        type=_number(1, 1 << 21),
        metavar="KIB",
        help="each tcpdump's buffer (512 MiB for all points, 256 MiB for one, or less where memory is scarce)",
    )
    parser.add_argument(
        "-p",
        "--no-promiscuous-mode",
        dest="promiscuous",
        action="store_false",
        help="only what the interface itself takes; a bridge then shows nothing that merely passes it",
    )
    parser.add_argument("--duration", type=_seconds, metavar="S", help="end after so many seconds (3600)")
    parser.add_argument(
        "--count", type=_number(1, 10**12), metavar="N", help="end when one point has N packets"
    )
    parser.add_argument(
        "--max-size", type=_number(1, 10**6), metavar="MB", help="end when all points have so much (4295)"
    )
    parser.add_argument(
        "--rotate-size",
        type=_number(1, 10**6),
        metavar="MB",
        help="start a new file after so much (tcpdump -C)",
    )
    parser.add_argument(
        "--rotate-time", type=_number(1, _LONGEST_S), metavar="S", help="start a new file after so long (-G)"
    )
    parser.add_argument(
        "--files", type=_number(1, 10_000), metavar="N", help="with --rotate-size: keep the last N files (-W)"
    )
    parser.add_argument(
        "--no-context",
        dest="context",
        action="store_false",
        help="leave out what the host knows: rules, routes, conntrack, Docker's networks and containers",
    )
    parser.add_argument("--analyze", action="store_true", help="print the report at the end")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands to run by hand, and start nothing"
    )


def split_workload(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before and after the first ``--`` of a capture; other commands have no workload."""
    if arguments[:1] != ["capture"] or "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def run(arguments: argparse.Namespace, message: Callable[[str], None]) -> str | None:
    """Capture; return the bundle's folder, or None when nothing was captured because of ``--dry-run``."""
    # ctrl-C leaves pyroute2 in the middle of a question, of which asyncio would complain on the terminal.
    import logging  # noqa: PLC0415 - other commands need not wait for it

    from nattrace import capture  # noqa: PLC0415 - only this command needs it

    logging.getLogger("asyncio").addHandler(logging.NullHandler())
    if arguments.files is not None and arguments.rotate_size is None:
        raise UsageError("--files needs --rotate-size: it is the number of files that are kept")
    chosen = capture.Selection(
        tuple(arguments.interfaces), tuple(arguments.containers), tuple(arguments.networks)
    )
    if arguments.auto and not chosen.is_automatic:
        raise UsageError("--auto finds the interfaces out: leave -i, --container and --network away")
    request = capture.Request(
        selection=chosen,
        options=_options(arguments),
        via=arguments.via or ("docker" if arguments.tcpdump is None else "host"),
        tcpdump=arguments.tcpdump,
        workload=tuple(arguments.workload),
        context=arguments.context,
        **image_words(arguments),
    )
    folder = arguments.folder or time.strftime("nattrace-%Y%m%dT%H%M%SZ", time.gmtime())
    if arguments.dry_run:
        sys.stdout.write(capture.dry_run(request, folder))
        return None
    with _Line(sys.stderr) as line:
        manifest = capture.run(
            request, folder, on_progress=line.show if line.wanted else None, on_message=message
        )
    if manifest.missing:
        lacking = [each.what + (f" (needs {each.needs})" if each.needs else "") for each in manifest.missing]
        message(f"context without {', '.join(lacking)}: manifest.json says why")
    message(_summary(folder, manifest))
    if any(point.problem for point in manifest.points):
        message("; ".join(f"{point.name}: {point.problem}" for point in manifest.points if point.problem))
    return str(folder)


def install(arguments: argparse.Namespace, message: Callable[[str], None]) -> None:
    """Run ``nattrace install-tcpdump``."""
    from nattrace import capture  # noqa: PLC0415 - only this command needs it

    names = capture.install_tcpdump(arguments.target, on_message=message, **image_words(arguments))
    message(f"installed in {arguments.target}: {', '.join(names)}")


def image_words(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was said of the helper image."""
    from nattrace.capture.helper.image import DEFAULT_BASE, DEFAULT_TAG  # noqa: PLC0415

    return {
        "image": arguments.image or DEFAULT_TAG,
        "recipe": arguments.build,
        "base": arguments.base or DEFAULT_BASE,
    }


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which helper image is used and how it is built."""
    parser.add_argument(
        "--image", metavar="TAG", help="helper image (localtcpdump, built when it is missing)"
    )
    parser.add_argument(
        "--build",
        choices=("auto", "scratch", "base"),
        default="auto",
        help="build it from this machine's tcpdump (scratch) or from --base (auto: scratch if there is one)",
    )
    parser.add_argument("--base", metavar="IMAGE", help="the distribution's image to build from (alpine:3)")


def add_install_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nattrace install-tcpdump``."""
    parser.add_argument("--target", required=True, metavar="DIR", help="the folder that it is put into")
    add_image_arguments(parser)


def _options(arguments: argparse.Namespace) -> Options:
    from nattrace.capture.plan import (  # noqa: PLC0415
        DEFAULT_DURATION_S,
        DEFAULT_SIZE_BYTES,
        WHOLE_SNAPLEN,
        Options,
    )

    if "\0" in arguments.filter:
        raise UsageError("--filter: a NUL character is in no filter")
    return Options(
        filter=arguments.filter,
        snaplen=arguments.snaplen or WHOLE_SNAPLEN,
        buffer_kib=arguments.buffer_size,
        duration_s=arguments.duration or DEFAULT_DURATION_S,
        count=arguments.count,
        max_bytes=DEFAULT_SIZE_BYTES if arguments.max_size is None else arguments.max_size * 10**6,
        rotate_mb=arguments.rotate_size,
        rotate_s=arguments.rotate_time,
        ring_files=arguments.files,
        promiscuous=arguments.promiscuous,
    )


def _summary(folder: str, manifest: Manifest) -> str:
    counted = []
    for point in manifest.points:
        counters = point.counters
        said = "?" if counters is None or counters.captured is None else str(counters.captured)
        lost = counters.dropped_by_kernel if counters is not None else None
        remarks = [f"{lost} dropped"] * bool(lost) + ["incomplete"] * bool(point.problem)
        counted.append(f"{point.name} {said}" + (f" ({', '.join(remarks)})" if remarks else ""))
    ended = f"ended by {manifest.stopped_by}"
    if manifest.workload is not None and manifest.workload.exit_code:
        code = manifest.workload.exit_code
        ended += f"; the command {f'gave exit code {code}' if code > 0 else f'was ended by signal {-code}'}"
    return f"bundle {folder}: packets {', '.join(counted)}; {ended}"


class _Line:
    """One line on a terminal that is written over and over, and is gone at the end."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.wanted = stream is not None and stream.isatty()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._write("")

    def show(self, progress: Progress) -> None:
        """Write packets per point and the time that is left."""
        counts = "  ".join(
            f"{terminal(name)} {'-' if n is None else n}" for name, n in progress.packets.items()
        )
        time_text = (
            f"{progress.elapsed_s:.0f} s" if progress.left_s is None else f"{progress.left_s:.0f} s left"
        )
        # One column less than there are: a full line moves the cursor to the next.
        columns = shutil.get_terminal_size().columns - 1
        self._write(f"capturing  {time_text}  {counts}"[:columns])

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(f"\r{text.ljust(self._width)}" if text else f"\r{' ' * self._width}\r")
            self._stream.flush()
            self._width = len(text)


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) <= 18 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to a week")
    return seconds
