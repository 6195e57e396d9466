"""Everything that containers do, at once: two networks, ports in use twice, published ports, proxies, fragments, errors."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from lab.topology import SERVERS, UPLINK

import nattrace
from capture import busy
from capture.evidence import captured, conntrack_events, report_of, run, translations, wait_for
from nattrace.model import Unmatched

if TYPE_CHECKING:
    from pathlib import Path

    from capture.engine import Engine

ONE, TWO = SERVERS[:2]
CONTAINERS = {
    "web": f"-p {busy.PUBLISHED[0]}:80",
    "shop": f"-p {busy.PUBLISHED[1]}:80 --network mine",
    "job1": "",
    "job2": "",
    "job3": "--network mine",
}
RANDOM = "iptables -t nat -{} POSTROUTING -s 172.16.0.0/12 -o eth0 -j MASQUERADE --random-fully"


def program(*words: str) -> list[str]:
    return [sys.executable, busy.__file__, *words]


def inside(process_id: str, *words: str) -> list[str]:
    return ["nsenter", f"--net=/proc/{process_id}/ns/net", *program(*words)]


def dropped(engine: Engine) -> int:
    """Packets that conntrack itself dropped: two that want one tuple at the same instant cannot both have it."""
    return sum(map(int, re.findall(r"\bdrop=(\d+)", engine.host.run("conntrack -S"))))


@pytest.mark.parametrize("ports", ["kept", "random"])
def test_every_translation_of_a_busy_host_is_the_kernels(engine: Engine, tmp_path: Path, ports: str) -> None:
    with ExitStack() as stack:
        if ports == "random":
            engine.host.run(RANDOM.format("I"))
            stack.callback(engine.host.run, RANDOM.format("D"))
        engine.docker("network create mine")
        stack.callback(engine.docker, "network rm mine")
        stack.callback(engine.docker, f"rm -f {' '.join(CONTAINERS)}")
        process_ids = {}
        for name, options in CONTAINERS.items():
            run(engine, f"--name {name} {options} busybox sleep 600")
            process_ids[name] = engine.docker(f"inspect -f {{{{.State.Pid}}}} {name}")
        servers = [engine.internet.command(*program("serve", ONE, TWO))]
        servers += [inside(process_ids[name], "serve", "0.0.0.0") for name in ("web", "shop")]
        for command in servers:
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
        wait_for(lambda: f"{TWO}:{busy.UDP_PORT}" in engine.internet.run("ss -lunt"))

        jobs = [name for name in CONTAINERS if name.startswith("job")]
        tasks = [inside(process_ids[name], "ask", str(n), ONE, TWO, UPLINK) for n, name in enumerate(jobs)]
        tasks += [["docker", "exec", name, "ping", "-q", "-c5", "-i0.2", ONE] for name in jobs]
        tasks += [["docker", "exec", name, "ping", "-q", "-c3", "-i0.2", "-s4000", TWO] for name in jobs]
        tasks += [engine.internet.command(*program("fetch", UPLINK, "4")), program("fetch", "127.0.0.1", "2")]
        all_at_once = "".join(f"{' '.join(task)} & " for task in tasks) + "wait"
        before = dropped(engine)
        done = engine.nattrace(
            *("capture", "-i", "docker0", "-i", "eth0", "--network", "mine", "-w", f"{tmp_path}/b"),
            *("--", "sh", "-c", all_at_once),
        )
        gone = dropped(engine) - before
    assert done.returncode == 0, done.stderr
    pings = re.findall(r"(\d+) packets transmitted, (\d+) packets received", done.stderr)
    assert len(pings) == 2 * len(jobs)
    assert sum(int(sent) - int(received) for sent, received in pings) <= gone
    assert sum(n or 0 for n in captured(tmp_path / "b").values()) > 1000
    report = report_of(tmp_path / "b")
    expected = conntrack_events(tmp_path / "b")
    assert translations(report) == expected
    # of each of three containers 8 + 3 TCP and 14 UDP conversations and two pings; 8 from outside
    assert 0 <= 3 * (11 + 14 + 2) + 8 - len(expected) <= gone
    crossings = [crossing for flow in report["flows"] for crossing in flow["crossings"]]
    assert sum(crossing["matched"] for crossing in crossings) > 500
    # Two acknowledgements that are alike in everything, identification 0 among it, may be told apart by nothing; and a
    # datagram that says what all say, held up by a loaded machine, has nearer ones for rivals. Few are, and none is lost.
    rows = list(nattrace.analyze(tmp_path / "b").rewrites.all())
    seen = [
        p for row in rows for p in ([row.packet] if isinstance(row, Unmatched) else [row.before, row.after])
    ]
    alike = Counter(replace(packet, frame=0, time=None) for packet in set(seen))
    doubtful = [row.packet for row in rows if isinstance(row, Unmatched) and row.reason == "ambiguous"]
    twins = [
        p for p in doubtful if (p.ip_id, p.length) == (0, 0) and alike[replace(p, frame=0, time=None)] > 1
    ]
    others = [packet for packet in doubtful if packet not in twins]
    assert {(packet.protocol, packet.length) for packet in others} <= {("udp", size) for size in busy.SAME}
    assert len(others) <= len(seen) / 500
    assert sum(crossing["lost"] for crossing in crossings) == gone
    if ports == "random":
        kept = [original[2:] == reply[3:1:-1] for original, reply in expected if original[2] is not None]
        assert sum(kept) < len(kept) / 2
