"""One running tcpdump: what the session needs of it, and the kind that is a process of this machine.

The other kind is a helper container (`nattrace.capture.helper`). A recorder starts and stops tcpdump; it never
looks into what was captured.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from nattrace.capture.errors import CaptureError
from nattrace.capture.plan import Options, PointPlan, tcpdump_arguments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Bytes of tcpdump's messages that are kept in mind; its last lines are the counters.
SAID_BYTES: Final = 1 << 16

#: prctl(2): the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG: Final = 1


class Recorder(Protocol):
    """A tcpdump that captures one point."""

    point: PointPlan
    command: tuple[str, ...]  #: the whole command line, for the manifest

    def said(self) -> str:
        """Return what tcpdump has printed on stderr, at least the last of it."""

    def exit_code(self) -> int | None:
        """Return None while tcpdump runs, its exit code when it has ended (negative: a signal)."""

    def send(self, which: signal.Signals) -> None:
        """Send a signal to tcpdump; nothing happens when it has ended."""

    def size_bytes(self) -> int | None:
        """Return the bytes captured so far, None where that cannot be seen from here."""

    def collect(self) -> tuple[str, ...]:
        """Bring the capture files into the bundle, after tcpdump has ended; return their names in it.

        Raises UncollectedError when they do not come whole.
        """

    def close(self) -> None:
        """Leave nothing running and nothing behind but what was collected; may be called at any time."""


def find_tcpdump(given: str | None) -> str:
    """Return the tcpdump to run: `given`, or the one on PATH or where the system keeps it.

    Raises CaptureError when there is none.
    """
    if given is not None:
        if shutil.which(given) is None:
            raise CaptureError(f"{given}: no program that can be run; give --tcpdump PATH")
        return given
    found = find_program("tcpdump")
    if found is None:
        raise CaptureError(
            "no tcpdump on this machine; install it, give --tcpdump PATH, or put one there with "
            "nattrace install-tcpdump --target DIR"
        )
    return found


def find_program(name: str) -> str | None:
    """Return a program on PATH or where the system keeps those of its administrator, None when there is none."""
    places = (os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin", "/opt/bin")
    return shutil.which(name, path=os.pathsep.join(places))


def host_command(point: PointPlan, options: Options, tcpdump: str, path: str) -> list[str]:
    """Return the command line that captures a point from this machine, entering a container's namespace."""
    enter = [] if point.process_id is None else ["nsenter", f"--net=/proc/{point.process_id}/ns/net"]
    # As root, tcpdump would change to another user and could not make the next file of a rotation.
    stay = ["-Z", "root"] if os.geteuid() == 0 else []
    return [*enter, tcpdump, *stay, *tcpdump_arguments(point, options, path)]


class HostRecorder:
    """tcpdump as a child process that writes straight into the bundle."""

    def __init__(self, point: PointPlan, options: Options, tcpdump: str, folder: Path) -> None:
        self.point = point
        self._folder = folder
        self._log = folder / f"{point.file_name}.log"
        self.command = tuple(host_command(point, options, tcpdump, str(folder / point.file_name)))
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603 - the command is built from checked parts
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Out of the terminal's group: ctrl-C is for the session, which then drains and stops it.
                    start_new_session=True,
                    preexec_fn=end_with_parent(),  # noqa: PLW1509 - before any thread is started
                )
        except OSError as error:
            self._log.unlink(missing_ok=True)
            raise CaptureError(f"{self.command[0]}: {error.strerror or error}") from error

    def said(self) -> str:
        """Return the end of tcpdump's messages."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - SAID_BYTES))
            return log.read().decode("utf-8", "replace")

    def exit_code(self) -> int | None:
        """Return None while tcpdump runs."""
        return self._process.poll()

    def send(self, which: signal.Signals) -> None:
        """Send a signal, if tcpdump still runs."""
        with suppress(ProcessLookupError):
            self._process.send_signal(which)

    def size_bytes(self) -> int | None:
        """Return the size of the point's files."""
        return sum(path.stat().st_size for path in self._files() if path.exists())

    def collect(self) -> tuple[str, ...]:
        """Return the names of the files; they lie in the bundle already. Files without a header are removed."""
        for path in self._files():
            if path.stat().st_size == 0:
                path.unlink()
        self._log.unlink(missing_ok=True)
        return tuple(path.name for path in self._files())

    def close(self) -> None:
        """Kill tcpdump if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if self.point.owns(path.name))


def end_with_parent() -> Callable[[], None] | None:
    """Return what a child runs so that it stops with this process, even one ended by SIGKILL; None off Linux."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    return before_exec
