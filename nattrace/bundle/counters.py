"""What tcpdump says of itself on stderr: that it listens, and what it counted. Text in, numbers out."""

from __future__ import annotations

import re
from typing import Final

from nattrace.bundle.manifest import Counters

#: At the end one line each ("5 packets captured"); on SIGUSR1 all in one (tcpdump.c, info()).
_COUNT = re.compile(
    r"(\d{1,18}) packets? (captured|received by filter|dropped by kernel|dropped by interface)", re.ASCII
)
_LISTENING = re.compile(r"listening on (\S+), link-type", re.ASCII)

#: tcpdump's words and the fields of `Counters`.
_FIELDS: Final = {
    "captured": "captured",
    "received by filter": "received_by_filter",
    "dropped by kernel": "dropped_by_kernel",
    "dropped by interface": "dropped_by_interface",
}


def counters_in(said: str) -> Counters | None:
    """Return the last counts that tcpdump printed, None when it printed none."""
    found = {_FIELDS[what]: int(number) for number, what in _COUNT.findall(said)}
    return Counters(**found) if found else None


def interface_in(said: str) -> str | None:
    """Return the interface that tcpdump says it is listening on, None while it does not."""
    found = _LISTENING.search(said)
    return found[1] if found is not None else None
