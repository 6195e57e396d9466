"""A box that numbers all packets anew, and keep-alives that say nothing: equal identifications are chance.

Counters that start close together make it look as if every packet were another one, a few packets earlier or later:
in captures of both sides, and in one file that shows both sides, where that would make layers.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Network, masquerade, write_pcap
from verdict import check_accounting

import nattrace
from nattrace.match.counters import by_chance
from nattrace.match.rows import Rows
from nattrace.model import Rewrite
from nattrace.table import UDP, PacketTable

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PAYLOADS = (b"", b"\xff", b"keep me alive!!!")
KINDS = tuple(product(("udp", "tcp", "icmp"), ("random", "counting", "in step")))


def keep_alives(seed: int, protocol: str, ids: str, flows: int, gap_us: int, talk: float) -> Network:
    """Keep-alives of both directions and all flows alike, and a share of packets that say something of their own.

    `ids` is how the hosts and the box number packets. In step, their counters start a few numbers apart.
    """
    network = Network(seed)
    rng = network.rng
    talks = [
        masquerade(protocol, (f"172.17.0.{n + 2}", 4500), ("198.51.100.1", 4500), 2000 + n * 7, rng=rng)
        for n in range(flows)
    ]
    start = rng.randint(1, 60_000)
    counters = {
        point: start + rng.randint(0, 6) if ids == "in step" else rng.randint(1, 60_000)
        for point in ("inside", "outside")
    }
    payload = rng.choice(PAYLOADS)
    for _ in range(150):
        network.wait_us(gap_us // 2, gap_us * 3 // 2)
        says = rng.random() < talk
        counters = {point: number + 1 for point, number in counters.items()}
        network.send(
            rng.choice(talks), rng.randbytes(30) if says else payload, reply=rng.random() < 0.5, ip_id=1,
            renumber={p: rng.randint(1, 65_535) for p in counters} if ids == "random" else counters,
            unseen=[point for point in counters if rng.random() < 0.02], advance=says,
        )  # fmt: skip
    return network


@pytest.mark.parametrize(("protocol", "ids"), KINDS)
@pytest.mark.parametrize(("flows", "gap_us"), [(1, 2_000), (2, 100_000), (8, 1_000_000)])
@pytest.mark.parametrize("talk", [0.0, 0.2])
def test_equal_identifications_of_keep_alives_make_no_row(
    protocol: str, ids: str, flows: int, gap_us: int, talk: float, tmp_path: Path
) -> None:
    for seed in range(4):
        network = keep_alives(seed, protocol, ids, flows, gap_us, talk)
        truth = network.write(tmp_path)
        report = nattrace.analyze(*truth.sources)
        assert not [
            row
            for row in report.rewrites.all()
            if isinstance(row, Rewrite)
            and truth.serials[row.before.point][row.before.frame - 1]
            != truth.serials[row.after.point][row.after.frame - 1]
        ]
        assert all(point.clock.offset_ns == 0 for point in report.points)
        check_accounting(report)
        assert not wrong_layers(network, tmp_path)


def wrong_layers(network: Network, folder: Path) -> list[tuple[int, int]]:
    """Return the rows of one file that shows both sides whose frames are different packets."""
    packets = sorted(packet for capture in network.captures.values() for packet in capture.packets)
    write_pcap(folder / "both.pcap", [packet[:2] for packet in packets])
    report = nattrace.analyze(folder / "both.pcap")
    return [
        (row.before.frame, row.after.frame)
        for row in report.rewrites.all()
        if isinstance(row, Rewrite) and packets[row.before.frame - 1][2] != packets[row.after.frame - 1][2]
    ]


def rows_of(packets: list[tuple[int, int, int]], *, flows: int = 1) -> Rows:
    """Return datagrams of one way of so many flows in turn: (time, what it says, identification)."""
    table = PacketTable.empty(len(packets))
    table.frame[:] = np.arange(1, len(packets) + 1)
    table.time_ns[:], table.content_hash[:], table.ip_id[:] = np.array(packets, np.int64).T
    table.protocol[:], table.version[:], table.src[:], table.dst[:] = UDP, 4, 1, 2
    table.sport[:] = np.arange(len(packets)) % flows
    return Rows.prepare(table)[0]


def slowly(first: Rows, second: Rows, pairs: list[tuple[int, int]]) -> list[bool]:
    """Say the same of pairs of two flows, one by one."""

    def alike(rows: Rows, row: int) -> list[int]:
        return [n for n in range(len(rows)) if rows.table.content_hash[n] == rows.table.content_hash[row]]

    asked = [(a, b) for a, b in pairs if len(alike(first, a)) > 1 or len(alike(second, b)) > 1]
    time_a, time_b, ip_id = first.table.time_ns, second.table.time_ns, first.table.ip_id
    near = 0
    for a, b in asked:
        apart = abs(int(time_b[b] - time_a[a]))
        ahead = min(abs(int(time_b[n] - time_a[a])) for n in alike(second, b))
        back = min(abs(int(time_b[b] - time_a[n])) for n in alike(first, a))
        near += apart <= max(min(ahead, back), 66_000)
    ids = [int(ip_id[a]) for a, _ in sorted(asked, key=lambda pair: int(time_a[pair[0]]))]
    steps = [(later - earlier) % 65536 <= 256 for earlier, later in pairwise(ids)]
    counting = 2 * sum(steps) >= len(asked) - 1
    believed = near >= 0.5 * len(asked) or (not counting and len(asked) >= 4)
    return [pair in asked and not believed for pair in pairs]


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_chance_is_told_as_the_slow_way_tells_it(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    lag = data.draw(st.integers(-2, 2))
    steps = data.draw(st.lists(st.integers(1, 400_000), min_size=size, max_size=size))
    ids = data.draw(st.sampled_from([range(7, 7 + size), [n * 7919 % 65536 + 1 for n in range(size)]]))
    said = data.draw(st.lists(st.integers(1, 2), min_size=size, max_size=size))
    times: NDArray[np.int64] = np.cumsum(np.array(steps))
    first = rows_of([(int(times[n]), said[n], ids[n]) for n in range(size)])
    second = rows_of([(int(times[(n + lag) % size]) + 20_000, said[n], ids[n]) for n in range(size)])
    everything = np.arange(size)
    told = by_chance(first, everything, second, everything)
    assert told.tolist() == slowly(first, second, [(n, n) for n in range(size)])


def test_packets_that_met_their_own_are_no_rivals_of_one_that_is_held_up() -> None:
    """The first packet of a flow takes longer through a busy host than those of others that say the same."""

    def by_chance_behind(delays: list[int]) -> list[int]:
        first, second = (
            rows_of([(n * 100_000 + late[n], 1, n * 7919 % 65536 + 1) for n in range(20)], flows=20)
            for late in ([0] * 20, delays)
        )
        everything = np.arange(20)
        return np.flatnonzero(by_chance(first, everything, second, everything)).tolist()

    assert by_chance_behind([20_000] * 10 + [240_000] + [20_000] * 9) == []
    # where many are, counters may overlap
    assert by_chance_behind([20_000] * 10 + [240_000] * 10) != []
