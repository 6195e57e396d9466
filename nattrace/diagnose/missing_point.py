"""Placeholder until the real one is written (helper 3)."""
from __future__ import annotations
def missing_point(points, flows):  # type: ignore
    return []
