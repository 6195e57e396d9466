"""One tcpdump for each observation point, and the kernel's conntrack events beside them.

A recording starts only when every process says that it listens, and stops only when the files have stopped
growing: tcpdump stopped right after the last packet loses the packets it has not read yet and still reports
none dropped. This module starts and stops processes; it never reads what they wrote.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from lab.topology import Namespace

#: Longest wait for a process to start, to finish, or for the files to become quiet.
PATIENCE_S = 10.0
#: A file that has not grown for this long is complete: immediate mode writes each packet as it comes.
QUIET_S = 0.4
#: Snapshot length unless a scenario wants less: any IP packet whole.
WHOLE = 65535
#: tcpdump's buffer in KiB. In immediate mode each packet takes a slot of the snaplen, so that the default of
#: 2 MiB holds 8 packets of 262144 bytes: a burst of 50 lost 24 of them. This one holds 512 whole packets.
BUFFER_KIB = 32768
#: NETLINK_NETFILTER (linux/netlink.h).
NETLINK_NETFILTER = 12


class RecordingError(RuntimeError):
    """tcpdump or conntrack did not start, or did not write all that it received."""


class Tcpdump:
    """A running capture of one interface."""

    def __init__(
        self, host: Namespace, interface: str, path: Path, *, snaplen: int, filter_: str, link_type: str
    ) -> None:
        self.path = path
        # the filter is asked about each packet of a loopback twice, sent and received, and shows it once
        self._asked = 2 if interface == "lo" else 1
        self._log = path.with_suffix(".log")
        words = (
            f"tcpdump -i {interface} -n --immediate-mode -U --time-stamp-precision=nano -Z root "
            f"-s {snaplen} -B {BUFFER_KIB}{f' -y {link_type}' if link_type else ''}"
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                host.command(*words.split(), "-w", str(path), filter_), stdout=log, stderr=log
            )
        self._wait_for("listening on")

    def _wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._log.read_text():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self._process.kill()
                self._process.wait()
                raise RecordingError(f"tcpdump did not start: {self._log.read_text().strip()}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop the capture and make sure that nothing it received is missing from the file."""
        _end(self._process, signal.SIGINT)
        said = self._log.read_text()
        counts = {what: int(n) for n, what in re.findall(r"(\d+) packets? (captured|received|dropped)", said)}
        if counts.get("captured", -1) * self._asked != counts.get("received") or counts.get("dropped"):
            raise RecordingError(f"{self.path.name} is not complete: {said.strip()}")
        self._log.unlink()


class ConntrackEvents:
    """A running ``conntrack -E`` in one router, and the final list behind it, in one text file."""

    def __init__(self, router: Namespace, path: Path) -> None:
        self._router, self.path = router, path
        with path.open("wb") as out:
            self._process = subprocess.Popen(
                router.command("conntrack", "-E", "-b", "4194304", "-o", "timestamp,extended,id"),
                stdout=out,
                stderr=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._subscribed():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self._process.kill()
                self._process.wait()
                raise RecordingError("conntrack -E did not start")
            time.sleep(0.01)

    def _subscribed(self) -> bool:
        """Whether the router's namespace has a listener: columns Eth and Groups of /proc/net/netlink.

        Nobody else listens there; the column Pid says nothing, since a second netlink socket of one process
        gets a random port id.
        """
        try:
            lines = Path(f"/proc/{self._process.pid}/net/netlink").read_text().splitlines()
        except OSError:
            return False
        rows = (line.split() for line in lines[1:])
        return any(int(row[1]) == NETLINK_NETFILTER and int(row[3], 16) for row in rows)

    def stop(self) -> None:
        """Stop listening and append the table as it stands."""
        _end(self._process, signal.SIGTERM)
        final = self._router.run("conntrack -L -f ipv4 -o extended,id")
        final += self._router.run("conntrack -L -f ipv6 -o extended,id")
        with self.path.open("a") as out:
            out.write(final)


@dataclass(slots=True)
class Recording:
    """All processes of one run. Use as a context manager: the body is the traffic."""

    folder: Path
    captures: dict[str, Tcpdump]
    events: dict[str, ConntrackEvents]

    @classmethod
    def into(cls, folder: Path) -> Recording:
        """Make a recording that has no processes yet and writes into an existing folder."""
        return cls(folder, {}, {})

    def capture(
        self,
        host: Namespace,
        interface: str,
        *,
        snaplen: int = WHOLE,
        filter_: str = "",
        name: str = "",
        link_type: str = "",
    ) -> None:
        """Start capturing; the point is named like the interface, or `name`, and its file POINT.pcap."""
        path = self.folder / f"{name or interface}.pcap"
        self.captures[name or interface] = Tcpdump(
            host, interface, path, snaplen=snaplen, filter_=filter_, link_type=link_type
        )

    def conntrack(self, router: Namespace, name: str) -> None:
        """Start listening to a router's conntrack events, into the file `name`."""
        self.events[name] = ConntrackEvents(router, self.folder / name)

    def stop_capture(self, interface: str) -> None:
        """Stop one capture before the others."""
        self.drain()
        self.captures.pop(interface).stop()

    def _running(self) -> list[Tcpdump | ConntrackEvents]:
        return [*self.captures.values(), *self.events.values()]

    def drain(self) -> None:
        """Wait until no file has grown for QUIET_S."""
        paths = [each.path for each in self._running()]
        deadline = time.monotonic() + PATIENCE_S
        sizes, since = [-1], time.monotonic()
        while time.monotonic() - since < QUIET_S:
            now = [path.stat().st_size for path in paths]
            if now != sizes:
                sizes, since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise RecordingError("the captures never became quiet")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Stop everything; what went wrong while stopping is raised only when the traffic itself went well."""
        problems: list[RuntimeError] = []
        if kind is None:
            try:
                self.drain()
            except RecordingError as problem:
                problems.append(problem)
        for each in self._running():
            try:
                each.stop()
            except RuntimeError as problem:
                problems.append(problem)
        if problems and kind is None:
            raise problems[0]


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a process that this module started, gently first."""
    process.send_signal(how)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
