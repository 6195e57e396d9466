"""Workers end in every case: read out, abandoned half-way, or killed from outside."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from nattrace.errors import NattraceError
from nattrace.ingest import ReadOptions, open_capture, parse_sources
from nattrace.match import prepare, workers
from nattrace.match.prepare import FIRST_LAYER, Preparation
from nattrace.match.workers import Worker
from nattrace.table import COLUMNS

CAPTURE = Path(__file__).parents[1] / "fixtures" / "lab" / "ipv6_masquerade" / "docker0.pcap"


def opened(options: ReadOptions, capture: Path = CAPTURE) -> Worker:
    (source,) = parse_sources([str(capture)])
    return Worker(open_capture(source, options), options)


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_chunks_are_those_made_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_PACKETS", 1)
    options, here = ReadOptions(), ReadOptions()
    (source,) = parse_sources([str(CAPTURE)])
    preparation = Preparation(open_capture(source, here), here)
    wanted = list(preparation.chunks())
    with closing(opened(options)) as worker:
        count = 0
        texts: list[list[str]] = []
        for chunk, expected in zip(worker.chunks(), wanted, strict=True):
            count += 1
            for name in COLUMNS:
                found = getattr(chunk.rows.table, name)
                assert np.array_equal(found, getattr(expected.rows.table, name)), name
            assert np.array_equal(chunk.rows.flow, expected.rows.flow)
        assert count == len(wanted) > 0
        for outcome, book in ((worker.outcome(), options.book), (preparation.outcome(), here.book)):
            flows = outcome.flows[0, FIRST_LAYER]
            texts.append([book.text(*pair) for pair in zip(flows.version, flows.low_address, strict=True)])
        assert texts[0] == texts[1]
        assert worker.outcome().points[0].packets == 64
    assert no_children()


@pytest.mark.parametrize(
    ("fixture", "depth", "count"), [("errors_v6/docker0", 0, 24), ("tunnel_errors_6in4/eth0", 1, 12)]
)
def test_icmp_errors_are_those_found_in_this_process(fixture: str, depth: int, count: int) -> None:
    capture = CAPTURE.parents[1] / f"{fixture}.pcap"
    options, here = ReadOptions(), ReadOptions()
    here.book.handle(bytes(16))  # so that no address has the same handle in both books
    (source,) = parse_sources([str(capture)])
    preparation = Preparation(open_capture(source, here), here)
    assert list(preparation.chunks())
    wanted = preparation.outcome().errors[0][depth]
    with closing(opened(options, capture)) as worker:
        assert list(worker.chunks())
        found = worker.outcome().errors[0][depth]
    assert len(found) == len(wanted) == count
    assert np.array_equal(found.carrier, wanted.carrier)
    assert np.array_equal(found.rest, wanted.rest)
    for ours, theirs in ((found.packets, wanted.packets), (found.quoted, wanted.quoted)):
        for name in set(COLUMNS) - {"src", "dst"}:
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("src", "dst"):
            assert [options.book.text(6, handle) for handle in getattr(ours, name).tolist()] == [
                here.book.text(6, handle) for handle in getattr(theirs, name).tolist()
            ]


def test_a_chunk_that_fits_no_slot_comes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_SLOT_BYTES", 4096)
    with closing(opened(ReadOptions())) as worker:
        assert sum(len(chunk.rows) for chunk in worker.chunks()) == worker.outcome().points[0].decoded - sum(
            worker.outcome().set_aside[0].values()
        )


def test_an_abandoned_worker_is_ended() -> None:
    with closing(opened(ReadOptions())) as worker:
        next(worker.chunks())
    assert no_children()


def test_a_killed_worker_is_said() -> None:
    with closing(opened(ReadOptions())) as worker:
        os.kill(worker._pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker._pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NattraceError, match="worker process was killed"):
            list(worker.chunks())
    assert no_children()
