"""End to end on a real Podman, asked through its Docker socket."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab.topology import SERVERS, UPLINK

from capture.evidence import (
    captured,
    capturing,
    conntrack,
    manifest_of,
    report_of,
    run,
    translations,
    wait_for,
)

if TYPE_CHECKING:
    from capture.engine import Engine

SERVER = SERVERS[0]
#: Podman's rm -f asks first, and waits ten seconds for a first process that asks for no signal.
KILLED = "--stop-signal KILL"
MASQUERADE = r"\[(\d+):\d+\] -A NETAVARK-\S+ ! -d 224.0.0.0/4 -j MASQUERADE"


def interfaces(podman: Engine) -> set[str]:
    return {link["ifname"] for link in json.loads(podman.host.run("ip -j link"))}


def test_from_a_command_to_the_report_where_no_bridge_is_yet(podman: Engine, tmp_path: Path) -> None:
    assert "podman0" not in interfaces(podman)
    ping = f"docker run --rm --label test --name brief busybox ping -q -c 3 -i 0.5 {SERVER}"
    done = podman.nattrace(
        *("capture", "-w", f"{tmp_path}/b", "--filter", "icmp", "--analyze", "--", *ping.split())
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("podman0 -> eth0   2 points, 12 packets")
    assert captured(tmp_path / "b") == {"podman0": 6, "eth0": 6}
    assert translations(report_of(tmp_path / "b")) == conntrack(podman, "icmp")
    assert len(conntrack(podman, "icmp")) == 1
    # what Podman knew: its network with the bridge, the container that came and went, the rule that translated
    manifest = manifest_of(tmp_path / "b")
    assert manifest.missing == ()
    assert manifest.points[0].ifindex is not None
    texts = {what: (tmp_path / "b" / file).read_text() for what, file in manifest.context.items()}
    (network,) = json.loads(texts["before/docker-networks"])
    assert (network["Name"], list(network["Options"].values())) == ("podman", ["podman0"])
    (brief,) = json.loads(texts["during/docker-containers"])
    ((original, _),) = translations(report_of(tmp_path / "b"))
    assert brief["Name"] == "/brief"
    assert brief["NetworkSettings"]["Networks"]["podman"]["IPAddress"] == original[0]
    counts = [re.findall(MASQUERADE, texts[f"{phase}/iptables-save"]) for phase in ("before", "after")]
    assert counts == [["0"], ["1"]]
    # the bridge goes with the capture, as it would with the container
    assert "podman0" not in interfaces(podman)


def test_a_published_port_reached_from_outside(podman: Engine, tmp_path: Path) -> None:
    run(podman, f"{KILLED} -p 8080:80 busybox httpd -f -p 80")
    client = "import socket; s = socket.create_connection(('%s', 8080)); s.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); s.recv(9)"
    done = podman.nattrace(
        *("capture", "--network", "bridge", "-i", "eth0", "-w", f"{tmp_path}/b", "--filter", "tcp", "--"),
        *podman.internet.command(sys.executable, "-c", client % UPLINK),
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b")["podman0"] == captured(tmp_path / "b")["eth0"]
    report = report_of(tmp_path / "b")
    assert [flow["status"] for flow in report["flows"]] == ["translated"]
    assert translations(report) == conntrack(podman, "tcp")


def test_a_container_has_its_own_point_and_its_cable_and_can_be_removed(
    podman: Engine, tmp_path: Path
) -> None:
    podman.docker("network create mine")
    try:
        run(podman, f"{KILLED} --name job --network mine busybox sleep 600")
        done = podman.nattrace(
            *("capture", "--container", "job", "--network", "mine", "-i", "eth0"),
            *("-w", f"{tmp_path}/b", "--filter", "icmp"),
            *("--", "docker", "exec", "job", "ping", "-q", "-c", "3", "-i", "0.1", SERVER),
        )
        assert done.returncode == 0, done.stderr
        _, inside, cable, bridge = manifest_of(tmp_path / "b").points
        assert (inside.name, inside.namespace) == ("job:eth0", "container:job")
        assert (cable.namespace, cable.container) == ("host", "job")
        assert bridge.name == "podman1"
        assert list(captured(tmp_path / "b").values()) == [6, 6, 6, 6]
        (flow,) = report_of(tmp_path / "b")["flows"]
        assert flow["path"] == ["job:eth0", cable.name, "podman1", "eth0"]
        assert translations({"flows": [flow]}) == conntrack(podman, "icmp")
        (tmp_path / "again").mkdir()
        with capturing(podman, tmp_path / "again", "--container", "job") as process:
            podman.docker("rm -f job")  # Podman keeps what another container depends on
            wait_for(lambda: process.poll() is not None)
    finally:
        podman.docker("rm -f job")
        podman.docker("network rm mine")
    problems = [point.problem or "" for point in manifest_of(tmp_path / "again/b").points]
    assert all("interface disappeared" in problem for problem in problems)


def test_helpers_can_do_nothing_but_capture_and_a_killed_capture_is_cleaned_up(
    podman: Engine, tmp_path: Path
) -> None:
    ours = "ps -q --filter label=org.nattrace.capture.owner"
    with capturing(podman, tmp_path, "--network", "podman") as process:
        rights = {}
        for helper in podman.docker(ours).split():
            (facts,) = json.loads(podman.docker(f"inspect {helper}"))
            status = Path(f"/proc/{facts['State']['Pid']}/status").read_text()
            words = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert words["NoNewPrivs"].strip() == "1"
            rights[facts["HostConfig"]["NetworkMode"]] = int(words["CapEff"], 16)
        # the one that keeps the bridge may nothing; CAP_NET_RAW is bit 13, CAP_SETGID bit 6 (linux/capability.h)
        assert rights == {"bridge": 0, "host": 1 << 13 | 1 << 6}
        process.kill()
        process.wait()
    assert len(podman.docker(ours).split()) == 2
    done = podman.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/again", "--", "true")
    assert done.returncode == 0, done.stderr
    assert "removed 2 helper containers of a capture that was killed" in done.stderr


def test_without_helpers_nothing_keeps_a_bridge_there(podman: Engine, tmp_path: Path) -> None:
    done = podman.nattrace(
        "capture", "--via", "host", "--network", "podman", "-w", f"{tmp_path}/b", "--", "true"
    )
    assert done.returncode == 2
    assert "podman0: not there yet: Podman makes it with the first container of network podman" in done.stderr
