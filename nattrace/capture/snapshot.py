"""What the host knew: the context of a capture, taken before it, during it and after it.

Whatever cannot be had is named with the right or the tool that it needs; nothing here ends a capture. Nothing is
interpreted: files hold what the kernel, its tools and the engine said.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from nattrace.bundle.manifest import CONTEXT_FOLDER, Missing
from nattrace.capture import kernel_state
from nattrace.capture.containers import ContainerWatch, running
from nattrace.capture.networks import networks
from nattrace.capture.recorder import end_with_parent, find_program

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Programs whose output is context, by CONTEXT_NAMES: file suffix and commands, whose outputs follow each other.
_COMMANDS: Final[dict[str, tuple[str, tuple[tuple[str, ...], ...]]]] = {
    "iptables-save": (".txt", (("iptables-save", "-c"),)),
    "ip6tables-save": (".txt", (("ip6tables-save", "-c"),)),
    "nft": (".json", (("nft", "-j", "list", "ruleset"),)),
    "conntrack": (
        ".txt",
        (
            ("conntrack", "-L", "-f", "ipv4", "-o", "extended,id"),
            ("conntrack", "-L", "-f", "ipv6", "-o", "extended,id"),
        ),
    ),
}
#: The socket buffer is 4 MiB: events come in bursts, and a lost one is a translation without its truth.
_EVENTS: Final = ("conntrack", "-E", "-b", "4194304", "-o", "timestamp,extended,id")

#: How an admin takes by hand what rtnetlink and the engine give here; the forms are the same.
_BY_HAND: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("links.json", ("ip", "-j", "-d", "link")),
    ("addresses.json", ("ip", "-j", "address")),
    ("routes.json", ("ip", "-j", "route", "show", "table", "all")),
    ("rules.json", ("ip", "-j", "rule")),
)

#: Seconds that a program may take: a table of a million entries takes ten.
_PATIENCE_S: Final = 30.0
#: Seconds until ``conntrack -E`` must have subscribed; it needs a few milliseconds.
_SUBSCRIBE_S: Final = 3.0

#: NETLINK_NETFILTER (linux/netlink.h).
_NETLINK_NETFILTER: Final = 12


def context_commands() -> list[tuple[str, Sequence[str]]]:
    """Return file names and commands that take the context by hand."""
    taken = [
        (f"{name}{suffix}", command)
        for name, (suffix, commands) in _COMMANDS.items()
        for command in commands[:1]
    ]
    return [*_BY_HAND, *taken]


class Snapshot:
    """The context of one capture. Use as a context manager around the session; leaving it ends what watches.

    `watch` is for the moment when every tcpdump listens: it starts a thread, and processes are made before that.
    """

    def __init__(self, folder: Path, client: Any | None, *, local: bool) -> None:
        """Take a bundle's folder, the engine if there is one, and whether its host is this machine."""
        self._folder = folder
        self._client = client
        self._local = local
        self._events: subprocess.Popen[bytes] | None = None
        self._watch: ContainerWatch | None = None
        self.files: dict[str, str] = {}
        self._missing: dict[str, Missing] = {}

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What could not be had."""
        return tuple(self._missing[what] for what in sorted(self._missing))

    def __enter__(self) -> Self:
        """Take what there is before the capture, and start to listen to conntrack."""
        self._take("before")
        if self._local:
            self._begin_events()
        return self

    def watch(self) -> None:
        """Start to note the containers that come."""
        if self._client is None:
            return
        try:
            self._watch = ContainerWatch(self._client)
        except Exception as failure:  # noqa: BLE001 - an engine that goes away costs its context only
            self._lack(
                "during/docker-containers", " ".join(str(failure).split())[:200], "an engine that answers"
            )

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Stop watching, and take what there is now, unless the capture failed."""
        self._end_events()
        seen = self._watch.stop() if self._watch is not None else []
        if kind is not None:
            return
        if seen:
            self._write("during", "docker-containers", ".json", json.dumps(seen, indent=1).encode())
        self._take("after")

    def _take(self, phase: str) -> None:
        if self._local:
            self._take_kernel(phase)
            for name, (suffix, commands) in _COMMANDS.items():
                self._run(phase, name, suffix, commands)
        else:
            self._lack("host", "the engine is on another machine", "nattrace capture on that machine")
        if self._client is None:
            self._lack("docker", "no engine answers", "a Docker engine, and the right to use it")
            return
        for name, question in (("docker-networks", networks), ("docker-containers", running)):
            try:
                answer = question(self._client)
            except Exception as failure:  # noqa: BLE001 - an engine that goes away costs its context only
                self._lack(
                    f"{phase}/{name}", " ".join(str(failure).split())[:200], "a Docker engine that answers"
                )
            else:
                self._write(phase, name, ".json", json.dumps(answer, indent=1).encode())

    def _take_kernel(self, phase: str) -> None:
        from pyroute2 import IPRoute  # noqa: PLC0415 - slow to load

        try:
            with IPRoute() as kernel:
                for name, question in kernel_state.QUESTIONS.items():
                    self._write(phase, name, ".json", json.dumps(question(kernel), indent=1).encode())
        except Exception as failure:  # noqa: BLE001 - pyroute2 has error classes of its own
            self._lack(f"{phase}/links", " ".join(str(failure).split())[:200], "rtnetlink")

    def _run(self, phase: str, name: str, suffix: str, commands: Sequence[Sequence[str]]) -> None:
        program = find_program(commands[0][0])
        if program is None:
            self._lack(name, f"no {commands[0][0]} on this machine", commands[0][0])
            return
        output = b""
        for command in commands:
            try:
                done = subprocess.run(  # noqa: S603 - fixed commands
                    [program, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_PATIENCE_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as failure:
                self._lack(name, " ".join(str(failure).split())[:200], None)
                return
            if done.returncode:
                self._lack(name, _last_line(done.stderr) or f"exit code {done.returncode}", _right())
                return
            output += done.stdout
        self._write(phase, name, suffix, output)

    # --- events ---------------------------------------------------------------------------------------

    def _begin_events(self) -> None:
        program = find_program(_EVENTS[0])
        if program is None:
            self._lack("conntrack-events", f"no {_EVENTS[0]} on this machine", _EVENTS[0])
            return
        path = self._path("during", "conntrack-events", ".txt")
        before = _subscribers()
        try:
            with path.open("wb") as out:
                self._events = subprocess.Popen(  # noqa: S603 - a fixed command
                    [program, *_EVENTS[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=end_with_parent(),  # noqa: PLW1509 - before any thread is started
                )
        except OSError as failure:
            self._lack("conntrack-events", failure.strerror or str(failure), _right())
            path.unlink(missing_ok=True)
            return
        deadline = time.monotonic() + _SUBSCRIBE_S
        while self._events.poll() is None and _subscribers() <= before and time.monotonic() < deadline:
            time.sleep(0.01)

    def _end_events(self) -> None:
        process, self._events = self._events, None
        if process is None:
            return
        ended_early = process.poll() is not None
        if not ended_early:
            process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        path = self._path("during", "conntrack-events", ".txt")
        if ended_early or b"ENOBUFS" in said:
            what = _last_line(said) if ended_early else "some events were lost: the socket buffer was full"
            self._lack("conntrack-events", what or "conntrack -E ended", _right() if ended_early else None)
        if path.stat().st_size == 0 and ended_early:
            path.unlink()
        else:
            self.files["during/conntrack-events"] = path.relative_to(self._folder).as_posix()

    # --- files ----------------------------------------------------------------------------------------

    def _path(self, phase: str, name: str, suffix: str) -> Path:
        path = self._folder / CONTEXT_FOLDER / phase / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, phase: str, name: str, suffix: str, content: bytes) -> None:
        path = self._path(phase, name, suffix)
        try:
            path.write_bytes(content)
        except OSError as failure:
            self._lack(f"{phase}/{name}", failure.strerror or str(failure), None)
            return
        self.files[f"{phase}/{name}"] = path.relative_to(self._folder).as_posix()

    def _lack(self, what: str, reason: str, needs: str | None) -> None:
        self._missing.setdefault(what, Missing(what, reason, needs))


def _right() -> str:
    return "root (CAP_NET_ADMIN)" if os.geteuid() else "CAP_NET_ADMIN"


def _last_line(said: bytes) -> str:
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return (lines or [""])[-1][:200]


def _subscribers() -> int:
    """Return how many sockets of this namespace listen to netfilter: columns Eth and Groups of /proc/net/netlink."""
    count = 0
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/net/netlink").read_text().splitlines()[1:]:
            row = line.split()
            count += int(row[1]) == _NETLINK_NETFILTER and int(row[3], 16) != 0
    return count
