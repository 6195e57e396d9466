"""Why constant payloads and identifications that merely count teach no clock: two truths make the same captures.

Either one fleet of devices was captured on both sides of a box by two clocks, or two fleets on one clock, the second
started later, of which each side's capture has only one. Nothing in the files says which, however many devices, so
nothing may be matched or taught.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from match.clock.test_compare import SECOND, clocks
from simulation import ClockError, Conversation, Network, Simulated, masquerade

import nattrace
from nattrace.model import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

DEVICES, ROUNDS, EVERY_US = 6, 100, 100_000
EXACTLY = (20_000, 20_000)


def fleet(first: int) -> list[Conversation]:
    """Return devices that get the same public ports whichever fleet they are of."""
    return [
        masquerade("udp", (f"172.17.{first}.{n + 2}", 4000), ("198.51.100.1", 514), 5000 + n)
        for n in range(DEVICES)
    ]


def report_to_each_other(network: Network, devices: list[Conversation], unseen: list[str]) -> None:
    """Have every device ask and be answered, all of them counting from one."""
    for number in range(1, ROUNDS + 1):
        for place, device in enumerate(devices):
            for reply in (False, True):
                network.send(
                    device,
                    b"alive",
                    ip_id=number + 1000 * place,
                    reply=reply,
                    unseen=unseen,
                    delay_ns=EXACTLY,
                )
                network.wait_us(50)
        network.wait_us(EVERY_US)


def two_clocks(folder: Path, offset_ns: int) -> Simulated:
    network = Network(1)
    report_to_each_other(network, fleet(0), [])
    network.clocks["outside"] = ClockError(offset_ns)
    return network.write(folder)


def two_fleets(folder: Path, offset_ns: int) -> Simulated:
    network = Network(1)
    began_ns = network.now_ns
    report_to_each_other(network, fleet(0), ["outside"])
    network.now_ns = began_ns + offset_ns
    report_to_each_other(network, fleet(1), ["inside"])
    return network.write(folder)


@pytest.mark.parametrize("offset_ns", [2 * SECOND, 5 * SECOND])
def test_two_clocks_and_two_fleets_are_the_same_bytes(offset_ns: int, tmp_path: Path) -> None:
    truths = []
    for name, make in (("clocks", two_clocks), ("fleets", two_fleets)):
        (tmp_path / name).mkdir()
        truths.append(make(tmp_path / name, offset_ns))
    first, second = truths
    for point in ("inside", "outside"):
        assert first.paths[point].read_bytes() == second.paths[point].read_bytes()
    assert len(first.pairs("inside", "outside")) == 2 * DEVICES * ROUNDS
    assert not second.pairs("inside", "outside")

    report = nattrace.analyze(*first.sources)
    assert not [row for row in report.rewrites.all() if isinstance(row, Rewrite)]
    assert all(clock.at is None for clock in clocks(report).values())
