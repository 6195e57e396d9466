"""What the report says of clocks: how far off, how exactly, and that one was set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nattrace.diagnose import diagnose
from nattrace.diagnose.clocks import clock_findings
from nattrace.model import Clock, ClockStep, Finding, Point

SECOND = 10**9
START_NS = 1_700_000_000 * SECOND
OWN = Clock("docker0", 3600 * SECOND + 12_000, 27.0, 35_000, START_NS)


def point(name: str, clock: Clock) -> Point:
    return Point(
        name=name, file=f"{name}.pcap", interface=None, link_type="EN10MB", snaplen=None, packets=1, decoded=1,
        skipped={}, first=START_NS, last=START_NS, truncated=False, dropped_by_kernel=None, clock=clock,
    )  # fmt: skip


def said(clock: Clock, uncorrected: tuple[str, ...] = ()) -> list[Finding]:
    return clock_findings([point("docker0", Clock("docker0")), point("eth0", clock)], uncorrected)


def test_one_clock_is_no_finding() -> None:
    assert said(Clock("docker0")) == []
    assert said(Clock("docker0", bound_ns=None)) == []


def test_an_offset_is_said_with_its_error_and_drift() -> None:
    (finding,) = said(OWN)
    assert (finding.code, finding.severity) == ("clock-offset", "info")
    assert finding.message == (
        "the clock of eth0 is 3600.000012 s ahead of that of docker0, to within 35 us, "
        "and gains 27 ppm (97.2 ms an hour)"
    )


def test_a_clock_behind_and_an_error_that_nobody_knows() -> None:
    (finding,) = said(replace(OWN, offset_ns=-5 * SECOND, drift_ppm=0.0, bound_ns=None))
    assert "is 5 s behind that of docker0; how exactly is not known" in finding.message


def test_points_of_one_clock_share_a_finding() -> None:
    points = [point(name, OWN) for name in ("eth0", "eth1")]
    (finding,) = clock_findings(points, ())
    assert "the clock of eth0, eth1 is" in finding.message


@pytest.mark.parametrize(("jump_ns", "way"), [(5 * SECOND, "forward by 5 s"), (-5 * SECOND, "back by 5 s")])
def test_a_step_is_a_warning(jump_ns: int, way: str) -> None:
    clock = replace(OWN, drift_ppm=0.0, steps=(ClockStep(START_NS + 60 * SECOND, OWN.offset_ns + jump_ns),))
    step, offset = sorted(said(clock), key=lambda finding: finding.code, reverse=True)
    assert (step.code, step.severity, offset.code) == ("clock-step", "warning", "clock-offset")
    assert way in step.message
    assert "2023-11-14T22:14:20.000000000Z" in step.message


def test_a_change_of_pace_is_no_step() -> None:
    later = ClockStep(START_NS + 1000 * SECOND, OWN.offset_ns + 27_000_000, 30.0)
    assert [finding.code for finding in said(replace(OWN, steps=(later,)))] == ["clock-offset"]


def test_a_pipe_is_named() -> None:
    offset, pipe = said(OWN, ("-",))
    assert (offset.code, pipe.code, pipe.severity) == ("clock-offset", "clock-not-corrected", "warning")
    assert pipe.message.startswith("- can be read only once")


def test_a_hostile_name_stays_one_line() -> None:
    (finding,) = clock_findings([point("eth0\n\x1b[31m", OWN)], ())
    assert finding.message.isprintable()


def test_warnings_come_before_hints() -> None:
    clock = replace(OWN, steps=(ClockStep(START_NS + SECOND, 0),))
    codes = [finding.severity for finding in diagnose([point("eth0", clock)], [])]
    assert codes == ["warning", "info"]
