"""The interfaces by which packets of containers leave, as the kernel would route them. Looks up; sends nothing.

The default route alone does not say: rules may send what comes from a bridge elsewhere, and VPNs lay two halves of
the address space, or a table of their own, over the default route.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nattrace.capture.context.host import Host

#: Places far away, one in each half of either address space: public resolvers and a root server, never asked.
_FAR: Final[dict[str, tuple[str, ...]]] = {
    "inet": ("9.9.9.9", "198.41.0.4"),
    "inet6": ("2620:fe::fe", "a000::1"),
}


def outgoing_interfaces(
    host: Host, state: dict[str, list[dict[str, Any]]], bridges: Sequence[str]
) -> list[str]:
    """Return the names of the interfaces by which packets from these bridges leave, IPv4's first.

    Of a family that no bridge routes, those by which the machine's own packets leave: a proxy may stand in between.
    `state` is the host's `kernel_state`.
    """
    found: list[str] = []
    for family, places in _FAR.items():
        guests = _guests(state["addresses"], family, bridges)
        ways = [host.way(place, guest) for guest in guests for place in places]
        if not any(ways):
            ways = [host.way(place) for place in places]
        for way in ways:
            found += _equal_ways(state["routes"], way) if way is not None else ()
    return [way for way in dict.fromkeys(found) if way != "lo"]


def _guests(
    addresses: Sequence[dict[str, Any]], family: str, bridges: Sequence[str]
) -> list[tuple[str, str]]:
    """Return source and incoming interface of a container's packet, for each network of the bridges."""
    found = []
    for link in addresses:
        for address in link["addr_info"] if link.get("ifname") in bridges else ():
            if address["family"] == family and address["scope"] != "link":
                own = str(address["local"])
                # The kernel refuses an address of its own as the source of what comes in.
                hosts = ip_network(f"{own}/{address['prefixlen']}", strict=False).hosts()
                guest = next((str(each) for each in hosts if str(each) != own), None)
                if guest is not None:
                    found.append((guest, link["ifname"]))
    return found


def _equal_ways(routes: Sequence[dict[str, Any]], way: str) -> list[str]:
    """Return this way and those that share a default route with it: a look-up gives one, packets take them all."""
    found = [way]
    for route in routes:
        ways = [str(hop.get("dev")) for hop in route.get("nexthops") or ()]
        if route["dst"] == "default" and way in ways:
            found += ways
    return found
