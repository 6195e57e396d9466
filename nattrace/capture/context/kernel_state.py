"""Links, addresses, routes and rules of this machine, asked by rtnetlink, in the form of ``ip -j``.

The form is iproute2's so that a context file reads the same whoever took it; fields that say nothing of NAT are left
out. Needs no right and no tool. Numbers that the kernel has no name for stay numbers.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

#: IFF_* (linux/if.h) as ip(8) prints them.
LINK_FLAGS: Final = {
    0x1: "UP",
    0x2: "BROADCAST",
    0x8: "LOOPBACK",
    0x10: "POINTOPOINT",
    0x80: "NOARP",
    0x100: "PROMISC",
    0x1000: "MULTICAST",
    0x10000: "LOWER_UP",
}
_FAMILIES: Final = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
_SCOPES: Final = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
_TABLES: Final = {0: "unspec", 253: "default", 254: "main", 255: "local"}
#: RTN_* (linux/rtnetlink.h).
_ROUTE_TYPES: Final = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    4: "anycast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
    9: "throw",
}
#: FR_ACT_* (linux/fib_rules.h).
_RULE_ACTIONS: Final = {1: "table", 2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}


def links(kernel: Any) -> list[dict[str, Any]]:
    """Return the interfaces as ``ip -j -d link`` does; `kernel` is a pyroute2 IPRoute."""
    names = _names(kernel)
    found = []
    for link in kernel.get_links():
        info = link.get_attr("IFLA_LINKINFO")
        kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
        entry = {
            "ifindex": link["index"],
            "ifname": link.get_attr("IFLA_IFNAME"),
            "flags": [name for bit, name in LINK_FLAGS.items() if link["flags"] & bit],
            "mtu": link.get_attr("IFLA_MTU"),
            "operstate": link.get_attr("IFLA_OPERSTATE"),
            "address": link.get_attr("IFLA_ADDRESS"),
        }
        peer, master = link.get_attr("IFLA_LINK"), link.get_attr("IFLA_MASTER")
        elsewhere = link.get_attr("IFLA_LINK_NETNSID")
        # An interface may name itself; one of the same number in another namespace is another one.
        if peer and (peer != link["index"] or elsewhere is not None):
            entry["link_index"] = peer
            _add(entry, "link_netnsid", elsewhere)
        if master:
            entry["master"] = names.get(master, str(master))
        if kind is not None:
            entry["linkinfo"] = {"info_kind": kind}
        found.append(entry)
    return found


def addresses(kernel: Any) -> list[dict[str, Any]]:
    """Return the interfaces with their addresses as ``ip -j address`` does."""
    by_index: dict[int, dict[str, Any]] = {
        index: {"ifindex": index, "ifname": name, "addr_info": []} for index, name in _names(kernel).items()
    }
    for address in kernel.get_addr():
        local = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
        entry = by_index.setdefault(address["index"], {"ifindex": address["index"], "addr_info": []})
        entry["addr_info"].append(
            {
                "family": _FAMILIES.get(address["family"], str(address["family"])),
                "local": local,
                "prefixlen": address["prefixlen"],
                "scope": _SCOPES.get(address["scope"], str(address["scope"])),
            }
        )
    return list(by_index.values())


def routes(kernel: Any) -> list[dict[str, Any]]:
    """Return the routes of all tables, both families, as ``ip -j route show table all`` does."""
    names = _names(kernel)
    found = []
    for family in _FAMILIES:
        for route in kernel.get_routes(family=family):
            if route["flags"] & 0x200:  # RTM_F_CLONED: a cache entry, no route
                continue
            entry: dict[str, Any] = {"dst": _prefix(route, "dst")}
            if route["type"] != 1:
                entry["type"] = _ROUTE_TYPES.get(route["type"], str(route["type"]))
            _add(entry, "gateway", route.get_attr("RTA_GATEWAY"))
            _add(entry, "dev", names.get(route.get_attr("RTA_OIF") or 0))
            table = route.get_attr("RTA_TABLE") or route["table"]
            if table != 254:
                entry["table"] = _TABLES.get(table, str(table))
            _add(entry, "prefsrc", route.get_attr("RTA_PREFSRC"))
            _add(entry, "metric", route.get_attr("RTA_PRIORITY"))
            hops = route.get_attr("RTA_MULTIPATH") or ()
            if hops:
                entry["nexthops"] = [
                    {
                        "gateway": hop.get_attr("RTA_GATEWAY"),
                        "dev": names.get(hop["oif"]),
                        "weight": hop["hops"] + 1,
                    }
                    for hop in hops
                ]
            found.append(entry)
    return found


def rules(kernel: Any) -> list[dict[str, Any]]:
    """Return the policy rules of both families as ``ip -j rule`` does."""
    found = []
    for family, name in _FAMILIES.items():
        for rule in kernel.get_rules(family=family):
            entry: dict[str, Any] = {"family": name, "priority": rule.get_attr("FRA_PRIORITY") or 0}
            entry["src"] = "all" if not rule["src_len"] else _prefix(rule, "src", "FRA_SRC")
            if rule["dst_len"]:
                entry["dst"] = _prefix(rule, "dst", "FRA_DST")
            _add(entry, "iif", rule.get_attr("FRA_IIFNAME"))
            _add(entry, "oif", rule.get_attr("FRA_OIFNAME"))
            mark, mask = rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_FWMASK")
            if mark or mask not in {None, 0, 0xFFFFFFFF}:
                entry["fwmark"], entry["fwmask"] = f"{mark or 0:#x}", f"{mask or 0:#x}"
            if rule["action"] == 1:
                table = rule.get_attr("FRA_TABLE") or rule["table"]
                entry["table"] = _TABLES.get(table, str(table))
            else:
                entry["action"] = _RULE_ACTIONS.get(rule["action"], str(rule["action"]))
            found.append(entry)
    return found


#: What is asked, by the names of `nattrace.bundle.writing.CONTEXT_NAMES`.
QUESTIONS: Final[dict[str, Callable[[Any], list[dict[str, Any]]]]] = {
    "links": links,
    "addresses": addresses,
    "routes": routes,
    "rules": rules,
}


def _names(kernel: Any) -> dict[int, str]:
    return {link["index"]: link.get_attr("IFLA_IFNAME") for link in kernel.get_links()}


def _prefix(message: Any, which: str, attribute: str = "RTA_DST") -> str:
    address, length = message.get_attr(attribute), message[f"{which}_len"]
    if address is None:
        return "default"
    return str(address) if length == (128 if ":" in address else 32) else f"{address}/{length}"


def _add(entry: dict[str, Any], key: str, value: object) -> None:
    if value is not None:
        entry[key] = value
