"""The order of a capture, its limits and its ends, with recorders that are scripts of their own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from nattrace.bundle.manifest import Counters
from nattrace.capture import session
from nattrace.capture.errors import CaptureError, start_failure
from nattrace.capture.plan import Options, PointPlan
from nattrace.capture.session import Progress, run_session

if TYPE_CHECKING:
    from pathlib import Path

LISTENING = "tcpdump: listening on {}, link-type EN10MB (Ethernet), snapshot length 65535 bytes\n"


class Scripted:
    """A recorder that keeps a diary; `counts` are its answers to SIGUSR1, the last one for ever."""

    def __init__(self, point: PointPlan, diary: list[str], counts: tuple[int, ...] = (3,)) -> None:
        self.point, self.diary, self.counts = point, diary, list(counts)
        self.command: tuple[str, ...] = ("tcpdump", "-i", point.interface)
        self.text = LISTENING.format(point.interface)
        self.code: int | None = None
        self.size = 0
        diary.append(f"start {point.name}")

    def said(self) -> str:
        return self.text

    def exit_code(self) -> int | None:
        return self.code

    def send(self, which: signal.Signals) -> None:
        if which is signal.SIGUSR1:
            count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
            self.text += f"tcpdump: {count} packets captured, {count} packets received by filter\n"
        else:
            self.diary.append(f"{which.name} {self.point.name}")
            self.code = 0
            self.text += f"{self.counts[-1]} packets captured\n0 packets dropped by kernel\n"

    def size_bytes(self) -> int | None:
        return self.size

    def collect(self) -> tuple[str, ...]:
        self.diary.append(f"collect {self.point.name}")
        return (self.point.file_name,)

    def close(self) -> None:
        self.diary.append(f"close {self.point.name}")


A, B = PointPlan("a", "a", ifindex=7), PointPlan("b", "b")


@pytest.fixture
def diary() -> list[str]:
    return []


def test_the_workload_runs_while_all_listen_and_none_is_stopped_before_it_ended(
    diary: list[str], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(mark)!r}, 'w').close(); raise SystemExit(3)"]

    class Watching(Scripted):
        def send(self, which: signal.Signals) -> None:
            if which is signal.SIGINT:
                assert mark.exists()
            super().send(which)

    manifest = run_session([A, B], lambda point: Watching(point, diary), Options(filter="icmp"), command)
    assert diary == [
        "start a",
        "start b",
        "SIGINT a",
        "SIGINT b",
        "collect a",
        "collect b",
        "close b",
        "close a",
    ]
    assert (manifest.stopped_by, manifest.workload and manifest.workload.exit_code) == ("workload", 3)
    assert [(p.files, p.ifindex, p.filter, p.counters) for p in manifest.points] == [
        (("a.pcap",), 7, "icmp", Counters(3, 3, 0, None)),
        (("b.pcap",), None, "icmp", Counters(3, 3, 0, None)),
    ]
    assert manifest.start_ns is not None
    assert manifest.stop_ns is not None
    assert manifest.start_ns < manifest.stop_ns


def test_the_workload_waits_for_the_last_to_listen(diary: list[str], tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Slow(Scripted):
        asked = 0

        def said(self) -> str:
            self.asked += 1
            if self.asked < 5:
                assert not mark.exists()
                return "tcpdump: starting\n"
            return super().said()

    run_session([A], lambda point: Slow(point, diary), Options(), ["touch", str(mark)])
    assert mark.exists()


def test_it_is_not_stopped_while_packets_still_arrive(diary: list[str]) -> None:
    made: list[Scripted] = []

    def start(point: PointPlan) -> Scripted:
        made.append(Scripted(point, diary, tuple(range(1, 30))))
        return made[-1]

    manifest = run_session([A], start, Options(), ["true"])
    counters = manifest.points[0].counters
    assert counters is not None
    assert counters.captured == 29


@pytest.mark.parametrize(
    ("options", "why"),
    [(Options(count=3), "count"), (Options(duration_s=0.3), "duration"), (Options(max_bytes=5), "size")],
)
def test_limits_end_it(diary: list[str], options: Options, why: str) -> None:
    def start(point: PointPlan) -> Scripted:
        made = Scripted(point, diary)
        made.size = 5
        return made

    shown: list[Progress] = []
    manifest = run_session([A], start, options, on_progress=shown.append)
    assert manifest.stopped_by == why
    assert shown[0].packets.keys() == {"a"}


def test_a_workload_that_outlasts_the_capture_is_ended(diary: list[str]) -> None:
    began = time.monotonic()
    manifest = run_session([A], lambda p: Scripted(p, diary), Options(duration_s=0.2), ["sleep", "60"])
    assert time.monotonic() - began < 30
    assert manifest.stopped_by == "duration"
    assert manifest.workload is not None
    assert manifest.workload.exit_code == -signal.SIGTERM


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_it_should_be_ended(diary: list[str], which: signal.Signals) -> None:
    outside = signal.signal(which, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), which)).start()
        manifest = run_session([A], lambda p: Scripted(p, diary), Options(duration_s=30))
        assert manifest.stopped_by == "signal"
        assert diary[-2:] == ["collect a", "close a"]
        assert signal.getsignal(which) is signal.SIG_DFL
    finally:
        signal.signal(which, outside)


def test_what_a_script_starts_in_the_background_can_be_interrupted(diary: list[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        manifest = run_session([A], lambda p: Scripted(p, diary), Options(duration_s=30))
        assert manifest.stopped_by == "signal"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_it_at_once_and_leaves_nothing_running(diary: list[str]) -> None:
    class Deaf(Scripted):
        def send(self, which: signal.Signals) -> None:
            if which is signal.SIGINT:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                super().send(which)

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_session([A, B], lambda p: Deaf(p, diary), Options(duration_s=30))
    assert diary[-2:] == ["close b", "close a"]


def test_one_that_ends_early_is_said_and_the_others_go_on(diary: list[str]) -> None:
    def start(point: PointPlan) -> Scripted:
        made = Scripted(point, diary)
        if point is A:
            made.exit_code = iter([None, -9] + [-9] * 1000).__next__  # type: ignore[method-assign]
            made.text += "tcpdump: docker0.pcap: No space left on device\n"
        return made

    said: list[str] = []
    manifest = run_session([A, B], start, Options(duration_s=0.3), on_message=said.append)
    problem = (
        "tcpdump was killed by signal 9 before the capture was stopped: docker0.pcap: No space left on device"
    )
    assert [point.problem for point in manifest.points] == [problem, None]
    assert said == [f"a: {problem}"]
    assert manifest.stopped_by == "duration"


def test_none_left_ends_it(diary: list[str]) -> None:
    def start(point: PointPlan) -> Scripted:
        made = Scripted(point, diary)
        made.exit_code = iter([None] + [1] * 1000).__next__  # type: ignore[method-assign]
        return made

    assert run_session([A], start, Options(duration_s=60)).stopped_by == "failure"


def test_one_that_does_not_start_ends_all(diary: list[str]) -> None:
    def start(point: PointPlan) -> Scripted:
        made = Scripted(point, diary)
        if point is B:
            made.text, made.code = "tcpdump: b: That device is not up\n", 1
        return made

    with pytest.raises(
        CaptureError, match="b: tcpdump does not start: b: That device is not up; ip link set b up"
    ):
        run_session([A, B], start, Options(), ["touch", "/nonexistent/never"])
    assert diary == ["start a", "start b", "close b", "close a"]


def test_a_workload_that_cannot_run_ends_all(diary: list[str]) -> None:
    with pytest.raises(CaptureError, match="/nonexistent: cannot be run: No such file"):
        run_session([A], lambda p: Scripted(p, diary), Options(), ["/nonexistent"])
    assert diary == ["start a", "close a"]


def test_one_that_never_listens_is_given_up(diary: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LISTEN_S", 0.1)

    class Silent(Scripted):
        def said(self) -> str:
            return ""

    with pytest.raises(CaptureError, match="it said nothing"):
        run_session([A], lambda p: Silent(p, diary), Options())


#: What tcpdump 4.99.3 and libpcap 1.10.3 print.
@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("tcpdump: eth9: No such device exists\n(SIOCGIFHWADDR: No such device)\n", "see ip link"),
        (
            "tcpdump: eth0: You don't have permission to perform this capture on that device\n(socket: Operation not permitted)\n",
            "run it as root",
        ),
        ("tcpdump: can't parse filter expression: syntax error\n", "pcap-filter"),
    ],
)
def test_a_complaint_comes_with_advice(said: str, advice: str) -> None:
    text = str(start_failure("eth0", said))
    assert advice in text
    assert "\n" not in text
