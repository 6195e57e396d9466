"""What a capture can fail with, and tcpdump's and the engine's complaints turned into one line of advice."""

from __future__ import annotations

import re

from nattrace.errors import NattraceError

#: What tcpdump says when all is well.
_ROUTINE = re.compile(r"listening on|\d+ packets? |dropped privs")


class CaptureError(NattraceError):
    """A capture cannot start or could not be finished: no tool, no right, no engine, no such interface."""


class UncollectedError(CaptureError):
    """Captures did not come into the bundle whole; `files` are there as far as they came."""

    def __init__(self, message: str, files: tuple[str, ...]) -> None:
        super().__init__(message)
        self.files = files


def tcpdump_complaint(said: str) -> str:
    """Return the last line that tcpdump printed of its own, without its name; empty when it said nothing."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not _ROUTINE.search(line)]
    own = [line for line in lines if line.startswith("tcpdump:")]
    line = (own or lines or [""])[-1]
    return line.removeprefix("tcpdump:").strip()[:300]


def last_line(said: bytes) -> str:
    """Return the last line that a program printed."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return (lines or [""])[-1][:200]


def start_failure(interface: str, said: str) -> CaptureError:
    """Return the error for a tcpdump that did not start listening on `interface`."""
    complaint = tcpdump_complaint(said)
    lower = complaint.lower()
    if "permission" in lower or "not permitted" in lower:
        advice = "run it as root, or with --via docker as somebody who may use Docker"
    elif "no such device" in lower or "doesn't exist" in lower:
        advice = "see ip link for the interfaces there are"
    elif "is not up" in lower or "network is down" in lower:
        advice = f"ip link set {interface} up"
    elif "syntax error" in lower or "filter" in lower or "expression" in lower:
        advice = "see pcap-filter(7) for filters"
    else:
        advice = "try the command that --dry-run prints"
    return CaptureError(f"{interface}: tcpdump does not start: {complaint or 'it said nothing'}; {advice}")
