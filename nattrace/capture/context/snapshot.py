"""What the host knew: the context of a capture, taken before it, during it and after it.

Whatever cannot be had is named with the right or the tool that it needs; nothing here ends a capture. Nothing is
interpreted: files hold what the kernel, its tools and the engine said.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from nattrace.bundle.manifest import CONTEXT_FOLDER, Missing
from nattrace.capture.context.host import Lacking, one_line
from nattrace.capture.context.kernel_state import QUESTIONS
from nattrace.capture.engines.containers import ContainerWatch, running
from nattrace.capture.engines.networks import networks
from nattrace.capture.errors import last_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nattrace.capture.context.host import Host, Listener

#: The socket buffer is 4 MiB: events come in bursts, and a lost one is a translation without its truth.
EVENTS: Final = ("conntrack", "-E", "-b", "4194304", "-o", "timestamp,extended,id")

#: How an admin takes by hand what rtnetlink and the engine give here; the forms are the same.
_BY_HAND: Final[tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]] = (
    ("links.json", (("ip", "-j", "-d", "link"),)),
    ("addresses.json", (("ip", "-j", "address"),)),
    ("routes.json", (("ip", "-j", "route", "show", "table", "all"),)),
    ("rules.json", (("ip", "-j", "rule"),)),
    ("iptables-save.txt", (("iptables-save", "-c"),)),
    ("ip6tables-save.txt", (("ip6tables-save", "-c"),)),
    ("nft.json", (("nft", "-j", "list", "ruleset"),)),
    ("conntrack.txt", tuple(("conntrack", "-L", "-f", f, "-o", "extended,id") for f in ("ipv4", "ipv6"))),
)

#: A network tells the addresses of its containers, and nothing secret as ``docker inspect`` of a container would.
_NETWORKS_BY_HAND: Final = (
    "docker-networks.json",
    (("sh", "-c", "docker network inspect $(docker network ls -q)"),),
)

#: Seconds until ``conntrack -E`` must have subscribed; it needs a few milliseconds.
_SUBSCRIBE_S: Final = 3.0

#: NETLINK_NETFILTER (linux/netlink.h).
_NETLINK_NETFILTER: Final = 12


def context_commands(*, docker: bool) -> Sequence[tuple[str, Sequence[Sequence[str]]]]:
    """Return file names and the commands that take the context by hand, Docker's networks as well if asked."""
    return (*_BY_HAND, _NETWORKS_BY_HAND) if docker else _BY_HAND


def _saved_rules(host: Host, name: str) -> bytes:
    """Return what ``iptables-save`` prints, and what the other of its two kinds does when that has rules as well.

    A kernel can hold rules of both; both are in force, and each kind shows its own.
    """
    printed = host.run([f"{name}-save", "-c"])
    other = "legacy" if b"(nf_tables)" in printed.partition(b"\n")[0] else "nft"
    with suppress(Lacking):
        more = host.run([f"{name}-{other}-save", "-c"])
        if b" -A " in more:
            printed += more
    return printed


def _conntrack(host: Host) -> bytes:
    return b"".join(
        host.run(["conntrack", "-L", "-f", family, "-o", "extended,id"]) for family in ("ipv4", "ipv6")
    )


#: What else than rtnetlink's answers is taken, by CONTEXT_NAMES: file suffix, and how.
_TAKEN: Final[dict[str, tuple[str, Callable[[Host], bytes]]]] = {
    "iptables-save": (".txt", lambda host: _saved_rules(host, "iptables")),
    "ip6tables-save": (".txt", lambda host: _saved_rules(host, "ip6tables")),
    "nft": (".json", lambda host: host.run(["nft", "-j", "list", "ruleset"])),
    "conntrack": (".txt", _conntrack),
}


class Snapshot:
    """The context of one capture. Use as a context manager around the session; leaving it ends what watches.

    `watch` is for the moment when every tcpdump listens: it starts a thread, and processes are made before that.
    """

    def __init__(self, folder: Path, client: Any | None, host: Host) -> None:
        """Take a bundle's folder, the engine of the machine whose packets are captured, and that machine."""
        self._folder = folder
        self._client = client
        self._host = host
        self._events: Listener | None = None
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
        self._begin_events()
        return self

    def watch(self) -> None:
        """Start to note the containers that come."""
        if self._client is None:
            return
        try:
            self._watch = ContainerWatch(self._client)
        except Exception as failure:  # noqa: BLE001 - an engine that goes away costs its context only
            self._lack("during/docker-containers", one_line(failure), "an engine that answers")

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
        try:
            for name, answer in self._host.kernel_state().items():
                self._write(phase, name, ".json", json.dumps(answer, indent=1).encode())
        except Lacking as lacking:
            for name in QUESTIONS:
                self._lack(name, lacking.reason, lacking.needs)
        for name, (suffix, question) in _TAKEN.items():
            try:
                self._write(phase, name, suffix, question(self._host))
            except Lacking as lacking:
                self._lack(name, lacking.reason, lacking.needs)
        if self._client is None:
            self._lack("docker", "no engine answers", "a Docker engine, and the right to use it")
            return
        for name, ask in (("docker-networks", networks), ("docker-containers", running)):
            try:
                answer = ask(self._client)
            except Exception as failure:  # noqa: BLE001 - an engine that goes away costs its context only
                self._lack(f"{phase}/{name}", one_line(failure), "a Docker engine that answers")
            else:
                self._write(phase, name, ".json", json.dumps(answer, indent=1).encode())

    # --- events ---------------------------------------------------------------------------------------

    def _begin_events(self) -> None:
        path = self._path("during", "conntrack-events", ".txt")
        try:
            before = self._subscribers()
            self._events = self._host.listen(EVENTS, path)
            deadline = time.monotonic() + _SUBSCRIBE_S
            while self._events.is_running() and self._subscribers() <= before and time.monotonic() < deadline:
                time.sleep(0.01)
        except Lacking as lacking:
            self._lack("conntrack-events", lacking.reason, lacking.needs)

    def _end_events(self) -> None:
        events, self._events = self._events, None
        if events is None:
            return
        ended_early = not events.is_running()
        said = events.end()
        path = self._path("during", "conntrack-events", ".txt")
        if ended_early:
            self._lack("conntrack-events", last_line(said) or "conntrack -E ended", "CAP_NET_ADMIN")
        elif b"ENOBUFS" in said:
            self._lack("conntrack-events", "some events were lost: the socket buffer was full", None)
        if ended_early and path.stat().st_size == 0:
            path.unlink()
        else:
            self.files["during/conntrack-events"] = path.relative_to(self._folder).as_posix()

    def _subscribers(self) -> int:
        """Return how many sockets listen to netfilter: columns Eth and Groups of /proc/net/netlink."""
        rows = [line.split() for line in self._host.read("/proc/net/netlink").splitlines()[1:]]
        return sum(int(row[1]) == _NETLINK_NETFILTER and int(row[3], 16) != 0 for row in rows)

    # --- files ----------------------------------------------------------------------------------------

    def _path(self, phase: str, name: str, suffix: str) -> Path:
        path = self._folder / CONTEXT_FOLDER / phase / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, phase: str, name: str, suffix: str, content: bytes) -> None:
        try:
            path = self._path(phase, name, suffix)
            path.write_bytes(content)
        except OSError as failure:
            self._lack(f"{phase}/{name}", failure.strerror or str(failure), None)
            return
        self.files[f"{phase}/{name}"] = path.relative_to(self._folder).as_posix()

    def _lack(self, what: str, reason: str, needs: str | None) -> None:
        self._missing.setdefault(what, Missing(what, reason, needs))
