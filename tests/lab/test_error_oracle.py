"""The slow matcher of ICMP errors agrees with tshark on what they quote, and finds as many as were provoked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lab.error_oracle import SeenError, expected_errors, read_errors
from lab.oracle import ExpectedRow, UndecidableError
from lab.truth import Addressing, Entry, Hop, Truth

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lab"
#: Scenario: pairs of errors at each hop.
PROVOKED = {
    "port_unreachable": [8],  # 2 containers, 4 datagrams each
    "published_port_unreachable": [8],
    "published_port_unreachable_masqueraded": [8],
    "published_port_unreachable_half": [8],
    "traceroute": [
        24
    ],  # 2 containers, 3 rounds of an echo, two datagrams, a SYN; what dies inside never crosses
    "path_mtu": [3],
    "path_mtu_v6": [3],
    "prohibited": [12],  # 2 containers, 3 rounds of a datagram and a SYN
    "errors_v6": [24],
    "errors_twice_nat": [36],  # 2 containers, 3 rounds of four datagrams, an echo and a SYN
    "errors_twice_nat_half": [36],
    "errors_hairpin": [24],  # 3 containers and a host outside, 6 datagrams each
    "errors_two_hops": [8, 4],  # 2 containers, 2 from between the hosts and 2 from beyond both
}
FIELDS = [
    "frame.number",
    "ip.src",
    "ip.dst",
    "ipv6.src",
    "ipv6.dst",
    "udp.srcport",
    "udp.dstport",
    "tcp.srcport",
    "tcp.dstport",
    "icmp.type",
    "icmp.code",
    "icmpv6.type",
    "icmpv6.code",
]


@pytest.mark.parametrize("name", PROVOKED)
def test_finds_every_error_that_was_provoked(name: str) -> None:
    truth = Truth.load(FIXTURES / name / "truth.json")
    points = {path.stem: read_errors(path) for path in (FIXTURES / name).glob("*.pcap")}

    assert [len(expected_errors(hop, points)) for hop in truth.hops] == PROVOKED[name]


@pytest.mark.parametrize("name", PROVOKED)
def test_reads_quotes_as_tshark_does(name: str) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("needs tshark")
    path = FIXTURES / name / "docker0.pcap"
    words = ["tshark", "-r", str(path), "-n", "-T", "fields"]
    for field in FIELDS:
        words += ["-e", field]
    words += ["-Y", "icmp.type in {3, 4, 5, 11, 12} || icmpv6.type in {1, 2, 3, 4}"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert [_plain(error) for error in read_errors(path)] == [
        _from_tshark(line.split("\t")) for line in printed.splitlines()
    ]


def _plain(error: SeenError) -> tuple[object, ...]:
    quoted = error.quoted
    ports = (-1, -1) if error.quoted_protocol.startswith("icmp") else (quoted.sport, quoted.dport)
    return (error.frame, error.src, error.dst, error.type, error.code, quoted.src, quoted.dst, *ports)


def _from_tshark(cells: list[str]) -> tuple[object, ...]:
    """Build the same from tshark's text: it prints the outer value of a field first, the quoted one second."""
    frame, src4, dst4, src6, dst6, usport, udport, tsport, tdport, type4, code4, type6, code6 = (
        cell.split(",") for cell in cells
    )
    src, dst = (src4, dst4) if len(src4) == 2 else (src6, dst6)
    kind, code = (type4, code4) if type4[0] else (type6, code6)
    ports = (usport[0] or tsport[0] or -1, udport[0] or tdport[0] or -1)
    return (int(frame[0]), src[0], dst[0], int(kind[0]), int(code[0]), src[1], dst[1], *map(int, ports))


OUTER = Entry("udp", Addressing("172.17.0.2", "1.1.1.1", 4, 9), Addressing("1.1.1.1", "2.2.2.2", 9, 5))
HOP = Hop("docker0", "eth0", "conntrack.txt", (OUTER,))


def _refusal(frame: int, to: str, sport: int, mark: int) -> SeenError:
    quoted = Addressing(to, "1.1.1.1", sport, 9)
    return SeenError(frame, "icmp", "1.1.1.1", to, 3, 3, "udp", quoted, (mark,))


def test_pairs_by_the_kernels_entry_and_the_bytes_of_the_quote() -> None:
    points = {
        "docker0": [_refusal(3, "172.17.0.2", 4, 7), _refusal(4, "172.17.0.3", 4, 7)],
        "eth0": [_refusal(1, "2.2.2.2", 5, 7), _refusal(2, "2.2.2.2", 5, 8), _refusal(6, "2.2.2.2", 6, 7)],
    }

    assert expected_errors(HOP, points) == {ExpectedRow("eth0", 1, "docker0", 3, "reply")}


def test_refuses_to_choose_between_equal_errors() -> None:
    points = {
        "docker0": [_refusal(3, "172.17.0.2", 4, 7)],
        "eth0": [_refusal(n, "2.2.2.2", 5, 7) for n in (1, 2)],
    }

    with pytest.raises(UndecidableError):
        expected_errors(HOP, points)
