"""Errors that cannot be read: of what they may be about nothing is claimed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from error_frames import CONTAINER, PUBLIC, ROUTER, Packet, Points, error
from hypothesis import given
from hypothesis import strategies as st
from match.test_truncation import FIXTURES, cut

import nattrace
from nattrace.match import prepare
from nattrace.match.errors.unread import ANSWER_NS, Unread
from nattrace.table import PacketTable

if TYPE_CHECKING:
    from pathlib import Path

#: IP version, address
HOSTS = st.sampled_from([(4, 1), (4, 2), (6, 1)])
SECOND = 10**9


def unread(errors: list[tuple[tuple[int, int], int]], unkept_ns: int) -> Unread:
    table = PacketTable.empty(len(errors))
    for n, ((version, address), time) in enumerate(errors):
        table.version[n], table.dst[n], table.time_ns[n] = version, address, time * SECOND
    return Unread(table, unkept_ns * SECOND)


@given(
    errors=st.lists(st.tuples(HOSTS, st.integers(0, 30)), max_size=8),
    sent=st.lists(st.tuples(HOSTS, st.integers(0, 30), st.integers(0, 10)), max_size=8),
    unkept=st.integers(0, 60),
)
def test_an_error_may_be_about_all_that_its_receiver_sent_shortly_before(
    errors: list[tuple[tuple[int, int], int]], sent: list[tuple[tuple[int, int], int, int]], unkept: int
) -> None:
    asked = unread(errors, unkept).may_answer(
        np.array([host[0] for host, _, _ in sent], np.uint8),
        np.array([host[1] for host, _, _ in sent], np.uint32),
        np.array([first * SECOND for _, first, _ in sent], np.int64),
        np.array([(first + longer) * SECOND for _, first, longer in sent], np.int64),
    )

    patience = ANSWER_NS // SECOND
    assert asked.tolist() == [
        first + longer + patience >= unkept
        or any(to == host and first <= time <= first + longer + patience for to, time in errors)
        for host, first, longer in sent
    ]


@given(
    times=st.lists(st.integers(0, 30), max_size=8),
    asked=st.lists(st.integers(0, 30), max_size=8),
    unkept=st.integers(0, 60),
)
def test_what_is_missing_may_be_an_unread_error_of_about_that_time(
    times: list[int], asked: list[int], unkept: int
) -> None:
    near = unread([((4, 1), time) for time in times], unkept).near(
        np.array(asked, np.int64) * SECOND, 2 * SECOND
    )

    assert near.tolist() == [
        time + 2 >= unkept or any(abs(time - other) <= 2 for other in times) for time in asked
    ]


@pytest.mark.parametrize("limit", [3, 1000])
def test_what_an_error_over_the_limit_may_be_about_is_not_lost(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router between the points turns back one of two probes; errors are kept up to a limit, then counted."""
    monkeypatch.setattr(prepare, "ERRORS_LIMIT", limit)
    points = Points()
    points.frame()
    for n in range(40):
        probe = Packet(CONTAINER, 40000, "192.0.2.1", 33434, ip_id=100 + n, payload=n.to_bytes(8, "big"))
        if n % 2:
            points.out(probe, replace(probe, src=PUBLIC))
        else:
            points.inside.append((points.now_ns, probe.ip()))
            points.step()
            points.back(None, error(ROUTER, CONTAINER, probe.ip(), kind=(11, 0), ip_id=900 + n))
    points.frame()
    report = nattrace.analyze(*points.write(tmp_path))

    answered = min(limit, 20)
    unmatched = report.accounting.unmatched
    assert unmatched["icmp-answered"] == answered
    assert unmatched.get("unknowable", 0) == 20 - answered
    assert "lost" not in unmatched


def test_a_snaplen_that_leaves_losses_in_doubt_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    captures = sorted((FIXTURES / "lab" / "trace_echo").glob("*.pcap"))
    for path in captures:
        cut(path, tmp_path / "cut" / path.name, 60)
    report = nattrace.analyze(*sorted((tmp_path / "cut").glob("*.pcap")))

    (finding,) = report.findings
    assert finding.code == "icmp-quotes-missing"
    # the nearest router turned three probes of either container back before they reached eth0
    assert "docker0 does not hold what 30 of its ICMP errors quote: 6 packets" in finding.message
    assert [f.code for f in nattrace.analyze(*captures).findings] == ["icmp-answered"]
