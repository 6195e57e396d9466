"""nattrace: what did NAT do to my packets?"""  # noqa: D400 - the question is the product

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nattrace.errors import InputError, MissingToolError, NattraceError, UsageError

if TYPE_CHECKING:
    from nattrace.pipeline import analyze
    from nattrace.report_object import Report

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "MissingToolError",
    "NattraceError",
    "Report",
    "UsageError",
    "__version__",
    "analyze",
]


def __getattr__(name: str) -> Any:
    """Load the engine when it is first used, so that looking up the version or an error costs nothing."""
    if name == "analyze":
        from nattrace.pipeline import analyze  # noqa: PLC0415

        return analyze
    if name == "Report":
        from nattrace.report_object import Report  # noqa: PLC0415

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
