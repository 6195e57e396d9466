"""The times tcpdump prints: of the day, since 1970, with a date, as differences, or none.

It reads a printed time and turns it into ns since 1970-01-01. It never asks the machine's clock or time zone:
dates printed by -tttt are in the writer's zone, which the text does not tell, and are read as UTC; times of
day without a date are put on 1970-01-01.
"""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

#: A time at the start of a packet line, after the packet number of -#. tcpdump always prints a fraction.
STAMP = re.compile(
    r"(?:(\d{1,10})\s{1,8})?"
    r"(?:(-)?(?:(\d{4}-\d\d-\d\d)[ T])?(\d{2,4}):(\d\d):(\d\d)\.(\d{1,9})|(\d{1,10})\.(\d{6,9}))\s+(?=\S)",
    re.ASCII,
)

#: How a time of day without a date is meant: -t (none given), -ttt and -ttttt.
Mode = Literal["time-of-day", "since-previous", "since-first"]

_NS = 1_000_000_000
_DAY_NS = 86_400 * _NS
_EPOCH = date(1970, 1, 1).toordinal()
#: Beyond this int64 sums of two instants overflow (year 2116); tcpdump itself ends in 2106.
_LATEST_NS = 1 << 62


def mode_of(lines: Iterable[str]) -> Mode:
    """Return how the times without dates at the start of a text are meant.

    tcpdump sets a space before the differences of -ttt and -ttttt, and both begin with 0. Where a later one is
    smaller they cannot all count from the first packet.
    """
    previous = None
    growing = True
    for line in lines:
        match = STAMP.match(line.strip())
        if match is None or match[4] is None or match[3] is not None:
            continue
        at = (match[4], match[5], match[6], match[7])
        if previous is None and (line[:1] not in " \t" or any(int(part) for part in at)):
            return "time-of-day"
        if previous is not None and at < previous and match[2] is None:
            growing = False
        previous = at
    if previous is None:
        return "time-of-day"
    return "since-first" if growing else "since-previous"


class PrintedClock:
    """Reads the times of one run of tcpdump, in order."""

    def __init__(self, mode: Mode = "time-of-day") -> None:
        self._mode = mode
        self._last_ns = 0
        self._days = 0
        self._date_text = ""
        self._date_ns = 0

    def read(self, stamp: re.Match[str] | None) -> tuple[int, bool] | None:
        """Return (ns since 1970-01-01, whether the text gives the date) of a `STAMP` match.

        No stamp (-t) is time 0. None means that the time is impossible. A time of day that falls back by more
        than 12 hours has passed midnight.
        """
        if stamp is None:
            return 0, False
        _, minus, day, hour, minute, second, fraction, epoch, epoch_fraction = stamp.groups()
        if epoch is not None:
            time_ns = int(epoch) * _NS + int(epoch_fraction.ljust(9, "0"))
            return (time_ns, True) if time_ns < _LATEST_NS else None
        time_ns = ((int(hour) * 60 + int(minute)) * 60 + int(second)) * _NS + int(fraction.ljust(9, "0"))
        if day is not None:
            if day != self._date_text:
                try:
                    self._date_ns = (date.fromisoformat(day).toordinal() - _EPOCH) * _DAY_NS
                except ValueError:
                    return None
                self._date_text = day
            time_ns += self._date_ns
            return (time_ns, True) if abs(time_ns) < _LATEST_NS else None
        if minus is not None:
            time_ns = -time_ns
        if self._mode == "since-previous":
            time_ns += self._last_ns
        elif self._mode == "time-of-day":
            time_ns += self._days * _DAY_NS
            if time_ns < self._last_ns - _DAY_NS // 2:
                self._days += 1
                time_ns += _DAY_NS
        if abs(time_ns) >= _LATEST_NS:
            return None
        self._last_ns = time_ns
        return time_ns, False
