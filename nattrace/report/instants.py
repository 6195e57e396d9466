"""Instants as text: ISO 8601 in UTC with nine decimals. Never asks for a clock, a locale or a time zone."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - naive on purpose: always UTC, and no zone in isoformat()


def iso_utc(time_ns: int) -> str:
    """Return ns since the epoch as ``2026-11-23T16:25:55.280741000Z``; any int64 has a text."""
    second, nanosecond = divmod(time_ns, 1_000_000_000)
    return f"{_second(second)}.{nanosecond:09d}Z"


# Neighbouring rows share their second, and formatting a date costs ten times as much as the look-up.
@lru_cache(maxsize=4096)
def _second(second: int) -> str:
    return (_EPOCH + timedelta(seconds=int(second))).isoformat()
