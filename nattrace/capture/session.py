"""One capture from start to end: all points listening, the workload, the drain, the stop, the manifest.

The order is what makes a capture worth comparing. Nothing runs before every tcpdump says that it listens, and no
tcpdump is stopped before the packets that had come are written. This module knows recorders, not what they are.
"""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from nattrace import __version__
from nattrace.bundle.counters import counters_in, interface_in
from nattrace.bundle.manifest import Manifest, PointEntry, Workload
from nattrace.capture.errors import CaptureError, UncollectedError, start_failure, tcpdump_complaint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nattrace.capture.plan import Options, PointPlan
    from nattrace.capture.recorder import Recorder

#: Seconds that a tcpdump may take to say that it listens: a helper container on a busy machine takes two.
LISTEN_S: Final = 20.0
#: A point whose count has not grown for this long has written what had come: immediate mode holds nothing back.
QUIET_S: Final = 0.4
#: Longest wait for all points to become quiet; on a busy line they never do, and need not.
DRAIN_S: Final = 3.0
#: Seconds that tcpdump and the workload get to end by themselves.
PATIENCE_S: Final = 10.0
#: Seconds that a workload gets to end by itself after ctrl-C, before it is told to.
GRACE_S: Final = 2.0

_POLL_S: Final = 0.05
#: How often tcpdump is asked for its counts.
_COUNT_S: Final = 0.5


@dataclass(slots=True)
class Progress:
    """What a person who waits wants to see: packets at each point, seconds gone and left."""

    packets: dict[str, int | None]
    elapsed_s: float
    left_s: float | None


@dataclass(slots=True)
class _Interrupts:
    """Signals that ask the capture to end; the second one means at once."""

    received: list[int] = field(default_factory=list)

    def __call__(self, number: int, _frame: object) -> None:
        self.received.append(number)
        if len(self.received) > 1:
            raise KeyboardInterrupt


