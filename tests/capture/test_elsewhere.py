"""An engine on another machine: points and context come out of helpers there, the same as if taken here."""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.topology import SERVERS

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

#: The engine's own machine, spoken to as if it were another one.
ELSEWHERE = "tcp://127.0.0.1:2375"

#: What must look the same whoever took it; counters and conntrack's entries change meanwhile.
JSON = ("links", "addresses", "routes", "rules", "nft")
TEXT = ("iptables-save", "ip6tables-save")


def test_points_and_container_of_an_engine_that_is_elsewhere(engine: Engine, tmp_path: Path) -> None:
    run(engine, "--name job busybox sleep 600")
    points = ["-i", "docker0", "-i", "eth0", "--container", "job"]
    done = engine.nattrace(
        *("capture", *points, "-w", f"{tmp_path}/b", "--filter", "icmp", "--"),
        *("docker", "exec", "job", "ping", "-q", "-c", "2", "-i", "0.1", SERVER),
        url=ELSEWHERE,
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"docker0": 4, "eth0": 4, "job:eth0": 4}
    ((original, reply),) = conntrack(engine, "icmp")
    assert translations(report_of(tmp_path / "b")) == {(original, reply)}
    events = (tmp_path / "b/context/during/conntrack-events.txt").read_text()
    assert re.search(
        rf"NEW\] .*src={original[0]} dst={SERVER} .*id={original[4]} .*dst={reply[1]} .*id={reply[4]}", events
    )
    after = (tmp_path / "b/context/after/conntrack.txt").read_text()
    assert f"src={original[0]} dst={SERVER} " in after


def test_which_interfaces_it_has_is_asked_there(engine: Engine, tmp_path: Path) -> None:
    done = engine.nattrace("capture", "-w", f"{tmp_path}/auto", "--", "true", url=ELSEWHERE)
    assert done.returncode == 0, done.stderr
    points = manifest_of(tmp_path / "auto").points
    assert [(point.name, point.ifindex) for point in points] == [
        (name, int(engine.host.run(f"cat /sys/class/net/{name}/ifindex"))) for name in ("docker0", "eth0")
    ]
    done = engine.nattrace("capture", "-w", f"{tmp_path}/b", "-i", "nosuch", "--", "true", url=ELSEWHERE)
    assert done.returncode == 2
    assert "nosuch: no such interface; there are docker0, eth0, lo" in done.stderr
    done = engine.nattrace("capture", "-w", f"{tmp_path}/b", "--dry-run", url=ELSEWHERE)
    assert done.returncode == 2
    assert (
        "the engine's interfaces are not known: its machine is not asked in a dry run; give -i" in done.stderr
    )
    done = engine.nattrace("capture", "-w", f"{tmp_path}/b", "--dry-run", "-i", "eth0", url=ELSEWHERE)
    assert done.stdout.startswith("# For the engine's machine, ")
    local = engine.nattrace("capture", "-w", f"{tmp_path}/b", "--dry-run", "-i", "eth0").stdout
    assert done.stdout.partition("\n")[2] == local


def test_the_context_is_the_one_taken_there(engine: Engine, tmp_path: Path) -> None:
    host = engine.host
    run(engine, "--name job -p 8090:80 busybox sleep 600")
    with ExitStack() as stack:
        for made, undone in (
            ("ip rule add fwmark 0x10/0xff table 100 priority 500", "ip rule del priority 500"),
            (
                "ip rule add from 172.17.0.0/24 iif docker0 unreachable priority 600",
                "ip rule del priority 600",
            ),
            ("ip -6 rule add to fd00:7::/64 goto 32766 priority 700", "ip -6 rule del priority 700"),
            ("ip route add default via 203.0.113.1 table 100 metric 7", "ip route flush table 100"),
            ("ip route add blackhole 192.0.2.0/24", "ip route del 192.0.2.0/24"),
            (
                "ip route add 192.0.2.128/25 nexthop via 203.0.113.1 weight 2 nexthop via 203.0.113.2",
                "ip route del 192.0.2.128/25",
            ),
            ("ip link add odd.1@b type bridge", "ip link del odd.1@b"),
            ("ip link add pair1 type veth peer name pair2", "ip link del pair1"),
            ("iptables -t mangle -A FORWARD -p tcp -m comment --comment x -j TCPMSS --set-mss 1200",) * 2,
        ):
            host.run(made)
            stack.callback(host.run, undone.replace(" -A ", " -D "))
        # The other kind of iptables, where the kernel still has it: its rules are in force as well.
        legacy = "iptables-legacy -t nat -A POSTROUTING -s 192.0.2.7 -j MASQUERADE"
        has_legacy = (
            subprocess.run(host.command(*legacy.split()), check=False, capture_output=True).returncode == 0
        )
        if has_legacy:
            stack.callback(host.run, legacy.replace(" -A ", " -D "))
        # Interfaces get their IPv6 addresses and routes a second or two after they came up.
        wait_for(lambda: is_settled(engine))
        taken = {}
        for name, url in (("here", engine.url), ("there", ELSEWHERE)):
            done = engine.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/{name}", "--", "true", url=url)
            assert done.returncode == 0, done.stderr
            manifest = manifest_of(tmp_path / name)
            assert manifest.missing == ()
            taken[name] = {
                what: (tmp_path / name / file).read_text() for what, file in manifest.context.items()
            }
    here, there = taken["here"], taken["there"]
    assert here.keys() == there.keys()
    for phase in ("before", "after"):
        for what in JSON:
            assert uncounted(there[f"{phase}/{what}"]) == uncounted(here[f"{phase}/{what}"]), what
        for what in TEXT:
            assert rules(there[f"{phase}/{what}"]) == rules(here[f"{phase}/{what}"])
    assert len(json.loads(here["after/rules"])) >= 8
    assert has_legacy == ("-s 192.0.2.7/32 -j MASQUERADE" in there["after/iptables-save"])
    assert "-j TCPMSS --set-mss 1200" in there["after/iptables-save"]
    assert [each["Name"] for each in json.loads(there["after/docker-containers"])] == ["/job"]


