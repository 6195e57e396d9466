"""Capture: tcpdump on several interfaces at once, and the bundle it leaves.

The only room that talks to Docker and to the kernel. It never reads a captured packet: what it leaves is read as
any other SOURCE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nattrace.bundle.writing import new_folder, write_manifest
from nattrace.capture.plan import Options, PointPlan, distinct
from nattrace.capture.recorder import HostRecorder, find_tcpdump, host_command
from nattrace.capture.script import script
from nattrace.capture.session import run_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nattrace.bundle.manifest import Manifest
    from nattrace.capture.session import Progress

__all__ = ["Options", "PointPlan", "capture_from_host", "host_script"]


def capture_from_host(
    points: Sequence[PointPlan],
    path: str | Path,
    options: Options,
    *,
    tcpdump: str | None = None,
    workload: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Capture with this machine's own tcpdump into a new bundle at `path`; return its manifest.

    Raises CaptureError when a tcpdump or the workload does not start, UsageError when `path` is in use.
    """
    program = find_tcpdump(tcpdump)
    folder = new_folder(path)
    manifest = run_session(
        distinct([*points]),
        lambda point: HostRecorder(point, options, program, folder),
        options,
        workload,
        on_progress=on_progress,
        on_message=on_message,
    )
    write_manifest(manifest, folder)
    return manifest


def host_script(
    points: Sequence[PointPlan],
    path: str,
    options: Options,
    *,
    tcpdump: str | None = None,
    workload: Sequence[str] = (),
) -> str:
    """Return the shell script that does by hand what `capture_from_host` would."""
    captures = [
        (
            point.file_name.removesuffix(".pcap"),
            host_command(point, options, tcpdump or "tcpdump", f"{path}.parts/{point.file_name}"),
        )
        for point in distinct([*points])
    ]
    return script(path, captures, (), workload, options.duration_s)
