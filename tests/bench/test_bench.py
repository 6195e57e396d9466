"""The benchmark makes true captures, keeps a true account of them, and its command runs to the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpkt
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
PACKETS = 2000
PUBLIC = bytes([203, 0, 113, 7])
PROTOCOLS = {1: dpkt.icmp.ICMP, 6: dpkt.tcp.TCP, 17: dpkt.udp.UDP}


def _python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, **options)


def _generate(folder: Path, *options: str, count: int = PACKETS) -> Path:
    done = _python("-m", "bench.generate", str(count), folder, *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures with whole packets, so that other tools can check every byte."""
    return _generate(tmp_path_factory.mktemp("pair"), "--snaplen", "65535")


@pytest.fixture(scope="module")
def truth(pair: Path) -> dict[str, Any]:
    with np.load(pair / "truth.npz") as archive:
        return {name: archive[name].tolist() for name in archive.files}


def _frames(path: Path) -> list[bytes]:
    with path.open("rb") as stream:
        return [frame for _, frame in dpkt.pcap.Reader(stream)]


def _fields(path: Path, *arguments: str) -> list[list[str]]:
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark")
    command = ["tshark", "-r", str(path), "-T", "fields", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


# --- the generator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_every_capture_has_the_packets_asked_for(pair: Path, side: str) -> None:
    if shutil.which("capinfos") is None:
        pytest.skip("needs capinfos")
    command = ["capinfos", "-c", "-M", str(pair / f"{side}.pcap")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"Number of packets:\s+(\d+)", done.stdout).group(1) == str(PACKETS)  # type: ignore[union-attr]


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_tshark_finds_every_checksum_right(pair: Path, side: str) -> None:
    checks = [f"{name}.check_checksum:TRUE" for name in ("ip", "tcp", "udp")]
    status = [f"{name}.checksum.status" for name in ("ip", "tcp", "udp", "icmp")]
    options = [word for check in checks for word in ("-o", check)]
    rows = _fields(pair / f"{side}.pcap", *options, *[word for name in status for word in ("-e", name)])
    good = "1"
    assert len(rows) == PACKETS
    assert {row[0] for row in rows} == {good}
    assert {"".join(row[1:]) for row in rows} == {good}  # one of TCP, UDP and ICMP, and that one right
    assert all(any(row[column] == good for row in rows) for column in (1, 2, 3))


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_time_never_runs_backwards(pair: Path, side: str) -> None:
    times = [float(row[0]) for row in _fields(pair / f"{side}.pcap", "-e", "frame.time_epoch")]
    assert times == sorted(times)
    assert len(set(times)) > PACKETS * 0.9


def test_a_true_pair_is_one_packet_before_and_after_the_nat(pair: Path, truth: dict[str, Any]) -> None:
    inside, outside = _frames(pair / "inside.pcap"), _frames(pair / "outside.pcap")
    for (i, o), flow in zip(truth["pairs"], truth["flow_of_pair"], strict=True):
        before, after = (
            dpkt.ethernet.Ethernet(inside[i - 1]).data,
            dpkt.ethernet.Ethernet(outside[o - 1]).data,
        )
        client = truth["client"][flow].to_bytes(4, "big")
        server = truth["server"][flow].to_bytes(4, "big")
        leaves = before.src == client
        assert (before.src, before.dst) == ((client, server) if leaves else (server, client))
        assert (after.src, after.dst) == ((PUBLIC, server) if leaves else (server, PUBLIC))
        assert before.p == after.p == truth["protocol"][flow]
        assert before.ttl - after.ttl == (1 if leaves else -1)
        assert (before.id, before.len) == (after.id, after.len)
        _same_but_for_the_port(before.data, after.data, truth, flow, leaves=leaves)


def _same_but_for_the_port(
    before: Any, after: Any, truth: dict[str, Any], flow: int, *, leaves: bool
) -> None:
    assert type(before) is type(after) is PROTOCOLS[truth["protocol"][flow]]
    ports = truth["client_port"][flow], truth["outside_port"][flow]
    if isinstance(before, dpkt.icmp.ICMP):
        assert (before.type, after.type) == ((8, 8) if leaves else (0, 0))
        assert (before.data.id, after.data.id) == ports
        assert (before.data.seq, before.data.data) == (after.data.seq, after.data.data)
        return
    near, far = ("sport", "dport") if leaves else ("dport", "sport")
    assert (getattr(before, near), getattr(after, near)) == ports
    assert getattr(before, far) == getattr(after, far) == truth["server_port"][flow]
    assert before.data == after.data
    if isinstance(before, dpkt.tcp.TCP):
        assert (before.seq, before.ack, before.flags, before.opts) == (
            after.seq,
            after.ack,
            after.flags,
            after.opts,
        )


def test_no_two_bindings_share_a_tuple_on_either_side(truth: dict[str, Any]) -> None:
    served = list(zip(truth["protocol"], truth["server"], truth["server_port"], strict=True))
    outside = list(zip(served, truth["outside_port"], strict=True))
    inside = list(zip(served, truth["client"], truth["client_port"], strict=True))
    assert len(served) > 50
    assert len(set(outside)) == len(set(inside)) == len(served)


def test_the_traffic_is_as_mixed_and_as_hard_as_it_says(tmp_path: Path) -> None:
    count = 20_000
    folder = _generate(tmp_path / "pair", count=count)
    with np.load(folder / "truth.npz") as archive:
        pairs, client, moved = archive["pairs"], archive["client_port"], archive["outside_port"]
    packets = [dpkt.ethernet.Ethernet(frame).data for frame in _frames(folder / "inside.pcap")]
    part = {p: sum(packet.p == p for packet in packets) / count for p in PROTOCOLS}
    assert part == pytest.approx({6: 0.7, 17: 0.2, 1: 0.1}, abs=0.05)
    assert pairs.shape[0] / count == pytest.approx(0.99, abs=0.01)  # one packet in a hundred is missing
    assert (client != moved).mean() == pytest.approx(0.36, abs=0.06)  # a third, and who had to give way
    assert 0.05 < sum(packet.id == 0 for packet in packets) / count < 0.4
    assert max(map(len, _frames(folder / "inside.pcap"))) == 96


def test_tcp_numbers_advance_as_a_connection_does(pair: Path) -> None:
    """Within one direction of a flow seq grows by what was sent, so tshark sees few gaps: the missing ones."""
    lost = ["-Y", "tcp.analysis.lost_segment or tcp.analysis.ack_lost_segment or tcp.analysis.retransmission"]
    flawed = _fields(pair / "inside.pcap", *lost, "-e", "frame.number")
    tcp = _fields(pair / "inside.pcap", "-Y", "tcp", "-e", "frame.number")
    assert len(flawed) < len(tcp) * 0.1


def test_the_same_seed_makes_the_same_bytes(tmp_path: Path) -> None:
    one, two = _generate(tmp_path / "1", count=300), _generate(tmp_path / "2", count=300)
    other = _generate(tmp_path / "3", "--seed", "2", count=300)
    for name in ("inside.pcap", "outside.pcap"):
        assert (one / name).read_bytes() == (two / name).read_bytes() != (other / name).read_bytes()


def test_identical_packets_are_identical(tmp_path: Path) -> None:
    folder = _generate(tmp_path / "pair", "--identical", count=500)
    inside, outside = _frames(folder / "inside.pcap"), _frames(folder / "outside.pcap")
    assert len(inside) == len(outside) == 500
    assert len(set(inside)) == len(set(outside)) == 1
    assert inside[0] != outside[0]


# --- the measurements ------------------------------------------------------------------------------------


def _accuracy(folder: Path) -> dict[str, int]:
    done = _python("-m", "bench.accuracy", folder)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def _with_truth(pair: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a pair, its truth changed."""
    shutil.copytree(pair, folder)
    with np.load(pair / "truth.npz") as archive:
        columns = {name: archive[name] for name in archive.files}
    change(columns)
    np.savez(folder / "truth.npz", **columns)
    return folder


def test_accuracy_counts_what_nattrace_got_right(pair: Path, truth: dict[str, Any]) -> None:
    counts = _accuracy(pair)
    assert counts["packets"] == 2 * PACKETS
    assert counts["pairs"] == len(truth["pairs"])
    assert counts["pairs_right"] > 0.98 * len(truth["pairs"])
    assert counts["pairs_wrong"] <= 2
    assert counts["bindings"] == len(truth["client"])
    assert counts["bindings_found"] > 0.98 * len(truth["client"])


def test_accuracy_notices_wrong_pairs(pair: Path, tmp_path: Path) -> None:
    def rotate(columns: dict[str, Any]) -> None:
        columns["pairs"][:100, 1] = np.roll(columns["pairs"][:100, 1], 1)

    before, after = _accuracy(pair), _accuracy(_with_truth(pair, tmp_path / "pair", rotate))
    lost = before["pairs_right"] - after["pairs_right"]
    assert 90 <= lost <= 100
    assert after["pairs_wrong"] - before["pairs_wrong"] == lost


def test_accuracy_notices_invented_and_missing_bindings(pair: Path, tmp_path: Path) -> None:
    def move(columns: dict[str, Any]) -> None:
        columns["outside_port"][:3] ^= 1

    before, after = _accuracy(pair), _accuracy(_with_truth(pair, tmp_path / "pair", move))
    assert before["bindings_found"] - after["bindings_found"] == 3
    assert after["bindings_invented"] - before["bindings_invented"] == 3


def test_the_dpkt_loop_reads_every_packet(pair: Path) -> None:
    files = pair / "inside.pcap", pair / "outside.pcap"
    assert _python("-m", "bench.dpkt_loop", *files).stdout.strip() == str(2 * PACKETS)
    assert _python("-m", "bench.dpkt_loop", "-c", "10", *files).stdout.strip() == "20"


def test_peak_memory_is_that_of_the_largest_process() -> None:
    script = """
import sys
from pathlib import Path
from bench.processes import run
big = [sys.executable, "-c", "held = b'x' * 150_000_000"]
small = [sys.executable, "-c", "pass"]
print(run([small], Path()).peak_bytes, run([small, big, small], Path()).peak_bytes)
"""
    done = _python("-c", script)
    small, big = map(int, done.stdout.split())
    assert small < 100e6
    assert 150e6 < big < 150e6 + 2 * small


def test_a_measured_command_that_fails_is_an_error() -> None:
    script = """
from pathlib import Path
from bench.processes import RunFailedError, run
for command in (["sh", "-c", "exit 3"], ["no-such-program"]):
    try:
        run([command], Path())
    except RunFailedError as error:
        print(error)
"""
    assert _python("-c", script).stdout.splitlines() == ["exit 3: sh -c exit 3", "exit 127: no-such-program"]


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_measures_everything_and_keeps_the_captures(tmp_path: Path) -> None:
    arguments = ["bench/bench.py", "--packets", "300", "--rounds", "1", "--large", "--data", str(tmp_path)]
    done = _python(*arguments)
    assert done.returncode == 0, done.stderr
    assert "nattrace analyze -f json" in done.stdout
    assert re.search(r"4 times the packets, all identical: [\d.]+ s to [\d.]+ s", done.stdout)
    assert re.search(r"10 times the packets, same flows: [\d.]+ s to [\d.]+ s", done.stdout)
    assert re.search(r"10 times the packets, 10 times the flows: [\d.]+ s to [\d.]+ s", done.stdout)
    assert re.search(r"accuracy on 600 packets: \d+ of \d+ crossings right", done.stdout)
    assert re.search(r"bindings: \d+ of \d+ found, \d+ invented", done.stdout)
    for tool in ("tshark", "tcpdump", "capinfos"):
        if shutil.which(tool):
            assert re.search(rf"^{tool} .*[\d.]+ +[\d.]+ +[\d.]+ +\d+ ", done.stdout, re.MULTILINE)
    made = sorted(folder.name for folder in tmp_path.iterdir())
    assert len(made) == 5  # mixed 300, 3000 and 3000 of the same flows; identical 300 and 1200
    assert "making" not in _python(*arguments, "--only-nattrace").stdout


def test_missing_tools_are_left_out_and_said(tmp_path: Path) -> None:
    arguments = ["bench/bench.py", "--packets", "100", "--rounds", "1", "--data", str(tmp_path)]
    (tmp_path / "bin").mkdir()
    done = _python(*arguments, env={**os.environ, "PATH": str(tmp_path / "bin")})
    assert done.returncode == 0, done.stderr
    for tool in ("tshark", "tcpdump", "capinfos"):
        assert re.search(rf"^{tool}.*: left out, {tool} is not installed$", done.stdout, re.MULTILINE)
    assert "bindings:" in done.stdout


@pytest.mark.parametrize("wrong", [["--packets", "0"], ["--rounds", "0"]])
def test_counts_below_one_are_refused(wrong: list[str]) -> None:
    done = _python("bench/bench.py", *wrong)
    assert done.returncode == 2
    assert "at least 1" in done.stderr
