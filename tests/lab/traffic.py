"""Senders and servers of the lab: ICMP echo, UDP and TCP exchanges with chosen ids, ports and payloads.

Every socket is made inside a namespace and then used from here, so one thread plays all hosts in lock step
and the order of packets is the order of the code. All waiting is bounded; nothing runs in the background.
"""

from __future__ import annotations

import itertools
import socket
import struct
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.topology import Namespace

#: Longest wait for one packet. Everything is on one machine: a packet later than this was dropped.
ANSWER_S = 5.0
#: How long a sender waits where the lab drops packets on purpose.
LOSSY_ANSWER_S = 0.2
#: UDP port of all the lab's servers unless said otherwise.
ECHO_PORT = 7

#: Socket option for datagrams that the kernel cuts as late as it can (linux/udp.h).
UDP_SEGMENT = 103

_TOKENS = itertools.count(1)


def token(size: int = 24) -> bytes:
    """Return `size` bytes (at least 16) that no other packet of this process carries."""
    return f"token-{next(_TOKENS):08d}".encode().ljust(size, b".")


def ftp_port(address: str, port: int) -> bytes:
    """Return the command that tells an FTP server where to send data (RFC 959 section 4.1.2)."""
    numbers = [*address.split("."), str(port >> 8), str(port & 255)]
    return f"PORT {','.join(numbers)}\r\n".encode()


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Pinger:
    """One run of ping: an ICMP id, sequence numbers from `first_seq`, and a payload that may be constant.

    As PID 1 of a container, ping uses id 1, so that two containers collide.
    """

    def __init__(
        self, host: Namespace, server: str, id_: int, *, payload: bytes | None = None, ttl: int = 64
    ) -> None:
        self.server, self.id, self.payload = server, id_, payload
        self._v6 = ":" in server
        with host.inside():
            protocol = socket.IPPROTO_ICMPV6 if self._v6 else socket.IPPROTO_ICMP
            self._socket = socket.socket(_family(server), socket.SOCK_RAW, protocol)
        if self._v6:
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        else:
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        self._expected = b""

    def send(self, seq: int) -> None:
        """Send one echo request."""
        payload = token(56) if self.payload is None else self.payload
        kind = 128 if self._v6 else 8
        message = struct.pack(">BBHHH", kind, 0, 0, self.id, seq) + payload
        if not self._v6:  # the kernel fills in the ICMPv6 checksum of raw sockets (RFC 3542 section 3.1)
            message = message[:2] + struct.pack(">H", checksum(message)) + message[4:]
        self._expected = struct.pack(">HH", self.id, seq) + payload
        self._socket.sendto(message, (self.server, 0))

    def receive(self, *, lossy: bool = False) -> bool:
        """Wait for the reply to the last request. Returns whether it came; only a `lossy` run may lose it."""
        self._socket.settimeout(LOSSY_ANSWER_S if lossy else ANSWER_S)
        try:
            while True:
                received = self._socket.recv(65535)
                body = received if self._v6 else received[20:]
                if body[0] == (129 if self._v6 else 0) and body[4:] == self._expected:
                    return True
        except TimeoutError:
            if lossy:
                return False
            raise

    def ping(self, seq: int, *, lossy: bool = False) -> bool:
        """Send one echo request and wait for its reply. Returns whether it came."""
        self.send(seq)
        return self.receive(lossy=lossy)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _drain(own: socket.socket) -> None:
    own.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            own.recv(65535)
    own.settimeout(ANSWER_S)


