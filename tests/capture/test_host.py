"""Real captures with the machine's own tcpdump, on the lab's router: against the kernel's conntrack and counters."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab import topology

import nattrace
from nattrace.bundle.manifest import parse_manifest
from nattrace.report.json import report_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab.topology import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    reason = topology.missing()
    if reason is not None:
        pytest.skip(reason)
    with topology.lab(2) as made:
        made.router.run("iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE")
        yield made


def command(lab: Lab, *words: str) -> list[str]:
    return lab.router.command(sys.executable, "-m", "nattrace", "capture", "--via", "host", *words)


def capture(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(lab, *words), capture_output=True, text=True, timeout=60, check=False)


def ping(lab: Lab, client: int, count: int) -> list[str]:
    return lab.clients[client].command("ping", "-q", "-c", str(count), "-i", "0.01", topology.SERVERS[0])


def manifest_of(folder: Path) -> Any:
    read = parse_manifest((folder / "manifest.json").read_bytes(), "m")
    assert read is not None
    return read


def tcpdumps(folder: Path) -> set[int]:
    """The tcpdump processes that write below `folder`: other runs have theirs."""
    found = set()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes().split(b"\0")
            if words[0].endswith(b"tcpdump") and any(word.startswith(bytes(folder)) for word in words):
                found.add(int(line.parent.name))
    return found


def ready(folder: Path) -> tuple[list[str], Callable[[], bool]]:
    """A workload that says that it runs, so that every tcpdump listens, and lasts."""
    mark = folder / "ready"
    return ["--", "sh", "-c", f"touch {mark}; exec sleep 20"], mark.exists


def test_a_burst_is_captured_whole_and_the_report_agrees_with_conntrack(lab: Lab, tmp_path: Path) -> None:
    both = " & ".join(" ".join(ping(lab, client, 50)) for client in (0, 1))
    lab.router.run("conntrack -F")
    done = capture(
        lab,
        "-i",
        "docker0",
        "-i",
        "eth0",
        "-w",
        f"{tmp_path}/b",
        "--analyze",
        "--filter",
        "icmp",
        "--",
        "sh",
        "-c",
        f"{both}; wait",
    )
    assert done.returncode == 0, done.stderr
    assert "400 packets" in done.stdout.splitlines()[0]
    manifest = manifest_of(tmp_path / "b")
    # 2 x 50 echo requests and as many replies: what the pings themselves counted
    assert [(p.name, p.counters.captured, p.counters.dropped_by_kernel) for p in manifest.points] == [
        ("docker0", 200, 0),
        ("eth0", 200, 0),
    ]
    assert [p.ifindex for p in manifest.points] == [
        int(lab.router.run(f"cat /sys/class/net/{i}/ifindex")) for i in ("docker0", "eth0")
    ]
    assert (manifest.stopped_by, manifest.workload.exit_code) == ("workload", 0)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "context",
        "docker0.pcap",
        "eth0.pcap",
        "manifest.json",
    ]
    report = report_dict(nattrace.analyze(str(tmp_path / "b")))
    found = {
        (t["original"]["src"], t["original"]["id"], t["reply"]["dst"], t["reply"]["id"])
        for f in report["flows"]
        for t in f["translations"]
    }
    listed = lab.router.run("conntrack -L -p icmp").splitlines()
    words = [dict(w.split("=") for w in reversed(line.split()) if "=" in w) for line in listed]
    replies = [dict(w.split("=") for w in line.split() if "=" in w) for line in listed]
    assert found == {
        (o["src"], int(o["id"]), r["dst"], int(r["id"])) for o, r in zip(words, replies, strict=True)
    }
    assert report["accounting"]["matched"] == 400


def test_a_point_whose_interface_offloads_has_a_slot_for_each_64_kib_of_its_buffer(
    lab: Lab, tmp_path: Path
) -> None:
    sockets = ["-B", "32768", "--no-context", "--", "ss", "-0", "-a", "-e"]
    done = capture(lab, "-i", "docker0", "-w", f"{tmp_path}/b", *sockets)
    assert done.returncode == 0, done.stderr
    ((size, number),) = re.findall(r"ring_rx\(blk_size:(\d+),blk_nr:(\d+)", done.stderr)
    assert int(size) == 65_536  # the next larger one would hold no more
    assert int(number) * 64 >= 32_768


def test_ctrl_c_ends_it_and_the_bundle_is_whole(lab: Lab, tmp_path: Path) -> None:
    workload, listening = ready(tmp_path)
    words = ["-i", "docker0", "-i", "eth0", "-w", f"{tmp_path}/b", "--filter", "icmp", *workload]
    with subprocess.Popen(command(lab, *words), stderr=subprocess.PIPE, text=True) as process:
        wait_for(listening)
        subprocess.run(ping(lab, 0, 5), check=True, capture_output=True, timeout=30)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(30) == 0
    last = said.splitlines()[-1]
    assert last.startswith(f"nattrace: bundle {tmp_path}/b: packets docker0 10, eth0 10; ended by signal")
    assert not tcpdumps(tmp_path)


def test_a_killed_capture_leaves_no_tcpdump(lab: Lab, tmp_path: Path) -> None:
    workload, listening = ready(tmp_path)
    words = ["-i", "docker0", "-w", f"{tmp_path}/b", *workload]
    with subprocess.Popen(command(lab, *words), stderr=subprocess.DEVNULL) as process:
        wait_for(listening)
        assert tcpdumps(tmp_path)
        process.kill()
    wait_for(lambda: not tcpdumps(tmp_path))


def test_a_killed_tcpdump_is_a_finding(lab: Lab, tmp_path: Path) -> None:
    workload, listening = ready(tmp_path)
    words = ["-i", "docker0", "-w", f"{tmp_path}/b", "--filter", "icmp", *workload]
    with subprocess.Popen(command(lab, *words), stderr=subprocess.PIPE, text=True) as process:
        wait_for(listening)
        subprocess.run(ping(lab, 0, 2), check=True, capture_output=True, timeout=30)
        wait_for(lambda: (tmp_path / "b/docker0.pcap").stat().st_size == 24 + 4 * (16 + 98))
        (mine,) = tcpdumps(tmp_path)
        os.kill(mine, signal.SIGKILL)
        assert process.wait(30) == 0  # no tcpdump is left: nothing to wait for
    report = nattrace.analyze(str(tmp_path / "b"))
    assert report.points[0].packets == 4
    (finding,) = [f for f in report.findings if f.code == "incomplete-bundle"]
    assert "docker0: tcpdump was killed by signal 9 before the capture was stopped" in finding.message


def test_rotated_files_are_one_point(lab: Lab, tmp_path: Path) -> None:
    big = lab.clients[0].command("ping", "-q", "-c", "40", "-i", "0.002", "-s", "60000", topology.SERVERS[0])
    done = capture(lab, "-i", "docker0", "-w", f"{tmp_path}/b", "--rotate-size", "1", "--", *big)
    assert done.returncode == 0, done.stderr
    (point,) = manifest_of(tmp_path / "b").points
    assert len(point.files) >= 4
    assert nattrace.analyze(str(tmp_path / "b")).points[0].packets == point.counters.captured


def test_what_cannot_start_is_one_line_and_leaves_no_tcpdump(lab: Lab, tmp_path: Path) -> None:
    for words, message in [
        (
            ["-i", "docker0", "--filter", "no such filter"],
            "docker0: tcpdump does not start: can't parse filter",
        ),
        (["-i", "docker0", "--", "/nonexistent"], "/nonexistent: cannot be run"),
    ]:
        done = capture(lab, "-w", f"{tmp_path}/{len(words)}", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not tcpdumps(tmp_path)


def test_the_commands_of_a_dry_run_give_a_bundle(lab: Lab, tmp_path: Path) -> None:
    words = ["-i", "docker0", "-i", "eth0", "-w", f"{tmp_path}/b", "--dry-run", "--", *ping(lab, 0, 3)]
    text = capture(lab, *words).stdout
    text = text.replace("nattrace bundle", f"{sys.executable} -m nattrace bundle")
    subprocess.run(lab.router.command("sh", "-c", text), check=True, capture_output=True, timeout=60)
    points = manifest_of(tmp_path / "b").points
    assert [(p.name, p.interface) for p in points] == [("docker0", "docker0"), ("eth0", "eth0")]
    assert all(p.counters.captured >= 6 for p in points)


def wait_for(holds: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
