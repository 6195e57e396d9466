"""End to end on a real engine: what containers did, against what they counted and what the kernel translated."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lab.topology import GATEWAY, SERVERS, SERVERS_V6, UPLINK

import nattrace
from nattrace.bundle.manifest import Manifest, parse_manifest
from nattrace.report.json import report_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capture.engine import Engine

SERVER = SERVERS[0]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(engine: Engine) -> Iterator[None]:
    before = engine.left()
    engine.host.run("conntrack -F")
    yield
    for container in set(engine.docker("ps -aq --filter label=test").split()):
        engine.docker(f"rm -f {container}")
    assert engine.left() == before


def run(engine: Engine, words: str) -> str:
    """Start a container that the test removes; return its id."""
    return engine.docker(f"run -d --label test {words}")


def manifest_of(folder: Path) -> Manifest:
    read = parse_manifest((folder / "manifest.json").read_bytes(), "m")
    assert read is not None
    return read


def captured(folder: Path) -> dict[str, int | None]:
    manifest = manifest_of(folder)
    assert [point.problem for point in manifest.points] == [None] * len(manifest.points)
    assert all(point.counters and point.counters.dropped_by_kernel == 0 for point in manifest.points)
    return {point.name: point.counters.captured if point.counters else None for point in manifest.points}


def report_of(folder: Path) -> Any:
    return report_dict(nattrace.analyze(str(folder)))


def translations(report: Any) -> set[tuple[Any, ...]]:
    """Both tuples of every translation, in conntrack's words."""
    return {
        tuple(
            tuple(t[way].get(key) for key in ("src", "dst", "sport", "dport", "id"))
            for way in ("original", "reply")
        )
        for flow in report["flows"]
        for t in flow["translations"]
    }


def conntrack(engine: Engine, protocol: str) -> set[tuple[Any, ...]]:
    """Both tuples of every entry that the kernel has translated."""
    entries = set()
    family = "ipv6" if protocol == "icmpv6" else "ipv4"
    for line in engine.host.run(f"conntrack -L -f {family} -p {protocol}").splitlines():
        ways: list[dict[str, str]] = []
        for word in line.split():
            key, _, value = word.partition("=")
            if key == "src":
                ways.append({})
            if ways and key in {"src", "dst", "sport", "dport", "id"}:
                ways[-1].setdefault(key, value)
        entry = tuple(
            tuple(
                int(way[key]) if key not in {"src", "dst"} and key in way else way.get(key)
                for key in ("src", "dst", "sport", "dport", "id")
            )
            for way in ways[:2]
        )
        if entry[0][:2] != entry[1][:2][::-1]:
            entries.add(entry)
    return entries


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


def test_an_engine_that_restarts_costs_what_was_running_and_leaves_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    with capturing(engine, tmp_path, "-i", "eth0") as process:
        engine.stop()
        engine.start()
        wait_for(lambda: process.poll() is not None)
    (point,) = manifest_of(tmp_path / "b").points
    assert point.problem
    done = engine.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/again", "--", "true")
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "again")


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


def test_an_engine_that_is_elsewhere(engine: Engine, tmp_path: Path) -> None:
    run(engine, "--name job busybox sleep 600")
    elsewhere = "tcp://127.0.0.1:2375"
    points = ["-i", "docker0", "-i", "eth0", "--container", "job"]
    done = engine.nattrace(
        *("capture", *points, "-w", f"{tmp_path}/b", "--filter", "icmp", "--"),
        *("docker", "exec", "job", "ping", "-q", "-c", "2", "-i", "0.1", SERVER),
        url=elsewhere,
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"docker0": 4, "eth0": 4, "job:eth0": 4}
    manifest = manifest_of(tmp_path / "b")
    # what this machine knows is not what that one knows
    assert [each.what for each in manifest.missing] == ["host"]
    assert {what.partition("/")[2] for what in manifest.context} == {"docker-networks", "docker-containers"}
    assert translations(report_of(tmp_path / "b")) == conntrack(engine, "icmp")
    done = engine.nattrace("capture", "-w", f"{tmp_path}/auto", "--", "true", url=elsewhere)
    assert done.returncode == 2
    assert "the engine is on another machine, whose interfaces are not known; give -i IF" in done.stderr


