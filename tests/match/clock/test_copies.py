"""One host has one clock, whatever its taps show: a bridge that copies packets is no path and no other clock."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from simulation import ClockError, Network, Simulated, routed

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = range(3)
SERVER = ("172.17.0.9", 80)


def bridged(
    folder: Path, seed: int, copied_ns: tuple[tuple[int, int], tuple[int, int]], far: ClockError | None = None
) -> Simulated:
    """Write veth1, veth2 and docker0 of containers that talk over a bridge; docker0 gets copies of what passes.

    `copied_ns` is how much later than at veth1 the copies of requests and of replies are shown. `far` is the clock
    error of veth2, which then is on another host.
    """
    network = Network(seed)
    if far is not None:
        network.clocks["veth2"] = far
    talks = [
        routed("tcp", (f"172.17.0.{n}", 40_000), SERVER, {}, points=("veth1", "veth2"), bridged=True)
        for n in range(2, 5)
    ]
    copies = network.point("docker0")
    for turn in range(240):
        reply = turn % 2 == 1
        network.wait_us(300, 900)
        network.send(talks[turn % 3], network.rng.randbytes(20), reply=reply)
        at_ns, frame, serial = network.point("veth1").packets[-1]
        copies.packets.append((at_ns + network.rng.randint(*copied_ns[reply]), frame, serial))
    return network.write(folder)


def offsets(report: nattrace.Report) -> dict[str, int]:
    return {point.name: point.clock.offset_ns for point in report.points if point.clock.offset_ns}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "copied_ns",
    [
        ((1_000, 5_000), (12_000, 40_000)),
        ((-60_000, -9_000), (-5_000, 0)),
        ((10_000, 12_000), (30_000, 90_000)),
    ],
)
def test_copies_of_a_bridge_make_no_clock(
    copied_ns: tuple[tuple[int, int], tuple[int, int]], seed: int, tmp_path: Path
) -> None:
    truth = bridged(tmp_path, seed, copied_ns)
    report = nattrace.analyze(*truth.sources)
    assert offsets(report) == {}
    assert report.findings == ()
    rows = [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    assert len(rows) >= 2 * 240 - 2
    for row in rows:
        packets = [truth.serials[seen.point][seen.frame - 1] for seen in (row.before, row.after)]
        assert packets[0] == packets[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("offset_ns", [300_000, -400_000])
def test_a_bridge_between_two_hosts_shows_their_clocks(offset_ns: int, seed: int, tmp_path: Path) -> None:
    truth = bridged(tmp_path, seed, ((1_000, 5_000), (12_000, 40_000)), ClockError(offset_ns))
    found = offsets(nattrace.analyze(*truth.sources))
    assert set(found) in ({"veth2"}, {"docker0", "veth1"})
    assert all(abs(abs(found_ns) - abs(offset_ns)) < 60_000 for found_ns in found.values())


def test_the_points_of_a_bundle_that_names_its_host_share_a_clock(tmp_path: Path) -> None:
    """However late a busy host shows copies: without the host, they look like a clock that is 0.7 ms off."""
    truth = bridged(tmp_path, 1, ((600_000, 620_000), (800_000, 900_000)))
    points = [{"name": name, "files": [path.name]} for name, path in truth.paths.items()]
    manifest = {"schema": "nattrace/bundle/1", "points": points}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert offsets(nattrace.analyze(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"host": "box"}))
    report = nattrace.analyze(tmp_path)
    assert offsets(report) == {}
    assert report.findings == ()
