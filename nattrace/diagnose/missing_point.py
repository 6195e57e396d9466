"""Captures of one side only: no NAT can be seen, and which point is missing and how to capture it.

NAT is seen by comparing a packet before it with the same packet behind it. This module looks at addresses and
interface names only; it never matches packets and never runs the commands that it proposes. Whatever comes from
a capture reaches a command line only as an address that was parsed, or as a quoted interface name.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import islice
from typing import TYPE_CHECKING

from nattrace.model import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.model import Flow, Point

Address = IPv4Address | IPv6Address

#: Sources that a NAT hides: RFC 1918, RFC 6598 (carrier-grade NAT), RFC 4193.
_PRIVATE: tuple[IPv4Network | IPv6Network, ...] = (
    *map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")),
    IPv6Network("fc00::/7"),
)
#: Addresses that never leave a host or a link (RFC 6890, RFC 5771, RFC 4291): they say nothing of NAT.
_LOCAL: tuple[IPv4Network | IPv6Network, ...] = (
    *map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")),
    *map(IPv6Network, ("::/127", "fe80::/10", "ff00::/8")),
)
#: Two private addresses under one such prefix are taken for neighbours: Docker's default networks are /16.
_NEIGHBOUR_PREFIX = {4: 16, 6: 64}

#: What Linux accepts as an interface name (dev_valid_name), narrowed to what needs no second look in a shell.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,14}", re.ASCII)
#: Point names that are surely interfaces, even if they come from a file name.
_FAMILIAR_NAME = re.compile(
    r"(?:docker|br|virbr|lxcbr|lxdbr|cni|podman|eth|wlan|bond|tun|tap|wg|ppp)\d{1,3}|br-[a-z0-9]{2,12}|(?:veth|en|wl|ww)[a-z0-9]{0,10}\d[a-z0-9]{0,4}",
    re.ASCII,
)

#: Destinations named in one finding: more make no filter that anyone would type.
MAX_DESTINATIONS = 3
#: Flows listed in one finding.
MAX_FLOWS = 100
#: Flows looked at when there is one point and so no crossing to find: enough to know where the traffic goes.
MAX_FLOWS_READ = 10_000

_TCPDUMP = "tcpdump --immediate-mode -U --time-stamp-precision=nano"


@dataclass(slots=True)
class _Side:
    """The flows that speak for one side: a few of them, and where all of them go."""

    flows: list[Flow] = field(default_factory=list)
    protocols: set[str] = field(default_factory=set)
    packets: Counter[Address] = field(default_factory=Counter)  #: by far end

    def add(self, flow: Flow, far_end: Address) -> None:
        if len(self.flows) < MAX_FLOWS:
            self.flows.append(flow)
        self.protocols.add(flow.protocol)
        self.packets[far_end] += flow.packets_original + flow.packets_reply

    def far_ends(self) -> list[Address]:
        """Return the far ends with most packets; equals in numerical order, so that the result is stable."""
        ranked = sorted(self.packets, key=lambda a: (-self.packets[a], a.version, int(a)))
        return ranked[:MAX_DESTINATIONS]


def missing_point(points: Sequence[Point], flows: Sequence[Flow]) -> list[Finding]:
    """Return a finding when no flow was seen at two points although its addresses speak of NAT.

    ``no-outside-point``: private addresses talk to others, and nothing shows what they become.
    ``no-inside-point``: only public addresses were seen; which private address stands behind is not captured.
    Returns an empty list when a flow was seen at two points, when both sides were captured, or when there is
    nothing but local traffic. `flows` is read once, in order.
    """
    inside, outside = _Side(), _Side()
    for flow in islice(flows, MAX_FLOWS_READ if len(points) == 1 else None):
        if len(flow.path) > 1:
            return []
        source, target = _address(flow.initiator.src), _address(flow.initiator.dst)
        if source is None or target is None or _is_local(source) or _is_local(target):
            continue
        remote = _remote(source, target)
        if remote is not None:
            inside.add(flow, remote)
        elif not _is_private(source):
            outside.add(flow, target)
    if inside.flows and not outside.flows:
        return [_no_outside(points, inside)]
    # with public addresses at several points both sides may be there; then it is no point that is missing
    if outside.flows and not inside.flows and len(points) == 1:
        return [_no_inside(points[0], outside)]
    return []


def _no_outside(points: Sequence[Point], side: _Side) -> Finding:
    remotes = side.far_ends()
    names = list(dict.fromkeys(_printable(flow.path[0]) for flow in side.flows))
    point = next((p for p in points if p.name == side.flows[0].path[0]), points[0])
    private = (
        address
        for flow in side.flows
        for address in (_address(flow.initiator.src), _address(flow.initiator.dst))
        if address is not None and _is_private(address) and address not in side.packets
    )
    hidden = sorted(dict.fromkeys(private), key=lambda a: (a.version, int(a)))
    message = (
        f"captured at {_listed(names)} only: no NAT can be seen from {'there' if len(names) > 1 else 'one point'} "
        f"alone. What {_listed(hidden)} {'becomes' if len(hidden) == 1 else 'become'} further on shows at the "
        f"outside point, the interface with the route to {_listed(remotes)}, which was not captured"
    )
    target = str(remotes[0])
    expression = shlex.quote(_filter(side, remotes))
    setting, here, file = _capture_names(point, "INSIDE")
    advice = [
        "find the interface with that route (it need not be called eth0): it is the word after dev in",
        f"  ip route get {target}",
        "put its name into IFACE, start both captures, repeat the traffic, then stop them with kill %1 %2:",
        "  IFACE=...",
        *setting,
        f"  {_TCPDUMP} -i {here} -w {file} {expression} &",
        f'  {_TCPDUMP} -i "$IFACE" -w "$IFACE.pcap" {expression} &',
        f'  nattrace analyze {file} "$IFACE.pcap"',
    ]
    return Finding(
        code="no-outside-point",
        severity="warning",
        message=message,
        flows=tuple(flow.id for flow in side.flows),
        advice="\n".join(advice),
    )


def _no_inside(point: Point, side: _Side) -> Finding:
    expression = shlex.quote(_filter(side, side.far_ends()))
    setting, here, file = _capture_names(point, "OUTSIDE")
    message = (
        f"captured at {_printable(point.name)} only, and only public addresses show there: if NAT put one of them "
        "in, the private address behind it shows at an inside point (docker0, a bridge br-..., the interface of "
        "the LAN), which was not captured"
    )
    advice = [
        "find the inside interface: the bridges of this host, and their addresses, are listed by",
        "  ip -brief address show type bridge",
        "put its name into IFACE, start both captures, repeat the traffic, then stop them with kill %1 %2:",
        "  IFACE=docker0",
        *setting,
        f'  {_TCPDUMP} -i "$IFACE" -w "$IFACE.pcap" {expression} &',
        f"  {_TCPDUMP} -i {here} -w {file} {expression} &",
        f'  nattrace analyze "$IFACE.pcap" {file}',
    ]
    return Finding(
        code="no-inside-point",
        severity="warning",
        message=message,
        flows=tuple(flow.id for flow in side.flows),
        advice="\n".join(advice),
    )


@lru_cache(4096)
def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_private(address: Address) -> bool:
    return any(address in network for network in _PRIVATE)


def _is_local(address: Address) -> bool:
    return any(address in network for network in _LOCAL)


def _remote(source: Address, target: Address) -> Address | None:
    """Return the far end of a flow with a private address, None if there is none or it is a neighbour's."""
    if _is_private(source) and _is_private(target):
        shift = source.max_prefixlen - _NEIGHBOUR_PREFIX[source.version]
        near = source.version == target.version and int(source) >> shift == int(target) >> shift
        return None if near else target
    if _is_private(source):
        return target
    return source if _is_private(target) else None


