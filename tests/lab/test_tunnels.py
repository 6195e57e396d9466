"""The recorded tunnels: the paths of what they carry, and where it was wrapped in what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nattrace
from lab.oracle import read
from lab.scenarios.tunnels import overlay_unwrapped

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lab"

#: Points of the path, and what each of them shows the containers' packets in.
PATHS = {
    "tunnel_vxlan": (("docker0", None), ("tun0", None), ("eth0", "vxlan 42")),
    "tunnel_geneve": (("docker0", None), ("eth0", "geneve 5001")),
    "tunnel_gre": (("docker0", None), ("eth0", "gre 7")),
    "tunnel_gretap": (("docker0", None), ("eth0", "gre")),
    "tunnel_ipip": (("docker0", None), ("eth0", "ipip")),
    "tunnel_6in4": (("docker0", None), ("eth0", "6in4")),
    "overlay_vxlan": (("docker0", None), ("mid0", "vxlan 42"), ("eth0", None)),
    "overlay_gre": (("docker0", None), ("mid0", "gre 7"), ("eth0", None)),
}


@pytest.mark.parametrize(("name", "path"), PATHS.items(), ids=PATHS.keys())
def test_a_path_says_where_a_flow_was_wrapped_and_in_what(
    name: str, path: tuple[tuple[str, str | None], ...]
) -> None:
    report = nattrace.analyze(*sorted((FIXTURES / name).glob("*.pcap")))

    carried = [flow for flow in report.flows if flow.status == "translated"]
    assert len(carried) == 6  # two containers, each with ping, UDP and TCP
    for flow in carried:
        assert flow.path == tuple(point for point, _ in path)
        assert flow.encapsulation == tuple(wrap for _, wrap in path)
    # their packets are told once: not again as flows of their own at the point that shows them wrapped
    ends = {(flow.initiator.src, flow.initiator.dst) for flow in report.flows if flow.status != "translated"}
    assert not ends & {(flow.initiator.src, flow.initiator.dst) for flow in carried}


@pytest.mark.parametrize(("name", "path"), PATHS.items(), ids=PATHS.keys())
def test_every_crossing_says_what_its_packets_are_wrapped_in(
    name: str, path: tuple[tuple[str, str | None], ...]
) -> None:
    folder = FIXTURES / name
    report = nattrace.analyze(*sorted(folder.glob("*.pcap")))

    wraps = dict(path)
    rows = [row for row in report.rewrites.all() if isinstance(row, nattrace.model.Rewrite)]
    assert {row.before.point for row in rows} == set(wraps)
    for row in rows:
        for sighting in (row.before, row.after):
            assert sighting.encapsulation == wraps[sighting.point]
    # 26 packets a container, each wrapped once: the oracle found them behind their carriers
    for point, wrap in path:
        if wrap is not None:
            inside = [
                p
                for p in read(folder / f"{point}.pcap")
                if {80, 53} & {p.addressing.sport, p.addressing.dport}
            ]
            assert len(inside) == 2 * 20


@pytest.mark.lab
def test_a_path_goes_through_the_device_that_unwraps(tmp_path: Path) -> None:
    overlay_unwrapped(tmp_path)

    report = nattrace.analyze(*sorted(tmp_path.glob("*.pcap")))

    carried = [flow for flow in report.flows if flow.status == "translated"]
    assert len(carried) == 6
    assert {flow.path for flow in carried} == {("docker0", "mid0", "tun0", "eth0")}
    assert {flow.encapsulation for flow in carried} == {(None, "vxlan 42", None, None)}


@pytest.mark.parametrize("name", PATHS)
def test_a_carrier_is_matched_when_what_it_carries_is(name: str) -> None:
    report = nattrace.analyze(*sorted((FIXTURES / name).glob("*.pcap")))

    total = report.accounting
    assert total.matched == 2 * 26 * len(PATHS[name])
    assert total.packets == total.matched + sum(total.unmatched.values()) + sum(total.skipped.values())


@pytest.mark.parametrize("name", PATHS)
def test_no_snaplen_gives_a_wrong_row_or_a_wrong_path(name: str, tmp_path: Path) -> None:
    whole = sorted((FIXTURES / name).glob("*.pcap"))
    expected = crossings(nattrace.analyze(*whole))
    # where a point's packets are cut off before the inner ports, crossings pass it by
    further = {(*a[:2], *b[2:]) for a in expected for b in expected if a[2:] == b[:2]}
    further |= {(*a[:2], *b[2:]) for a in expected for b in further if a[2:] == b[:2]}
    for snaplen in (42, 54, 62, 64, 74, 78, 84, 96, 110, 128, 160):
        # all points alike, then each of them alone
        for short in (whole, *([each] for each in whole)):
            given = [cut_to(snaplen, path, tmp_path / path.name) if path in short else path for path in whole]
            report = nattrace.analyze(*given)
            found = crossings(report)
            what = (snaplen, [path.stem for path in short])
            assert not found - expected - further, what
            if snaplen >= 128:  # 14 + 50 + 14 + 20 + 8 bytes of headers, and as much of the payload
                assert found == expected, what
            total = report.accounting
            assert total.packets == total.matched + sum(total.unmatched.values()) + sum(
                total.skipped.values()
            )


def crossings(report: Any) -> set[tuple[str, int, str, int]]:
    """All crossings: point and frame before, point and frame after."""
    return {
        (row.before.point, row.before.frame, row.after.point, row.after.frame)
        for row in report.rewrites.all()
        if isinstance(row, nattrace.model.Rewrite)
    }


def cut_to(snaplen: int, path: Path, target: Path) -> Path:
    """Write a pcap anew as tcpdump -s would have."""
    data = path.read_bytes()
    found = data[:16] + snaplen.to_bytes(4, "little") + data[20:24]
    at = 24
    while at < len(data):
        size = int.from_bytes(data[at + 8 : at + 12], "little")
        found += data[at : at + 8] + min(size, snaplen).to_bytes(4, "little") + data[at + 12 : at + 16]
        found += data[at + 16 : at + 16 + min(size, snaplen)]
        at += 16 + size
    target.write_bytes(found)
    return target
