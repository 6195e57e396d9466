"""ICMP errors by name (RFC 792, RFC 1122, RFC 1812, RFC 4443; IANA's registries). Data only; nothing is decoded."""

from __future__ import annotations

from typing import Final

_NAMES_V4: Final = {
    (3, 0): "net-unreachable", (3, 1): "host-unreachable", (3, 2): "protocol-unreachable",
    (3, 3): "port-unreachable", (3, 4): "fragmentation-needed", (3, 5): "source-route-failed",
    (3, 6): "net-unknown", (3, 7): "host-unknown", (3, 8): "source-host-isolated", (3, 9): "net-prohibited",
    (3, 10): "host-prohibited", (3, 11): "net-unreachable-for-tos", (3, 12): "host-unreachable-for-tos",
    (3, 13): "admin-prohibited", (3, 14): "precedence-violation", (3, 15): "precedence-cutoff",
    (4, 0): "source-quench",
    (5, 0): "redirect-net", (5, 1): "redirect-host", (5, 2): "redirect-tos-net", (5, 3): "redirect-tos-host",
    (11, 0): "ttl-exceeded", (11, 1): "reassembly-time-exceeded",
    (12, 0): "parameter-problem", (12, 1): "required-option-missing", (12, 2): "bad-length",
}  # fmt: skip
_NAMES_V6: Final = {
    (1, 0): "no-route", (1, 1): "admin-prohibited", (1, 2): "beyond-scope", (1, 3): "address-unreachable",
    (1, 4): "port-unreachable", (1, 5): "source-address-failed-policy", (1, 6): "reject-route",
    (1, 7): "source-route-failed", (1, 8): "headers-too-long",
    (2, 0): "packet-too-big",
    (3, 0): "hop-limit-exceeded", (3, 1): "reassembly-time-exceeded",
    (4, 0): "parameter-problem", (4, 1): "unknown-next-header", (4, 2): "unknown-option",
    (4, 3): "incomplete-header-chain",
}  # fmt: skip

#: What says that a packet was too big: type and code of both versions. Only these carry an MTU.
FRAGMENTATION_NEEDED: Final = (3, 4)
PACKET_TOO_BIG: Final = (2, 0)


def error_name(version: int, kind: int, code: int) -> str:
    """Name an ICMP error of IP version 4 or 6 by type and code; ``type-N-code-N`` where it has no name."""
    names = _NAMES_V4 if version == 4 else _NAMES_V6
    return names.get((kind, code)) or f"type-{kind}-code-{code}"
