from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nattrace.report import human


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "0 ns"),
        (850, "850 ns"),
        (21_000, "21 us"),
        (1_400, "1.4 us"),
        (1_000, "1 us"),
        (999_600, "1 ms"),
        (1_400_000, "1.4 ms"),
        (66_400_000, "66 ms"),
        (2_000_000_000, "2 s"),
        (-21_000, "-21 us"),
    ],
)
def test_duration(time_ns: int, text: str) -> None:
    assert human.duration(time_ns) == text


@given(st.integers(0, 10**12))
def test_a_duration_is_within_five_percent_and_has_no_large_figure(time_ns: int) -> None:
    figure, unit = human.duration(time_ns).split()
    size = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}[unit]
    assert abs(float(figure) * size - time_ns) <= 0.05 * time_ns + 0.5
    assert unit == "s" or float(figure) < 1000


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (4_411_017_000, "4.4 s"),
        (59_990_000_000, "60.0 s"),
        (725_000_000_000, "12 min 5 s"),
        (3_600_000_000_000, "1 h"),
        (183_600_000_000_000, "2 d 3 h"),
    ],
)
def test_span(time_ns: int, text: str) -> None:
    assert human.span(time_ns) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("172.17.0.3", 40000), "172.17.0.3:40000"),
        (("2001:db8::1", 80), "[2001:db8::1]:80"),  # RFC 5952 section 6
        (("172.17.0.4", None, 1), "172.17.0.4 id 1"),
        (("2001:db8::1", None, 0), "2001:db8::1 id 0"),
        (("192.0.2.1",), "192.0.2.1"),
        (("192.0.2.1", 0), "192.0.2.1:0"),
    ],
)
def test_endpoint(arguments: tuple[str, int | None, int | None], text: str) -> None:
    assert human.endpoint(*arguments) == text


def test_numbers_are_ranges() -> None:
    assert human.numbers([4, 1, 2, 3, 7, 7]) == "1-4, 7"
    assert human.numbers(range(1, 100, 2), limit=2) == "1, 3, ..."


def test_lists_and_counts() -> None:
    assert human.listed(["a", "b", "c"]) == "a, b, c"
    assert human.listed("abcdefg") == "a, b, c and 4 more"
    assert human.count(1, "flow") == "1 flow"
    assert human.count(48_092, "flow") == "48,092 flows"
    assert (
        human.counts({"arp": 3, "lldp": 3, "truncated": 1200, "none": 0}) == "1,200 truncated, 3 arp, 3 lldp"
    )
