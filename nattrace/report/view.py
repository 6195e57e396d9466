"""What the renderers read of a report: a shape, not a class, so that flows may be built while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.model import Accounting, Finding, Flow, Point


class ReportView(Protocol):
    """A report as `nattrace.model.ReportData` holds it; `nattrace.analyze` returns one."""

    @property
    def version(self) -> str:
        """The version of nattrace that made the report."""

    @property
    def points(self) -> Sequence[Point]:
        """The observation points, in the order of the report."""

    @property
    def flows(self) -> Sequence[Flow]:
        """The flows, in the order of their ids; read once from first to last."""

    @property
    def findings(self) -> Sequence[Finding]:
        """The findings, in the order of the report."""

    @property
    def accounting(self) -> Accounting:
        """Where every packet went."""
