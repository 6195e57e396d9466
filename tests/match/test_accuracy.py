"""The table in docs/accuracy.md holds: no wrong row anywhere, and as many found as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sweep import FAMILIES, TROUBLES, cell, kept

if TYPE_CHECKING:
    from pathlib import Path

#: Every third row of the table for every family, another third for each: all rows, in some ten seconds.
PART = [
    (trouble, family) for place, family in enumerate(FAMILIES) for trouble in list(TROUBLES)[place % 3 :: 3]
]


def test_the_table_has_a_row_for_every_trouble() -> None:
    assert list(kept()) == list(TROUBLES)


@pytest.mark.parametrize(("trouble", "family"), PART)
def test_no_row_is_wrong_and_none_is_missed_that_was_found(trouble: str, family: str, tmp_path: Path) -> None:
    score = cell(tmp_path, trouble, family)
    assert (score.wrong, score.invented) == (0, 0)
    assert score.crossings > 0
    assert float(score.recall) >= kept()[trouble][family]
