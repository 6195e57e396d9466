"""The command lines: what the measurement needs is in every one of them, and nothing can slip in."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nattrace.capture.plan import Options, PointPlan, distinct, tcpdump_arguments, with_buffers
from nattrace.capture.script import script
from nattrace.cli import main

if TYPE_CHECKING:
    from pathlib import Path

POINT = PointPlan("docker0", "docker0")
GIB = 1 << 30


def test_packets_are_written_at_once_into_a_buffer_that_holds_bursts() -> None:
    options = with_buffers(Options(filter="icmp or -w"), points=2, memory_bytes=8 * GIB)
    assert tcpdump_arguments(POINT, options, "d/docker0.pcap") == [
        *("--immediate-mode", "-U", "-s", "65400", "-B", "262144", "--time-stamp-precision=nano", "-n"),
        *("-i", "docker0", "-w", "d/docker0.pcap", "--", "icmp or -w"),
    ]


@pytest.mark.parametrize(
    ("points", "memory_bytes", "buffer_kib"),
    [
        (1, None, 262_144),
        (8, None, 65_536),
        (2, GIB, 32_768),  # a sixteenth of the memory, for both
        (64, GIB // 2, 4_096),
        (0, 0, 4_096),
    ],
)
def test_points_share_what_memory_buffers_may_take(
    points: int, memory_bytes: int | None, buffer_kib: int
) -> None:
    assert with_buffers(Options(), points, memory_bytes).buffer_kib == buffer_kib


def test_a_buffer_that_was_asked_for_is_taken() -> None:
    assert with_buffers(Options(buffer_kib=7), 100, 1).buffer_kib == 7


def test_promiscuous_mode_can_be_left_out() -> None:
    words = tcpdump_arguments(POINT, Options(promiscuous=False), "docker0.pcap")
    assert words[words.index("-n") + 1 :] == ["-i", "docker0", "-p", "-w", "docker0.pcap"]


def test_rotation_by_size_keeps_a_ring_and_by_time_gives_names_of_their_own() -> None:
    words = tcpdump_arguments(POINT, Options(rotate_mb=5, ring_files=3), "docker0.pcap")
    assert words[-6:] == ["-C", "5", "-W", "3", "-w", "docker0.pcap"]
    words = tcpdump_arguments(POINT, Options(rotate_s=60), "a%b/docker0.pcap")
    assert words[-4:] == ["-G", "60", "-w", "a%%b/docker0.%Y%m%dT%H%M%S.pcap"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("eth0.100", "eth0.100.pcap"),
        ("job:eth0", "job_eth0.pcap"),
        ("../x", "_x.pcap"),
        ("-w", "w.pcap"),
        ("..", "point.pcap"),
        ("é", "_.pcap"),
    ],
)
def test_a_file_name_is_safe_whatever_the_point_is_called(name: str, file: str) -> None:
    assert replace(POINT, name=name).file_name == file


def test_an_interface_is_captured_once() -> None:
    inside = replace(POINT, namespace="container:job")
    assert distinct([POINT, replace(POINT, name="again"), inside]) == [
        POINT,
        replace(inside, name="docker0-2"),
    ]


def test_a_point_owns_the_files_of_its_rotation_and_no_others() -> None:
    for file in (
        "docker0.pcap",
        "docker0.pcap12",
        "docker0.20261123T220000.pcap",
        "docker0.20261123T220000.pcap1",
    ):
        assert POINT.owns(file)
    for file in ("docker0.100.pcap", "docker0.pcap.log", "xdocker0.pcap", "docker0xpcap"):
        assert not POINT.owns(file)


def test_the_script_is_one_that_a_shell_understands(tmp_path: Path) -> None:
    text = (
        script(
            f"{tmp_path}/it's",
            [["true"]],
            [["sleep", "60"]],
            [("a", ["sh", "-c", "echo 'tcpdump: listening on a, link-type X' >&2; exec sleep 60"])],
            [("links.json", [["echo", "[]"]]), ("conntrack.txt", [["echo", "4"], ["echo", "6"]])],
            ["sh", "-c", "echo event; exec sleep 60"],
            ["echo", "$HOME"],
            5,
        )
        .replace("sleep 2\n", "")
        .replace("sleep 1\n", "")
    )
    ran = text.replace("nattrace bundle", "echo bundle").replace("kill -INT", "kill -TERM")
    done = subprocess.run(["sh", "-e", "-c", ran], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.splitlines() == ["$HOME", f"bundle {tmp_path}/it's.parts -w {tmp_path}/it's"]
    assert (tmp_path / "it's.parts/before/links.json").read_text() == "[]\n"
    assert (tmp_path / "it's.parts/after/links.json").read_text() == "[]\n"
    assert (tmp_path / "it's.parts/after/conntrack.txt").read_text() == "4\n6\n"
    assert (tmp_path / "it's.parts/during/conntrack-events.txt").read_text() == "event\n"


def test_the_script_begins_nothing_when_a_check_fails_and_no_workload_when_a_tcpdump_does(
    tmp_path: Path,
) -> None:
    for check, capture in (("false", "sleep 9"), ("true", "echo no such interface >&2")):
        text = script(
            f"{tmp_path}/b", [[check]], [], [("a", ["sh", "-c", capture])], (), (), ["echo", "workload"], 5
        ).replace("left=20", "left=1")
        done = subprocess.run(
            ["sh", "-c", text.replace("nattrace bundle", "echo bundle")],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert "workload" not in done.stdout
        assert ("no such interface" in done.stderr) == (check == "true")
        assert (tmp_path / "b.parts").exists() == (check == "true")


def test_a_dry_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "capture",
        "--via",
        "host",
        "--dry-run",
        "-i",
        "lo",
        "-w",
        "b",
        "--filter",
        "icmp",
        "--",
        "ping",
        "a b",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "--immediate-mode" in out
    assert "-- icmp" in out
    assert shlex.join(["ping", "a b"]) in out.splitlines()
    assert out.splitlines()[-1] == "nattrace bundle b.parts -w b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # any program will do: it is not started
        (["-i", "nosuch0", "--tcpdump", sys.executable], "nosuch0: no such interface; there are"),
        (
            ["-i", "any", "--tcpdump", sys.executable],
            "any: one capture of all interfaces cannot be told apart",
        ),
        (["-i", "lo", "--duration", "nan"], "'nan' is no number of seconds"),
        (["-i", "lo", "--duration", "-3"], "'-3' is no number of seconds"),
        (["-i", "lo", "--snaplen", "7"], "'7' is no number from 42"),
        (["-i", "lo", "--count", "0"], "'0' is no number from 1"),
        (["-i", "lo", "--files", "2"], "--files needs --rotate-size"),
        (
            ["-i", "lo", "--tcpdump", "/nonexistent/tcpdump"],
            "/nonexistent/tcpdump: no program that can be run",
        ),
        (["-i", "lo", "--filter", "a\0b"], "a NUL character"),
    ],
)
def test_what_cannot_be_captured_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capture", "--via", "host", *words, "-w", str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()
