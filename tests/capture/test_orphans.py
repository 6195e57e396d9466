"""A helper whose nattrace was killed ends by itself, and what it wrote stays within the capture's limits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from capture.evidence import wait_for
from nattrace.capture.helper.watchdog import SIZE_REACHED

if TYPE_CHECKING:
    from pathlib import Path

    from capture.engine import Engine

#: nattrace, whose helpers outlast their capture's duration by a second instead of two minutes.
HASTY = """
import sys
from nattrace.capture.helper import container as helper_container
from nattrace.cli import main
helper_container.SPARE_S = 1
sys.exit(main(sys.argv[1:]))
"""
LABEL = "label=org.nattrace.capture.owner"


def captures(engine: Engine) -> list[Path]:
    """The files in the helpers' volume."""
    return [path for path in (engine.folder / "data/volumes").glob("*/_data/*/*") if path.is_file()]


def log(engine: Engine, helper: str) -> str:
    """What a helper said on stderr."""
    command = ["docker", "logs", helper]
    return subprocess.run(command, env=engine.environment, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(
    ("words", "reason", "most_bytes"),
    [
        # Some 6 MB come in a second: far more than these limits before the hour is over.
        # One file has the kernel's own limit; the other point's empty file has a header.
        (["--max-size", "3"], SIZE_REACHED, 3_000_000 + 24),
        # Several files are looked at once a second, later on a busy machine.
        (["--max-size", "9", "--rotate-size", "1"], SIZE_REACHED, 9_000_000 + 18_000_000),
        (["--max-size", "9", "--rotate-time", "1"], SIZE_REACHED, 9_000_000 + 18_000_000),
        (["--duration", "5"], "the capture has reached its longest time", 60_000_000),
    ],
)
def test_it_ends_at_its_limit(
    engine: Engine, tmp_path: Path, words: list[str], reason: str, most_bytes: int
) -> None:
    host, mark = engine.host, tmp_path / "listening"
    flood = host.command("ping", "-q", "-i", "0.02", "-s", "60000", "-w", "40", "127.0.0.1")
    command = host.command(sys.executable, "-c", HASTY, "capture", "-i", "lo", "-i", "eth0", "--no-context")
    command += [*words, "-w", f"{tmp_path}/b", "--", "sh", "-c", f"touch {mark}; exec sleep 4"]
    with subprocess.Popen(command, env=engine.environment, stderr=subprocess.DEVNULL) as process:
        wait_for(mark.exists)
        process.kill()
    with subprocess.Popen(flood, stdout=subprocess.DEVNULL) as ping:
        began = time.monotonic()
        wait_for(lambda: not engine.docker(f"ps -q --filter {LABEL}"), 30)
        ping.kill()
    assert time.monotonic() - began < 20
    ended = engine.docker(f"ps -aq --filter {LABEL}").split()
    facts = json.loads(engine.docker(f"inspect {' '.join(ended)}"))
    codes = [each["State"]["ExitCode"] for each in facts]
    assert len(codes) == 2
    assert set(codes) <= {0, 128 + signal.SIGXFSZ}
    said = [log(engine, helper) for helper in ended]
    assert reason in "".join(said)
    for text, code in zip(said, codes, strict=True):
        assert code or " captured\n" in text, text
    size_bytes = sum(path.stat().st_size for path in captures(engine))
    assert 300_000 < size_bytes <= most_bytes
    done = engine.nattrace("capture", "-i", "eth0", "--no-context", "-w", f"{tmp_path}/next", "--", "true")
    assert "removed 2 helper containers of a capture that was killed" in done.stderr
    assert not captures(engine)