def _filter(side: _Side, remotes: Sequence[Address]) -> str:
    """Return a pcap filter that holds on both sides: NAT of the other end leaves the far ends alone."""
    hosts = " or ".join(f"host {address}" for address in remotes)
    word = {"icmp": "icmp", "icmpv6": "icmp6"}.get(next(iter(side.protocols)))
    if word is None or len(side.protocols) > 1:
        return hosts
    return f"{word} and {hosts}" if len(remotes) == 1 else f"{word} and ({hosts})"


def _interface(point: Point) -> str | None:
    """Return the interface to capture on again, None if it is not known: a file may be called anything."""
    if (
        point.interface is not None
        and point.interface != "any"
        and _INTERFACE_NAME.fullmatch(point.interface)
    ):
        return point.interface
    return point.name if _FAMILIAR_NAME.fullmatch(point.name) else None


def _capture_names(point: Point, variable: str) -> tuple[list[str], str, str]:
    """Return the lines that set `variable` if need be, and interface and file as words for a shell."""
    name = _interface(point)
    if name is None:
        return [f"  {variable}=..."], f'"${variable}"', f'"${variable}.pcap"'
    return [], shlex.quote(name), shlex.quote(f"{name.replace(':', '_')}.pcap")


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


def _listed(things: Sequence[object]) -> str:
    """Return the first few, separated by commas."""
    shown = [str(thing) for thing in things[:MAX_DESTINATIONS]]
    return ", ".join([*shown, "..."] if len(things) > len(shown) else shown)
