"""Diagnose: from points and flows to findings, one module a family. Pure functions; nothing is read or printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nattrace.diagnose.missing_point import missing_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.model import Finding, Flow, Point


def diagnose(points: Sequence[Point], flows: Sequence[Flow]) -> list[Finding]:
    """Return all findings, most severe first."""
    return missing_point(points, flows)


__all__ = ["diagnose", "missing_point"]
