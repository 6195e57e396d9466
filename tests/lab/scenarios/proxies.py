"""Proxies beside NAT: connections of their own with the same payload, which are no translation."""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lab import rules
from lab.recorder import PATIENCE_S
from lab.scenarios.recording import kernel_truth, recorded
from lab.topology import SERVERS, UPLINK, client_address, lab
from lab.traffic import ANSWER_S, TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.topology import Namespace
    from lab.truth import Truth

#: Debian and Docker's own packages have it in different places, and not on every user's PATH.
_PLACES = "/usr/bin:/usr/sbin:/usr/libexec/docker:/usr/local/bin"


@contextmanager
def _docker_proxy(
    host: Namespace, protocol: str, listen: tuple[str, int], to: tuple[str, int]
) -> Iterator[None]:
    """Run Docker's own proxy as dockerd would, until the body is done. Raises RuntimeError when it does not start."""
    program = shutil.which("docker-proxy", path=_PLACES)
    if program is None:
        raise RuntimeError("needs docker-proxy (package docker.io)")
    words = [program, "-proto", protocol, "-host-ip", listen[0], "-host-port", str(listen[1])]
    words += ["-container-ip", to[0], "-container-port", str(to[1])]
    # dockerd gives it a pipe as descriptor 3, in which it says 0 when it listens
    process = subprocess.Popen(
        host.command("sh", "-c", 'exec "$@" 3>&1', "sh", *words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        if not ready or process.stdout.read(1) != b"0":
            raise RuntimeError("docker-proxy did not start")
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Relay:
    """A TCP proxy in lock step: it forwards what it has received when told to, in pieces of its own size."""

    def __init__(self, host: Namespace, listen: tuple[str, int], to: tuple[str, int]) -> None:
        self._host, self._to = host, to
        self._listening = TcpServer(host, *listen)

    def accept(self) -> None:
        """Accept a client and connect to the server for it."""
        self._client = self._listening.accept()
        with self._host.inside():
            self._server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._server.settimeout(ANSWER_S)
        self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connect(self._to)

    def forward(self, size: int, pieces: int, *, back: bool = False) -> None:
        """Receive `size` bytes from one side and send them to the other in so many pieces."""
        source, target = (self._server, self._client) if back else (self._client, self._server)
        data = b""
        while len(data) < size:
            data += source.recv(size - len(data))
        step = -(-size // pieces)
        for at in range(0, size, step):
            target.sendall(data[at : at + step])

    def close(self) -> None:
        """Close both connections and stop listening."""
        for end in (self._client, self._server, self._listening):
            end.close()


def docker_proxy(folder: Path) -> Truth:
    """docker-proxy serves a published port, TCP and UDP, to another host and to its own: proxied, not NATed."""
    with lab(clients=1) as net:
        rules.docker_nat(net.router)
        inside = client_address(1)
        web, dns = TcpServer(net.clients[0], inside, 80), UdpServer(net.clients[0], inside, 53)
        with (
            closing_all(web, dns),
            _docker_proxy(net.router, "tcp", (UPLINK, 8080), (inside, 80)),
            _docker_proxy(net.router, "tcp", ("127.0.0.1", 8080), (inside, 80)),
            _docker_proxy(net.router, "udp", (UPLINK, 5353), (inside, 53)),
            recorded(net, folder) as recording,
        ):
            recording.capture(net.router, "lo")
            for number, (host, to) in enumerate(((net.internet, UPLINK), (net.router, "127.0.0.1"))):
                connection = TcpConnection(host, 50000 + number, web, (to, 8080))
                connection.exchange(token(90), token(3000))
                connection.exchange(token(40), token(200))
                connection.close()
            asking = UdpClient(net.internet, 50002, UPLINK, 5353)
            with closing_all(asking):
                for _ in range(3):
                    asking.exchange(dns, token(), token())
        return kernel_truth(net, folder, unique_payloads=False)


def relay_behind_nat(folder: Path) -> Truth:
    """A relay in a container behind a published port, and beside it two containers that fetch one page."""
    with lab(clients=4, bridge_netfilter=False) as net:
        rules.docker_nat(net.router)
        relay_at, backend = client_address(1), client_address(2)
        rules.publish(net.router, "tcp", 8080, relay_at, 8000)
        web = TcpServer(net.clients[1], backend, 80)
        relay = Relay(net.clients[0], (relay_at, 8000), (backend, 80))
        pages = [TcpServer(net.internet, server, 80) for server in SERVERS[:2]]
        with closing_all(web, *pages), recorded(net, folder):
            with net.internet.inside():
                client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            client.settimeout(ANSWER_S)
            client.bind((SERVERS[2], 50000))
            client.connect((UPLINK, 8080))
            relay.accept()
            server = web.accept()
            client.sendall(token(100))
            relay.forward(100, pieces=3)
            assert len(_all(server, 100)) == 100
            server.sendall(token(2500))
            relay.forward(2500, pieces=2, back=True)
            assert len(_all(client, 2500)) == 2500
            for end in (client, server):
                end.close()
            relay.close()
            # the same bytes from two servers to two clients, one exchange inside the other
            question, page = token(80), token(1200)
            outer = TcpConnection(net.clients[2], 40000, pages[0], (SERVERS[0], 80))
            inner = TcpConnection(net.clients[3], 40000, pages[1], (SERVERS[1], 80))
            outer.say(question)
            inner.exchange(question, page)
            outer.answer(len(question), page)
            inner.close()
            outer.close()
        return kernel_truth(net, folder, unique_payloads=False)


def _all(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += end.recv(size - len(data))
    return data


SCENARIOS = (docker_proxy, relay_behind_nat)
