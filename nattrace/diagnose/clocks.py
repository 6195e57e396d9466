"""Clocks: points whose clocks differ from the reference's, and clocks that were set while they were captured.

Reads the clocks that matching found and says what they mean for a reader; it estimates nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nattrace.model import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.model import Clock, ClockStep, Point

#: A jump below this is told as a drift that changed, where the error of the clock is not known.
_LEAST_JUMP_NS = 1_000_000

#: Points named in one finding.
_NAMED = 8

_UNITS = ((10**9, "s"), (10**6, "ms"), (10**3, "us"), (1, "ns"))

_ADVICE = (
    "keep the hosts' clocks together (NTP, PTP; chronyc tracking shows how far off one is). If one capture is of "
    "traffic that was replayed, this is the time between the two"
)


def clock_findings(points: Sequence[Point], uncorrected: Sequence[str]) -> list[Finding]:
    """Return ``clock-offset`` for every clock of its own, ``clock-step`` for every one that was set.

    `uncorrected` are files that could not be read again on the reference's time: ``clock-not-corrected``.
    """
    by_clock: dict[Clock, list[Point]] = {}
    for point in points:
        if point.clock.at is not None:
            by_clock.setdefault(point.clock, []).append(point)
    findings = []
    for clock, of_clock in by_clock.items():
        names = _listed([point.name for point in of_clock])
        findings.append(Finding("clock-offset", "info", _offset(names, clock), advice=_ADVICE))
        dated = all(point.dated for point in of_clock)
        findings.extend(
            Finding(
                "clock-step",
                "warning",
                f"the clock of {names} was set {'forward' if jump > 0 else 'back'} by {_figure(abs(jump))}, compared with "
                f"that of {_printable(clock.reference)}{_at(step) if dated else ''}",
                advice="set clocks before a capture, or let them be slewed (chrony without makestep)",
            )
            for step, jump in _jumps(clock)
        )
    if uncorrected and by_clock:
        findings.append(
            Finding(
                "clock-not-corrected",
                "warning",
                f"{_listed(uncorrected)} can be read only once, so packets were compared without "
                "correcting their clocks: matches may be missing and latencies are not measured",
                advice="save the capture to a file and analyze that",
            )
        )
    return findings


def _offset(names: str, clock: Clock) -> str:
    ahead, size = ("ahead of" if clock.offset_ns > 0 else "behind"), abs(clock.offset_ns)
    within = "; how exactly is not known, packets both ways would tell"
    if clock.bound_ns is not None:
        within = f", to within {_figure(clock.bound_ns)}"
    drift = ""
    if clock.drift_ppm:
        # a millionth of an hour is 3.6 ms
        hourly = _figure(round(abs(clock.drift_ppm) * 3_600_000))
        drift = f", and {'gains' if clock.drift_ppm > 0 else 'loses'} {abs(clock.drift_ppm):.3g} ppm ({hourly} an hour)"
    return f"the clock of {names} is {_figure(size)} {ahead} that of {_printable(clock.reference)}{within}{drift}"


def _jumps(clock: Clock) -> list[tuple[ClockStep, int]]:
    """Return the steps at which the time itself jumped, not only the pace, and by how much."""
    least = _LEAST_JUMP_NS if clock.bound_ns is None else 2 * clock.bound_ns
    offset, drift, at = clock.offset_ns, clock.drift_ppm, clock.at or 0
    found = []
    for step in clock.steps:
        jump = step.offset_ns - offset
        expected = round(drift / 1e6 * (step.at - jump - at))
        if abs(jump - expected) > least:
            found.append((step, jump - expected))
        offset, drift, at = step.offset_ns, step.drift_ppm, step.at
    return found


def _figure(time_ns: int) -> str:
    """Return a duration with six digits behind the point at most, in the unit that has some before it."""
    size, unit = next(each for each in _UNITS if time_ns >= each[0] or each[0] == 1)
    return f"{time_ns / size:.6f}".rstrip("0").rstrip(".") + f" {unit}"


def _at(step: ClockStep) -> str:
    return f", and then read {np.datetime64(step.at, 'ns')}Z"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_printable, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)
