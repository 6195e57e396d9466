"""Diagnose: from points and flows to findings, one module a family. Pure functions; nothing is read or printed."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.ingest.openings import Openings
    from nattrace.model import Finding, Flow, Point
    from nattrace.nat.icmp_errors import ErrorOutcome
    from nattrace.nat.paths import Hops
    from nattrace.nat.shifts import SequenceShift
    from nattrace.table import AddressBook

    #: What the errors' family reads: the errors, the hops that they crossed, the points' names, the addresses.
    IcmpErrorView = tuple[ErrorOutcome, Hops, Sequence[str], AddressBook]

#: Flows looked at to see whether anything crosses; those that go on are looked at by whoever needs them.
_GLANCE = 64


_SEVERITIES = ("error", "warning", "info")


def diagnose(
    points: Sequence[Point],
    flows: Sequence[Flow],
    uncorrected: Sequence[str] = (),
    *,
    openings: Sequence[tuple[str, Openings]] = (),
    book: AddressBook | None = None,
    errors: IcmpErrorView | None = None,
    shifts: Sequence[SequenceShift] = (),
    names: Sequence[str] = (),
) -> list[Finding]:
    """Return all findings, most severe first.

    `uncorrected` are files whose clock could not be corrected. `openings` are the points' names with what was
    noted of TCP connections there, in the handles of `book`; `errors` the ICMP errors, where there are some;
    `names` are those of the points that `shifts` has numbers of.
    """
    found: list[Finding] = []
    if errors is not None:
        from nattrace.diagnose.icmp_errors import icmp_error_findings  # noqa: PLC0415 - few captures have any

        found += icmp_error_findings(*errors)
    if any(point.clock.at is not None for point in points):
        from nattrace.diagnose.clocks import clock_findings  # noqa: PLC0415 - most captures have one clock

        found += clock_findings(points, uncorrected)
    if book is not None and sum(bool(each) for _, each in openings):
        from nattrace.diagnose.proxies import proxied  # noqa: PLC0415 - only where TCP connections end

        found += proxied(openings, flows, book)
    if shifts:
        from nattrace.diagnose.shifted_numbers import shifted_numbers  # noqa: PLC0415 - seldom needed

        found += shifted_numbers(shifts, names)
    # missing points are a matter of captures in which nothing crosses
    if not any(len(flow.path) > 1 for flow in islice(flows, _GLANCE)):
        from nattrace.diagnose.missing_point import missing_point  # noqa: PLC0415 - seldom needed, dear to load

        found += missing_point(points, flows)
    return sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity))
