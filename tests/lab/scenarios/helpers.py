"""The kernel's helpers, which read and rewrite what protocols say about addresses: FTP, SIP."""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab import rules, sip
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import SERVERS, SERVERS_V6, UPLINK, client_address, client_address_v6, lab
from lab.traffic import TcpConnection, TcpServer, UdpClient, UdpServer, closing_all, ftp_port, token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab.topology import Lab, Namespace
    from lab.truth import Truth

#: A request over UDP is sent again after this (RFC 3261 section 17.1.1.2, T1).
SENT_AGAIN_S = 0.5


def give_helper(router: Namespace, protocol: str, port: int, helper: str, tool: str = "iptables") -> None:
    """Give connections to a port a helper; skips where the kernel does not have it."""
    try:
        router.run(f"{tool} -w -t raw -A PREROUTING -p {protocol} --dport {port} -j CT --helper {helper}")
    except RuntimeError as refused:
        raise NotHereError(f"kernel has no {helper} helper") from refused


def ftp_active(folder: Path) -> Truth:
    """FTP helper: a masqueraded client's PORT is rewritten and grows; all its later bytes are shifted."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "tcp", 21, "ftp")
        control = TcpServer(net.internet, SERVERS[0], 21)
        with closing_all(control), recorded(net, folder):
            connections = [
                TcpConnection(client, 41000 + n, control, (SERVERS[0], 21))
                for n, client in enumerate(net.clients)
            ]
            for connection in connections:
                connection.exchange(b"USER anonymous\r\n", b"331 Guest login ok, send your address.\r\n")
                connection.exchange(b"PASS lab@example.org\r\n", b"230 Guest login ok.\r\n")
            for round_ in range(2):
                for n, connection in enumerate(connections):
                    port = 50000 + 10 * n + round_
                    asked = ftp_port(client_address(n + 1), port)
                    connection.exchange(
                        asked, b"200 PORT command successful.\r\n", arrives=ftp_port(UPLINK, port)
                    )
                    connection.exchange(b"LIST\r\n", b"150 Opening data connection.\r\n")
                    connection.exchange(b"NOOP\r\n", b"226 Transfer complete.\r\n")
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder, keeps="stream")


def ftp_passive(folder: Path) -> Truth:
    """FTP helper: a published server's 227 answer is rewritten; all its later bytes are shifted."""
    with lab(clients=1) as net:
        rules.docker_nat(net.router)
        rules.publish(net.router, "tcp", 21, client_address(1), 21)
        give_helper(net.router, "tcp", 21, "ftp")
        control = TcpServer(net.clients[0], client_address(1), 21)
        with closing_all(control), recorded(net, folder):
            connection = TcpConnection(net.internet, 50000, control, (UPLINK, 21), SERVERS[0])
            connection.exchange(b"USER anonymous\r\n", b"331 Guest login ok, send your address.\r\n")
            connection.exchange(b"PASS lab@example.org\r\n", b"230 Guest login ok.\r\n")
            for port in (40000, 40001):
                connection.exchange(
                    b"PASV\r\n",
                    _ftp_passive(client_address(1), port),
                    returns=_ftp_passive(UPLINK, port),
                )
                connection.exchange(b"LIST\r\n", b"150 Opening data connection.\r\n")
                connection.exchange(b"NOOP\r\n", b"226 Transfer complete.\r\n")
            connection.close()
        return kernel_truth(net, folder, keeps="stream")


def _ftp_passive(address: str, port: int) -> bytes:
    numbers = [*address.split("."), str(port >> 8), str(port & 255)]
    return f"227 Entering Passive Mode ({','.join(numbers)}).\r\n".encode()


