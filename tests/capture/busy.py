"""The traffic of a busy host, to run as a program inside a network namespace: `serve`, or `ask` from a seed."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Nobody waits for longer than this, and no server lives longer.
PATIENCE_S = 6.0
SERVED_S = 120.0

TCP_PORT, UDP_PORT, CLOSED_PORT = 80, 53, 9
PUBLISHED = (8080, 8081)
SAME = (1, 20, 33)  #: sizes of datagrams that all containers send alike
OWN_PORT = 5555  #: the same in all containers, so that the kernel must pick others


def serve_tcp(address: str) -> None:
    """Answer every connection with as many bytes as it asks for."""
    blob = os.urandom(1 << 20)
    listening = socket.create_server((address, TCP_PORT), backlog=100)

    def answer(end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):
            end.sendall(blob[: int(end.recv(100))])

    while True:
        threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()


def serve_udp(address: str) -> None:
    """Send every datagram back."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind((address, UDP_PORT))
    while True:
        payload, sender = bound.recvfrom(65535)
        bound.sendto(payload, sender)


def fetch(address: str, port: int, size: int, own_port: int = 0, *, resets: bool = False) -> None:
    """Ask for `size` bytes; `resets` ends the connection with RST."""
    with socket.socket() as end, contextlib.suppress(OSError):
        end.settimeout(PATIENCE_S)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(("", own_port))
        end.connect((address, port))
        end.sendall(b"%d\n" % size)
        while end.recv(65536):
            pass
        if resets:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def echo(address: str, port: int, size: int, count: int, own_port: int = 0) -> None:
    """Send `count` equal datagrams one after the other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.settimeout(0.5)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(("", own_port))
        for _ in range(count):
            with contextlib.suppress(OSError):
                end.sendto(b"x" * size, (address, port))
                end.recv(65535)
            time.sleep(0.01)


def repeat(count: int, task: Callable[[int], None]) -> None:
    """Do a task several times, each with a socket of its own."""
    for number in range(count):
        task(number)


def ask(seed: int, one: str, two: str, published: str) -> None:
    """Do all that a container does, in an order that the seed says, a little after one another."""
    chance = random.Random(seed)
    tasks: list[Callable[[], None]] = [
        lambda: fetch(one, TCP_PORT, 500_000),
        lambda: fetch(two, TCP_PORT, 100_000, OWN_PORT, resets=True),
        lambda: repeat(8, lambda _: fetch(one, TCP_PORT, 10)),
        lambda: fetch(one, CLOSED_PORT, 0),
        *(lambda port=port: fetch(published, port, 50_000) for port in PUBLISHED),
        lambda: echo(one, UDP_PORT, SAME[0], 15, OWN_PORT),  # keep-alives
        lambda: echo(two, UDP_PORT, SAME[1], 4, OWN_PORT),
        lambda: echo(two, UDP_PORT, 4000, 5),  # fragments
        lambda: echo(one, CLOSED_PORT, 30, 3),
        # from ports of their own: the one that the system picks may be one that it has just picked
        lambda: repeat(10, lambda n: echo(one, UDP_PORT, SAME[2], 1, 6000 + 10 * seed + n)),
    ]
    chance.shuffle(tasks)
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
        time.sleep(chance.random() * 0.1)
    for thread in threads:
        thread.join()


def main(mode: str, *words: str) -> None:
    """Run ``serve ADDRESS...``, ``ask SEED ONE TWO PUBLISHED`` or ``fetch ADDRESS COUNT``."""
    if mode == "serve":
        for address in words:
            for server in (serve_tcp, serve_udp):
                threading.Thread(target=server, args=(address,), daemon=True).start()
        time.sleep(SERVED_S)
    elif mode == "ask":
        ask(int(words[0]), *words[1:4])
    else:
        for _ in range(int(words[1])):
            for port in PUBLISHED:
                fetch(words[0], port, 30_000)


if __name__ == "__main__":
    main(*sys.argv[1:])
