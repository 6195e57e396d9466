"""Synthetic traffic of one NAT as columns: flows, their packets, and the time each takes to be seen.

Everything follows from a seed. What a matcher finds hard is put in on purpose: IP ids of 0, one payload
repeated, pure acknowledgements with nothing of their own, ICMP id 1 in many clients at once. This module never
writes a file and knows nothing of nattrace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17

#: Share of the flows, and of the packets, that each protocol has.
SHARES: Final = {TCP: 0.7, UDP: 0.2, ICMP: 0.1}

#: The outside address of the NAT (RFC 5737), and the network behind it that Docker would use.
PUBLIC: Final = 0xCB007107
CLIENT_NETWORK: Final = 0xAC110000

#: Packets of an average flow.
PACKETS_PER_FLOW: Final = 20

#: Sigma of the log-normal flow sizes: a few flows carry most of the packets.
FLOW_SIZE_SIGMA: Final = 1.2

#: Part of the flows that get a new port or id although theirs is free, as `--random` does it.
REWRITTEN: Final = 1 / 3

#: Packets per second that the NAT forwards.
PACKET_RATE: Final = 100_000

#: Bytes of random data that payloads are cut from; a power of two.
POOL_BYTES: Final = 1 << 24

_SERVER_PORTS: Final = {443: 0.6, 80: 0.15, 53: 0.1, 8443: 0.05, 5060: 0.04, 123: 0.03, 22: 0.03}
_TCP_TIMESTAMPS_BYTES: Final = 12
_HEADER_BYTES: Final = {TCP: 20, UDP: 8, ICMP: 8}
_SYN, _SYN_ACK, _ACK, _PSH_ACK = 0x02, 0x12, 0x10, 0x18


@dataclass(frozen=True, slots=True)
class Flows:
    """One row a flow; ports are the id where the protocol is ICMP. Addresses and ports in host order."""

    protocol: NDArray[np.uint8]
    client: NDArray[np.uint32]
    client_port: NDArray[np.uint16]
    server: NDArray[np.uint32]
    server_port: NDArray[np.uint16]  #: 0 for ICMP
    outside_port: NDArray[np.uint16]  #: what the NAT makes of `client_port`
    header_bytes: NDArray[np.int64]  #: L4 header with its options
    client_zero_id: NDArray[np.bool_]  #: the client sends IP id 0
    server_zero_id: NDArray[np.bool_]
    constant: NDArray[np.bool_]  #: every packet has the same payload
    server_ttl: NDArray[np.uint8]  #: TTL of replies when they reach the outside point

    def __len__(self) -> int:
        """Count of flows."""
        return int(self.protocol.size)


@dataclass(frozen=True, slots=True)
class Packets:
    """One row a packet, in the order in which the packets reach the NAT."""

    flow: NDArray[np.int32]
    outbound: NDArray[np.bool_]
    inside_us: NDArray[np.int64]  #: when the inside point sees it, from the start of the traffic
    outside_us: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]
    payload_at: NDArray[np.int64]  #: first byte of the payload in the pool; even
    ip_id: NDArray[np.uint16]
    seq: NDArray[np.uint32]  #: TCP sequence number; for ICMP the echo sequence number
    ack: NDArray[np.uint32]
    tcp_flags: NDArray[np.uint8]
    window: NDArray[np.uint16]

    def __len__(self) -> int:
        """Count of packets."""
        return int(self.flow.size)


def make_flows(rng: Generator, count: int) -> Flows:
    """Return `count` flows whose tuples are all different, inside and outside."""
    protocol = np.repeat(
        np.array(list(SHARES), np.uint8),
        np.diff([0, *(count * np.cumsum(list(SHARES.values()))).round()]).astype(int),
    )
    icmp, tcp, udp = protocol == ICMP, protocol == TCP, protocol == UDP
    client = (CLIENT_NETWORK + rng.integers(2, 65534, count)).astype(np.uint32)
    # Flows share servers, so clients that chose one port or id meet and the NAT has to move one of them.
    server = rng.choice(_public_addresses(rng, max(1, count // 8)), count)
    server_port = rng.choice(np.array(list(_SERVER_PORTS), np.uint16), count, p=list(_SERVER_PORTS.values()))
    server_port[icmp] = 0
    client_port = rng.integers(32768, 61000, count).astype(np.uint16)
    client_port[icmp & (rng.random(count) < 1 / 3)] = 1  # `ping` as PID 1 of a container
    served = (protocol.astype(np.uint64) << 16 | server_port) << 32 | server
    _make_distinct(rng, client_port, client, served)

    outside_port = client_port.copy()
    moved = rng.random(count) < REWRITTEN
    outside_port[moved] = rng.integers(1024, 65536, int(moved.sum()))
    _make_distinct(rng, outside_port, np.full(count, PUBLIC, np.uint32), served)

    header = np.zeros(count, np.int64)
    for number, length in _HEADER_BYTES.items():
        header[protocol == number] = length
    header[tcp & (rng.random(count) < 0.9)] += _TCP_TIMESTAMPS_BYTES
    return Flows(
        protocol=protocol,
        client=client,
        client_port=client_port,
        server=server,
        server_port=server_port,
        outside_port=outside_port,
        header_bytes=header,
        client_zero_id=udp & (rng.random(count) < 0.5),
        server_zero_id=rng.random(count) < 0.15,
        constant=udp & (rng.random(count) < 0.2),
        server_ttl=rng.integers(40, 60, count).astype(np.uint8),
    )


def make_packets(rng: Generator, count: int, flows: Flows) -> Packets:
    """Return `count` packets of the flows, requests and replies mixed as a client and a server would."""
    flow = _choose_flows(rng, count, flows)
    protocol = flows.protocol[flow]
    icmp, tcp = protocol == ICMP, protocol == TCP
    order = np.argsort(flow, kind="stable")
    rank = _rank(flow, order)

    outbound = (rng.random(count) < 0.5) | (rank == 0)
    outbound[icmp] = rank[icmp] % 2 == 0
    outbound[tcp & (rank == 1)] = False  # SYN-ACK

    length = _payload_lengths(rng, flows, flow, rank)
    at = rng.integers(0, (POOL_BYTES - 2048) // 2, count) * 2
    constant = flows.constant[flow]
    at[constant] = (rng.integers(0, (POOL_BYTES - 2048) // 2, len(flows)) * 2)[flow[constant]]
    # An echo reply returns the payload of its request, which is the packet before it in the flow.
    request = np.empty(count, np.int64)
    request[order[1:]] = order[:-1]
    reply = np.flatnonzero(icmp & ~outbound)
    at[reply], length[reply] = at[request[reply]], length[request[reply]]

    seq, ack = _sequence_numbers(
        rng, flow=flow, order=order, outbound=outbound, length=length, handshake=tcp & (rank < 2)
    )
    ack[rank == 0] = 0
    seq[icmp] = rank[icmp] // 2
    flags = np.where(length > 0, _PSH_ACK, _ACK).astype(np.uint8)
    flags[rank == 0] = _SYN
    flags[rank == 1] = _SYN_ACK
    inside_us, outside_us = _times(rng, outbound)
    return Packets(
        flow=flow,
        outbound=outbound,
        inside_us=inside_us,
        outside_us=outside_us,
        payload_bytes=length,
        payload_at=at,
        ip_id=_ip_ids(rng, flows, flow, outbound),
        seq=seq,
        ack=ack,
        tcp_flags=flags,
        window=rng.integers(200, 65536, 2 * len(flows)).astype(np.uint16)[2 * flow + outbound],
    )


def make_identical(rng: Generator, count: int) -> tuple[Flows, Packets]:
    """Return one UDP flow of `count` packets that differ in nothing but the time: the worst case."""
    one = make_flows(rng, 10)  # 10: the smallest count in which every protocol has a flow
    udp = np.flatnonzero(one.protocol == UDP)[:1]
    flows = Flows(**{name: getattr(one, name)[udp] for name in Flows.__slots__})
    zeros = np.zeros(count, np.int64)
    outbound = np.ones(count, np.bool_)
    inside_us, outside_us = _times(rng, outbound)
    return flows, Packets(
        flow=zeros.astype(np.int32),
        outbound=outbound,
        inside_us=inside_us,
        outside_us=outside_us,
        payload_bytes=zeros + 32,
        payload_at=zeros,
        ip_id=zeros.astype(np.uint16),
        seq=zeros.astype(np.uint32),
        ack=zeros.astype(np.uint32),
        tcp_flags=zeros.astype(np.uint8),
        window=zeros.astype(np.uint16),
    )


def _public_addresses(rng: Generator, count: int) -> NDArray[np.uint32]:
    """Return unicast addresses that are neither private, local nor the NAT's own network."""
    found = np.empty(0, np.uint32)
    while found.size < count:
        more = rng.integers(1 << 24, 224 << 24, 2 * count, dtype=np.uint32)
        top8, top12, top16 = more >> 24, more >> 20, more >> 16
        good = (
            (top8 != 10) & (top8 != 127) & (top12 != 0xAC1) & (top16 != 0xC0A8) & (more >> 8 != PUBLIC >> 8)
        )
        found = np.concatenate([found, more[good]])
    return found[:count]


