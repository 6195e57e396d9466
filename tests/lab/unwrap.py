"""What stands inside the lab's tunnels, one frame at a time: part of the oracle, nothing of nattrace is used."""

from __future__ import annotations

_IPV4, _IPV6, _ETHERNET = 0x0800, 0x86DD, 0x6558


def unwrapped(frame: bytes) -> bytes | None:
    """Return the Ethernet frame that an Ethernet frame carries in a tunnel, None for no tunnel.

    IP alone in a tunnel gets an Ethernet header of zeros. Outer headers are IPv4, not fragmented.
    """
    if int.from_bytes(frame[12:14], "big") != _IPV4:
        return None
    ip = frame[14:]
    header, length, protocol = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big"), ip[9]
    inside = ip[header:length]
    if protocol == 4:
        return _ethernet(_IPV4, inside)
    if protocol == 41:
        return _ethernet(_IPV6, inside)
    if protocol == 47:
        flags, kind = int.from_bytes(inside[:2], "big"), int.from_bytes(inside[2:4], "big")
        optional = 4 * sum(flags >> bit & 1 for bit in (15, 13, 12))
        return _ethernet(kind, inside[4 + optional :])
    if protocol != 17:
        return None
    port, payload = int.from_bytes(inside[2:4], "big"), inside[8:]
    if port == 4789:
        return payload[8:]
    if port == 6081:
        return _ethernet(int.from_bytes(payload[2:4], "big"), payload[8 + (payload[0] & 0x3F) * 4 :])
    return None


def _ethernet(kind: int, inside: bytes) -> bytes:
    return inside if kind == _ETHERNET else bytes(12) + kind.to_bytes(2, "big") + inside
