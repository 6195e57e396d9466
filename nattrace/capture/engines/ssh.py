"""An engine behind ssh://: its socket forwarded to a socket of this machine.

The ssh command does it all, so keys, agents, known hosts and its configuration are the user's own. The docker command
starts a process there for every request; one connection that forwards them all needs no docker command there, and
half a second less for each.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from nattrace.capture.errors import CaptureError, last_line
from nattrace.capture.recorder import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds that the machine may take to accept the connection; whoever types a password takes longer.
_CONNECT_S: Final = 30
#: Seconds that a command over the open connection may take.
_PATIENCE_S: Final = 30
_POLL_S: Final = 0.02
#: The folder is removed again when something still appears in it: once, on a loaded machine, it was left behind.
_REMOVALS: Final = 50

#: Says which of its arguments is a socket there, and whether it may be used.
_FIND: Final = """
for place in "$@"; do
  if [ -S "$place" ]; then
    [ -w "$place" ] && echo "may $place" || echo "may-not $place"
    exit
  fi
done
"""


class SshBridge:
    """The open connection; `url` is where the engine answers on this machine. `close` ends it."""

    def __init__(self, address: str, sockets: Sequence[str]) -> None:
        """Open it.

        Parameters
        ----------
        address
            ``ssh://[USER@]HOST[:PORT][/SOCKET]``.
        sockets
            Where an engine may listen there when the address does not say; ``$`` is for the shell there.

        Raises
        ------
        CaptureError
            There is no ssh command, it does not get there, or there is no engine to be used; it says why.
        """
        self._address = address
        self._target, given = _parsed(address)
        if shutil.which("ssh") is None:
            raise CaptureError(f"{address}: no ssh command on this machine; install an OpenSSH client")
        self._folder = Path(tempfile.mkdtemp(prefix="nattrace-ssh-"))
        self._master: subprocess.Popen[bytes] | None = None
        try:
            self._open()
            place = self._find([given] if given else sockets)
            self._command("-O", "forward", "-L", f"{self._folder}/engine:{place}", *self._target)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The socket of this machine."""
        return f"unix://{self._folder}/engine"

    def complaint(self) -> str:
        """Return the last line that ssh printed, empty when it said nothing."""
        return last_line((self._folder / "said").read_bytes())

    def close(self) -> None:
        """End the connection."""
        if self._master is not None:
            self._master.terminate()
            self._master.wait()
        for _ in range(_REMOVALS):
            shutil.rmtree(self._folder, ignore_errors=True)
            if not self._folder.exists():
                break
            time.sleep(_POLL_S)

    def _open(self) -> None:
        options = ["-M", "-N", "-T", "-o", "ControlPersist=no", "-o", f"ConnectTimeout={_CONNECT_S}"]
        with (self._folder / "said").open("wb") as said:
            self._master = subprocess.Popen(  # noqa: S603 - the user's own ssh
                ["ssh", "-S", f"{self._folder}/shared", *options, *self._target],  # noqa: S607
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                # It stays in the terminal's group, to ask for a password there.
                preexec_fn=_before_exec,  # noqa: PLW1509 - before any thread is started
            )
        while not (self._folder / "shared").exists():
            if self._master.poll() is not None:
                raise CaptureError(f"{self._address}: {self.complaint() or 'ssh ends without a word'}")
            time.sleep(_POLL_S)

    def _find(self, sockets: Sequence[str]) -> str:
        # Double quotes let the shell there fill in its variables.
        places = " ".join(f'"{place}"' for place in sockets)
        script = f"set -- {places}{_FIND}"
        answer, _, place = self._command(*self._target, shlex.join(["sh", "-c", script])).partition(" ")
        if answer == "may-not":
            raise CaptureError(f"{self._address}: no right to use {place} there; join the group docker")
        if answer != "may":
            raise CaptureError(
                f"{self._address}: no Docker engine there; start it, or give its socket as ssh://USER@HOST/PATH"
            )
        return place

    def _command(self, *words: str) -> str:
        """Run ssh over the open connection and return what it printed."""
        try:
            done = subprocess.run(  # noqa: S603 - the user's own ssh
                ["ssh", "-S", f"{self._folder}/shared", "-T", *words],  # noqa: S607
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CaptureError(f"{self._address}: no answer for {_PATIENCE_S} s") from error
        if done.returncode:
            said = last_line(done.stderr) or f"ssh ended with exit code {done.returncode}"
            raise CaptureError(f"{self._address}: {said}")
        return done.stdout.decode("utf-8", "replace").strip()


def _parsed(address: str) -> tuple[list[str], str | None]:
    """Return ssh's arguments that name the machine, and the path of the socket there if the address has one."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise CaptureError(f"{address}: {error}; give ssh://USER@HOST") from error
    if parts.password is not None:  # which no message may repeat
        raise CaptureError(
            "ssh://USER:PASSWORD@HOST: leave the password out; ssh asks for it, or takes a key"
        )
    if not parts.hostname or parts.query or parts.fragment or set('"$`\\') & {*parts.path}:
        raise CaptureError(f"{address}: no such address; give ssh://USER@HOST")
    words = [] if port is None else ["-p", str(port)]
    words += [] if not parts.username else ["-l", parts.username]
    return [*words, "--", parts.hostname], parts.path if parts.path not in {"", "/"} else None


def _before_exec() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the capture, which still needs the engine
    die_with_parent = end_with_parent()
    if die_with_parent is not None:
        die_with_parent()