def _make_distinct(
    rng: Generator, port: NDArray[np.uint16], address: NDArray[np.uint32], served: NDArray[np.uint64]
) -> None:
    """Draw ports anew, in place, until every (port, address, server) is there once, as conntrack demands."""
    while True:
        # Odd multipliers mix the parts; a collision of the mix costs one needless new port.
        key = served * np.uint64(0x9E3779B185EBCA87) + address * np.uint64(0xC2B2AE3D27D4EB4F) + port
        again = np.ones(key.size, np.bool_)
        again[np.unique(key, return_index=True)[1]] = False
        if not again.any():
            return
        port[again] = rng.integers(1024, 65536, int(again.sum()))


def _choose_flows(rng: Generator, count: int, flows: Flows) -> NDArray[np.int32]:
    weight = rng.lognormal(0.0, FLOW_SIZE_SIGMA, len(flows))
    for number, share in SHARES.items():
        of_protocol = flows.protocol == number
        weight[of_protocol] *= share / max(weight[of_protocol].sum(), 1e-9)
    edges = np.cumsum(weight)
    chosen: NDArray[np.int64] = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    return chosen.clip(max=len(flows) - 1).astype(np.int32)


def _rank(group: NDArray[Any], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the running number of each element within its group; `order` sorts `group` stably."""
    ordered = group[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    start = np.repeat(first, np.diff(np.r_[first, ordered.size]))
    rank = np.empty(group.size, np.int64)
    rank[order] = np.arange(group.size) - start
    return rank


def _payload_lengths(
    rng: Generator, flows: Flows, flow: NDArray[np.int32], rank: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return payload lengths of the simple IMIX: 7 small, 4 medium and 1 full packet in 12 (RFC 6985)."""
    protocol = flows.protocol[flow]
    header = 20 + flows.header_bytes[flow]
    kind = rng.random(flow.size)
    small = np.where(rng.random(flow.size) < 0.6, 0, rng.integers(1, 80, flow.size))
    small = np.where(protocol == UDP, rng.integers(12, 90, flow.size), small)
    medium = 576 - header + rng.integers(-64, 65, flow.size)
    length = np.select([kind < 7 / 12, kind < 11 / 12], [small, medium], 1500 - header)
    length[(protocol == ICMP) & (rng.random(flow.size) < 0.7)] = 56  # what ping sends
    length[(protocol == TCP) & (rank < 2)] = 0
    constant = flows.constant[flow]
    length[constant] = rng.integers(12, 200, len(flows))[flow[constant]]
    return length.astype(np.int64)


def _sequence_numbers(
    rng: Generator,
    *,
    flow: NDArray[np.int32],
    order: NDArray[np.int64],
    outbound: NDArray[np.bool_],
    length: NDArray[np.int64],
    handshake: NDArray[np.bool_],
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return TCP seq and ack: all that the own and the other direction sent before (RFC 9293 section 3.4)."""
    ordered = flow[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    of_flow = np.repeat(first, np.diff(np.r_[first, ordered.size]))
    spent = length + handshake  # SYN takes one number

    def sent_before(which: NDArray[np.bool_], initial: NDArray[np.int64]) -> NDArray[np.uint32]:
        own = np.where(which, spent, 0)[order]
        before = np.cumsum(own) - own
        result = np.empty(flow.size, np.uint32)
        result[order] = (before - before[of_flow] + initial[ordered]) & 0xFFFFFFFF
        return result

    initial = rng.integers(0, 1 << 32, (2, int(flow.max(initial=0)) + 1))
    client, server = sent_before(outbound, initial[0]), sent_before(~outbound, initial[1])
    return np.where(outbound, client, server), np.where(outbound, server, client)


def _ip_ids(
    rng: Generator, flows: Flows, flow: NDArray[np.int32], outbound: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Return IP ids that count up for each flow and direction from a random start, or are 0."""
    sender = 2 * flow.astype(np.int64) + outbound
    start = rng.integers(0, 65536, 2 * len(flows))
    ids = (start[sender] + _rank(sender, np.argsort(sender, kind="stable"))) & 0xFFFF
    ids[np.where(outbound, flows.client_zero_id[flow], flows.server_zero_id[flow])] = 0
    return ids.astype(np.uint16)


def _times(rng: Generator, outbound: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return when the inside and the outside point see each packet; crossing takes 3 us and a bit."""
    reached = np.cumsum(rng.exponential(1e6 / PACKET_RATE, outbound.size))
    left = reached + 3 + rng.gamma(2.0, 4.0, outbound.size)
    inside = np.where(outbound, reached, left)
    outside = np.where(outbound, left, reached)
    return inside.astype(np.int64), outside.astype(np.int64)