def run_session(
    plans: Sequence[PointPlan],
    start: Callable[[PointPlan], Recorder],
    options: Options,
    workload: Sequence[str] = (),
    *,
    on_listening: Callable[[], None] = lambda: None,
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Capture on all points until something ends it, and return the manifest; context is not taken here.

    `start` begins to capture one point; `on_listening` is called when all do, before the workload starts. The
    capture ends with the workload, after ``duration_s``, at ``count`` packets, at ``max_bytes``, by SIGINT,
    SIGTERM or SIGHUP, or when no tcpdump is left. The workload's stdout goes to stderr; one that still runs
    at the end gets SIGTERM.

    Raises
    ------
    CaptureError
        A tcpdump does not start, or the workload cannot be run. Nothing is left running.
    KeyboardInterrupt
        A second signal came.
    """
    with ExitStack() as stack, _signals() as interrupts:
        recorders: list[Recorder] = []
        for plan in plans:
            recorder = start(plan)
            stack.callback(recorder.close)
            recorders.append(recorder)
        _await_listening(recorders, interrupts)
        on_listening()
        start_ns = time.time_ns()
        process = _start_workload(workload)
        if process is not None:
            stack.callback(_end_workload, process)
        watch = _Watch(recorders, options, process, interrupts, on_progress, on_message)
        stopped_by = watch.run()
        exit_code = None
        if process is not None:
            if stopped_by == "signal":
                # The terminal's ctrl-C reached the workload as well, and it may have something to say at its end.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            exit_code = _end_workload(process)
        stop_ns = time.time_ns()
        watch.drain()
        entries = _stop(recorders, watch.problems, options)
    return Manifest(
        points=tuple(entries),
        version=__version__,
        host=platform.node() or None,
        kernel=f"{platform.system()} {platform.release()}",
        start_ns=start_ns,
        stop_ns=stop_ns,
        stopped_by=stopped_by,
        workload=Workload(tuple(workload), exit_code) if workload else None,
    )


@contextmanager
def _signals() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            # As in tcpdump: nohup's SIGHUP stays ignored. SIGINT does not: scripts start what they will interrupt with
            # `&`, which ignores it. Only the main thread may set handlers (signal(2)).
            with suppress(ValueError):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, interrupts)
        yield interrupts
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _await_listening(recorders: Sequence[Recorder], interrupts: _Interrupts) -> None:
    deadline = time.monotonic() + LISTEN_S
    waiting = list(recorders)
    while waiting:
        for recorder in list(waiting):
            ended = recorder.exit_code() is not None
            said = recorder.said()
            if interface_in(said) is not None and not ended:
                waiting.remove(recorder)
            elif ended or time.monotonic() > deadline:
                raise start_failure(recorder.point.name, said)
        if interrupts.received:
            raise KeyboardInterrupt
        time.sleep(_POLL_S / 2)


def _start_workload(workload: Sequence[str]) -> subprocess.Popen[bytes] | None:
    if not workload:
        return None
    try:
        # stdout is for data; a report may follow there.
        return subprocess.Popen([*workload], stdout=_stderr())  # noqa: S603 - the user's own command
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CaptureError(f"{workload[0]}: cannot be run: {reason}") from error


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return subprocess.DEVNULL


def _end_workload(process: subprocess.Popen[bytes]) -> int:
    """End the workload if it still runs, and return its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class _Watch:
    """Looks after a running capture: counts, limits, and tcpdumps that ended by themselves."""

    def __init__(
        self,
        recorders: Sequence[Recorder],
        options: Options,
        process: subprocess.Popen[bytes] | None,
        interrupts: _Interrupts,
        on_progress: Callable[[Progress], None] | None,
        on_message: Callable[[str], None],
    ) -> None:
        self._recorders, self._options, self._process = recorders, options, process
        self._interrupts, self._on_progress, self._on_message = interrupts, on_progress, on_message
        self._packets: dict[str, int | None] = {recorder.point.name: None for recorder in recorders}
        self.problems: dict[str, str] = {}

    def run(self) -> str:
        """Wait until the capture is to end; return what ended it."""
        began = time.monotonic()
        next_count = began
        while True:
            now = time.monotonic()
            if self._interrupts.received:
                return "signal"
            if self._process is not None and self._process.poll() is not None:
                return "workload"
            if now - began >= self._options.duration_s:
                return "duration"
            if now >= next_count:
                next_count = now + _COUNT_S
                if (reason := self._look(now - began)) is not None:
                    return reason
            time.sleep(_POLL_S)

    def drain(self) -> None:
        """Wait until every point has written what had come before, as far as the line allows."""
        deadline = time.monotonic() + DRAIN_S
        since = time.monotonic()
        before = self._ask()
        while time.monotonic() < deadline and time.monotonic() - since < QUIET_S:
            time.sleep(_POLL_S)
            now = self._ask()
            if now != before:
                before, since = now, time.monotonic()

    def _ask(self) -> dict[str, int | None]:
        """Ask every tcpdump for its counts; an answer comes a moment later and is read the next time."""
        for recorder in self._recorders:
            if recorder.exit_code() is None:
                counters = counters_in(recorder.said())
                self._packets[recorder.point.name] = None if counters is None else counters.captured
                recorder.send(signal.SIGUSR1)
        return dict(self._packets)

    def _look(self, elapsed_s: float) -> str | None:
        alive = 0
        size_bytes = 0
        packets = self._ask()
        for recorder in self._recorders:
            code = recorder.exit_code()
            name = recorder.point.name
            if code == -signal.SIGXFSZ:
                return "size"
            if code is None:
                alive += 1
                size_bytes += recorder.size_bytes() or 0
            elif name not in self.problems:
                self.problems[name] = _ended_early(code, recorder.said())
                self._on_message(f"{name}: {self.problems[name]}")
        if self._on_progress is not None:
            left = None if self._process is not None else max(0.0, self._options.duration_s - elapsed_s)
            self._on_progress(Progress(packets, elapsed_s, left))
        if not alive:
            return "failure"
        count = self._options.count
        if count is not None and any((n or 0) >= count for n in packets.values()):
            return "count"
        return "size" if size_bytes >= self._options.max_bytes else None


def _ended_early(code: int, said: str) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    complaint = tcpdump_complaint(said)
    return f"tcpdump {how} before the capture was stopped" + (f": {complaint}" if complaint else "")


def _stop(recorders: Sequence[Recorder], problems: dict[str, str], options: Options) -> list[PointEntry]:
    """Stop every tcpdump, gently first, and return what the manifest says of each point."""
    for recorder in recorders:
        code = recorder.exit_code()
        if code is None:
            recorder.send(signal.SIGINT)
        elif code == -signal.SIGXFSZ:
            problems.setdefault(recorder.point.name, "the capture reached its greatest size")
        elif recorder.point.name not in problems:
            problems[recorder.point.name] = _ended_early(code, recorder.said())
    deadline = time.monotonic() + PATIENCE_S
    entries = []
    for recorder in recorders:
        while recorder.exit_code() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S / 2)
        if recorder.exit_code() is None:
            recorder.send(signal.SIGKILL)
            problems.setdefault(recorder.point.name, "tcpdump did not stop and was killed")
        point = recorder.point
        counters = counters_in(recorder.said())
        entry = PointEntry(
            name=point.name,
            files=(),
            interface=point.interface,
            ifindex=point.ifindex,
            namespace=point.namespace,
            container=point.container,
            filter=options.filter,
            snaplen=options.snaplen,
            counters=counters,
            command=recorder.command,
            problem=problems.get(point.name),
        )
        try:
            entries.append(replace(entry, files=recorder.collect()))
        except UncollectedError as error:
            # The other points' packets must not be lost with this one's.
            entries.append(replace(entry, files=error.files, problem=entry.problem or str(error)))
    return entries