def test_a_helper_can_do_nothing_but_capture(engine: Engine, tmp_path: Path) -> None:
    with capturing(engine, tmp_path, "-i", "docker0"):
        (helper,) = engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()
        (facts,) = json.loads(engine.docker(f"inspect {helper}"))
        host = facts["HostConfig"]
        assert host["CapDrop"] == ["ALL"]
        assert set(host["CapAdd"]) <= {"NET_RAW", "CAP_NET_RAW", "SETGID", "CAP_SETGID"}
        assert host["ReadonlyRootfs"]
        assert not host["Privileged"]
        assert "no-new-privileges" in host["SecurityOpt"][0]
        assert [(mount["Type"], mount["Destination"]) for mount in facts["Mounts"]] == [
            ("volume", "/capture")
        ]
        status = Path(f"/proc/{facts['State']['Pid']}/status").read_text()
        words = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        # CAP_NET_RAW is bit 13, CAP_SETGID bit 6 (linux/capability.h)
        assert int(words["CapEff"], 16) & ~(1 << 13 | 1 << 6) == 0
        assert words["NoNewPrivs"].strip() == "1"


def test_what_a_killed_capture_left_is_removed_by_the_next(engine: Engine, tmp_path: Path) -> None:
    with capturing(engine, tmp_path, "-i", "docker0", "-i", "eth0") as process:
        process.kill()
        process.wait()
    assert len(engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()) == 2
    done = engine.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/again", "--", "true")
    assert done.returncode == 0, done.stderr
    assert "removed 2 helper containers of a capture that was killed" in done.stderr


def test_a_capture_that_runs_is_left_alone_by_another(engine: Engine, tmp_path: Path) -> None:
    with capturing(engine, tmp_path, "-i", "docker0"):
        done = engine.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/other", "--", "true")
        assert done.returncode == 0, done.stderr
        assert "removed" not in done.stderr
        assert len(engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()) == 1
    assert captured(tmp_path / "b") == {"docker0": 0}


def test_a_removed_helper_and_a_removed_container_are_said(engine: Engine, tmp_path: Path) -> None:
    run(engine, "--name job busybox sleep 600")
    with capturing(engine, tmp_path, "--container", "job", "-i", "eth0") as process:
        helpers = engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()
        (eth0,) = [helper for helper in helpers if "/capture/eth0.pcap" in engine.docker(f"inspect {helper}")]
        engine.docker(f"rm -f {eth0}")
        engine.docker("rm -f job")
        wait_for(
            lambda: (
                process.poll() is not None
                or len(engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()) <= 1
            )
        )
    problems = {point.name: point.problem or "" for point in manifest_of(tmp_path / "b").points}
    assert re.search("killed by signal 9|container is gone", problems["eth0"])
    cable = next(name for name in problems if name.startswith("veth"))
    assert "tcpdump ended with exit code 1 before the capture was stopped" in problems[cable]


