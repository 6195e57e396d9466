"""Proxies are told apart from NAT, and from strangers that say the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from simulation import Network, Simulated, masquerade, routed

import nattrace

if TYPE_CHECKING:
    from simulation import Conversation

    from nattrace.model import Finding

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lab"
SYN, SYN_ACK, PSH, FIN, RST, ACK = 0x02, 0x12, 0x18, 0x11, 0x14, 0x10
QUESTION, ANSWER = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"page" * 100
#: Of one exchange through a proxy: who calls it, where it listens, from where it calls, whom.
CALLER, LISTENS, OWN, BACKEND = "203.0.113.5", "203.0.113.10", "172.17.0.1", "172.17.0.2"


class Session:
    """A TCP connection from SYN to FIN, a step at a time, so that two can lie in each other."""

    def __init__(self, network: Network, conversation: Conversation) -> None:
        self.network, self.c = network, conversation

    def _send(self, data: bytes = b"", *, reply: bool = False, flags: int = PSH) -> None:
        self.network.wait_us(30, 60)
        self.network.send(self.c, data, reply=reply, flags=flags, ip_id=0)
        if flags & 0x03:  # SYN and FIN take one number
            name = "ack" if reply else "seq"
            setattr(self.c, name, (getattr(self.c, name) + 1) & 0xFFFFFFFF)

    def open(self) -> None:
        """Shake hands."""
        self._send(flags=SYN)
        self._send(flags=SYN_ACK, reply=True)
        self._send(flags=ACK)

    def ask(self, data: bytes = QUESTION, pieces: int = 1) -> None:
        """Send data to the server."""
        step = -(-len(data) // pieces)
        for at in range(0, len(data), step):
            self._send(data[at : at + step])

    def answer(self, data: bytes = ANSWER, pieces: int = 1) -> None:
        """Send data to the client."""
        step = -(-len(data) // pieces)
        for at in range(0, len(data), step):
            self._send(data[at : at + step], reply=True)

    def close(self, end: int = FIN) -> None:
        """End both directions."""
        self._send(flags=FIN)
        self._send(flags=end, reply=True)


def proxied_session(outer: Session, inner: Session, pieces: int = 1) -> None:
    outer.open()
    outer.ask()
    inner.open()
    inner.ask(pieces=pieces)
    inner.answer()
    outer.answer(pieces=pieces)
    outer.close()
    inner.close()


def at(network: Network, client: tuple[str, int], server: tuple[str, int], point: str) -> Session:
    return Session(network, routed("tcp", client, server, points=(point,)))


def pair(network: Network, number: int = 0) -> tuple[Session, Session]:
    """Return what docker-proxy shows: the client's connection outside, its own inside."""
    outer = at(network, (CALLER, 50000 + number), (LISTENS, 8080), "outside")
    return outer, at(network, (OWN, 40000 + number), (BACKEND, 80), "inside")


def findings(truth: Simulated) -> list[Finding]:
    """Return the findings about proxies. Whatever they are, a proxy is no translation."""
    report = nattrace.analyze(*truth.sources)
    assert not [t for flow in report.flows for t in flow.translations]
    return [finding for finding in report.findings if finding.code == "proxied"]


def test_docker_proxy_is_seen_at_work() -> None:
    """Recorded from Docker's own program: another host through eth0, its own host through the loopback."""
    report = nattrace.analyze(*sorted((FIXTURES / "docker_proxy").glob("*.pcap")))
    proxied = [finding for finding in report.findings if finding.code == "proxied"]
    flows = {flow.id: flow for flow in report.flows}

    told = [
        [(flows[n].path, flows[n].initiator.src, flows[n].initiator.dst, flows[n].initiator.dport) for n in f.flows]
        for f in proxied
    ]  # fmt: skip
    inner = (("docker0",), "172.17.0.1", "172.17.0.2", 80)
    assert told == [
        [(("eth0",), "203.0.113.1", "203.0.113.10", 8080), inner],
        [(("lo",), "127.0.0.1", "127.0.0.1", 8080), inner],
    ]
    assert not list(report.rewrites)
    assert {f.severity for f in proxied} == {"info"}
    # 90 + 40 and 3000 + 200 bytes were sent
    assert all("130 bytes out, 3200 back" in f.message and "172.17.0.1" in f.message for f in proxied)
    assert all("userland-proxy" in (f.advice or "") for f in proxied)


