"""Fragments against datagrams and against other fragments: what a fragmenting network knows to be true."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fragmenting import Settings, Truth, send
from hypothesis import given, settings
from hypothesis import strategies as st
from verdict import check_accounting, rows_told

import nattrace

if TYPE_CHECKING:
    from nattrace import Report
    from nattrace.model import Rewrite

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=50)

SEEDS = st.integers(0, 10**6)
#: Inside and outside: whole against fragments, both ways, and fragments of two sizes.
MTUS = st.sampled_from([(65_535, 1_500), (1_500, 65_535), (1_500, 1_300), (1_300, 1_500), (1_500, 1_500)])


def judged(drawn: Settings) -> tuple[Report, dict[tuple[int, int], Rewrite], Truth]:
    with tempfile.TemporaryDirectory() as folder:
        truth = send(Path(folder), drawn)
        report = nattrace.analyze(*truth.sources)
        rows = rows_told(report)
        check_accounting(report)
        return report, rows, truth


@EXAMPLES
@given(seed=SEEDS, mtu=MTUS, version=st.sampled_from([4, 6]))
def test_every_fragment_finds_its_datagram(seed: int, mtu: tuple[int, int], version: int) -> None:
    report, rows, truth = judged(Settings(seed=seed, mtu=mtu, version=version))
    assert set(rows) == set(truth.shared)
    assert {flow.status for flow in report.flows} == {"translated"}
    crossings = [c for flow in report.flows for c in flow.crossings]
    assert sum(c.lost + c.ambiguous + c.unknowable for c in crossings) == 0
    assert sum(c.segments.missing_bytes for c in crossings if c.segments) == 0


@EXAMPLES
@given(seed=SEEDS, mtu=MTUS, identifications=st.sampled_from([50, 65_535]))
def test_missing_fragments_and_identifications_that_come_round_confuse_nothing(
    seed: int, mtu: tuple[int, int], identifications: int
) -> None:
    """Identifications come round after some 30 ms: time, lengths and contents must tell datagrams apart."""
    drawn = Settings(seed=seed, mtu=mtu, datagrams=150, lost=0.1, missed=0.1, identifications=identifications)
    _, rows, truth = judged(drawn)
    assert not set(rows) - set(truth.shared)
    if identifications == 65_535:
        assert truth.whole <= set(rows)


@EXAMPLES
@given(seed=SEEDS, mtu=MTUS, same=st.booleans())
def test_over_ipv6_what_lacks_its_first_fragment_is_never_confused(
    seed: int, mtu: tuple[int, int], *, same: bool
) -> None:
    drawn = Settings(seed=seed, mtu=mtu, version=6, datagrams=60, lost=0.1, missed=0.1, same_payload=same)
    _, rows, truth = judged(drawn)
    assert not set(rows) - set(truth.shared)
    if not same and mtu[0] != mtu[1]:
        assert truth.whole <= set(rows)


@EXAMPLES
@given(seed=SEEDS, version=st.sampled_from([4, 6]))
def test_first_fragments_alone_are_found_and_the_rest_of_their_bytes_is_missing(
    seed: int, version: int
) -> None:
    report, rows, truth = judged(Settings(seed=seed, version=version, first_only=True))
    assert set(rows) == set(truth.shared)
    crossings = [
        c for flow in report.flows for c in flow.crossings if c.segments and c.direction == "original"
    ]
    assert all(c.segments and c.segments.missing_bytes > 0 for c in crossings)


@EXAMPLES
@given(seed=SEEDS, mtu=MTUS, version=st.sampled_from([4, 6]))
def test_fragments_seen_twice_are_never_matched_with_another_datagram(
    seed: int, mtu: tuple[int, int], version: int
) -> None:
    drawn = Settings(seed=seed, mtu=mtu, version=version, twice=0.2)
    _, rows, truth = judged(drawn)
    assert not set(rows) - set(truth.shared)
    once = {
        (here, there)
        for here, there in truth.shared
        if not {("inside", here), ("outside", there)} & truth.doubled
    }
    assert once
