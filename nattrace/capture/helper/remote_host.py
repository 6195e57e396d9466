"""A helper container that answers for the machine of an engine elsewhere: programs run in its network namespace.

It waits and does nothing; each question is an exec into it. NET_ADMIN is what conntrack, nft and iptables-save ask
the kernel with, and iptables-save of the older kind opens a raw socket. It has no other right and no mount.
"""

from __future__ import annotations

import json
import math
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.context.host import Lacking
from nattrace.capture.context.iproute import COMMANDS, FORMS
from nattrace.capture.engines.engine import complaint, engine_errors
from nattrace.capture.errors import CaptureError, last_line
from nattrace.capture.helper.container import SPARE_S, marks, privileges, remove
from nattrace.capture.recorder import SAID_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nattrace.capture.context.host import Listener

_RIGHTS: Final = ("NET_ADMIN", "NET_RAW")

#: What a shell says by its exit code when there is no such program (POSIX, 2.8.2).
_NOT_FOUND: Final = 127


class HelperHost:
    """The engine's machine. `close` removes the helper; one that cannot be started lacks every answer."""

    def __init__(self, client: Any, image: str, duration_s: float, network: str = "host") -> None:
        """Take the engine, the helper image, and how long the capture may last: the helper ends by itself then.

        `network` is the namespace of the engine's networks, as ``docker run --network`` names it.
        """
        self._client = client
        self._container: Any = None
        self._lacking: Lacking | None = None
        try:
            with engine_errors("the engine starts no helper for the context"):
                self._container = client.containers.create(
                    image,
                    entrypoint=["sleep", str(math.ceil(duration_s) + SPARE_S)],
                    network_mode=network,
                    labels=marks(duration_s),
                    **privileges(_RIGHTS),
                )
                self._container.start()
        except CaptureError as error:
            self._lacking = Lacking(
                str(error), "a helper container with NET_ADMIN on the engine's host network"
            )

    def close(self) -> None:
        """Remove the helper."""
        if self._container is not None:
            remove(self._container)
            self._container = None

    def kernel_state(self) -> dict[str, list[dict[str, Any]]]:
        """Ask ``ip`` in the helper."""
        try:
            return {
                name: FORMS[name]([_parsed(self.run(command)) for command in commands])
                for name, commands in COMMANDS.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as failure:
            # BusyBox has an ip that prints no JSON.
            raise Lacking(f"ip -j prints something else: {failure}"[:200], "ip of iproute2") from failure

    def way(self, place: str, guest: tuple[str, str] | None = None) -> str | None:
        """Ask ``ip route get`` in the helper."""
        packet = [] if guest is None else ["from", guest[0], "iif", guest[1]]
        with suppress(Lacking, ValueError):
            for route in _parsed(self.run(["ip", "-j", "route", "get", place, *packet])):
                return route.get("dev")
        return None

    def run(self, command: Sequence[str]) -> bytes:
        """Run a program in the helper."""
        code, (out, said) = self._asked(
            lambda: self._container.exec_run(["sh", "-c", 'exec "$@"', "nattrace", *command], demux=True)
        )
        if code == _NOT_FOUND:
            raise Lacking(f"no {command[0]} in the helper image", f"{command[0]} in the helper image")
        if code:
            raise Lacking(
                last_line(said or b"") or f"exit code {code}", "CAP_NET_ADMIN for a helper container"
            )
        return out or b""

    def read(self, path: str) -> str:
        """Read a file as the helper sees it; of /proc/net that is the host's."""
        return self.run(["cat", path]).decode("utf-8", "replace")

    def listen(self, command: Sequence[str], output: Path) -> Listener:
        """Start a program in the helper; a thread writes what it prints."""
        self.run([command[0], "--version"])  # says whether there is one
        return _Exec(self, command, output)

    def start_exec(self, command: Sequence[str]) -> Any:
        """Start a program in the helper and return the stream of what it prints."""
        api = self._client.api

        def start() -> Any:
            made = api.exec_create(self._container.id, [*command])
            return api.exec_start(made["Id"], stream=True, demux=True)

        return self._asked(start)

    def _asked(self, question: Any) -> Any:
        import docker  # noqa: PLC0415
        import requests  # noqa: PLC0415

        if self._lacking is not None:
            raise self._lacking
        try:
            return question()
        except (docker.errors.DockerException, requests.RequestException, OSError) as failure:
            raise Lacking(complaint(failure)[:200], "an engine that answers") from failure


class _Exec:
    """A program in the helper that prints into a file; the first line of its messages is its process number there."""

    def __init__(self, host: HelperHost, command: Sequence[str], output: Path) -> None:
        self._host, self._output = host, output
        self._number, self._said = "", b""
        words = ["sh", "-c", 'echo $$ >&2; exec "$@"', "nattrace", *command]
        self._stream = host.start_exec(words)
        self._thread = threading.Thread(target=self._write, daemon=True, name=f"nattrace-{command[0]}")
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> bytes:
        if self.is_running():
            with suppress(Lacking):
                self._host.run(["sh", "-c", 'kill "$1"', "kill", self._number])
        self._thread.join(5)
        return self._said

    def _write(self) -> None:
        with suppress(Exception), self._output.open("wb") as file:  # the engine may go away
            for out, said in self._stream:
                self._said = (self._said + (said or b""))[-SAID_BYTES:]
                if not self._number and b"\n" in self._said:
                    first, _, self._said = self._said.partition(b"\n")
                    self._number = first.decode("ascii", "replace")
                if out:
                    file.write(out)
                    file.flush()


def _parsed(printed: bytes) -> list[dict[str, Any]]:
    # ip pads its lists with empty objects.
    return [entry for entry in json.loads(printed or b"[]") if entry]
