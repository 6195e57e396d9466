"""End to end on a real engine: what containers did, against what they counted and what the kernel translated."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

from lab.topology import GATEWAY, SERVERS, SERVERS_V6, UPLINK

from capture.evidence import captured, conntrack, manifest_of, report_of, run, translations

if TYPE_CHECKING:
    from pathlib import Path

    from capture.engine import Engine

SERVER = SERVERS[0]


def test_colliding_pings_of_two_containers(engine: Engine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        engine.docker(f"create --label test --name {name} busybox ping -q -c 5 -i 0.2 {SERVER}")
    done = engine.nattrace(
        *("capture", "-w", f"{tmp_path}/b", "--filter", "icmp", "--analyze", "--"),
        *("sh", "-c", "docker start -a one & docker start -a two & wait"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("5 packets transmitted, 5 packets received") == 2
    assert done.stdout.startswith("docker0 -> eth0   2 points, 40 packets")
    assert captured(tmp_path / "b") == {"docker0": 20, "eth0": 20}
    report = report_of(tmp_path / "b")
    assert report["accounting"]["matched"] == 40
    assert len(translations(report)) == 2
    assert translations(report) == conntrack(engine, "icmp")


def test_a_published_port_reached_from_outside(engine: Engine, tmp_path: Path) -> None:
    run(engine, "-p 8080:80 busybox httpd -f -p 80")
    client = "import socket; s = socket.create_connection(('%s', 8080)); s.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); s.recv(9)"
    done = engine.nattrace(
        *("capture", "-i", "docker0", "-i", "eth0", "-w", f"{tmp_path}/b", "--filter", "tcp", "--"),
        *engine.internet.command(sys.executable, "-c", client % UPLINK),
    )
    assert done.returncode == 0, done.stderr
    assert manifest_of(tmp_path / "b").workload is not None
    assert captured(tmp_path / "b")["docker0"] == captured(tmp_path / "b")["eth0"]
    report = report_of(tmp_path / "b")
    assert [flow["status"] for flow in report["flows"]] == ["translated"]
    assert translations(report) == conntrack(engine, "tcp")


def test_docker_proxy_on_loopback_is_no_translation(engine: Engine, tmp_path: Path) -> None:
    run(engine, "-p 8081:80 busybox httpd -f -p 80")
    client = "import socket; s = socket.create_connection(('127.0.0.1', 8081)); s.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); s.recv(9)"
    done = engine.nattrace(
        *(
            "capture",
            "-i",
            "docker0",
            "-i",
            "lo",
            "-w",
            f"{tmp_path}/b",
            "--filter",
            "tcp",
            "--",
            sys.executable,
        ),
        *("-c", client),
    )
    assert done.returncode == 0, done.stderr
    counts = captured(tmp_path / "b")
    assert counts["docker0"]
    assert counts["lo"]
    report = report_of(tmp_path / "b")
    assert translations(report) == set() == conntrack(engine, "tcp")
    assert report["accounting"]["matched"] == 0


def test_a_container_has_its_own_point_and_its_cable(engine: Engine, tmp_path: Path) -> None:
    run(engine, "--name job busybox sleep 600")
    done = engine.nattrace(
        *("capture", "--container", "job", "-i", "eth0", "-w", f"{tmp_path}/b", "--filter", "icmp", "--"),
        *("docker", "exec", "job", "ping", "-q", "-c", "3", "-i", "0.1", SERVER),
    )
    assert done.returncode == 0, done.stderr
    eth0, inside, cable = manifest_of(tmp_path / "b").points
    index = engine.docker("exec job cat /sys/class/net/eth0/iflink")
    assert (inside.name, inside.namespace, inside.container) == ("job:eth0", "container:job", "job")
    assert (cable.namespace, cable.container, str(cable.ifindex)) == ("host", "job", index)
    assert list(captured(tmp_path / "b").values()) == [6, 6, 6]
    (flow,) = report_of(tmp_path / "b")["flows"]
    assert flow["path"] == ["job:eth0", cable.name, "eth0"]
    assert translations({"flows": [flow]}) == conntrack(engine, "icmp")
    assert eth0.container is None


def test_a_macvlan_shares_the_interface_outside(engine: Engine, tmp_path: Path) -> None:
    engine.docker(
        "network create -d macvlan -o parent=eth0 --subnet 203.0.113.0/24 --ip-range 203.0.113.64/27 mac"
    )
    try:
        done = engine.nattrace("capture", "--network", "mac", "-w", f"{tmp_path}/b", "--", "true")
        assert done.returncode == 2
        assert "mac: a macvlan network has no bridge on this machine; give -i eth0" in done.stderr
        run(engine, "--name job --network mac busybox sleep 600")
        done = engine.nattrace(
            *("capture", "--container", "job", "-w", f"{tmp_path}/b", "--filter", "icmp", "--"),
            *("docker", "exec", "job", "ping", "-q", "-c", "2", "-i", "0.1", GATEWAY),
        )
        assert done.returncode == 0, done.stderr
        assert captured(tmp_path / "b") == {"job:eth0": 4, "eth0": 4}
        inside, shared = manifest_of(tmp_path / "b").points
        # others send by that interface too
        assert (inside.container, shared.container) == ("job", None)
        assert translations(report_of(tmp_path / "b")) == set() == conntrack(engine, "icmp")
    finally:
        engine.docker("rm -f job")
        engine.docker("network rm mac")


def test_the_bundle_holds_what_the_host_knew(engine: Engine, tmp_path: Path) -> None:
    secret = "-e PASSWORD=hunter2 --name stays"
    run(engine, f"{secret} busybox sleep 600")
    again = f"docker run --rm --label test --name brief busybox ping -q -c 3 -i 0.5 {SERVER}"
    done = engine.nattrace("capture", "-w", f"{tmp_path}/b", "--filter", "icmp", "--", "sh", "-c", again)
    assert done.returncode == 0, done.stderr
    manifest = manifest_of(tmp_path / "b")
    assert manifest.missing == ()
    kernel = {"links", "addresses", "routes", "rules", "iptables-save", "ip6tables-save", "nft", "conntrack"}
    twice = kernel | {"docker-networks", "docker-containers"}
    during = {"during/conntrack-events", "during/docker-containers"}
    assert (
        manifest.context.keys()
        == {f"{phase}/{name}" for phase in ("before", "after") for name in twice} | during
    )
    texts = {what: (tmp_path / "b" / file).read_text() for what, file in manifest.context.items()}
    assert not any("hunter2" in text for text in texts.values())
    # the rule that made the translation counted one more packet: the first of the flow
    counts = [
        int(
            re.findall(
                r"\[(\d+):\d+\] -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
                texts[f"{phase}/iptables-save"],
            )[0]
        )
        for phase in ("before", "after")
    ]
    assert counts[1] == counts[0] + 1
    # the container that came and went is known with its address, and so is the translation of its flow
    (brief,) = json.loads(texts["during/docker-containers"])
    assert brief["Name"] == "/brief"
    address = brief["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
    ((original, reply),) = translations(report_of(tmp_path / "b"))
    assert original[0] == address
    assert re.search(
        rf"NEW\] .*src={address} dst={SERVER} .*id={original[4]} .*dst={UPLINK} .*id={reply[4]}",
        texts["during/conntrack-events"],
    )
    assert f"src={address} " in texts["after/conntrack"]
    assert [each["Name"] for each in json.loads(texts["before/docker-containers"])] == ["/stays"]
    assert "docker0" in [link["ifname"] for link in json.loads(texts["after/links"])]
    assert "bridge" in [network["Name"] for network in json.loads(texts["before/docker-networks"])]


def test_a_network_of_ones_own_and_one_without_a_way_out(engine: Engine, tmp_path: Path) -> None:
    engine.docker("network create mine")
    engine.docker("network create --internal inner")
    try:
        run(engine, "--name job --network mine busybox sleep 600")
        run(engine, "--name jailed --network inner busybox sleep 600")
        pings = f"docker exec job ping -q -c 2 {SERVER}; docker exec jailed ping -q -c 2 -W 1 {GATEWAY}; true"
        done = engine.nattrace(
            *("capture", "--network", "mine", "--network", "inner", "-i", "eth0", "-w", f"{tmp_path}/b"),
            *("--filter", "icmp", "--", "sh", "-c", pings),
        )
        assert done.returncode == 0, done.stderr
        ids = {
            name: engine.docker(f"network inspect -f {{{{.Id}}}} {name}")[:12] for name in ("mine", "inner")
        }
        counts = captured(tmp_path / "b")
        assert counts["eth0"] == counts[f"br-{ids['mine']}"] == 4
        assert translations(report_of(tmp_path / "b")) == conntrack(engine, "icmp")
        assert len(conntrack(engine, "icmp")) == 1
    finally:
        engine.docker("rm -f job jailed")
        engine.docker("network rm mine inner")


def test_a_container_started_again_on_the_same_address(engine: Engine, tmp_path: Path) -> None:
    again = f"for n in 1 2; do docker run --rm --label test busybox ping -q -c 2 -i 0.1 {SERVER}; done"
    done = engine.nattrace(
        "capture", "-w", f"{tmp_path}/b", "--filter", "icmp[0] = 8 or icmp[0] = 0", "--", "sh", "-c", again
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"docker0": 8, "eth0": 8}
    report = report_of(tmp_path / "b")
    assert report["accounting"]["matched"] == 16
    assert translations(report) == conntrack(engine, "icmp")


def test_a_network_with_ipv6(engine: Engine, tmp_path: Path) -> None:
    engine.docker("network create --ipv6 --subnet fd00:9::/64 six")
    try:
        run(engine, "--name job --network six busybox sleep 600")
        done = engine.nattrace(
            *("capture", "--network", "six", "-i", "eth0", "-w", f"{tmp_path}/b"),
            *("--filter", "icmp6[0] = 128 or icmp6[0] = 129"),
            *("--", "docker", "exec", "job", "ping", "-q", "-c", "3", "-i", "0.1", SERVERS_V6[0]),
        )
        assert done.returncode == 0, done.stderr
        assert "3 packets transmitted, 3 packets received" in done.stderr
        assert list(captured(tmp_path / "b").values()) == [6, 6]
        assert translations(report_of(tmp_path / "b")) == conntrack(engine, "icmpv6")
        assert len(conntrack(engine, "icmpv6")) == 1
    finally:
        engine.docker("rm -f job")
        engine.docker("network rm six")


def test_a_published_port_reached_from_inside_is_no_translation(engine: Engine, tmp_path: Path) -> None:
    run(engine, "-p 8082:80 busybox httpd -f -p 80")
    run(engine, "--name job busybox sleep 600")
    done = engine.nattrace(
        *("capture", "--container", "job", "-i", "docker0", "-w", f"{tmp_path}/b", "--filter", "tcp", "--"),
        *("docker", "exec", "job", "sh", "-c", f"echo | nc -w 1 {UPLINK} 8082"),
    )
    assert done.returncode == 0, done.stderr
    counts = captured(tmp_path / "b")
    cable = next(name for name in counts if name.startswith("veth"))
    assert counts["job:eth0"] == counts[cable]
    # docker-proxy answers it (Docker's rule says ! -i docker0): two connections pass the bridge
    assert (counts["docker0"] or 0) > (counts["job:eth0"] or 0) > 6
    assert translations(report_of(tmp_path / "b")) == set() == conntrack(engine, "tcp")


def test_auto_takes_the_bridges_in_use_and_the_way_out(engine: Engine, tmp_path: Path) -> None:
    engine.docker("network create busy")
    engine.docker("network create idle")
    try:
        run(engine, "--name job --network busy busybox sleep 600")
        bridge = "br-" + engine.docker("network inspect -f {{.Id}} busy")[:12]
        done = engine.nattrace("capture", "--auto", "-w", f"{tmp_path}/b", "--", "true")
        assert done.returncode == 0, done.stderr
        assert set(captured(tmp_path / "b")) == {"docker0", "eth0", bridge}
        assert f"capturing on {bridge}, docker0, eth0" in done.stderr
    finally:
        engine.docker("rm -f job")
        engine.docker("network rm busy idle")
