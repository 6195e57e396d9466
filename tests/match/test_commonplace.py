"""What everybody says: payloads that tell no packet from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from packet_rows import decoded, table
from simulation import Network, routed

from nattrace.match.rows import Rows
from nattrace.match.unique import commonplace
from nattrace.match.votes import _causal
from nattrace.table import TCP

if TYPE_CHECKING:
    from pathlib import Path


def said_by_others(payloads: list[bytes], folder: Path) -> list[bool]:
    """Send UDP datagrams with these payloads and return which of them count as commonplace."""
    network = Network()
    c = routed("udp", ("172.17.0.2", 4000), ("198.51.100.1", 9), points=("here",))
    for payload in payloads:
        network.wait_us(10)
        network.send(c, payload)
    rows, _ = Rows.prepare(decoded(network.write(folder).paths["here"]))
    found: list[bool] = commonplace(rows, np.arange(len(payloads))).tolist()
    return found


def test_a_payload_that_two_packets_carry_is_commonplace(tmp_path: Path) -> None:
    assert said_by_others([b"alive", b"hello", b"alive", b"other"], tmp_path) == [True, False, True, False]


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32])
@pytest.mark.parametrize("filling", [0x00, 0x41, 0xFF])
def test_a_payload_of_equal_bytes_is_commonplace_even_when_sent_once(
    filling: int, size: int, tmp_path: Path
) -> None:
    other = bytes([filling]) * size + b"!"
    # the hash sees 32 bytes; what follows them is not looked at
    assert said_by_others([bytes([filling]) * size, other], tmp_path) == [True, size == 32]


def test_tcp_is_never_commonplace() -> None:
    rows, _ = Rows.prepare(table([{"protocol": TCP, "seq": n} for n in (7, 7, 8)]))
    assert not commonplace(rows, np.arange(3)).any()


def causal(*pairs: tuple[bool, int, int]) -> bool:
    """Judge one edge from (backward, second point's time minus first point's, TTL drop) of its pairs."""
    columns = list(zip(*pairs, strict=True))
    member = np.zeros(len(pairs), np.int64)
    verdict = _causal(
        member, np.array(columns[0]), np.array(columns[1], np.int64), np.array(columns[2], np.int64), 1
    )
    assert len(set(verdict.tolist())) == 1
    return bool(verdict[0])


@pytest.mark.parametrize("offset_ns", [0, 5_000_000_000, -5_000_000_000])
def test_a_path_is_causal_whatever_the_offset_of_the_clocks(offset_ns: int) -> None:
    assert causal((False, 20 + offset_ns, 1), (True, -30 + offset_ns, -1), (False, 50 + offset_ns, 1))
    assert causal((False, -20 + offset_ns, -1), (True, 30 + offset_ns, 1))
    assert causal((False, offset_ns, 0), (True, offset_ns, 0))  # taps that share one timestamp


def test_two_directions_that_overlap_are_no_path() -> None:
    assert not causal((False, 200, 0), (True, 260, 0), (True, -180, 0))


def test_a_ttl_that_rises_along_the_way_is_no_path() -> None:
    assert not causal((False, 20, 0), (True, -30, 1))
    assert not causal((False, 20, -1), (True, -30, 0))


def test_one_direction_alone_may_run_either_way() -> None:
    assert causal((False, 20, -1), (False, -30, -1))
