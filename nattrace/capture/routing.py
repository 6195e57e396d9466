"""The interfaces by which packets of containers leave, as the kernel would route them. Looks up; sends nothing.

The default route alone does not say: rules may send what comes from a bridge elsewhere, and VPNs lay two halves of
the address space, or a table of their own, over the default route.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Places far away, one in each half of either address space: public resolvers and a root server, never asked.
_FAR: Final[dict[int, tuple[str, ...]]] = {
    socket.AF_INET: ("9.9.9.9", "198.41.0.4"),
    socket.AF_INET6: ("2620:fe::fe", "a000::1"),
}

#: RT_TABLE_MAIN (linux/rtnetlink.h).
_MAIN_TABLE: Final = 254


def outgoing_interfaces(bridges: Sequence[str]) -> list[str]:
    """Return the names of the interfaces by which packets from these bridges leave, IPv4's first.

    Of a family that no bridge routes, those by which this machine's own packets leave: a proxy may stand in between.
    """
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow to load

    names = dict(socket.if_nameindex())
    found: list[str] = []
    with IPRoute() as kernel:
        for family, places in _FAR.items():
            guests = _guests(kernel, family, {index for index, name in names.items() if name in bridges})
            ways = [
                way
                for guest in guests
                for place in places
                if (way := _way(kernel, place, **guest)) is not None
            ]
            if not ways:
                ways = [way for place in places if (way := _way(kernel, place)) is not None]
            # A look-up gives one of several equal ways; packets take them all.
            equals = _default_ways(kernel, family)
            found += [
                names[way]
                for chosen in ways
                for way in (equals if chosen in equals else [chosen])
                if names.get(way, "lo") != "lo"
            ]
    return list(dict.fromkeys(found))


def _guests(kernel: Any, family: int, bridges: set[int]) -> list[dict[str, Any]]:
    """Return what tells a packet that a container sends, for each network of the bridges: source and interface."""
    found = []
    for address in kernel.get_addr(family=family):
        own = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
        if address["index"] in bridges and not str(own).lower().startswith("fe80:"):
            # The kernel refuses an address of its own as the source of what comes in.
            hosts = ip_network(f"{own}/{address['prefixlen']}", strict=False).hosts()
            guest = next((str(host) for host in hosts if str(host) != own), None)
            if guest is not None:
                found.append({"src": guest, "iif": address["index"]})
    return found


def _way(kernel: Any, place: str, **guest: Any) -> int | None:
    """Return the index of the interface that a packet to `place` leaves by, None when it cannot."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with suppress(NetlinkError):
        for route in kernel.route("get", dst=place, **guest):
            return int(route.get_attr("RTA_OIF") or 0) or None
    return None


def _default_ways(kernel: Any, family: int) -> list[int]:
    """Return the interfaces of the default routes of least metric in the main table."""
    routes = [
        route
        for route in kernel.get_routes(family=family)
        if route["dst_len"] == 0 and route.get_attr("RTA_TABLE", _MAIN_TABLE) == _MAIN_TABLE
    ]
    least = min((route.get_attr("RTA_PRIORITY", 0) or 0 for route in routes), default=0)
    return [
        way
        for route in routes
        if (route.get_attr("RTA_PRIORITY", 0) or 0) == least
        for way in (
            route.get_attr("RTA_OIF"),
            *(hop["oif"] for hop in route.get_attr("RTA_MULTIPATH") or ()),
        )
        if way
    ]