def test_the_installed_tcpdump_needs_nothing_of_the_host(engine: Engine, tmp_path: Path) -> None:
    done = engine.nattrace("install-tcpdump", "--target", str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    # an image without a single library
    shown = engine.docker(f"run --rm -v {tmp_path}/bin:/opt/bin busybox /opt/bin/tcpdump --version")
    assert "libpcap version" in shown
    done = engine.nattrace(
        *("capture", "--tcpdump", str(tmp_path / "bin/tcpdump"), "-i", "eth0", "--filter", "icmp"),
        *("-w", f"{tmp_path}/b", "--", "ping", "-q", "-c", "2", "-i", "0.1", GATEWAY),
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"eth0": 4}


def test_the_image_alone_installs_too(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    engine.docker(f"run --rm -v {tmp_path}/target:/target localtcpdump")
    shown = subprocess.run(
        [tmp_path / "target/tcpdump", "--version"], capture_output=True, text=True, check=True
    )
    assert "libpcap version" in shown.stdout + shown.stderr


def test_an_image_from_a_distribution(engine: Engine, tmp_path: Path) -> None:
    """The other Dockerfile, from a base that has a tcpdump already: nothing can be installed without a registry."""
    library = engine.folder / "bin/tcpdump.lib"
    files = {f"lib/{path.name}": path.read_bytes() for path in library.iterdir() if ".so." in path.name}
    files["bin/tcpdump"] = (library / "tcpdump").read_bytes()
    found = re.search(rb"/lib[^\0]*/ld-[^\0]*\.so\.\d", files["bin/tcpdump"])
    assert found is not None
    loader = found[0].decode()
    files[loader.lstrip("/")] = (library / "ld.so").read_bytes()
    files["bin/ldd"] = f'#!/bin/sh\nexec {loader} --list "$1"\n'.encode()
    files["bin/busybox"] = Path(str(shutil.which("busybox"))).read_bytes()
    files["etc/passwd"] = b"root:x:0:0:root:/:\n"
    applets = ("sh", "cp", "sed", "mkdir", "chmod")
    engine.import_image("distribution", files, {f"bin/{name}": "busybox" for name in applets})
    engine.docker("rmi localtcpdump")
    words = ["--build", "base", "--base", "distribution"]
    done = engine.nattrace("install-tcpdump", *words, "--target", str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert "building the helper image localtcpdump from distribution" in done.stderr
    assert {path.name for path in (tmp_path / "bin/tcpdump.lib").iterdir()} >= {"tcpdump", "libc.so.6"}
    shown = engine.docker("inspect -f {{.Config.Labels}} localtcpdump")
    assert "org.nattrace.helper:1" in shown


def test_a_dry_run_can_be_run_by_hand(engine: Engine, tmp_path: Path) -> None:
    words = ["capture", "-i", "eth0", "-w", f"{tmp_path}/b", "--dry-run", "--filter", "icmp", "--"]
    text = engine.nattrace(*words, "ping", "-q", "-c", "2", "-i", "0.1", GATEWAY).stdout
    assert not (tmp_path / "b").exists()
    text = text.replace("nattrace bundle", f"{sys.executable} -m nattrace bundle")
    done = subprocess.run(
        engine.host.command("sh", "-c", text),
        env=engine.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"eth0": 4}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--container", "nosuch"], "nosuch: no such container; running: "),
        (["--network", "nosuch"], "nosuch: no such network; there are bridge, host, none"),
        (["--network", "host"], "host: a host network has no bridge"),
        (["-i", "nosuch0"], "nosuch0: no such interface; there are docker0, eth0, lo"),
        (["-i", "eth0", "--image", "nosuch"], "image nosuch: the engine has none; docker pull nosuch"),
        (["-i", "eth0", "--image", "busybox"], "eth0: the engine starts no helper: "),
        (["-i", "eth0", "--filter", "no such"], "eth0: tcpdump does not start: can't parse filter"),
        (["-i", "eth0", "--", "/nonexistent"], "/nonexistent: cannot be run"),
    ],
)
def test_what_is_not_there_is_one_line(
    engine: Engine, tmp_path: Path, words: list[str], message: str
) -> None:
    done = engine.nattrace("capture", "-w", f"{tmp_path}/b", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "b").exists()


def wait_for(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def capturing(engine: Engine, folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A capture into `folder`/b that listens inside the block and is ended like with ctrl-C after it."""
    mark = folder / "ready"
    lasts = f"echo $$ > {mark}.new; mv {mark}.new {mark}; exec sleep 60"
    command = engine.command("capture", *words, "-w", f"{folder}/b", "--", "sh", "-c", lasts)
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, env=engine.environment, stderr=said)
    try:
        wait_for(lambda: mark.exists() or process.poll() is not None)
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert process.returncode in {0, -signal.SIGKILL}, (folder / "said").read_text()
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(mark.read_text()), signal.SIGKILL)