def is_settled(engine: Engine) -> bool:
    """Whether nothing about interfaces and routes changes for more than a second."""

    def state() -> list[str]:
        return [engine.host.run(f"ip {what}") for what in ("link", "address", "-6 route show table all")]

    before = state()
    time.sleep(1.5)
    return state() == before


def uncounted(text: str) -> Any:
    """A context file's JSON without nft's counters: asking the engine is traffic on lo."""
    return json.loads(re.sub(r'"(packets|bytes)": \d+', r'"\1": 0', text))


def rules(saved: str) -> list[str]:
    """The lines of iptables-save without its remarks, which hold the time, and without counters."""
    return [re.sub(r"\[\d+:\d+\]", "", line) for line in saved.splitlines() if not line.startswith("#")]


def test_the_helper_for_the_context_has_two_rights_and_no_mount(engine: Engine, tmp_path: Path) -> None:
    with capturing(engine, tmp_path, "-i", "eth0", url=ELSEWHERE):
        found = engine.docker("ps -q --filter label=org.nattrace.capture.owner").split()
        facts = json.loads(engine.docker(f"inspect {' '.join(found)}"))
        (helper,) = [each for each in facts if each["Path"] == "sleep"]
        assert len(facts) == 2
        assert (helper["Mounts"], helper["HostConfig"]["Privileged"]) == ([], False)
        assert helper["HostConfig"]["ReadonlyRootfs"]
        processes = engine.docker(f"top {helper['Id']} -eo pid,comm").splitlines()[1:]
        names = {line.split()[1]: line.split()[0] for line in processes}
        assert names.keys() == {"sleep", "conntrack"}
        for process_id in names.values():
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{process_id}/status").read_text().splitlines()
                if ":\t" in line
            )
            # CAP_NET_ADMIN is bit 12, CAP_NET_RAW bit 13 (linux/capability.h)
            assert int(status["CapEff"], 16) == 1 << 12 | 1 << 13
            assert status["NoNewPrivs"].strip() == "1"


def test_what_the_image_lacks_is_named(engine: Engine, tmp_path: Path) -> None:
    """The helper image without conntrack and with an ip that knows no JSON, as BusyBox has it."""
    made = engine.docker("create localtcpdump")
    exported = subprocess.run(
        ["docker", "export", made], env=engine.environment, capture_output=True, check=True, timeout=60
    ).stdout
    engine.docker(f"rm {made}")
    lean = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(exported)) as whole, tarfile.open(fileobj=lean, mode="w") as archive:
        for member in whole:
            if member.name not in {"usr/bin/conntrack", "usr/bin/ip"}:
                archive.addfile(member, whole.extractfile(member) if member.isfile() else None)
        script = b"#!/usr/bin/sh\necho 1: lo\n"
        info = tarfile.TarInfo("usr/bin/ip")
        info.size, info.mode = len(script), 0o755
        archive.addfile(info, io.BytesIO(script))
    subprocess.run(
        ["docker", "import", "-", "lean"],
        input=lean.getvalue(),
        env=engine.environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    try:
        words = ["capture", "-i", "eth0", "--image", "lean", "-w", f"{tmp_path}/b", "--", "true"]
        done = engine.nattrace(*words, url=ELSEWHERE)
        assert done.returncode == 0, done.stderr
    finally:
        engine.docker("rmi lean")
    manifest = manifest_of(tmp_path / "b")
    assert {each.what: each.needs for each in manifest.missing} == {
        **dict.fromkeys(("links", "addresses", "routes", "rules"), "ip of iproute2"),
        **dict.fromkeys(("conntrack", "conntrack-events"), "conntrack in the helper image"),
    }
    assert {file.partition("/")[2] for file in manifest.context} == {
        *("iptables-save", "ip6tables-save", "nft", "docker-networks", "docker-containers")
    }
    assert captured(tmp_path / "b").keys() == {"eth0"}
