"""A printed packet as numbers: what the readers of lines fill in, part by part. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Printed:
    """One printed packet. Numbers are 0 where tcpdump did not print them, None where that has a meaning."""

    version: int = 0
    ttl: int = 0
    ip_id: int = 0
    fragment: int = 0  #: as `PacketTable.fragment`
    ip_length: int = 0
    header_length: int = 0  #: IP header bytes; 0 if options or extension headers make it unknown
    protocol: int | None = None
    frame_length: int = 0  #: -e
    addressed: bool = False  #: the addresses have been read
    src: bytes = b""
    dst: bytes = b""
    src_text: str = ""  #: endpoints as printed: names of a TCP connection
    dst_text: str = ""
    sport: int = 0
    dport: int = 0
    icmp_type: int = 0
    icmp_code: int = 0
    mtu: int = 0  #: of ICMP errors that name one
    quote: Printed | None = None  #: what an ICMP error quotes
    seq: int | None = None  #: as printed: may be relative for TCP
    ack: int | None = None
    tcp_flags: int = 0
    window: int = 0
    checksum: int | None = None
    checksum_correct: bool = False
    payload_length: int = 0
    l4_length: int = 0  #: header bytes whose fields the text holds: PacketTable.l4_visible
