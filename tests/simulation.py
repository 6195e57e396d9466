"""A seeded NAT box: packets in, the same packets translated out, and which is which.

It knows nothing of nattrace: frames are built with dpkt, translated by changing the objects, and written
with dpkt. The truth is the list of (inside frame number, outside frame number).
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dpkt

PUBLIC = bytes([203, 0, 113, 10])
PUBLIC6 = bytes.fromhex("20010db8000000000000000000000010")


@dataclass
class Traffic:
    """What to send and how hard to make it."""

    seed: int = 1
    flows: int = 10
    packets_per_flow: int = 10
    loss_inside: float = 0.0  #: packets that the inside capture misses
    loss_outside: float = 0.0  #: packets that never leave, or that the outside capture misses
    zero_ids: bool = False  #: IP identification 0 everywhere
    constant_payload: bool = False
    random_ports: bool = True  #: every port and id is rewritten
    snaplen: int = 262144
    spacing_us: int = 500
    protocols: tuple[str, ...] = ("icmp", "udp", "tcp")
    version: int = 4
    servers: int = 3


@dataclass
class Simulated:
    """Where the captures are and what is true."""

    inside: Path
    outside: Path
    pairs: set[tuple[int, int]] = field(default_factory=set)
    #: (protocol, inside source, inside port or id, outside port or id, server, server port)
    bindings: set[tuple[str, bytes, int, int, bytes, int]] = field(default_factory=set)


@dataclass
class _Flow:
    protocol: str
    client: bytes
    server: bytes
    port: int
    server_port: int
    outside_port: int
    seq: int
    ack: int
    sent: int = 0


def simulate(folder: Path, traffic: Traffic) -> Simulated:
    """Write inside.pcap and outside.pcap and return the truth about them."""
    rng = random.Random(traffic.seed)
    flows: list[_Flow] = []
    taken: set[tuple[object, ...]] = set()
    while len(flows) < traffic.flows:  # ids and ports collide between hosts, never within one
        flow = _new_flow(rng, traffic, len(flows))
        name = (flow.protocol, flow.client, flow.port, flow.server, flow.server_port)
        if name not in taken:
            taken.add(name)
            flows.append(flow)
    out = Simulated(folder / "inside.pcap", folder / "outside.pcap")
    inside: list[tuple[int, bytes, int]] = []
    outside: list[tuple[int, bytes, int]] = []
    now = 1_700_000_000_000_000_000
    serial = 0
    order = [flow for flow in flows for _ in range(traffic.packets_per_flow)]
    rng.shuffle(order)
    for flow in order:
        now += rng.randint(traffic.spacing_us * 500, traffic.spacing_us * 1500)
        reply = flow.sent % 2 == 1
        ip_id = 0 if traffic.zero_ids else rng.randint(1, 65535)
        payload = b"\0" * 32 if traffic.constant_payload else rng.randbytes(rng.randint(8, 64))
        before, after = _frames(flow, reply, ip_id, payload, traffic.version)
        delay = rng.randint(3_000, 60_000)
        serial += 1
        t_in, t_out = (now + delay, now) if reply else (now, now + delay)
        if rng.random() >= traffic.loss_inside:
            inside.append((t_in, before, serial))
        if rng.random() >= traffic.loss_outside:
            outside.append((t_out, after, serial))
        flow.sent += 1
        flow.seq = (flow.seq + len(payload)) & 0xFFFFFFFF
    numbers: list[dict[int, int]] = []
    for path, packets in ((out.inside, inside), (out.outside, outside)):
        packets.sort()
        with path.open("wb") as stream:
            writer = dpkt.pcap.Writer(stream, snaplen=traffic.snaplen, nano=True)
            for time_ns, frame, _ in packets:
                _write(writer, frame, time_ns, traffic.snaplen)
        numbers.append({mark: n for n, (_, _, mark) in enumerate(packets, 1)})
    out.pairs = {(numbers[0][k], numbers[1][k]) for k in numbers[0].keys() & numbers[1].keys()}
    for flow in flows:
        out.bindings.add(
            (flow.protocol, flow.client, flow.port, flow.outside_port, flow.server, flow.server_port)
        )
    return out


def _write(writer: Any, frame: bytes, time_ns: int, snaplen: int) -> None:
    # dpkt's writer takes float times; ns need integers
    stream = writer._Writer__f
    seconds, rest = divmod(time_ns, 10**9)
    cut = frame[:snaplen]
    stream.write(struct.pack("<IIII", seconds, rest, len(cut), len(frame)) + cut)


def _new_flow(rng: random.Random, traffic: Traffic, n: int) -> _Flow:
    protocol = traffic.protocols[n % len(traffic.protocols)]
    host = rng.randint(2, 250)
    server = rng.randint(1, traffic.servers)
    client = bytes([172, 17, 0, host])
    remote = bytes([198, 51, 100, server])
    if traffic.version == 6:
        client = bytes.fromhex("fd000000000000000000000000000000")[:-1] + bytes([host])
        remote = bytes.fromhex("20010db8000100000000000000000000")[:-1] + bytes([server])
    # ids and ports are unique per flow outside, as the kernel makes them; inside they collide freely
    port = rng.randint(1, 5) if protocol == "icmp" else rng.choice([40000, 40001, 50000 + n])
    outside = 1024 + n * 7 + 1 if traffic.random_ports else port
    return _Flow(
        protocol, client, remote, port, 0 if protocol == "icmp" else 80 + n % 3, outside,
        rng.getrandbits(32), rng.getrandbits(32),
    )  # fmt: skip


def _frames(flow: _Flow, reply: bool, ip_id: int, payload: bytes, version: int) -> tuple[bytes, bytes]:
    """Return the frame as it is inside and as it is outside."""
    public = PUBLIC if version == 4 else PUBLIC6
    before = _frame(flow, reply, ip_id, payload, version, flow.client, flow.port, 63 if reply else 64)
    after = _frame(flow, reply, ip_id, payload, version, public, flow.outside_port, 64 if reply else 63)
    return before, after


def _frame(
    flow: _Flow, reply: bool, ip_id: int, payload: bytes, version: int, client: bytes, port: int, ttl: int
) -> bytes:
    src, dst = (flow.server, client) if reply else (client, flow.server)
    sport, dport = (flow.server_port, port) if reply else (port, flow.server_port)
    upper: Any
    if flow.protocol == "icmp" and version == 4:
        echo = dpkt.icmp.ICMP.Echo(id=port, seq=flow.sent // 2, data=payload)
        upper = dpkt.icmp.ICMP(type=0 if reply else 8, data=echo)
        number = 1
    elif flow.protocol == "icmp":
        echo6 = dpkt.icmp6.ICMP6.Echo(id=port, seq=flow.sent // 2, data=payload)
        upper = dpkt.icmp6.ICMP6(type=129 if reply else 128, data=echo6)
        number = 58
    elif flow.protocol == "udp":
        upper = dpkt.udp.UDP(sport=sport, dport=dport, data=payload, ulen=8 + len(payload))
        number = 17
    else:
        upper = dpkt.tcp.TCP(
            sport=sport, dport=dport, seq=flow.seq, ack=flow.ack, flags=0x18, win=501, data=payload
        )
        number = 6
    if version == 4:
        packet = dpkt.ip.IP(src=src, dst=dst, p=number, ttl=ttl, id=ip_id, data=upper)
        packet.len = len(packet)
        kind = 0x0800
    else:
        packet = dpkt.ip6.IP6(src=src, dst=dst, nxt=number, hlim=ttl, data=upper, plen=len(upper))
        packet.extension_hdrs = {}
        kind = 0x86DD
    return bytes(dpkt.ethernet.Ethernet(src=b"\2" * 6, dst=b"\4" * 6, type=kind, data=packet))
