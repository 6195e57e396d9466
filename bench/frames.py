"""Writes what one point saw of the traffic as a pcap file, with every checksum right.

Packets are built block by block: headers as rows of packed big-endian records, payloads cut from one pool of
random bytes, and the whole block turned into file bytes at once. This module never decides what was seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from bench.traffic import ICMP, POOL_BYTES, PUBLIC, TCP, UDP, Flows, Packets

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: 2023-11-14 22:13:20 UTC, when the traffic starts.
START_S: Final = 1_700_000_000

#: Packets built at a time: the rows of a block fit the caches of the processor.
BLOCK_PACKETS: Final = 16_384

#: What no record exceeds: Ethernet, IP and what the largest payload leaves room for.
LARGEST_FRAME_BYTES: Final = 1514

_ETHERNET_IP: Final = [
    ("to", "u1", 6), ("from", "u1", 6), ("ethertype", ">u2"),
    ("version_ihl", "u1"), ("tos", "u1"), ("length", ">u2"), ("ip_id", ">u2"), ("fragment", ">u2"),
    ("ttl", "u1"), ("protocol", "u1"), ("ip_checksum", ">u2"), ("src", ">u4"), ("dst", ">u4"),
]  # fmt: skip
_TCP: Final = [
    ("sport", ">u2"), ("dport", ">u2"), ("seq", ">u4"), ("ack", ">u4"),
    ("offset", "u1"), ("flags", "u1"), ("window", ">u2"), ("checksum", ">u2"), ("urgent", ">u2"),
]  # fmt: skip
_TIMESTAMPS: Final = [("options", ">u4"), ("tsval", ">u4"), ("tsecr", ">u4")]
_UDP: Final = [("sport", ">u2"), ("dport", ">u2"), ("udp_length", ">u2"), ("checksum", ">u2")]
_ICMP: Final = [("type", "u1"), ("code", "u1"), ("checksum", ">u2"), ("id", ">u2"), ("icmp_seq", ">u2")]

#: (protocol, L4 header bytes) to the header of a frame, from the first byte of Ethernet on; no padding.
_HEADERS: Final = {
    (TCP, 20): np.dtype([*_ETHERNET_IP, *_TCP]),
    (TCP, 32): np.dtype([*_ETHERNET_IP, *_TCP, *_TIMESTAMPS]),
    (UDP, 8): np.dtype([*_ETHERNET_IP, *_UDP]),
    (ICMP, 8): np.dtype([*_ETHERNET_IP, *_ICMP]),
}
_RECORD: Final = np.dtype([("seconds", "<u4"), ("us", "<u4"), ("captured", "<u4"), ("wire", "<u4")])
_GLOBAL: Final = np.array([0xA1B2C3D4, 0x00040002, 0, 0], "<u4")  # draft-ietf-opsawg-pcap, microseconds
_ETHERNET_LINK: Final = 1

#: Where the 16-bit words of the IP header and its addresses lie in a frame, counted in words.
_IP_WORDS: Final = slice(7, 17)
_ADDRESS_WORDS: Final = slice(13, 17)
_L4_WORDS: Final = slice(17, None)

_CLIENT_MAC, _INSIDE_MAC, _OUTSIDE_MAC, _GATEWAY_MAC = (
    np.frombuffer(bytes.fromhex(mac), np.uint8)
    for mac in ("0242ac110002", "0242ac110001", "0242cb007107", "0242cb007101")
)


class Pool:
    """Random bytes that payloads are cut from, and the sums that make their checksums cheap."""

    def __init__(self, seed: int) -> None:
        self.data = np.random.default_rng(seed).integers(0, 256, POOL_BYTES, np.uint8)
        self._sums: NDArray[np.int64] = np.concatenate(
            [[0], np.cumsum(self.data.view(">u2"), dtype=np.int64)]
        )

    def sums(self, at: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum of the 16-bit words of each cut; `at` is even, an odd end is padded (RFC 1071)."""
        end = at + length
        odd: NDArray[np.int64] = np.where(length & 1, self.data[end - 1].astype(np.int64) << 8, 0)
        total: NDArray[np.int64] = self._sums[end // 2] - self._sums[at // 2] + odd
        return total


def write_pcap(
    stream: BinaryIO,
    flows: Flows,
    packets: Packets,
    seen: NDArray[np.int64],
    pool: Pool,
    *,
    inside: bool,
    snaplen: int,
) -> None:
    """Write the packets `seen`, in that order, as the inside or the outside point has them."""
    stream.write(_GLOBAL.tobytes() + np.array([snaplen, _ETHERNET_LINK], "<u4").tobytes())
    for start in range(0, seen.size, BLOCK_PACKETS):
        rows = seen[start : start + BLOCK_PACKETS]
        stream.write(_block(flows, packets, rows, pool, inside=inside, snaplen=snaplen))


def _block(
    flows: Flows, packets: Packets, rows: NDArray[np.int64], pool: Pool, *, inside: bool, snaplen: int
) -> bytes:
    """Return the records of some packets as they stand in the file."""
    flow = packets.flow[rows]
    wire = 34 + flows.header_bytes[flow] + packets.payload_bytes[rows]
    captured = np.minimum(wire, snaplen)
    time_us = (packets.inside_us if inside else packets.outside_us)[rows]
    record = np.empty(rows.size, _RECORD)
    record["seconds"], record["us"] = START_S + time_us // 10**6, time_us % 10**6
    record["captured"], record["wire"] = captured, wire

    # One row a record, each as wide as the longest; what a record does not reach is left out at the end.
    width = 16 + min(snaplen, LARGEST_FRAME_BYTES)
    block = np.empty((rows.size, width), np.uint8)
    block[:, :16] = record.view(np.uint8).reshape(-1, 16)
    cuts = np.lib.stride_tricks.sliding_window_view(pool.data, width)
    for (protocol, header_bytes), layout in _HEADERS.items():
        here = np.flatnonzero((flows.protocol[flow] == protocol) & (flows.header_bytes[flow] == header_bytes))
        if not here.size:
            continue
        header = _headers(layout, flows, packets, rows[here], pool, inside=inside)
        payload_at = 16 + layout.itemsize
        block[here, 16:payload_at] = header[:, : width - 16]
        block[here, payload_at:] = cuts[packets.payload_at[rows[here]], : max(0, width - payload_at)]
    inhabited: NDArray[np.bool_] = np.arange(width) < (16 + captured)[:, None]
    return bytes(block[inhabited].data)


def _headers(
    layout: np.dtype[np.void],
    flows: Flows,
    packets: Packets,
    rows: NDArray[np.int64],
    pool: Pool,
    *,
    inside: bool,
) -> NDArray[np.uint8]:
    """Return the headers of packets that share a layout, shape (packets, bytes of a header)."""
    flow, outbound = packets.flow[rows], packets.outbound[rows]
    length = packets.payload_bytes[rows]
    protocol, header_bytes = flows.protocol[flow], flows.header_bytes[flow]
    near = flows.client[flow] if inside else np.full(rows.size, PUBLIC, np.uint32)
    near_port = (flows.client_port if inside else flows.outside_port)[flow]

    frame = np.zeros(rows.size, layout)
    near_mac, far_mac = (_CLIENT_MAC, _INSIDE_MAC) if inside else (_OUTSIDE_MAC, _GATEWAY_MAC)
    frame["from"] = np.where(outbound[:, None], near_mac, far_mac)
    frame["to"] = np.where(outbound[:, None], far_mac, near_mac)
    frame["ethertype"] = 0x0800
    frame["version_ihl"] = 0x45
    frame["length"] = 20 + header_bytes + length
    frame["ip_id"] = packets.ip_id[rows]
    frame["fragment"] = 0x4000  # don't fragment
    # The NAT routes, so each packet has one hop less behind it.
    frame["ttl"] = np.where(outbound, 64, flows.server_ttl[flow]) - (outbound != inside)
    frame["protocol"] = protocol
    frame["src"] = np.where(outbound, near, flows.server[flow])
    frame["dst"] = np.where(outbound, flows.server[flow], near)

    names = layout.names or ()
    if "sport" in names:
        frame["sport"] = np.where(outbound, near_port, flows.server_port[flow])
        frame["dport"] = np.where(outbound, flows.server_port[flow], near_port)
    if "seq" in names:
        frame["seq"], frame["ack"] = packets.seq[rows], packets.ack[rows]
        frame["offset"] = header_bytes // 4 << 4
        frame["flags"], frame["window"] = packets.tcp_flags[rows], packets.window[rows]
    if "tsval" in names:
        frame["options"] = 0x0101080A  # NOP, NOP, timestamps of 10 bytes (RFC 7323)
        frame["tsval"] = packets.inside_us[rows] // 1000
        frame["tsecr"] = np.where(packets.tcp_flags[rows] & 0x10, packets.inside_us[rows] // 1000 ^ 0x55, 0)
    if "udp_length" in names:
        frame["udp_length"] = 8 + length
    if "icmp_seq" in names:
        frame["type"] = np.where(outbound, 8, 0)
        frame["id"], frame["icmp_seq"] = near_port, packets.seq[rows]

    words = frame.view(">u2").reshape(rows.size, -1)
    frame["ip_checksum"] = _checksum(words[:, _IP_WORDS].sum(axis=1, dtype=np.int64))
    covered = words[:, _L4_WORDS].sum(axis=1, dtype=np.int64) + pool.sums(packets.payload_at[rows], length)
    if "icmp_seq" not in names:  # the pseudo-header; ICMP has none
        covered += words[:, _ADDRESS_WORDS].sum(axis=1, dtype=np.int64) + protocol + header_bytes + length
    checksum = _checksum(covered)
    # In UDP 0 means no checksum; a sum of 0 is sent as its other form (RFC 768).
    frame["checksum"] = np.where((protocol == UDP) & (checksum == 0), 0xFFFF, checksum)
    return frame.view(np.uint8).reshape(rows.size, -1)


def _checksum(total: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the Internet checksum of sums of 16-bit words (RFC 1071)."""
    for _ in range(3):
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
