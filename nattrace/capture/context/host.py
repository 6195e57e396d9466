"""What answers for the machine whose packets are captured, and the kind that is this machine.

The other kind is a helper container on another machine (`nattrace.capture.helper.remote_host`). Nothing is interpreted.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from nattrace.capture.context import kernel_state
from nattrace.capture.errors import last_line
from nattrace.capture.recorder import SAID_BYTES, end_with_parent, find_program

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds that a program may take: a table of a million entries takes ten.
PATIENCE_S: Final = 30.0


class Lacking(Exception):  # noqa: N818 - no error: it goes into the manifest
    """Something cannot be had; `needs` is the tool or the right that it takes."""

    def __init__(self, reason: str, needs: str | None) -> None:
        super().__init__(reason)
        self.reason, self.needs = reason, needs


class Listener(Protocol):
    """A program that prints into a file until it is told to end."""

    def is_running(self) -> bool:
        """Tell whether it has not ended by itself."""

    def end(self) -> bytes:
        """End it and return what it said on stderr."""


class Host(Protocol):
    """A machine that can be asked. Every question raises Lacking where there is no answer."""

    def kernel_state(self) -> dict[str, list[dict[str, Any]]]:
        """Return the answers to `nattrace.capture.context.kernel_state.QUESTIONS`."""

    def way(self, place: str, guest: tuple[str, str] | None = None) -> str | None:
        """Return the interface by which a packet to `place` leaves, None when it does not.

        The packet is the machine's own, or comes from `guest`: a source address and the interface it comes in by.
        """

    def run(self, command: Sequence[str]) -> bytes:
        """Run a program and return what it printed."""

    def read(self, path: str) -> str:
        """Return the text of a file of /proc."""

    def listen(self, command: Sequence[str], output: Path) -> Listener:
        """Start a program that prints into `output`."""


class LocalHost:
    """The machine that nattrace runs on: rtnetlink needs no tool and no right, all else needs both."""

    def kernel_state(self) -> dict[str, list[dict[str, Any]]]:
        """Ask rtnetlink."""
        from pyroute2 import IPRoute  # noqa: PLC0415 - slow to load

        try:
            with IPRoute() as kernel:
                return {name: question(kernel) for name, question in kernel_state.QUESTIONS.items()}
        except Exception as failure:  # pyroute2 has error classes of its own
            raise Lacking(one_line(failure), "rtnetlink") from failure

    def way(self, place: str, guest: tuple[str, str] | None = None) -> str | None:
        """Ask rtnetlink."""
        from pyroute2 import IPRoute  # noqa: PLC0415 - slow to load
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

        names = dict(socket.if_nameindex())
        indices = {name: index for index, name in names.items()}
        packet = {} if guest is None else {"src": guest[0], "iif": indices.get(guest[1])}
        with IPRoute() as kernel, suppress(NetlinkError):
            for route in kernel.route("get", dst=place, **packet):
                return names.get(route.get_attr("RTA_OIF"))
        return None

    def run(self, command: Sequence[str]) -> bytes:
        """Run a program of this machine."""
        program = _program(command[0])
        try:
            done = subprocess.run(  # noqa: S603 - fixed commands
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as failure:
            raise Lacking(one_line(failure), None) from failure
        if done.returncode:
            raise Lacking(last_line(done.stderr) or f"exit code {done.returncode}", _right())
        return done.stdout

    def read(self, path: str) -> str:
        """Read a file of this machine."""
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as failure:
            raise Lacking(failure.strerror or str(failure), None) from failure

    def listen(self, command: Sequence[str], output: Path) -> Listener:
        """Start a child process, which ends with this one."""
        program = _program(command[0])
        try:
            return _Child([program, *command[1:]], output)
        except OSError as failure:
            raise Lacking(failure.strerror or str(failure), _right()) from failure


class _Child:
    def __init__(self, command: Sequence[str], output: Path) -> None:
        # A file and no pipe: who complains a lot must not wait for a reader.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end
        with output.open("wb") as out:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed command
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=self._said,
                start_new_session=True,
                preexec_fn=end_with_parent(),  # noqa: PLW1509 - before any thread is started
            )

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> bytes:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._said as said:
            said.seek(max(0, said.seek(0, os.SEEK_END) - SAID_BYTES))
            return said.read()


def one_line(failure: BaseException) -> str:
    """Return what went wrong, on one short line."""
    return " ".join(str(failure).split())[:200]


def _program(name: str) -> str:
    program = find_program(name)
    if program is None:
        raise Lacking(f"no {name} on this machine", name)
    return program


def _right() -> str:
    return "root (CAP_NET_ADMIN)" if os.geteuid() else "CAP_NET_ADMIN"
