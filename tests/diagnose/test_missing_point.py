"""One side captured: the report says so, says which point is missing, and how to capture both."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nattrace.diagnose.missing_point import missing_point
from nattrace.model import Clock, Flow, Point, Tuple

SHARED = Path(__file__).parents[2].parent / "shared" / "captures"


def point(name: str, interface: str | None = None) -> Point:
    return Point(
        name=name, file=f"{name}.pcap", interface=interface, link_type="EN10MB", snaplen=262144, packets=6, decoded=6,
        skipped={}, first=None, last=None, truncated=False, dropped_by_kernel=None, clock=Clock(name),
    )  # fmt: skip


def flow(number: int, src: str, dst: str, *path: str, protocol: str = "icmp", packets: int = 3) -> Flow:
    return Flow(
        id=number, protocol=protocol, status="one-sided" if len(path) == 1 else "untranslated", path=path,
        initiator=Tuple(src, dst, id=1), translations=(), packets_original=packets, packets_reply=packets,
        crossings=(), first=0, last=1,
    )  # fmt: skip


def commands(advice: str | None) -> list[list[str]]:
    """The command lines of the advice, as a shell splits them."""
    assert advice is not None
    return [shlex.split(line) for line in advice.splitlines() if line.startswith("  ")]


def test_the_seed_story_lacks_the_outside_point() -> None:
    found = missing_point([point("docker0", "docker0")], [flow(1, "172.17.0.3", "202.89.233.100", "docker0")])
    assert [(f.code, f.severity, f.flows) for f in found] == [("no-outside-point", "warning", (1,))]
    assert "no NAT can be seen" in found[0].message
    assert "172.17.0.3" in found[0].message
    assert "the interface with the route to 202.89.233.100" in found[0].message
    assert "eth0" not in found[0].message  # the writer's machine had none
    route, _, inside, outside, analyze = commands(found[0].advice)
    assert route == ["ip", "route", "get", "202.89.233.100"]
    assert inside[:1] + inside[-6:] == [
        "tcpdump", "-i", "docker0", "-w", "docker0.pcap", "icmp and host 202.89.233.100", "&",
    ]  # fmt: skip
    assert outside[-5:] == ["$IFACE", "-w", "$IFACE.pcap", "icmp and host 202.89.233.100", "&"]
    for command in (inside, outside):
        assert {"--immediate-mode", "-U", "--time-stamp-precision=nano"} <= set(command)
    assert analyze == ["nattrace", "analyze", "docker0.pcap", "$IFACE.pcap"]


def test_a_published_port_seen_behind_the_nat_lacks_the_outside_too() -> None:
    found = missing_point(
        [point("docker0")], [flow(1, "198.51.100.9", "172.17.0.3", "docker0", protocol="tcp")]
    )
    assert found[0].code == "no-outside-point"
    assert "What 172.17.0.3 becomes" in found[0].message
    assert ["ip", "route", "get", "198.51.100.9"] in commands(found[0].advice)
    assert "host 198.51.100.9" in commands(found[0].advice)[2]


def test_public_addresses_alone_lack_the_inside_point() -> None:
    found = missing_point([point("eth0", "eth0")], [flow(1, "203.0.113.10", "202.89.233.100", "eth0")])
    assert [(f.code, f.severity, f.flows) for f in found] == [("no-inside-point", "warning", (1,))]
    assert ["ip", "-brief", "address", "show", "type", "bridge"] in commands(found[0].advice)
    assert commands(found[0].advice)[-1] == ["nattrace", "analyze", "$IFACE.pcap", "eth0.pcap"]


@pytest.mark.parametrize(
    ("names", "flows"),
    [
        (["docker0", "eth0"], [flow(1, "172.17.0.3", "202.89.233.100", "docker0", "eth0")]),
        (["docker0", "eth0"], [flow(1, "172.17.0.9", "1.1.1.1", "docker0"), flow(2, "172.17.0.3", "9.9.9.9", "docker0", "eth0")]),
        (["docker0", "eth0"], [flow(1, "172.17.0.3", "9.9.9.9", "docker0"), flow(2, "203.0.113.1", "9.9.9.9", "eth0")]),
        (["docker0"], [flow(1, "172.17.0.3", "172.17.0.1", "docker0")]),
        (["docker0"], [flow(1, "172.17.0.3", "224.0.0.251", "docker0"), flow(2, "fe80::1", "ff02::fb", "docker0")]),
        (["lo"], [flow(1, "127.0.0.1", "127.0.0.53", "lo"), flow(2, "::1", "::1", "lo")]),
        (["docker0"], []),
        ([], []),
    ],
    ids=["crossing", "one crosses", "both sides", "neighbours", "link-local", "loopback", "no flow", "no point"],
)  # fmt: skip
def test_nothing_is_said_without_reason(names: list[str], flows: list[Flow]) -> None:
    assert missing_point([point(name) for name in names], flows) == []


def test_two_inside_points_still_lack_the_outside() -> None:
    found = missing_point(
        [point("docker0"), point("br-1")],
        [flow(1, "172.17.0.3", "9.9.9.9", "docker0"), flow(2, "172.18.0.3", "9.9.9.9", "br-1")],
    )
    assert [f.code for f in found] == ["no-outside-point"]
    assert "docker0, br-1" in found[0].message


def test_private_networks_behind_one_another_count() -> None:
    found = missing_point(
        [point("docker0")], [flow(1, "172.17.0.3", "192.168.1.9", "docker0", protocol="udp")]
    )
    assert ["ip", "route", "get", "192.168.1.9"] in commands(found[0].advice)


def test_ipv6_has_its_own_filter() -> None:
    found = missing_point(
        [point("docker0")], [flow(1, "fd00::2", "2001:db8::7", "docker0", protocol="icmpv6")]
    )
    assert "icmp6 and host 2001:db8::7" in commands(found[0].advice)[2]


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump")
@pytest.mark.parametrize(
    "flows",
    [
        [flow(1, "172.17.0.3", "202.89.233.100", "docker0")],
        [flow(n, "172.17.0.3", f"9.9.9.{n}", "docker0") for n in range(9)],
        [
            flow(1, "172.17.0.3", "9.9.9.9", "docker0"),
            flow(2, "172.17.0.3", "9.9.9.8", "docker0", protocol="tcp"),
        ],
        [flow(1, "fd00::2", "2001:db8::7", "docker0", protocol="icmpv6")],
    ],
)
def test_tcpdump_compiles_the_filter(flows: list[Flow]) -> None:
    expression = commands(missing_point([point("docker0")], flows)[0].advice)[2][-2]
    subprocess.run(["tcpdump", "-y", "EN10MB", "-d", expression], check=True, capture_output=True)


def test_the_busiest_destinations_come_first_and_few_are_named() -> None:
    flows = [flow(n, "172.17.0.3", f"9.9.9.{n}", "docker0", packets=n) for n in range(1, 200)]
    found = missing_point([point("docker0")], flows)[0]
    assert ["ip", "route", "get", "9.9.9.199"] in commands(found.advice)
    assert len(found.flows) == 100
    assert len(found.message) < 400


@pytest.mark.parametrize(
    "name",
    [
        "x; rm -rf ~",
        "$(id)",
        "-w/etc/passwd",
        "a\nb",
        "\x1b[31m",
        "any",
        "",
        "é",
        "a'b",
        "way-too-long-for-linux",
    ],
)
def test_hostile_names_stay_out_of_the_command_lines(name: str) -> None:
    found = missing_point([point(name, name)], [flow(1, "172.17.0.3", "9.9.9.9", name)])[0]
    assert found.advice is not None
    assert commands(found.advice)[2] == ["INSIDE=..."]
    assert commands(found.advice)[3][5:8] == ["$INSIDE", "-w", "$INSIDE.pcap"]
    assert found.advice.count("\n") == 7
    assert re.fullmatch(r"[ -~]+", found.message.replace("é", "e"))


def test_a_file_name_is_not_taken_for_an_interface() -> None:
    found = missing_point([point("capture1")], [flow(1, "172.17.0.3", "9.9.9.9", "capture1")])[0]
    assert commands(found.advice)[3][5] == "$INSIDE"
    found = missing_point([point("br-d430eab46516")], [flow(1, "172.17.0.3", "9.9.9.9", "br-d430eab46516")])[
        0
    ]
    assert commands(found.advice)[2][5] == "br-d430eab46516"


def test_hostile_addresses_are_left_out() -> None:
    assert missing_point([point("docker0")], [flow(1, "172.17.0.3", "9.9.9.9; reboot", "docker0")]) == []


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared captures")
def test_the_seed_storys_text_leads_to_the_advice() -> None:
    nattrace = pytest.importorskip("nattrace")
    report = nattrace.analyze(SHARED / "printed" / "docker0.txt")
    found = [f for f in report.findings if f.code == "no-outside-point"]
    assert len(found) == 1
    assert ["ip", "route", "get", "202.89.233.100"] in commands(found[0].advice)