def sip_udp(folder: Path) -> Truth:
    """SIP helper: two telephones behind one address, calls both ways; it rewrites every datagram."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "udp", 5060, "sip")
        _telephony(net, folder, SERVERS[0], [client_address(n) for n in (1, 2)])
        return kernel_truth(net, folder, keeps="named", unique_payloads=False)


def sip_udp_ipv6(folder: Path) -> Truth:
    """SIP helper over IPv6, where no packet has an identification."""
    with lab(clients=2, ipv6=True) as net:
        rules.masquerade_v6(net.router, "fd00:17::/64")
        give_helper(net.router, "udp", 5060, "sip", "ip6tables")
        _telephony(net, folder, SERVERS_V6[0], [client_address_v6(n) for n in (1, 2)])
        return kernel_truth(net, folder, keeps="named", unique_payloads=False)


def _telephony(net: Lab, folder: Path, server: str, addresses: list[str]) -> None:
    desk = _Desk(net.internet, server)
    phones = [_Phone(*each, desk) for each in zip(net.clients, addresses, strict=True)]
    with closing_all(desk, *phones), recorded(net, folder):
        for phone in phones:
            phone.register()
        # two calls at once each time; the helper drops an offer of a port that another one has
        for ask in (lambda phone, n: phone.call(40_000 + n), lambda phone, n: desk.call(phone, 42_000 + n)):
            calls = [ask(phone, 100 * n) for n, phone in enumerate(phones)]
            for call in calls:
                call.talk()
            for call in calls:
                call.end()


@dataclass(slots=True)
class _Call:
    """An answered call; `heard` is where the desk was told to send its stream, in the eyes of the desk."""

    phone: _Phone
    near_port: int
    far_port: int
    heard: tuple[str, int]
    end: Callable[[], object]

    def talk(self) -> None:
        """Exchange RTP and RTCP, which the helper expects."""
        desk = self.phone.desk
        for step in (0, 1):
            near = UdpClient(self.phone.host, self.near_port + step, desk.address, self.far_port + step)
            far = UdpServer(desk.host, desk.address, self.far_port + step)
            with closing_all(near, far):
                for sequence in range(4):
                    far.send(sip.rtp(sequence), (self.heard[0], self.heard[1] + step))
                    near.receive()
                    near.exchange(far, sip.rtp(sequence), sip.rtp(sequence))


class _Desk:
    """The server's side: it answers, and calls a telephone where it has registered from."""

    def __init__(self, host: Namespace, address: str) -> None:
        self.host, self.address = host, address
        self.end = UdpServer(host, address, 5060)
        self.contact = f"{sip.host(address)}:5060"
        self.uri = f"sip:desk@{sip.host(address)}"
        self.registered: dict[_Phone, tuple[str, int]] = {}

    def close(self) -> None:
        self.end.close()

    def call(self, phone: _Phone, port: int) -> _Call:
        """Call a telephone, which answers."""
        peer = self.registered[phone]
        there = f"sip:user@{sip.host(peer[0])}:{peer[1]}"
        dialog = sip.Dialog(f"in-{phone.name}", self.contact, self.uri, phone.uri)
        self.end.send(dialog.request("INVITE", there, sip.offer(self.address, 42_020)), peer)
        asked = phone.end.receive()
        for status, body in (("180 Ringing", ""), ("200 OK", sip.offer(phone.address, port))):
            phone.end.send(sip.response(asked, status, phone.contact, body))
            answer, _ = self.end.receive()
        self.end.send(dialog.request("ACK", there), peer)
        phone.end.receive()

        def end() -> None:
            self.end.send(dialog.request("BYE", there), peer)
            phone.end.send(sip.response(phone.end.receive(), "200 OK", phone.contact))
            self.end.receive()

        return _Call(phone, port, 42_020, sip.media(answer), end)


class _Phone:
    """A telephone behind NAT that knows nothing of it: it writes its own address into all that it says."""

    def __init__(self, host: Namespace, address: str, desk: _Desk) -> None:
        self.host, self.address, self.desk = host, address, desk
        self.end = UdpClient(host, 5060, desk.address, 5060)
        self.name = address.replace(":", ".")
        self.contact = f"{sip.host(address)}:5060"
        self.uri = f"sip:{self.name}@{sip.host(desk.address)}"

    def close(self) -> None:
        self.end.close()

    def register(self) -> None:
        """Register; where IP ids tell the two apart once more word for word, as if the answer had been lost."""
        dialog = sip.Dialog(f"reg-{self.name}", self.contact, self.uri, self.uri)
        message = dialog.request("REGISTER", f"sip:{sip.host(self.desk.address)}")
        self._ask(message, ("200 OK", ""))
        if ":" not in self.address:
            time.sleep(SENT_AGAIN_S)
            self._ask(message, ("200 OK", ""))

    def call(self, port: int) -> _Call:
        """Call the desk, which answers."""
        dialog = sip.Dialog(f"out-{self.name}", self.contact, self.uri, self.desk.uri)
        invitation = dialog.request("INVITE", self.desk.uri, sip.offer(self.address, port))
        answer = sip.offer(self.desk.address, 40_020)
        asked = self._ask(invitation, ("100 Trying", ""), ("200 OK", answer))
        self.end.send(dialog.request("ACK", self.desk.uri))
        self.desk.end.receive()
        bye = dialog.request("BYE", self.desk.uri)
        return _Call(self, port, 40_020, sip.media(asked), lambda: self._ask(bye, ("200 OK", "")))

    def _ask(self, message: bytes, *answers: tuple[str, str]) -> bytes:
        """Send a request, have it answered with a status and a body each time; return it as it arrived."""
        self.end.send(message)
        asked, peer = self.desk.end.receive()
        self.desk.registered[self] = peer[:2]
        for status, body in answers:
            self.desk.end.send(sip.response(asked, status, self.desk.contact, body), peer)
            self.end.receive()
        return asked


