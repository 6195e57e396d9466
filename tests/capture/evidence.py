"""What a capture is held against: its own manifest, the kernel's conntrack, and a capture that is made to last."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import nattrace
from nattrace.bundle.manifest import Manifest, parse_manifest
from nattrace.report.json import report_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from capture.engine import Engine


def run(engine: Engine, words: str) -> str:
    """Start a container that the test removes; return its id."""
    return engine.docker(f"run -d --label test {words}")


def manifest_of(folder: Path) -> Manifest:
    read = parse_manifest((folder / "manifest.json").read_bytes(), "m")
    assert read is not None
    return read


def captured(folder: Path) -> dict[str, int | None]:
    manifest = manifest_of(folder)
    assert [point.problem for point in manifest.points] == [None] * len(manifest.points)
    assert all(point.counters and point.counters.dropped_by_kernel == 0 for point in manifest.points)
    return {point.name: point.counters.captured if point.counters else None for point in manifest.points}


def report_of(folder: Path) -> Any:
    return report_dict(nattrace.analyze(str(folder)))


def translations(report: Any) -> set[tuple[Any, ...]]:
    """Both tuples of every translation, in conntrack's words."""
    return {
        tuple(
            tuple(t[way].get(key) for key in ("src", "dst", "sport", "dport", "id"))
            for way in ("original", "reply")
        )
        for flow in report["flows"]
        for t in flow["translations"]
    }


def conntrack(engine: Engine, protocol: str) -> set[tuple[Any, ...]]:
    """Both tuples of every entry that the kernel has translated."""
    family = "ipv6" if protocol == "icmpv6" else "ipv4"
    return translated_entries(engine.host.run(f"conntrack -L -f {family} -p {protocol}").splitlines())


def conntrack_events(folder: Path) -> set[tuple[Any, ...]]:
    """Both tuples of every translated entry that the kernel made while a bundle was captured."""
    text = (folder / manifest_of(folder).context["during/conntrack-events"]).read_text()
    return translated_entries(line for line in text.splitlines() if "[NEW]" in line)


def translated_entries(lines: Iterable[str]) -> set[tuple[Any, ...]]:
    """Both tuples of every entry that conntrack printed, if they are not each other's reverse."""
    entries = set()
    for line in lines:
        ways: list[dict[str, str]] = []
        for word in line.split():
            key, _, value = word.partition("=")
            if key == "src":
                ways.append({})
            # the entry's own number is called id as well, and stands behind TCP's and UDP's tuples
            if ways and (
                key in {"src", "dst", "sport", "dport", "type"} or (key == "id" and "type" in ways[-1])
            ):
                ways[-1].setdefault(key, value)
        entry = tuple(
            tuple(
                int(way[key]) if key not in {"src", "dst"} and key in way else way.get(key)
                for key in ("src", "dst", "sport", "dport", "id")
            )
            for way in ways[:2]
        )
        if entry[0][:2] != entry[1][:2][::-1]:
            entries.add(entry)
    return entries


def wait_for(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def capturing(
    engine: Engine, folder: Path, *words: str, url: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A capture into `folder`/b that listens inside the block and is ended like with ctrl-C after it."""
    environment = engine.environment | ({} if url is None else {"DOCKER_HOST": url})
    mark = folder / "ready"
    lasts = f"echo $$ > {mark}.new; mv {mark}.new {mark}; exec sleep 60"
    command = engine.command("capture", *words, "-w", f"{folder}/b", "--", "sh", "-c", lasts)
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, env=environment, stderr=said)
    try:
        wait_for(lambda: mark.exists() or process.poll() is not None)
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.returncode in {0, -signal.SIGKILL}, (folder / "said").read_text()
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(mark.read_text()), signal.SIGKILL)
