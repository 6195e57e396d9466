"""What is noted of TCP connections while a capture is read: few packets, and the first bytes of each side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from simulation import Network, routed

from nattrace.ingest import open_capture, parse_sources
from nattrace.ingest import openings as module
from nattrace.ingest.openings import HEAD_BYTES, Openings
from nattrace.ingest.source import ReadOptions

if TYPE_CHECKING:
    from pathlib import Path

SYN, SYN_ACK, PSH, FIN = 0x02, 0x12, 0x18, 0x11


def connection(
    network: Network, port: int, question: bytes, answer: bytes, *, timestamps: bool = False
) -> None:
    """Send one connection: handshake, question, answer twice, FIN from the client."""
    c = routed("tcp", ("192.0.2.1", port), ("192.0.2.2", 80), points=("here",))
    c.timestamps = timestamps
    network.send(c, flags=SYN)
    c.seq += 1
    network.send(c, flags=SYN_ACK, reply=True)
    c.ack += 1
    network.send(c, question)
    for _ in range(2):
        network.send(c, answer, reply=True)
    network.send(c, flags=FIN)
    network.now_ns += 1_000_000


def noted(path: Path) -> Openings:
    options = ReadOptions()
    capture = open_capture(parse_sources([path])[0], options)
    for _ in capture.batches(options):
        pass
    return capture.points[0].openings


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("snaplen", [60, 80, 262144])
def test_first_bytes_of_both_sides_as_far_as_they_were_captured(
    snaplen: int, timestamps: bool, tmp_path: Path
) -> None:
    network = Network()
    connection(network, 40000, b"question", b"0123456789" * 20, timestamps=timestamps)
    path = network.write(tmp_path, snaplen).paths["here"]

    found = noted(path).noted()

    assert found.table.frame.tolist() == [2, 3, 4, 6]  # SYN-ACK, question, first answer, FIN
    header = 14 + 20 + (32 if timestamps else 20)
    heads = [
        bytes(head[:length]) for head, length in zip(found.head, found.head_length.tolist(), strict=True)
    ]
    visible = min(max(snaplen - header, 0), HEAD_BYTES)
    assert heads == [b"", b"question"[:visible], (b"0123456789" * 20)[:visible], b""]


def test_more_connections_than_the_limit_are_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECTIONS", 5)
    network = Network()
    for port in range(20):
        connection(network, 40000 + port, b"question", b"answer")
    found = noted(network.write(tmp_path).paths["here"]).noted()
    answers = found.table.tcp_flags == SYN_ACK
    assert np.count_nonzero(answers) == 5
    assert np.count_nonzero(found.head_length) == 2 * 5


def test_a_flood_of_openings_that_nobody_answers_is_not_noted(tmp_path: Path) -> None:
    network = Network()
    for port in range(300):
        network.send(routed("tcp", ("192.0.2.1", port), ("192.0.2.2", 80), points=("here",)), flags=SYN)
    found = noted(network.write(tmp_path).paths["here"])
    assert not found
    assert not len(found.noted().table)