def sip_tcp(folder: Path) -> Truth:
    """SIP helper over TCP: every message grows or shrinks, so each shifts its stream a little further."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "tcp", 5060, "sip")
        desk = f"sip:desk@{SERVERS[0]}"
        server = TcpServer(net.internet, SERVERS[0], 5060)
        with closing_all(server), recorded(net, folder):
            connections = [TcpConnection(client, 5060, server, (SERVERS[0], 5060)) for client in net.clients]
            for n, connection in enumerate(connections, 1):
                near, far = f"{client_address(n)}:5060", f"{SERVERS[0]}:5060"
                out = sip.Dialog(f"out-{n}", near, f"sip:phone{n}@{SERVERS[0]}", desk, "TCP")
                back = sip.Dialog(f"in-{n}", far, desk, f"sip:phone{n}@{SERVERS[0]}", "TCP")
                for method in ("REGISTER", "OPTIONS", "INVITE", "OPTIONS", "REGISTER"):
                    offer = sip.offer(client_address(n), 40_000 + 100 * n) if method == "INVITE" else ""
                    asked = connection.ask(out.request(method, desk, offer))
                    connection.tell(sip.response(asked, "200 OK", far))
                    if method == "INVITE":
                        connection.ask(out.request("ACK", desk))
                    else:
                        asked = connection.tell(back.request("OPTIONS", f"sip:user@{UPLINK}:5060"))
                        connection.ask(sip.response(asked, "200 OK", near))
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder, keeps="stream", unique_payloads=False)


def irc_dcc(folder: Path) -> Truth:
    """IRC helper: an offer's address is rewritten by another of one length, a port that is taken by another one."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "tcp", 6667, "irc")
        server = TcpServer(net.internet, SERVERS[0], 6667)
        with closing_all(server), recorded(net, folder):
            connections = [TcpConnection(client, 41000, server, (SERVERS[0], 6667)) for client in net.clients]
            for n, connection in enumerate(connections, 1):
                connection.exchange(b"NICK user\r\n", b":irc 001 user :Welcome\r\n")
                for port in (9_998, 9_999):
                    address = int(ipaddress.ip_address(client_address(n)))
                    said = connection.ask(b"PRIVMSG bob :\1DCC SEND notes %d %d 1024\1\r\n" % (address, port))
                    assert b"%d" % int(ipaddress.ip_address(UPLINK)) in said
                    connection.exchange(b"PING :a\r\n", b":irc PONG irc :a\r\n")
            for connection in connections:
                connection.close()
        return kernel_truth(net, folder, keeps="stream", unique_payloads=False)


def tftp(folder: Path) -> Truth:
    """TFTP helper: a server answers from another port than it was asked at, which is a translation of its own."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "udp", 69, "tftp")
        asked = UdpServer(net.internet, SERVERS[0], 69)
        answering = [UdpServer(net.internet, SERVERS[0], port) for port in (30_000, 30_001)]
        clients = [UdpServer(client, client_address(n), 40_000) for n, client in enumerate(net.clients, 1)]
        with closing_all(asked, *answering, *clients), recorded(net, folder):
            for client, server in zip(clients, answering, strict=True):
                client.send(b"\0\1" + token() + b"\0octet\0", (SERVERS[0], 69))
                _, peer = asked.receive()
                for block in (b"\0\1", b"\0\2"):
                    server.send(b"\0\3" + block + token(100), peer)
                    _, whence = client.receive()
                    client.send(b"\0\4" + block, whence)
                    server.receive()
        return kernel_truth(net, folder, unique_payloads=False)


SCENARIOS = (
    ftp_active,
    ftp_passive,
    sip_udp,
    sip_udp_ipv6,
    sip_tcp,
    irc_dcc,
    tftp,
)
