"""How much of what NAT did nattrace finds, and how little it invents, over seeded traffic that gets harder.

    python tests/sweep.py            prints the table that docs/accuracy.md keeps, in half a minute
    python tests/sweep.py loss       only the rows that have a word in their names
    python tests/sweep.py --keep     puts the whole table into docs/accuracy.md

Every row of the table is a kind of trouble; its figures are those of MIXES x SEEDS simulated networks. The
truth is the simulator's. This module knows nothing of how nattrace decides.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation import ClockError, Traffic, simulate
from verdict import expected_flows, flows_told, judge_rows

import nattrace

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The page whose end is the table, and how a table begins.
KEPT = Path(__file__).resolve().parents[1] / "docs" / "accuracy.md"
FIRST_WORDS = "| trouble |"

SEEDS = (1, 2)
SECOND_NS = 1_000_000_000

#: What the columns of the table are.
FAMILIES: dict[str, dict[str, Any]] = {
    "IPv4": {},
    "IPv4, ids that count": {"counted_ids": True},
    "IPv4 without ids": {"zero_ids": True},
    "IPv6": {"version": 6, "zero_ids": True},
}

#: Ports and ids collide between clients, and the box gives every flow a new one.
MIXES: tuple[dict[str, Any], ...] = (
    {"flows": 15, "packets_per_flow": 16, "servers": 2, "timestamps": True},
    {"flows": 8, "packets_per_flow": 16, "servers": 1, "protocols": ("icmp",)},
    {"flows": 8, "packets_per_flow": 16, "servers": 1, "protocols": ("tcp",), "pure_acks": True},
)

#: Rows of the table: a name, and what it makes of a mix.
TROUBLES: dict[str, dict[str, Any]] = {
    "none": {},
    "none, a packet every 20 us": {"spacing_us": 20},
    "none, equal payloads": {"constant_payload": True},
    "none, equal payloads, a packet every 20 us": {"constant_payload": True, "spacing_us": 20},
    **{f"loss {n} %": {"loss_inside": n / 100, "loss_outside": n / 100} for n in (1, 5, 10, 20, 30)},
    "loss 10 %, equal payloads": {"loss_inside": 0.1, "loss_outside": 0.1, "constant_payload": True},
    "loss 30 % at one point": {"loss_outside": 0.3},
    **{f"reordering {n} %": {"reordered": n / 100} for n in (1, 5, 20)},
    "reordering 20 %, equal payloads": {"reordered": 0.2, "constant_payload": True},
    **{f"duplication {n} %": {"duplicated": n / 100} for n in (1, 5, 20)},
    "duplication of all": {"duplicated": 1.0},
    "duplication 5 %, equal payloads": {"duplicated": 0.05, "constant_payload": True},
    "duplication 20 %, loss 20 %": {"duplicated": 0.2, "loss_inside": 0.2, "loss_outside": 0.2},
    **{f"sent twice at once {n} %": {"sent_twice": n / 100} for n in (5, 20, 100)},
    "resending 5 %": {"resent": 0.05},
    "resending 20 %, loss 20 %": {"resent": 0.2, "loss_inside": 0.2, "loss_outside": 0.2},
    "resending 20 %, loss 20 %, equal payloads": {
        "resent": 0.2, "loss_inside": 0.2, "loss_outside": 0.2, "constant_payload": True,
    },
    **{f"snaplen {n}": {"snaplen": n} for n in (42, 46, 50, 54, 62, 66, 70, 74, 82, 96, 128)},
    "snaplen 54, loss 10 %": {"snaplen": 54, "loss_inside": 0.1, "loss_outside": 0.1},
    "snaplen 54, equal payloads": {"snaplen": 54, "constant_payload": True},
    "clock 1 ms ahead": {"clock": ClockError(1_000_000)},
    "clock 5 s behind": {"clock": ClockError(-5 * SECOND_NS)},
    "clock 1 h ahead": {"clock": ClockError(3600 * SECOND_NS)},
    "clock 1 day behind": {"clock": ClockError(-86_400 * SECOND_NS)},
    "clock drifts 27 ppm": {"clock": ClockError(0, 27.0), "spacing_us": 50_000},
    "clock drifts -100 ppm, 1 h ahead": {
        "clock": ClockError(3600 * SECOND_NS, -100.0), "spacing_us": 50_000,
    },
    "clock is set back 2 s in mid-capture": {
        "clock": ClockError(0, 0.0, ((3 * SECOND_NS, -2 * SECOND_NS),)), "spacing_us": 50_000,
    },
    "clock 1 h ahead, equal payloads": {"clock": ClockError(3600 * SECOND_NS), "constant_payload": True},
    "clock 1 h ahead, loss 10 %, snaplen 66": {
        "clock": ClockError(3600 * SECOND_NS), "loss_inside": 0.1, "loss_outside": 0.1, "snaplen": 66,
    },
    "loss 10 %, reordering 5 %, duplication 5 %": {
        "loss_inside": 0.1, "loss_outside": 0.1, "reordered": 0.05, "duplicated": 0.05,
    },
    "loss 10 %, reordering 5 %, duplication 5 %, snaplen 66": {
        "loss_inside": 0.1, "loss_outside": 0.1, "reordered": 0.05, "duplicated": 0.05, "snaplen": 66,
    },
    "all of that, equal payloads, a packet every 20 us": {
        "loss_inside": 0.1, "loss_outside": 0.1, "reordered": 0.05, "duplicated": 0.05, "snaplen": 66,
        "constant_payload": True, "spacing_us": 20,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Counts over some networks. A crossing is a packet that both points recorded, once or more."""

    crossings: int = 0
    found: int = 0  #: of these, told by some row
    rows: int = 0
    wrong: int = 0  #: rows that are not the same packet at both points, the right way round
    invented: int = 0  #: translations that no box made

    def __add__(self, other: Score) -> Score:
        """Return the sum."""
        return Score(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def recall(self) -> str:
        """Found crossings of all, four decimals, rounded down so that 1.0000 means every one."""
        return f"{self.found * 10_000 // max(self.crossings, 1) / 10_000:.4f}"

    @property
    def precision(self) -> str:
        """Right rows of all, four decimals, rounded down."""
        return f"{(self.rows - self.wrong) * 10_000 // max(self.rows, 1) / 10_000 if self.rows else 1:.4f}"


def score(folder: Path, traffic: Traffic) -> Score:
    """Simulate, analyze and judge one network."""
    truth = simulate(folder, traffic)
    report = nattrace.analyze(*truth.sources)
    judged = judge_rows(report, truth)
    both = set(truth.serials["inside"]) & set(truth.serials["outside"])
    # a packet recorded twice is found by either record
    missed = {truth.serials[point][frame - 1] for point, frame, _, _ in judged.missed}
    invented = {flow for flow in flows_told(report) if flow[3]} - set(expected_flows(truth))
    return Score(
        crossings=len(both),
        found=len(both) - len(missed & both),
        rows=judged.right + len(judged.wrong),
        wrong=len(judged.wrong),
        invented=len(invented),
    )


def cell(folder: Path, trouble: str, family: str) -> Score:
    """Return the score of one cell of the table."""
    total = Score()
    for mix in MIXES:
        for seed in SEEDS:
            traffic = replace(Traffic(seed=seed, **mix), **FAMILIES[family], **TROUBLES[trouble])
            total += score(folder, traffic)
    return total


def table(troubles: Iterable[str]) -> list[str]:
    """Return the lines of the table, in Markdown."""
    lines = [
        f"{FIRST_WORDS} {' | '.join(FAMILIES)} | precision | wrong rows | invented translations |",
        f"|---|{'---|' * len(FAMILIES)}---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for trouble in troubles:
            scores = [cell(Path(folder), trouble, family) for family in FAMILIES]
            total = sum(scores, Score())
            recalls = " | ".join(each.recall for each in scores)
            lines.append(f"| {trouble} | {recalls} | {total.precision} | {total.wrong} | {total.invented} |")
    return lines


def kept() -> dict[str, dict[str, float]]:
    """Return the kept table: recall by trouble and family."""
    lines = KEPT.read_text().partition(FIRST_WORDS)[2].splitlines()[2:]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: dict(zip(FAMILIES, map(float, cells), strict=False)) for name, *cells in rows}


def main(words: list[str]) -> None:
    """Run from the command line."""
    keep = "--keep" in words
    chosen = [name for name in TROUBLES if keep or not words or any(word in name for word in words)]
    text = "\n".join(table(chosen)) + "\n"
    if keep:
        before = KEPT.read_text().partition(FIRST_WORDS)[0]
        KEPT.write_text(before + text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
