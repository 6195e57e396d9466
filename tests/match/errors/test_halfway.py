"""A bridge with netfilter shows packets after DNAT, and the errors about them as the container gets them.

The container asks a virtual address, docker0 shows the server's, eth0 the server's and the host's own. So the error at
docker0 quotes a flow of which docker0 shows no packet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from error_frames import (
    CONTAINER,
    CONTAINER6,
    PUBLIC,
    PUBLIC6,
    ROUTER,
    ROUTER6,
    SERVER,
    SERVER6,
    Packet,
    Points,
    error,
)

import nattrace

if TYPE_CHECKING:
    from pathlib import Path

    from nattrace import Report

VIRTUAL, VIRTUAL6 = "198.51.100.99", "2001:db8:2::99"


def analysed(folder: Path, *, version: int, in_name: bool = True, ids: bool = True) -> Report:
    """Analyse six datagrams, each refused by the server; `in_name` of the virtual address, or still the router's."""
    six = version == 6
    container, public, server, virtual, router = (
        (CONTAINER6, PUBLIC6, SERVER6, VIRTUAL6, ROUTER6)
        if six
        else (CONTAINER, PUBLIC, SERVER, VIRTUAL, ROUTER)
    )
    points = Points()
    points.frame()
    for n in range(6):
        asked = Packet(container, 40000, virtual, 53, b"datagram %d" % n, ip_id=(300 + n) * ids, ttl=63)
        half = replace(asked, dst=server, dport=5353)
        sent = replace(half, src=public, sport=33333)
        points.out(half, sent)
        kind = (1, 4) if six else (3, 3)
        outer_id = (900 + n) * ids
        points.back(
            error(router, public, replace(sent, ttl=62).ip(), kind=kind, ip_id=outer_id),
            error(
                virtual if in_name else router,
                container,
                replace(asked, ttl=62).ip(),
                kind=kind,
                ip_id=outer_id,
            ),
        )
    points.frame()
    return nattrace.analyze(*points.write(folder))


def test_an_error_is_known_by_its_identifications_and_the_end_that_was_kept(tmp_path: Path) -> None:
    report = analysed(tmp_path, version=4)

    errors = [row for row in report.rewrites if row.before.type == 3]
    assert [(row.before.point, row.after.point) for row in errors] == [("eth0", "docker0")] * 6
    assert [row.before.ip_id for row in errors] == [row.after.ip_id for row in errors]
    assert not [f for f in report.findings if f.code.startswith("icmp-error")]
    (flow,) = (flow for flow in report.flows if flow.icmp_errors)
    assert [(e.name, e.count) for e in flow.icmp_errors] == [("port-unreachable", 6)]


@pytest.mark.parametrize("version", [4, 6])
def test_without_identifications_it_stays_in_doubt_and_is_not_lost(version: int, tmp_path: Path) -> None:
    report = analysed(tmp_path, version=version, ids=False)

    assert report.accounting.unmatched["ambiguous"] == 6
    assert not [f for f in report.findings if f.code.startswith("icmp-error")]


def test_a_quote_of_a_stranger_in_a_routers_name_is_not_believed(tmp_path: Path) -> None:
    report = analysed(tmp_path, version=4, in_name=False)

    assert not [row for row in report.rewrites if row.before.type == 3]
    assert not [f for f in report.findings if f.code.startswith("icmp-error")]
