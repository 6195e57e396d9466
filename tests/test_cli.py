"""The command line as its users meet it: arguments, streams, exit codes. The engine is tried elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

import nattrace
from nattrace.cli import main
from nattrace.errors import InputError
from nattrace.model import Accounting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "nattrace" / "samples"
DOCKER0, ETH0 = str(SAMPLES / "docker0.pcap"), str(SAMPLES / "eth0.pcap")


class StubRows:
    """No rewrites, and none with --all either."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def all(self) -> StubRows:
        return self


class StubReport:
    """What `nattrace.analyze` returns, with nothing in it."""

    version = "0"
    points: tuple[Any, ...] = ()
    flows: tuple[Any, ...] = ()
    findings: tuple[Any, ...] = ()
    accounting = Accounting(0, 0, {}, {})
    rewrites = StubRows()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Put an engine in place that records how it was called."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def analyze(*sources: Any, **options: Any) -> StubReport:
        calls.append((sources, options))
        return StubReport()

    monkeypatch.setattr(nattrace, "analyze", analyze, raising=False)
    return calls


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def analyze(*_sources: Any, **_options: Any) -> StubReport:
        raise error

    monkeypatch.setattr(nattrace, "analyze", analyze, raising=False)


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    usual = {"capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([sys.executable, "-m", "nattrace", *arguments], check=False, **(usual | options))


# --- arguments -------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nattrace {nattrace.__version__}\n"


@pytest.mark.parametrize(
    ("of", "name"), [([], "report-1"), (["report"], "report-1"), (["rewrites"], "rewrite-1")]
)
def test_schema_prints_the_file_that_ships(
    capsys: pytest.CaptureFixture[str], of: Sequence[str], name: str
) -> None:
    assert main(["schema", *of]) == 0
    assert capsys.readouterr().out == (ROOT / f"nattrace/report/{name}.schema.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["bogus"], "analyze"),
        (["analyze"], "SOURCE"),
        (["analyze", "x", "-f", "xml"], "json"),
        (["analyze", "x", "-o", "report.xml"], ".txt (table), .json (json)"),
        (["rewrites", "x", "-o", "rows.json"], ".txt (table), .jsonl (jsonl), .csv (csv)"),
        (["rewrites", "x", "-f", "json"], "jsonl"),
        (["analyze", "x", "--limit", "-1"], "-1"),
        (["analyze", "x", "--limit", "9" * 5000], "999"),
        (["analyze", "x", "--dissector", "wireshark"], "tshark"),
        (["analyze", "x", "--form", "json"], "--form"),
        (["analyze", "-", "-"], "stdin"),
        (["demo", "extra"], "extra"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    stub: list[Any],
    arguments: list[str],
    message: str,
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nattrace: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not stub


def test_sources_and_options_reach_the_library(
    capsys: pytest.CaptureFixture[str], stub: list[tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    assert main(["analyze", "in=a.pcap", "-", "--dissector", "tshark"]) == 0
    assert main(["rewrites", "b.pcap", "--all", "-f", "csv"]) == 0
    assert stub == [
        (("in=a.pcap", "-"), {"dissector": "tshark", "rows": False, "progress": None}),
        (("b.pcap",), {"dissector": "native", "rows": True, "progress": None}),
    ]
    captured = capsys.readouterr()
    assert captured.out.startswith("no flow was found\nflow,direction,nat,")
    assert captured.err == ""


# --- output ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stub")
def test_the_suffix_of_the_output_picks_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "x", "-o", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == "nattrace/report/1"
    assert main(["analyze", "x", "-o", str(tmp_path / "report.txt")]) == 0
    assert (tmp_path / "report.txt").read_text() == "no flow was found\n"
    assert main(["analyze", "x", "-f", "json", "-o", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other").read_bytes() == (tmp_path / "report.json").read_bytes()
    assert main(["rewrites", "x", "-o", str(tmp_path / "rows.csv")]) == 0
    assert (tmp_path / "rows.csv").read_text().startswith("flow,")
    assert capsys.readouterr() == ("", "")
    assert main(["analyze", "x", "-f", "json", "-o", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "report.json").read_text()


def test_a_failure_leaves_no_output_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    for error in (InputError("x: no capture"), KeyboardInterrupt()):
        fail_with(monkeypatch, error)
        assert main(["analyze", "x", "-o", str(target)]) != 0
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_rows_are_written_leaves_no_output_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: list[Any]
) -> None:
    class Interrupted(StubRows):
        def __iter__(self) -> Iterator[Any]:
            raise KeyboardInterrupt

    monkeypatch.setattr(StubReport, "rewrites", Interrupted())
    assert main(["rewrites", "x", "-o", str(tmp_path / "rows.jsonl")]) == 130
    assert stub
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("prefix", ["", "inside="])
def test_a_source_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prefix: str
) -> None:
    capture = tmp_path / "capture.txt"
    capture.write_text(
        "12:00:00.000000 IP 192.0.2.1 > 192.0.2.2: ICMP echo request, id 1, seq 0, length 64\n"
    )
    before = capture.read_bytes()
    assert main(["analyze", f"{prefix}{capture}", "-o", str(capture)]) == 2
    assert "is a source" in capsys.readouterr().err
    assert capture.read_bytes() == before


@pytest.mark.usefixtures("stub")
def test_an_output_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "missing" / "report.json"
    assert main(["analyze", "x", "-o", str(target)]) == 2
    assert capsys.readouterr().err == f"nattrace: {target}: No such file or directory\n"


@pytest.mark.usefixtures("stub")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "x", "-f", "json", "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err == "nattrace: /dev/full: No space left on device\n"
    with Path("/dev/full").open("w") as full:
        finished = command("schema", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert finished.returncode == 2
    assert finished.stderr == "nattrace: input or output failed: No space left on device\n"


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x.pcap: byte 24: no such record"), 2, "nattrace: x.pcap: byte 24: no such record\n"),
        (InputError("\x1b[2Jx\n\u202e: no"), 2, "nattrace: \\x1b[2Jx\\x0a\\u202e: no\n"),
        (KeyboardInterrupt(), 130, "nattrace: interrupted\n"),
        (PermissionError(13, "Permission denied", "x.pcap"), 2, "nattrace: x.pcap: Permission denied\n"),
        (OSError(5, "Input/output error"), 2, "nattrace: input or output failed: Input/output error\n"),
        (
            MemoryError(),
            2,
            "nattrace: not enough memory for this input: try a part of it (editcap -c, tcpdump -C)\n",
        ),
    ],
)
def test_a_failure_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    fail_with(monkeypatch, error)
    # An I/O error makes the command give up its stdout; here that is pytest's.
    monkeypatch.setattr("nattrace.cli._abandon_stdout", lambda: None)
    assert main(["analyze", "x"]) == code
    assert capsys.readouterr() == ("", message)


def test_the_unexpected_is_one_line_with_a_way_to_report_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, IndexError("row\n9"))
    monkeypatch.delenv("NATTRACE_DEBUG", raising=False)
    assert main(["analyze", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        r"nattrace: internal error, please report it with the input: IndexError: row\x0a9 at test_cli.py:"
    )
    assert error.endswith("(NATTRACE_DEBUG=1 shows the traceback)\n")
    assert error.count("\n") == 1
    monkeypatch.setenv("NATTRACE_DEBUG", "1")
    assert main(["analyze", "x"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = command("schema", stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    finally:
        os.close(writing)
    assert (finished.returncode, finished.stderr) == (141, "")


def test_a_closed_stdout_is_said() -> None:
    line = f'"{sys.executable}" -m nattrace schema >&-'
    finished = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr == "nattrace: stdout is closed: there is nowhere to write to\n"


# --- what is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import nattrace", {"docker", "pyroute2", "pyshark", "tabulate", "tqdm", "dpkt"}),
        (
            "from nattrace.cli import main; main(['--version'])",
            {"numpy", "docker", "tabulate", "tqdm", "jsonschema"},
        ),
        (
            "from nattrace.cli import main; main(['schema'])",
            {"numpy", "docker", "tabulate", "tqdm", "jsonschema"},
        ),
        (
            f"from nattrace.cli import main; main(['analyze', '-f', 'json', {DOCKER0!r}, {ETH0!r}])",
            {"docker", "pyroute2", "pyshark", "tabulate", "tqdm", "jsonschema", "asyncio"},
        ),
    ],
)
def test_a_command_loads_what_it_needs(code: str, unwanted: set[str]) -> None:
    program = f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not unwanted & set(finished.stderr.split())


# --- the captures that ship ------------------------------------------------------------------------------


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments]) == 0
    return json.loads(capsys.readouterr().out)


def conntrack_tuples() -> set[tuple[str, str, int, str, str, int]]:
    """Return what the kernel printed while the samples were recorded."""
    path = ROOT.parent / "shared" / "captures" / "docker-ping" / "conntrack.txt"
    if not path.exists():
        pytest.skip("needs the shared captures beside the checkout")
    found = set()
    for line in path.read_text().splitlines():
        words = [word.split("=", 1) for word in line.split() if "=" in word]
        src, dst, icmp_id = ([value for key, value in words if key == name] for name in ("src", "dst", "id"))
        found.add((src[0], dst[0], int(icmp_id[0]), src[1], dst[1], int(icmp_id[1])))
    return found


def test_demo_prints_the_kernels_translations(capsys: pytest.CaptureFixture[str]) -> None:
    expected = conntrack_tuples()
    report = run_json(capsys, "demo", "-f", "json")
    translations = [translation for flow in report["flows"] for translation in flow["translations"]]
    assert len(translations) == len(expected) == 4
    found = set()
    for translation in translations:
        original, reply = translation["original"], translation["reply"]
        found.add((original["src"], original["dst"], original["id"], reply["src"], reply["dst"], reply["id"]))
    assert found == expected


def test_demo_table_shows_the_rewritten_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()[:2]
    assert first.startswith(
        "docker0 -> eth0   2 points, 80 packets, 4.4 s together: 40 crossings matched, 0 lost, 0 ambiguous"
    )
    assert second == "4 flows, all translated (snat to 203.0.113.10)"
    assert captured.out.count("203.0.113.10 id 50024") == 1
    assert DOCKER0 in captured.err


def test_the_real_report_obeys_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "nattrace/report/report-1.schema.json").read_text())
    for sources in ([DOCKER0, ETH0], [DOCKER0]):
        report = run_json(capsys, "analyze", *sources, "-f", "json")
        jsonschema.Draft202012Validator(schema).validate(report)
        accounting = report["accounting"]
        assert accounting["packets"] == 40 * len(sources)
        assert accounting["packets"] == accounting["matched"] + sum(accounting["unmatched"].values()) + sum(
            accounting["skipped"].values()
        )


def test_every_rewrite_row_is_a_pair_of_real_packets(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "nattrace/report/rewrite-1.schema.json").read_text())
    assert main(["rewrites", DOCKER0, ETH0, "-f", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 40
    for row in rows:
        jsonschema.Draft202012Validator(schema).validate(row)
        # In these captures the kernel forwarded one packet at a time and kept the IP id.
        assert row["before"]["ip_id"] == row["after"]["ip_id"]
        assert row["before"]["seq"] == row["after"]["seq"]
        assert row["before"]["frame"] == row["after"]["frame"]
    assert main(["rewrites", DOCKER0, ETH0, "--all", "-f", "jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40


def test_the_same_input_gives_the_same_bytes() -> None:
    outputs = set()
    for number, sources in enumerate(([DOCKER0, ETH0], [ETH0, DOCKER0])):
        environment = os.environ | {
            "PYTHONHASHSEED": str(number),
            "TZ": ("Asia/Kathmandu", "America/St_Johns")[number],
            "LC_ALL": ("C", "C.UTF-8")[number],
            "PYTHONIOENCODING": ("ascii", "utf-16")[number],
            "COLUMNS": ("20", "300")[number],
        }
        for form in ("json", "table"):
            finished = command("analyze", *sources, "-f", form, env=environment, text=False)
            assert finished.returncode == 0
            outputs.add(finished.stdout)
    assert len(outputs) == 2  # one JSON, one table


def unread(pipe: IO[bytes]) -> int:
    """Return the bytes that wait in a pipe, FIONREAD of ioctl_pipe(2)."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def state(pid: int) -> str:
    """Return the state letter of a process, proc_pid_stat(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: /proc")
def test_ctrl_c_while_reading_leaves_nothing(tmp_path: Path) -> None:
    capture = Path(DOCKER0).read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-m", "nattrace", "analyze", "-", "-o", str(tmp_path / "report.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(capture)
            process.stdin.flush()
        # Interrupt it where a person would: it has read all there is and sleeps until more comes.
        while unread(process.stdin) or state(process.pid) != "S":
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b"nattrace: interrupted\n"
    assert not list(tmp_path.iterdir())
