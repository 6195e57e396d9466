"""An engine without docker-proxy: a published port reached from inside is translated on the bridge, and comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from lab.topology import UPLINK

import nattrace
from capture.evidence import captured, conntrack, report_of, run, translations
from nattrace.model import Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from capture.engine import Engine

CONNECTIONS = 4


def whole(flow: Any) -> tuple[Any, ...]:
    """Both tuples of what all of a flow's translations do together: halves of one entry are joined."""
    first, last = flow["translations"][0], flow["translations"][-1]
    ((original, _),) = translations({"flows": [{"translations": [first]}]})
    ((_, reply),) = translations({"flows": [{"translations": [last]}]})
    return original, reply


def reached(engine: Engine, folder: Path, client: str, *points: str) -> Any:
    """Have a container reach a published port by the host's address; return the report of the capture."""
    again = f"for n in $(seq {CONNECTIONS}); do echo | nc -w 1 {UPLINK} 8080; done"
    done = engine.nattrace(
        *("capture", *points, "-i", "eth0", "-w", f"{folder}/b", "--filter", "tcp", "--"),
        *("docker", "exec", client, "sh", "-c", again),
    )
    assert done.returncode == 0, done.stderr
    report = report_of(folder / "b")
    kernel = conntrack(engine, "tcp")
    assert len(kernel) == CONNECTIONS
    assert {whole(flow) for flow in report["flows"]} == kernel
    # whatever the bridge shows twice, one host has one clock, and nothing is lost
    assert report["findings"] == []
    assert {point["clock"]["offset_ns"] for point in report["points"]} == {0}
    left = [row for row in nattrace.analyze(folder / "b").rewrites.all() if isinstance(row, Unmatched)]
    assert {row.reason for row in left} <= {"duplicate", "ambiguous"}
    # docker0 in promiscuous mode gets what only passes it, and routes it a second time: two acknowledgements without
    # identification may be one or two
    doubtful = [row.packet for row in left if row.reason == "ambiguous"]
    assert all((packet.length, packet.ip_id) == (0, 0) for packet in doubtful)
    if "docker0" not in points or "-p" in points:
        assert doubtful == []
    if "-p" in points:
        assert left == []
    return report


@pytest.mark.parametrize(
    "bridge", [(), ("-i", "docker0"), ("-p", "-i", "docker0")], ids=["cables", "bridge", "unpromiscuous"]
)
def test_another_container_reaches_a_published_port(
    unproxied: Engine, tmp_path: Path, bridge: tuple[str, ...]
) -> None:
    run(unproxied, "--name web -p 8080:80 busybox httpd -f -p 80")
    run(unproxied, "--name job busybox sleep 600")
    report = reached(unproxied, tmp_path, "job", "--container", "job", "--container", "web", *bridge)
    counts = captured(tmp_path / "b")
    assert counts["eth0"] == 0
    assert counts["job:eth0"]
    for flow in report["flows"]:
        assert flow["path"][0] == "job:eth0"
        assert flow["path"][-1] == "web:eth0"
        assert [t["nat"] for t in flow["translations"]] == ["dnat"]
        assert sum(c["lost"] for c in flow["crossings"]) == 0
        # once the bridge knows where to, most packets pass it without docker0
        unseen = [c for c in flow["crossings"] if c["unknowable"]]
        assert all("-p" in bridge and "docker0" in {c["from"], c["to"]} for c in unseen)
        assert bridge or sum(c["ambiguous"] for c in flow["crossings"]) == 0


def test_a_container_reaches_its_own_published_port(unproxied: Engine, tmp_path: Path) -> None:
    run(unproxied, "--name web -p 8080:80 busybox httpd -f -p 80")
    report = reached(unproxied, tmp_path, "web", "--container", "web")
    counts = captured(tmp_path / "b")
    cable = next(name for name in counts if name.startswith("veth"))
    assert counts["web:eth0"] == counts[cable]
    assert len(report["flows"]) == CONNECTIONS
    for flow in report["flows"]:
        # out by its cable, and in again by the same one
        assert flow["path"] == ["web:eth0", cable, cable, "web:eth0"]
        ((nat, there, back),) = [(t["nat"], t["from"], t["to"]) for t in flow["translations"]]
        assert (nat, there, back) == ("snat+dnat", cable, cable)


def test_the_bridge_itself_shows_it_by_halves(unproxied: Engine, tmp_path: Path) -> None:
    """Where docker0 is captured, it gets what only passes the bridge, and routes it once more: three of each packet."""
    run(unproxied, "--name web -p 8080:80 busybox httpd -f -p 80")
    report = reached(unproxied, tmp_path, "web", "--container", "web", "-i", "docker0")
    for flow in report["flows"]:
        assert {t["nat"] for t in flow["translations"]} == {"dnat", "snat"}
