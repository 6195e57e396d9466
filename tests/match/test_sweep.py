"""Masquerading boxes by the hundred, from easy to hopeless: never a wrong row, and all rows where it is easy.

NATTRACE_SWEEP=N runs N seeds of every combination instead of one seed of some; a seed takes about a minute.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from simulation import Traffic, simulate
from verdict import check_accounting, expected_flows, flows_told, judge_rows

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = int(os.environ.get("NATTRACE_SWEEP", "0"))

#: (inside, outside): share of packets that each capture misses.
LOSSES = ((0.0, 0.0), (0.05, 0.05), (0.3, 0.3), (0.0, 0.5))
SPACINGS_US = (20, 500, 20_000)
#: Link header, IP header and: everything; ports and TCP sequence; ICMP header or ports and little of TCP.
SNAPLENS = {4: (262144, 96, 42), 6: (262144, 96, 62)}
MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"protocols": ("udp",), "servers": 1, "flows": 6},
    {"protocols": ("icmp",), "servers": 1, "flows": 8},
    {"protocols": ("tcp",), "servers": 2, "flows": 6},
    {"servers": 1, "flows": 25, "packets_per_flow": 8},
    {"protocols": ("tcp",), "servers": 1, "flows": 6, "pure_acks": True},
)


def judge(folder: Path, traffic: Traffic) -> int:
    """Analyze one simulation, check what always holds, and return how many crossings were not found."""
    truth = simulate(folder, traffic)
    report = nattrace.analyze(*truth.sources)
    rows = judge_rows(report, truth)
    assert not rows.wrong, traffic
    check_accounting(report)
    invented = {flow for flow in flows_told(report) if flow[3]} - set(expected_flows(truth))
    assert not invented, traffic
    return len(rows.missed)


@pytest.mark.parametrize("mix", range(len(MIXES)))
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", ["4", "4 without ids", "6"])
def test_no_row_is_ever_wrong(kind: str, constant: bool, mix: int, tmp_path: Path) -> None:
    """Lost packets, cut packets, equal payloads, no identifications, and all of it at once."""
    version, zero_ids = int(kind[0]), kind.endswith("ids")
    combinations = list(product(SNAPLENS[version], LOSSES, SPACINGS_US, (False, True)))
    seeds = range(1, SEEDS + 1)
    if not SEEDS:  # every third combination, another third in every test
        combinations, seeds = combinations[(mix + constant) % 3 :: 3], range(mix, mix + 1)
    for seed in seeds:
        for snaplen, (inside, outside), spacing_us, random_ports in combinations:
            judge(
                tmp_path,
                replace(
                    Traffic(**MIXES[mix]),
                    seed=seed,
                    version=version,
                    zero_ids=zero_ids,
                    constant_payload=constant,
                    snaplen=snaplen,
                    loss_inside=inside,
                    loss_outside=outside,
                    spacing_us=spacing_us,
                    random_ports=random_ports,
                ),
            )


@pytest.mark.parametrize("mix", range(len(MIXES)))
@pytest.mark.parametrize(
    ("version", "zero_ids", "constant", "spacing_us"),
    [
        (4, False, False, 20),
        (4, False, True, 20),
        (4, True, False, 20),
        (4, True, True, 500),
        (6, True, False, 20),
        (6, True, True, 500),
    ],
)
def test_where_nothing_is_missed_every_row_is_found(
    version: int, zero_ids: bool, constant: bool, spacing_us: int, mix: int, tmp_path: Path
) -> None:
    """Packets that differ are told apart at any pace; equal ones without ids where the path is shorter than the pace."""
    for seed in range(1, max(SEEDS, 3) + 1):
        missed = judge(
            tmp_path,
            replace(
                Traffic(**MIXES[mix]),
                seed=seed,
                version=version,
                zero_ids=zero_ids,
                constant_payload=constant,
                spacing_us=spacing_us,
            ),
        )
        assert missed == 0
