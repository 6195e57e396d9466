"""Diagnose: from points and flows to findings, one module a family. Pure functions; nothing is read or printed."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.model import Finding, Flow, Point

#: Flows looked at to see whether anything crosses; those that go on are looked at by whoever needs them.
_GLANCE = 64


def diagnose(points: Sequence[Point], flows: Sequence[Flow]) -> list[Finding]:
    """Return all findings, most severe first."""
    if any(len(flow.path) > 1 for flow in islice(flows, _GLANCE)):
        return []  # the one family there is speaks of captures in which nothing crosses
    from nattrace.diagnose.missing_point import missing_point  # noqa: PLC0415 - seldom needed, dear to load

    return missing_point(points, flows)
