"""Helper containers on a real engine: what they may do, how they end, what they leave, and the image they come from."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.topology import GATEWAY

from capture.evidence import captured, capturing, manifest_of, run, wait_for

if TYPE_CHECKING:
    from capture.engine import Engine


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
        (eth0,) = [helper for helper in helpers if "/eth0.pcap" in engine.docker(f"inspect {helper}")]
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


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_before_anything_is_captured_or_twice_leaves_no_folder(
    engine: Engine, tmp_path: Path, times: int
) -> None:
    words = ["capture", "-i", "eth0", "--filter", "udp port 9", "-w", f"{tmp_path}/b", "--"]
    words += ["sh", "-c", f"touch {tmp_path}/listening; exec sleep 20"]
    process = subprocess.Popen(
        engine.command(*words), env=engine.environment, stderr=subprocess.PIPE, text=True
    )
    with process:
        wait_for(tmp_path.joinpath("b" if times == 1 else "listening").exists)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "nattrace: interrupted\n")
    assert not (tmp_path / "b").exists()


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
    # whom Debian's tcpdump gives its file to, and becomes, unless told otherwise
    files["etc/passwd"] = b"root:x:0:0:root:/:\ntcpdump:x:100:101::/:\n"
    files["etc/group"] = b"root:x:0:\ntcpdump:x:101:\n"
    applets = ("sh", "cp", "sed", "mkdir", "chmod", "sleep", "stat")
    engine.import_image("distribution", files, {f"bin/{name}": "busybox" for name in applets})
    engine.docker("tag localtcpdump kept")  # later tests want what this one does not have
    engine.docker("rmi localtcpdump")
    words = ["--build", "base", "--base", "distribution"]
    done = engine.nattrace("install-tcpdump", *words, "--target", str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert "building the helper image localtcpdump from distribution" in done.stderr
    assert {path.name for path in (tmp_path / "bin/tcpdump.lib").iterdir()} >= {"tcpdump", "libc.so.6"}
    shown = engine.docker("inspect -f {{.Config.Labels}} localtcpdump")
    assert "org.nattrace.helper:2" in shown
    ping = ["ping", "-q", "-c", "2", "-i", "0.1", GATEWAY]
    done = engine.nattrace("capture", "-i", "eth0", "--filter", "icmp", "-w", f"{tmp_path}/b", "--", *ping)
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"eth0": 4}
    engine.docker("tag kept localtcpdump")
    engine.docker("rmi kept")


def test_a_base_that_nothing_can_be_installed_in_is_one_line(engine: Engine, tmp_path: Path) -> None:
    engine.docker("tag localtcpdump kept")
    engine.docker("rmi localtcpdump")
    try:
        words = ["--build", "base", "--base", "busybox", "--target", str(tmp_path / "bin")]
        done = engine.nattrace("install-tcpdump", *words)
        assert done.returncode == 2
        said = done.stderr.splitlines()[-1]
        assert said.endswith(
            "cannot be built: no tcpdump in this image, and no apk, apt-get or dnf to install it with"
        )
    finally:
        engine.docker("tag kept localtcpdump")
        engine.docker("rmi kept")


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
    context = manifest_of(tmp_path / "b").context
    taken = {"links", "addresses", "routes", "rules", "iptables-save", "ip6tables-save", "nft", "conntrack"}
    taken |= {"docker-networks"}
    events = "during/conntrack-events"
    assert context.keys() == {f"{phase}/{name}" for phase in ("before", "after") for name in taken} | {events}
    assert f"dst={GATEWAY} type=8" in (tmp_path / "b" / context[events]).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--container", "nosuch"], "nosuch: no such container; running: "),
        (["--network", "nosuch"], "nosuch: no such network; there are bridge, host, none"),
        (["--network", "host"], "host: a host network has no bridge"),
        (["-i", "nosuch0"], "nosuch0: no such interface; there are docker0, eth0, lo"),
        (["-i", "eth0", "--image", "nosuch"], "image nosuch: the engine has none; docker pull nosuch"),
        (["-i", "eth0", "--image", "busybox"], "eth0: tcpdump does not start: "),
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
