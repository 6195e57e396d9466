"""Packets without identification that their senders repeat word for word: one here and one there may be two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from simulation import Network, Simulated, masquerade
from verdict import check_accounting, judge_rows

import nattrace

if TYPE_CHECKING:
    from pathlib import Path


def repeating(
    seed: int,
    folder: Path,
    protocol: str,
    version: int,
    apart_us: tuple[int, int],
    missed: tuple[float, float],
) -> Simulated:
    """Write captures of three hosts that send half of their datagrams, or acknowledgements, twice."""
    network = Network(seed)
    rng = network.rng
    client, server = ("172.17.0.{}", "198.51.100.1") if version == 4 else ("fd00::{}", "2001:db8:1::1")
    hosts = [
        masquerade(protocol, (client.format(n + 2), 40_000), (server, 53), 2_000 + n, rng=rng)
        for n in range(3)
    ]
    for _ in range(80):
        network.wait_us(100, 300)
        host = rng.choice(hosts)
        host.ack += rng.randint(1, 3_000)
        says = b"" if protocol == "tcp" else rng.randbytes(20)
        times = 1 + (rng.random() < 0.5)
        now_ns = network.now_ns
        for _ in range(times):
            points = zip(("inside", "outside"), missed, strict=True)
            unseen = [point for point, share in points if rng.random() < share]
            network.send(host, says, ip_id=0, unseen=unseen)
            network.wait_us(*apart_us)
        network.now_ns = max(now_ns, network.now_ns if apart_us[1] < 1_000 else now_ns)
    return network.write(folder)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("apart_us", [(50, 300), (500, 9_000), (20_000, 50_000)])
def test_copies_of_which_each_capture_missed_another_are_no_pair(
    apart_us: tuple[int, int], protocol: str, version: int, tmp_path: Path
) -> None:
    for seed in range(6):
        truth = repeating(seed, tmp_path, protocol, version, apart_us, (0.3, 0.3))
        report = nattrace.analyze(*truth.sources)
        assert not judge_rows(report, truth).wrong, seed
        check_accounting(report)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_where_one_capture_misses_nothing_no_copy_is_mistaken_for_another(
    protocol: str, tmp_path: Path
) -> None:
    """What is there once outside was sent once, and what stands alone inside is it."""
    truth = repeating(1, tmp_path, protocol, 6, (20_000, 50_000), (0.2, 0.0))
    judged = judge_rows(nattrace.analyze(*truth.sources), truth)
    assert not judged.wrong
    assert judged.right >= 0.6 * (judged.right + len(judged.missed))