def test_a_relay_behind_a_translated_port() -> None:
    """NAT to the relay and the relay's own connection: one translation, one proxy; segments were cut anew."""
    report = nattrace.analyze(*sorted((FIXTURES / "relay_behind_nat").glob("*.pcap")))
    (proxied,) = [finding for finding in report.findings if finding.code == "proxied"]
    outer, inner = (flow for flow in report.flows if flow.id in proxied.flows)
    assert (outer.status, outer.path, outer.initiator.dport) == ("translated", ("eth0", "docker0"), 8080)
    assert (inner.status, inner.path, inner.initiator.dport) == ("one-sided", ("docker0",), 80)
    assert [ref.point for ref in proxied.packets] == ["docker0", "docker0"]


@pytest.mark.parametrize("point", ["inside", "outside"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_proxy_with_one_address(pieces: int, point: str, tmp_path: Path) -> None:
    """Both connections at one point or at two; what it forwards is cut into other segments."""
    network = Network()
    outer = at(network, (CALLER, 50000), (LISTENS, 8080), "outside")
    proxied_session(outer, at(network, (LISTENS, 40000), (BACKEND, 80), point), pieces)
    (found,) = findings(network.write(tmp_path))
    assert found.flows == (1, 2)


def test_many_connections_of_one_proxy_are_one_finding(tmp_path: Path) -> None:
    network = Network()
    for number in range(12):
        proxied_session(*pair(network, number))
        network.wait_us(2000)
    (found,) = findings(network.write(tmp_path))
    assert found.flows == tuple(range(1, 25))
    assert "12 pairs of flows" in found.message


def test_connections_that_end_with_a_reset(tmp_path: Path) -> None:
    network = Network()
    outer, inner = pair(network)
    for session in (outer, inner):
        session.open()
    for session in (outer, inner):
        session.ask()
    for session in (inner, outer):
        session.answer()
    outer.close(end=RST)
    inner.close(end=RST)
    assert len(findings(network.write(tmp_path))) == 1


# Ethernet, IPv4 and TCP take 54 bytes; 6 bytes of payload each way are not enough, 12 are
@pytest.mark.parametrize(("snaplen", "told"), [(54, 0), (60, 0), (66, 1)])
def test_captures_cut_at_the_headers_show_no_payload(snaplen: int, told: int, tmp_path: Path) -> None:
    network = Network()
    proxied_session(*pair(network))
    assert len(findings(network.write(tmp_path, snaplen))) == told


@pytest.mark.parametrize("workers", [False, True])
def test_ipv6_and_files_that_other_processes_read(
    workers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker numbers IPv6 addresses for itself; what it noted is told in this process's numbers."""
    monkeypatch.setattr("nattrace.match.workers.WORKER_FILE_BYTES", 0 if workers else 2**40)
    monkeypatch.setattr("nattrace.match.workers.may_fork", lambda: True)
    network = Network()
    others = [routed("udp", (f"fd00::{n}", 53), ("fd00::1", 53), points=("inside",)) for n in range(9, 2, -1)]
    for other in others:
        network.send(other, b"first come, first numbered")
    outer = at(network, ("2001:db8::5", 50000), ("2001:db8::10", 8080), "outside")
    proxied_session(outer, at(network, ("fd00::1", 40000), ("fd00::2", 80), "inside"))
    (found,) = findings(network.write(tmp_path))
    assert "2001:db8::5 called [2001:db8::10]:8080" in found.message
    assert "from fd00::1 to [fd00::2]:80" in found.message


@pytest.mark.parametrize("second", ["after", "beside", "inside"])
def test_two_clients_of_one_server_that_ask_the_same(second: str, tmp_path: Path) -> None:
    network = Network()
    one, two = (at(network, (host, 50000), (LISTENS, 80), "outside") for host in (CALLER, "203.0.113.6"))
    if second == "inside":
        proxied_session(one, two)
    else:
        one.open()
        if second == "beside":
            two.open()
        one.ask()
        one.answer()
        one.close()
        if second == "after":
            two.open()
        two.ask()
        two.answer()
        two.close()
    assert not findings(network.write(tmp_path))


def test_one_prober_that_asks_two_servers_the_same(tmp_path: Path) -> None:
    network = Network()
    one, two = (at(network, (CALLER, 50000), (host, 80), "outside") for host in (LISTENS, "203.0.113.11"))
    proxied_session(one, two)
    assert not findings(network.write(tmp_path))


def test_strangers_that_were_forwarded(tmp_path: Path) -> None:
    """Two probers and two replicas; the second exchange lies in the first by chance, and came through a router."""
    network = Network()
    outer, inner = pair(network)
    inner.c = routed(
        "tcp", (OWN, 40000), (BACKEND, 80), {}, {}, points=("elsewhere", "inside", "beyond")
    )  # fmt: skip
    proxied_session(outer, inner)
    network.captures.pop("elsewhere")
    network.captures.pop("beyond")
    assert not findings(network.write(tmp_path))


@pytest.mark.parametrize("what", ["question", "answer", "length", "order", "early"])
def test_what_is_not_the_same_payload_or_not_inside_is_no_proxy(what: str, tmp_path: Path) -> None:
    network = Network()
    outer, inner = pair(network)
    question = QUESTION.replace(b"GET", b"PUT") if what == "question" else QUESTION
    answer = ANSWER.replace(b"200", b"404") if what == "answer" else ANSWER
    answer += b"!" if what == "length" else b""
    first, second = (inner, outer) if what == "early" else (outer, inner)
    first.open()
    outer.ask()
    second.open()
    inner.ask(question)
    if what == "order":  # the client had its answer before the server gave it
        outer.answer(answer)
        inner.answer(ANSWER)
    else:
        inner.answer(answer)
        outer.answer(ANSWER)
    outer.close()
    inner.close()
    assert not findings(network.write(tmp_path))


def test_a_scan_that_opens_and_closes(tmp_path: Path) -> None:
    """Connections without a word have equal totals, and nothing else."""
    network = Network()
    for number in range(30):
        for session in pair(network, number):
            session.open()
            session.close()
    assert not findings(network.write(tmp_path))


def test_banners_that_all_servers_send(tmp_path: Path) -> None:
    """Connections that are still open say nothing of their totals."""
    network = Network()
    outer, inner = pair(network)
    for session in (outer, inner):
        session.open()
    inner.answer(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    outer.answer(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
    assert not findings(network.write(tmp_path))


def test_a_translated_connection_is_no_proxied_one(tmp_path: Path) -> None:
    network = Network()
    session = Session(network, masquerade("tcp", ("172.17.0.2", 40000), ("198.51.100.1", 80), 50000))
    session.open()
    session.ask()
    session.answer()
    session.close()
    report = nattrace.analyze(*network.write(tmp_path).sources)
    assert [flow.status for flow in report.flows] == ["translated"]
    assert not report.findings


def test_two_calls_at_once_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """Whose connection is whose is not said where both would do."""
    network = Network()
    first, second = pair(network, 0), pair(network, 1)
    for step in ("open", "ask"):
        for outer, _ in (first, second):
            getattr(outer, step)()
    for step in ("open", "ask", "answer"):
        for _, inner in (first, second):
            getattr(inner, step)()
    for outer, inner in (first, second):
        outer.answer()
        outer.close()
        inner.close()
    assert not findings(network.write(tmp_path))
