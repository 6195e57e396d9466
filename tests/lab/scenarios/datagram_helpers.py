"""The kernel's helpers that write into datagrams what keeps their length: SNMP, H.323 registration, Amanda."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from lab import rules
from lab.scenarios.helpers import give_helper
from lab.scenarios.recording import kernel_truth, recorded
from lab.topology import SERVERS, UPLINK, client_address, lab
from lab.traffic import UdpClient, UdpServer, closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.truth import Truth

SNMP_TRAP, RAS, AMANDA = 162, 1719, 10080


def snmp_inform(folder: Path) -> Truth:
    """SNMP helper: the address that a notification names its agent by is rewritten, all else stays."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "udp", SNMP_TRAP, "snmp_trap")
        for client in net.clients:
            # what is behind the first bytes shows in the checksum alone, so let that be finished
            client.run("ethtool -K eth0 tx off")
        manager = UdpServer(net.internet, SERVERS[0], SNMP_TRAP)
        agents = [UdpClient(client, 40_000, SERVERS[0], SNMP_TRAP) for client in net.clients]
        with closing_all(manager, *agents), recorded(net, folder):
            for number in range(8):
                for n, agent in enumerate(agents, 1):
                    agent.send(_inform(client_address(n), number))
                    arrived, peer = manager.receive()
                    assert ipaddress.ip_address(UPLINK).packed in arrived
                    manager.send(_answer(number), peer)
                    agent.receive()
        return kernel_truth(net, folder, keeps="named", unique_payloads=False)


def _inform(agent: str, number: int) -> bytes:
    """Write a notification that names its agent (snmpTrapAddress, RFC 3584)."""

    told = _bound(b"\6\3\x12\1\3\0", _ber(0x40, ipaddress.ip_address(agent).packed))
    return _snmp(0xA6, number, _since(number) + told)


def _answer(number: int) -> bytes:
    """Write the answer to a notification, which names nobody."""
    return _snmp(0xA2, number, _since(number))


def _since(number: int) -> bytes:
    return _bound(b"\2\1\1\3\0", _ber(0x43, bytes([number])))


def _bound(name: bytes, value: bytes) -> bytes:
    return _ber(0x30, _ber(6, b"\x2b\6\1" + name), value)


def _snmp(kind: int, number: int, bindings: bytes) -> bytes:
    """Write a message of version 2 (RFC 3416) whose community is a token."""
    head = _ber(2, bytes([number])) + _ber(2, b"\0") + _ber(2, b"\0")
    return _ber(0x30, _ber(2, b"\1"), _ber(4, token(16)), _ber(kind, head, _ber(0x30, bindings)))


def _ber(tag: int, *content: bytes) -> bytes:
    joined = b"".join(content)
    return bytes([tag, len(joined)]) + joined


def h323_registration(folder: Path) -> Truth:
    """H.323 helper: terminals ask for a gatekeeper; the address and port that it shall answer are rewritten."""
    with lab(clients=2) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "udp", RAS, "RAS")
        gatekeeper = UdpServer(net.internet, SERVERS[0], RAS)
        terminals = [UdpClient(client, RAS, SERVERS[0], RAS) for client in net.clients]
        with closing_all(gatekeeper, *terminals), recorded(net, folder):
            for number in range(6):
                for n, terminal in enumerate(terminals, 1):
                    terminal.send(_gatekeeper_request(number, client_address(n), RAS))
                    arrived, peer = gatekeeper.receive()
                    assert ipaddress.ip_address(UPLINK).packed in arrived
                    gatekeeper.send(_gatekeeper_reject(number), peer)
                    terminal.receive()
        return kernel_truth(net, folder, keeps="named", unique_payloads=False)


def _gatekeeper_request(number: int, address: str, port: int) -> bytes:
    """Write a GRQ of a terminal (ITU-T H.225.0, aligned PER), and a token that no decoder reads."""
    protocol = bytes([6, 0, 8, 0x91, 0x4A, 0, 2])
    answer = b"\0" + ipaddress.ip_address(address).packed + port.to_bytes(2, "big")
    return b"\0\0" + number.to_bytes(2, "big") + protocol + answer + b"\2\0" + token(16)


def _gatekeeper_reject(number: int) -> bytes:
    """Write a GRJ."""
    return b"\x08\0" + number.to_bytes(2, "big") + bytes([6, 0, 8, 0x91, 0x4A, 0, 2]) + b"\x20\0" + token(16)


def amanda(folder: Path) -> Truth:
    """Amanda helper: of two answers that name one port, the second one's is rewritten."""
    with lab(clients=1) as net:
        rules.docker_nat(net.router)
        give_helper(net.router, "udp", AMANDA, "amanda")
        server = UdpServer(net.internet, SERVERS[0], AMANDA)
        clients = [UdpClient(net.clients[0], 40_000 + n, SERVERS[0], AMANDA) for n in range(3)]
        rewritten = 0
        with closing_all(server, *clients), recorded(net, folder):
            for number in range(4):
                for client in clients:
                    client.send(b"Amanda 2.6 REQ HANDLE %d %s\n" % (number, token(16)))
                    _, peer = server.receive()
                    answer = b"Amanda 2.6 REP HANDLE %d %s\nCONNECT DATA 50000 MESG 50001 INDEX 50002\n" % (
                        number,
                        token(16),
                    )
                    server.send(answer, peer)
                    rewritten += client.receive() != answer
        assert rewritten
        return kernel_truth(net, folder, keeps="named", unique_payloads=False)


SCENARIOS = (
    snmp_inform,
    h323_registration,
    amanda,
)
