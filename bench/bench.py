"""The benchmark: whole commands on generated captures, next to the tools that read the same files.

Runs everything in turns, so that a busy machine treats all alike, and prints medians and ratios. It never
passes or fails: it prints figures. See README.md beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
# Python put this script's folder first; `bench` is the package that holds it.
sys.path[0] = str(ROOT)

from bench.processes import Cost, RunFailedError, median, peak_of_family, run  # noqa: E402

#: More packets than this of each file are not given to tools that need tens of microseconds for each.
SLICE_PACKETS: Final = 1_000_000

#: Packets of each capture of the pair that is compared with the truth: rows become Python objects there.
TRUTH_PACKETS: Final = 200_000

#: How many times as many packets the growth is measured on.
GROWTH: Final = 10
IDENTICAL_GROWTH: Final = 4

#: Rounds on the large pairs at most: each takes as long as ten others.
LARGE_ROUNDS: Final = 3

#: Packets of an average flow, as in bench.traffic, which loads numpy and so stays out of this process.
PACKETS_PER_FLOW: Final = 20

#: Changed whenever the generator makes other files, so that old ones are not taken for new.
_GENERATION: Final = 1

_FIELDS: Final = (
    "ip.src",
    "ip.dst",
    "ip.id",
    "icmp.ident",
    "icmp.seq",
    "tcp.srcport",
    "tcp.dstport",
    "tcp.seq",
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to read a pair: its commands, and how the cost of a part is scaled to the whole."""

    name: str
    commands: list[list[str]]
    slow: bool = False  #: run once, not every round
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Name, and what is not as in the others."""
        remarks = ["one run"] * self.slow + [f"a part, times {self.scale:g}"] * (self.scale != 1)
        return f"{self.name} ({', '.join(remarks)})" if remarks else self.name


def main() -> None:
    """Run the benchmark."""
    chosen = _arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a run takes minutes, also into a pipe
    try:
        _measure(chosen)
    except RunFailedError as error:
        raise SystemExit(f"bench: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _measure(chosen: argparse.Namespace) -> None:
    data: Path = chosen.data
    count: int = chosen.packets
    print(f"nattrace benchmark: 2 x {count:,} packets, snaplen 96, {chosen.rounds} rounds in turns")
    print(f"captures in {data}; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the start")

    pair = _pair(data, count)
    costs = _in_turns(_contenders(pair, count, peers=not chosen.only_nattrace), chosen.rounds)
    _print_costs(costs)
    nattrace = _nattrace(pair)
    together = peak_of_family(nattrace.commands[0], ROOT)
    print(f"\nmemory of nattrace, all its processes together (PSS): {_megabytes(together)} MB")

    _growth("all identical", _pair(data, count, identical=True),
            _pair(data, count * IDENTICAL_GROWTH, identical=True), IDENTICAL_GROWTH, chosen.rounds)  # fmt: skip
    if chosen.large:
        few = min(chosen.rounds, LARGE_ROUNDS)
        longer = _pair(data, count * GROWTH, flows=max(1, count // PACKETS_PER_FLOW))
        _growth("same flows", pair, longer, GROWTH, few)
        _growth(f"{GROWTH} times the flows", pair, _pair(data, count * GROWTH), GROWTH, few)
    _print_accuracy(_pair(data, min(count, TRUTH_PACKETS)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure nattrace next to the tools that read the same files."
    )
    parser.add_argument(
        "--packets", type=int, default=1_000_000, metavar="N", help="of each capture (1000000)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="runs of each command (5)")
    parser.add_argument("--large", action="store_true", help=f"measure growth to {GROWTH} N packets too")
    parser.add_argument("--only-nattrace", action="store_true", help="leave the other tools out")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="where the captures are made and kept (a temporary folder)",
        default=Path(tempfile.gettempdir()) / f"nattrace-bench-{os.getuid()}",
    )  # fmt: skip
    chosen = parser.parse_args()
    if chosen.packets < 1 or chosen.rounds < 1:
        parser.error("--packets and --rounds are at least 1")
    chosen.data = chosen.data.resolve()
    return chosen


def _pair(data: Path, count: int, *, identical: bool = False, flows: int | None = None) -> Path:
    """Return the folder of a generated pair, which is made when it is not there yet."""
    options = ["--identical"] * identical + (["--flows", str(flows)] if flows else [])
    kind = "identical" if identical else "mixed" if flows is None else f"mixed-{flows}-flows"
    folder = data / f"{kind}-{count}-v{_GENERATION}"
    if not (folder / "truth.npz").exists():
        print(f"making {folder.name} ...", flush=True)
        command = [sys.executable, "-m", "bench.generate", str(count), str(folder), *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"bench: could not make {folder}")
    return folder


def _files(pair: Path) -> list[str]:
    return [str(pair / "inside.pcap"), str(pair / "outside.pcap")]


def _nattrace(pair: Path) -> Contender:
    command = [sys.executable, "-m", "nattrace", "analyze", *_files(pair), "-f", "json", "-o", os.devnull]
    return Contender("nattrace analyze -f json", [command])


def _contenders(pair: Path, count: int, *, peers: bool) -> list[Contender]:
    """Return what is compared, nattrace first; a tool that is not installed is said and left out."""
    found = [_nattrace(pair)]
    if not peers:
        return found
    files = _files(pair)
    part = ["-c", str(SLICE_PACKETS)] if count > SLICE_PACKETS else []
    scale = max(1.0, count / SLICE_PACKETS)
    fields = [argument for field in _FIELDS for argument in ("-e", field)]
    peers_of = [
        Contender("capinfos -c", [["capinfos", "-c", *files]]),
        Contender("tcpdump -w /dev/null", [["tcpdump", "-r", file, "-w", os.devnull] for file in files]),
        Contender(
            "dpkt, parse only",
            [[sys.executable, "-m", "bench.dpkt_loop", *part, *files]],
            slow=True,
            scale=scale,
        ),
        Contender(
            "tshark -T fields",
            [["tshark", "-r", file, *part, "-T", "fields", *fields] for file in files],
            slow=True,
            scale=scale,
        ),
    ]
    for peer in peers_of:
        if shutil.which(peer.commands[0][0]) is None:
            print(f"{peer.name}: left out, {peer.commands[0][0]} is not installed")
        else:
            found.append(peer)
    return found


def _in_turns(contenders: list[Contender], rounds: int) -> dict[str, list[Cost]]:
    """Run every contender once a round, and slow ones once in all; return the costs of each.

    A first run that is not counted fills the page cache and compiles Python files.
    """
    for contender in contenders:
        if not contender.slow:
            run(contender.commands, ROOT)
    costs: dict[str, list[Cost]] = {contender.label: [] for contender in contenders}
    for turn in range(rounds):
        for contender in contenders:
            # In the middle, so that the other figures come from before and after it.
            if not contender.slow or turn == rounds // 2:
                cost = run(contender.commands, ROOT)
                costs[contender.label].append(
                    Cost(cost.wall_s * contender.scale, cost.cpu_s * contender.scale, cost.peak_bytes)
                )
    return costs


def _print_costs(costs: dict[str, list[Cost]]) -> None:
    """Print medians, and the time of each contender against that of nattrace, the first."""
    ours, *_ = costs.values()
    wall_s, cpu_s = _wall(ours), _cpu(ours)
    print(
        f"\n{'both files, whole process':<36}{'wall s':>9}{'min':>9}{'cpu s':>9}{'peak MB':>9}  nattrace takes"
    )
    for name, runs in costs.items():
        ratio = "" if runs is ours else f"{_times(wall_s / _wall(runs))} (cpu {_times(cpu_s / _cpu(runs))})"
        print(
            f"{name:<36}{_wall(runs):>9.3f}{min(cost.wall_s for cost in runs):>9.3f}{_cpu(runs):>9.3f}"
            f"{_megabytes(max(cost.peak_bytes for cost in runs)):>9}  {ratio}"
        )
    print(
        f"peak MB: largest single process, {_megabytes(run([[sys.executable, '-c', 'pass']], ROOT).peak_bytes)} at the least"
    )


def _growth(name: str, small: Path, large: Path, factor: int, rounds: int) -> None:
    """Print how the cost grows with the packets."""
    one, many = _nattrace(small), _nattrace(large)
    costs = _in_turns([Contender("one", one.commands), Contender("many", many.commands)], rounds)
    few, more = costs["one"], costs["many"]
    print(
        f"\n{factor} times the packets, {name}: {_wall(few):.3f} s to {_wall(more):.3f} s, "
        f"{_wall(more) / _wall(few):.2f} times the time (cpu {_cpu(more) / _cpu(few):.2f} times), "
        f"{_megabytes(max(c.peak_bytes for c in few))} MB to {_megabytes(max(c.peak_bytes for c in more))} MB"
    )


def _print_accuracy(pair: Path) -> None:
    """Print how the rows and bindings of a pair compare with what the generator did."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.accuracy", str(pair)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"bench: accuracy of {pair.name} failed:\n{done.stderr}")
    n: dict[str, int] = json.loads(done.stdout)
    said = n["pairs_right"] + n["pairs_wrong"]
    print(
        f"\naccuracy on {n['packets']:,} packets: {n['pairs_right']:,} of {n['pairs']:,} crossings right "
        f"(recall {n['pairs_right'] / n['pairs']:.6f}), {n['pairs_wrong']:,} wrong "
        f"(precision {n['pairs_right'] / max(1, said):.6f}; {n['pairs_wrong_same_flow']:,} of them within one flow), "
        f"{n['ambiguous']:,} packets called ambiguous\n"
        f"bindings: {n['bindings_found']:,} of {n['bindings']:,} found, {n['bindings_invented']:,} invented"
    )


def _wall(runs: list[Cost]) -> float:
    return median([cost.wall_s for cost in runs])


def _cpu(runs: list[Cost]) -> float:
    return median([cost.cpu_s for cost in runs])


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times" if ratio >= 1 else f"1/{1 / ratio:.1f}"


def _megabytes(size_bytes: int) -> int:
    return round(size_bytes / 1e6)


if __name__ == "__main__":
    main()