class UdpServer:
    """A bound UDP socket that answers when told to."""

    def __init__(self, host: Namespace, address: str, port: int = ECHO_PORT) -> None:
        with host.inside():
            self._socket = socket.socket(_family(address), socket.SOCK_DGRAM)
        self._socket.settimeout(ANSWER_S)
        self._socket.bind((address, port))

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for."""
        return self._socket.fileno()

    def answer(self, payload: bytes) -> bytes:
        """Receive one datagram, send `payload` back, return what was received."""
        received, peer = self._socket.recvfrom(65535)
        self._socket.sendto(payload, peer)
        return received

    def receive(self) -> tuple[bytes, Any]:
        """Receive one datagram; return it and who sent it."""
        return self._socket.recvfrom(65535)

    def drain(self) -> None:
        """Forget what has been received."""
        _drain(self._socket)

    def send(self, payload: bytes, peer: Any, *, segment_bytes: int = 0) -> None:
        """Send a datagram, or one for every `segment_bytes` in one call."""
        self._socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment_bytes)
        self._socket.sendto(payload, peer)
        self._socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class UdpClient:
    """A connected UDP socket with a chosen source port, and address where the host has several."""

    def __init__(
        self,
        host: Namespace,
        sport: int,
        server: str,
        port: int = ECHO_PORT,
        source: str = "",
        *,
        reuse: bool = False,
    ) -> None:
        with host.inside():
            self._socket = socket.socket(_family(server), socket.SOCK_DGRAM)
        self._socket.settimeout(ANSWER_S)
        if reuse:  # several sockets of one port, each connected to a server of its own
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((source, sport))
        self._socket.connect((server, port))

    def send(self, payload: bytes, *, segment_bytes: int = 0) -> None:
        """Send a datagram, or one for every `segment_bytes` in one call, and wait for nothing."""
        if segment_bytes:
            self._socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment_bytes)
        self._socket.send(payload)
        if segment_bytes:
            self._socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)

    def receive(self) -> bytes:
        """Receive one datagram from the server."""
        return self._socket.recv(65535)

    def drain(self) -> None:
        """Forget what has been received."""
        _drain(self._socket)

    def exchange(self, server: UdpServer, question: bytes, answer: bytes) -> None:
        """Send a datagram to `server`, which answers, and receive the answer."""
        self._socket.send(question)
        assert server.answer(answer) == question
        assert self.receive() == answer

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class TcpServer:
    """A listening TCP socket."""

    def __init__(self, host: Namespace, address: str, port: int) -> None:
        with host.inside():
            self._socket = socket.socket(_family(address), socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self._socket.listen()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for."""
        return self._socket.fileno()

    def accept(self) -> socket.socket:
        """Accept the next connection."""
        accepted, _ = self._socket.accept()
        accepted.settimeout(ANSWER_S)
        return accepted

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class TcpConnection:
    """One TCP connection, both ends in hand. `to` is what the client asks for, `server` who must get it."""

    def __init__(
        self, host: Namespace, sport: int, server: TcpServer, to: tuple[str, int], source: str = ""
    ) -> None:
        with host.inside():
            self._client = socket.socket(_family(to[0]), socket.SOCK_STREAM)
        self._client.settimeout(ANSWER_S)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._client.bind((source, sport))
        self._client.connect(to)
        self._server = server.accept()

    def exchange(
        self, question: bytes, answer: bytes, *, arrives: bytes | None = None, returns: bytes | None = None
    ) -> None:
        """Send data one way and back; `arrives` and `returns` are what a helper on the way makes of them."""
        arrives, returns = arrives or question, returns or answer
        self._client.sendall(question)
        assert _read(self._server, len(arrives)) == arrives
        self._server.sendall(answer)
        assert _read(self._client, len(returns)) == returns

    def ask(self, data: bytes) -> bytes:
        """Send a message to the server; return it as it arrives, in one piece."""
        self._client.sendall(data)
        return self._server.recv(65535)

    def tell(self, data: bytes) -> bytes:
        """Send a message to the client; return it as it arrives, in one piece."""
        self._server.sendall(data)
        return self._client.recv(65535)

    def say(self, data: bytes) -> None:
        """Send data to the server and wait for nothing."""
        self._client.sendall(data)

    def answer(self, size: int, data: bytes) -> None:
        """Receive `size` bytes that the client said before, and send it data back."""
        assert len(_read(self._server, size)) == size
        self._server.sendall(data)
        assert _read(self._client, len(data)) == data

    def close(self, *, server_first: bool = False) -> None:
        """Close one end's half, then the other's, each seen by the other: FIN both ways, no RST.

        The end that closes first keeps the connection in TIME_WAIT.
        """
        first, second = (self._server, self._client) if server_first else (self._client, self._server)
        first.shutdown(socket.SHUT_WR)
        assert second.recv(1) == b""
        second.close()
        assert first.recv(1) == b""
        first.close()

    def reset(self) -> None:
        """Close the client's end with RST; the server's end stays open until `forget`."""
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.close()

    def forget(self) -> None:
        """Close the server's end of a connection that was reset."""
        self._server.close()


def _read(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = end.recv(size - len(data))
        if not piece:
            break
        data += piece
    return data


class Closable(Protocol):
    """Whatever has to be closed at the end."""

    def close(self) -> None:
        """Close it."""


@contextmanager
def closing_all(*made: Closable) -> Iterator[None]:
    """Close everything at the end, last made first."""
    with ExitStack() as stack:
        for each in made:
            stack.callback(each.close)
        yield
