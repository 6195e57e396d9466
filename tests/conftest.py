"""What all tests share: the lab's recorded fixtures, and the rule that CI skips nothing it could run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

#: Set by .ci/run: there every tool and right is present, so a skipped test is a broken promise.
IN_CI = os.environ.get("NATTRACE_CI") == "1"
#: Captures that other people own lie beside the checkout and not in it.
SHARED = Path(__file__).resolve().parents[1].parent / "shared"
#: Reasons that CI accepts: not a tool or a right, but something that machine cannot be given.
EXCUSED = ("kernel has no ",)

_broken_promises: list[str] = []

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # so it is for what a script starts in the background, and for all that is started from there
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that capture or watch the kernel run one after the other where others run beside them (xdist)."""
    for item in items:
        if "capture" in item.path.parts or item.get_closest_marker("lab") is not None:
            item.add_marker(pytest.mark.xdist_group("kernel"))


def _is_excused(reason: str) -> bool:
    return reason.startswith(EXCUSED) or ("shared" in reason and not SHARED.exists())


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not _is_excused(reason):
        _broken_promises.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a skipped test."""
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a skipped module."""
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a CI run that skipped what it has the tools for."""
    if _broken_promises and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which skips failed the run."""
    if _broken_promises:
        terminalreporter.section("skipped in CI, where nothing may be missing")
        for line in _broken_promises:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _lab_needs_a_machine(request: pytest.FixtureRequest) -> None:
    """Skip tests marked `lab` where namespaces or tools are missing."""
    if request.node.get_closest_marker("lab") is not None:
        from lab.topology import missing  # noqa: PLC0415  # pyroute2 is loaded only for the lab

        reason = missing()
        if reason is not None:
            pytest.skip(reason)
