"""Damaged captures: whatever is cut or overwritten, the rest is read or one clear error is raised.

The whole sweep (every shared file at every tenth byte) takes minutes; set NATTRACE_ALL_CUTS=1 for it.
"""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from nattrace.errors import NattraceError
from nattrace.pipeline import analyze
from nattrace.report.json import write_json

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared captures")

#: Cut at every tenth byte up to this size, unless all cuts are asked for.
SMALL_BYTES = 1000 if "NATTRACE_ALL_CUTS" not in os.environ else 20_000
SAMPLE = 12 if "NATTRACE_ALL_CUTS" not in os.environ else None


def files() -> list[Path]:
    return sorted(path for path in SHARED.rglob("*") if path.is_file())


def outcome(content: bytes) -> str | None:
    """Analyse a source beside itself; return the error's message, or None. Anything else is a failure."""
    try:
        report = analyze(io.BytesIO(content), io.BytesIO(content))
    except NattraceError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return message
    accounting = report.accounting
    spoken_for = accounting.matched + sum(accounting.unmatched.values()) + sum(accounting.skipped.values())
    assert accounting.packets == spoken_for
    assert sum(point.packets for point in report.points) == accounting.packets
    assert not list(report.rewrites)  # a capture is no translation of itself
    write_json(report, io.StringIO())
    return None


def test_every_shared_file_is_read_or_refused_in_one_line() -> None:
    refused = [path.name for path in files() if outcome(path.read_bytes()) is not None]
    # Captures of unknown versions, and files that are no captures.
    assert len(refused) < 20


def test_small_files_cut_at_every_tenth_byte() -> None:
    small = [path for path in files() if path.stat().st_size <= SMALL_BYTES]
    assert len(small) > 100
    picked = random.Random(1)
    for path in small:
        content = path.read_bytes()
        cuts = list(range(0, len(content), 10))
        if SAMPLE is not None and len(cuts) > SAMPLE:
            cuts = picked.sample(cuts, SAMPLE)
        for cut in cuts:
            outcome(content[:cut])


def test_larger_files_cut_at_random() -> None:
    picked = random.Random(2)
    large = [path for path in files() if path.stat().st_size > SMALL_BYTES]
    for path in large if SAMPLE is None else picked.sample(large, min(200, len(large))):
        content = path.read_bytes()
        outcome(content[: picked.randrange(len(content))])


def test_files_with_overwritten_bytes() -> None:
    picked = random.Random(3)
    for path in picked.sample(files(), 300):
        content = bytearray(path.read_bytes()[:20_000])
        for _ in range(picked.randrange(1, 9)):
            at = picked.randrange(len(content))
            content[at] = picked.choice([0, 0xFF, 0x80, picked.randrange(256)])
        outcome(bytes(content))


def test_files_with_overwritten_headers() -> None:
    """The first 200 bytes hold every length that decides how the rest is walked."""
    picked = random.Random(4)
    for path in picked.sample(files(), 300):
        content = bytearray(path.read_bytes()[:5000])
        for _ in range(3):
            at = picked.randrange(min(200, len(content)))
            content[at : at + 4] = picked.choice([bytes(4), b"\xff" * 4, b"\x00\x00\x00\x10", b"\x0c\0\0\0"])
        outcome(bytes(content))
