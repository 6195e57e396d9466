"""The checks themselves: a report made from the truth passes, and each kind of lie is found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.check import check_losses, check_rows, check_translations, read_points
from lab.oracle import ExpectedRow, Seen, expected_rows
from lab.truth import Addressing, Entry, Truth
from nattrace.model import Rewrite, Sighting, Translation, Tuple

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "lab" / "icmp_id_collision"
TRUTH = Truth.load(FOLDER / "truth.json")
POINTS = read_points(FOLDER, TRUTH)
ENTRIES = TRUTH.hops[0].entries


@dataclass(frozen=True)
class Said:
    """As much of a report as the checks read."""

    flows: list[Any]
    rewrites: list[Rewrite]


def _tuple(addressing: Addressing) -> Tuple:
    return Tuple(addressing.src, addressing.dst, id=addressing.id)


def _translation(entry: Entry) -> Translation:
    original, reply = _tuple(entry.original), _tuple(entry.reply)
    return Translation("docker0", "eth0", "snat", ("src",), original, reply, first=100, last=200)


def _flow(*translations: Translation, lost: int = 0) -> Any:
    crossing = SimpleNamespace(lost=lost, ambiguous=0)
    return SimpleNamespace(protocol="icmp", translations=translations, crossings=[crossing])


def _sighting(point: str, frame: int) -> Sighting:
    packet = next(packet for packet in POINTS[point] if packet.frame == frame)
    at = packet.addressing
    return Sighting(point, frame, None, "icmp", at.src, at.dst, packet.ttl, None, type=at.type, id=at.id)


def _rewrite(row: ExpectedRow) -> Rewrite:
    before, after = _sighting(row.before_point, row.before_frame), _sighting(row.after_point, row.after_frame)
    changed = tuple(name for name in ("src", "dst", "id") if getattr(before, name) != getattr(after, name))
    return Rewrite(1, row.direction, "snat", changed, None, before, after, ())  # type: ignore[arg-type]


def _honest() -> Said:
    rows = [_rewrite(row) for row in sorted(expected_rows(TRUTH.hops[0], POINTS))]
    return Said([_flow(_translation(entry)) for entry in ENTRIES], rows)


def test_the_truth_passes() -> None:
    report = _honest()

    assert len(report.rewrites) == 40
    check_translations(report, TRUTH, POINTS)
    check_rows(report, TRUTH, POINTS)
    check_losses(report, TRUTH, POINTS)


def test_a_translation_too_few_is_found() -> None:
    report = _honest()

    with pytest.raises(AssertionError, match="without a translation"):
        check_translations(Said(report.flows[1:], report.rewrites), TRUTH, POINTS)


def test_a_translation_shown_twice_is_found() -> None:
    report = _honest()

    with pytest.raises(AssertionError, match="more than once"):
        check_translations(Said([*report.flows, report.flows[0]], report.rewrites), TRUTH, POINTS)


def test_an_invented_translation_is_found() -> None:
    report = _honest()
    invented = replace(_translation(ENTRIES[0]), original=Tuple("172.17.0.99", "198.51.100.1", id=1))

    with pytest.raises(AssertionError, match="does not have"):
        check_translations(Said([*report.flows, _flow(invented)], report.rewrites), TRUTH, POINTS)


def test_rows_with_exchanged_partners_are_found() -> None:
    report = _honest()
    # Two containers' requests of one round: same type, id and payload, and the obvious matcher mixes them up.
    same = [row for row in report.rewrites if row.direction == "original" and row.before.id == 1][:2]
    mixed = [replace(same[0], after=same[1].after), replace(same[1], after=same[0].after)]
    rows = [row for row in report.rewrites if row not in same]

    with pytest.raises(AssertionError, match="2 wrong rows of 40"):
        check_rows(Said(report.flows, rows + mixed), TRUTH, POINTS)


def test_a_missing_row_is_found() -> None:
    report = _honest()

    with pytest.raises(AssertionError, match="1 of 40 rows are missing"):
        check_rows(Said(report.flows, report.rewrites[1:]), TRUTH, POINTS)


def test_a_row_in_the_wrong_direction_is_found() -> None:
    report = _honest()
    turned = replace(report.rewrites[0], direction="reply", before=report.rewrites[0].after)

    with pytest.raises(AssertionError, match="1 wrong rows"):
        check_rows(Said(report.flows, [turned, *report.rewrites[1:]]), TRUTH, POINTS)


def test_a_wrong_list_of_changes_is_found() -> None:
    report = _honest()
    row = next(row for row in report.rewrites if "id" in row.changed)
    rows = [replace(each, changed=("src",)) if each is row else each for each in report.rewrites]

    with pytest.raises(AssertionError):
        check_rows(Said(report.flows, rows), TRUTH, POINTS)


def test_an_invented_loss_is_found() -> None:
    with pytest.raises(AssertionError, match="the kernel dropped 0"):
        check_losses(Said([_flow(lost=1)], []), TRUTH, POINTS)


def test_the_oracle_has_frames_for_every_row() -> None:
    frames: dict[str, set[int]] = {name: {seen.frame for seen in packets} for name, packets in POINTS.items()}
    packet: Seen = POINTS["docker0"][0]

    assert packet.protocol == "icmp"
    assert all(row.before_frame in frames[row.before_point] for row in expected_rows(TRUTH.hops[0], POINTS))
