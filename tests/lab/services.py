"""Several servers behind one service: whichever the kernel picked answers.

They are used wherever traffic.py's single servers are: the lab's one thread waits for the one that was asked.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Self, TypeVar

from lab.traffic import ANSWER_S, TcpServer, UdpServer

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Sequence

    from lab.topology import Namespace

_Server = TypeVar("_Server", UdpServer, TcpServer)


class UdpServers(UdpServer):
    """Bound UDP sockets, one of which is asked."""

    def __init__(self, host: Namespace, addresses: Iterable[str], port: int) -> None:
        self._members = [UdpServer(host, address, port) for address in addresses]

    @classmethod
    def on(cls, places: Iterable[tuple[Namespace, str]], port: int) -> Self:
        """Make one server a place: a host and an address of its own."""
        made = cls.__new__(cls)
        made._members = [UdpServer(host, address, port) for host, address in places]
        return made

    def answer(self, payload: bytes) -> bytes:
        """Answer the one datagram that has come, at whichever server."""
        return _asked(self._members).answer(payload)

    def close(self) -> None:
        """Close all sockets."""
        for member in self._members:
            member.close()


class TcpServers(TcpServer):
    """Listening TCP sockets, one of which is asked."""

    def __init__(self, host: Namespace, addresses: Iterable[str], port: int) -> None:
        self._members = [TcpServer(host, address, port) for address in addresses]

    @classmethod
    def on(cls, places: Iterable[tuple[Namespace, str]], port: int) -> Self:
        """Make one server a place: a host and an address of its own."""
        made = cls.__new__(cls)
        made._members = [TcpServer(host, address, port) for host, address in places]
        return made

    def accept(self) -> socket.socket:
        """Accept the one connection that has come, at whichever server."""
        return _asked(self._members).accept()

    def close(self) -> None:
        """Close all sockets."""
        for member in self._members:
            member.close()


def _asked(members: Sequence[_Server]) -> _Server:
    """Return the member that has something to read; raises TimeoutError when none has."""
    ready, _, _ = select.select(members, [], [], ANSWER_S)
    if not ready:
        raise TimeoutError("no server was asked")
    found: _Server = ready[0]
    return found
