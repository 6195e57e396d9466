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
@pytest.mark.parametrize(("flows", "gap_us"), [(1, 100), (8, 100), (1, 2_000), (2, 100_000), (8, 1_000_000)])
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


def slowly(first: Rows, second: Rows, kept: bool) -> list[bool]:
    """Say the same of pairs of two flows, row n with row n, one by one."""
    time_a, time_b = first.table.time_ns.tolist(), second.table.time_ns.tolist()
    ids, said = first.table.ip_id.tolist(), first.table.content_hash.tolist()
    rivals = {n: [m for m in range(len(ids)) if said[m] == said[n]] for n in range(len(ids))}
    asked = [n for n in rivals if len(rivals[n]) > 1]
    kept |= len(ids) - len(asked) >= 4
    order = sorted(asked, key=lambda n: time_a[n])
    steps = [(ids[later] - ids[earlier]) % 65536 <= 256 for earlier, later in pairwise(order)]
    counting = 2 * sum(steps) >= len(asked) - 1
    kept |= not counting and len(asked) >= 4  # so few packets share no identification by chance
    downhill = int(first.table.ttl[0]) - int(second.table.ttl[0])

    def nearest_and_clear(n: int, met: list[int]) -> tuple[bool, bool]:
        apart, backwards = abs(time_b[n] - time_a[n]), (time_b[n] - time_a[n]) * downhill < 0
        others = [m for m in rivals[n] if m != n and m not in met]
        nearest_other = min(
            (min(abs(time_b[m] - time_a[n]), abs(time_b[n] - time_a[m])) for m in others), default=2**62
        )
        nearest, soon = apart <= nearest_other, apart <= 66_000
        if not kept:
            nearest &= not backwards or apart <= 10_000
            soon &= (time_b[n] - time_a[n]) * downhill > 0
        # which of two that are as far is the nearest is no question: neither is clear
        return nearest or soon, nearest_other // 8 >= max(apart, 66_000)

    def near(told: dict[int, tuple[bool, bool]]) -> bool:
        enough = sum(nearest for nearest, _ in told.values()) >= 0.5 * len(asked)
        return enough and (kept or len(asked) >= 4 or all(clear for _, clear in told.values()))

    told = {n: nearest_and_clear(n, []) for n in asked}
    met = [n for n in asked if told[n][0] and near(told)]
    late = [n for n in asked if n not in met]
    if len(late) <= 0.1 * len(asked):
        told |= {n: nearest_and_clear(n, met) for n in late}
    believed = near(told) or (not counting and len(asked) >= 4)
    return [n in asked and not believed for n in range(len(ids))]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_chance_is_told_as_the_slow_way_tells_it(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    lag = data.draw(st.integers(-2, 2))
    steps = data.draw(st.lists(st.integers(1, 400_000), min_size=size, max_size=size))
    ids = data.draw(st.sampled_from([range(7, 7 + size), [n * 7919 % 65536 + 1 for n in range(size)]]))
    said = data.draw(st.lists(st.integers(1, 2), min_size=size, max_size=size))
    behind_ns, kept = data.draw(st.sampled_from([-20_000, 5_000, 20_000])), data.draw(st.booleans())
    times: NDArray[np.int64] = np.cumsum(np.array(steps))
    first = rows_of([(int(times[n]), said[n], ids[n]) for n in range(size)])
    second = rows_of([(int(times[(n + lag) % size]) + behind_ns, said[n], ids[n]) for n in range(size)])
    second.table.ttl[:] = data.draw(st.integers(0, 2))
    first.table.ttl[:] = 1
    everything = np.arange(size)
    told = by_chance(first, everything, second, everything, kept=kept)
    assert told.tolist() == slowly(first, second, kept)


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
