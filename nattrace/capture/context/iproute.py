"""What ``ip -j`` prints, in the very form of `nattrace.capture.context.kernel_state`: the same fields, none more. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.context.kernel_state import LINK_FLAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: What `FORMS` need, by the names of `kernel_state.QUESTIONS`; rules and routes are asked for each family.
COMMANDS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "links": (("ip", "-j", "-d", "link"),),
    "addresses": (("ip", "-j", "address"),),
    "routes": tuple(("ip", "-j", family, "route", "show", "table", "all") for family in ("-4", "-6")),
    "rules": tuple(("ip", "-j", family, "rule") for family in ("-4", "-6")),
}

_ROUTE_FIELDS: Final = ("dst", "type", "gateway", "dev", "table", "prefsrc", "metric")


def links(printed: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the interfaces of ``ip -j -d link``."""
    (there,) = printed
    indices = {link["ifname"]: link["ifindex"] for link in there}
    found = []
    for link in there:
        entry = {key: link.get(key) for key in ("ifindex", "ifname", "flags", "mtu", "operstate", "address")}
        entry["flags"] = [flag for flag in LINK_FLAGS.values() if flag in link.get("flags", ())]
        # A peer in this namespace is given by its name.
        peer = link.get("link_index") or indices.get(link.get("link"))
        if peer:
            entry["link_index"] = peer
            _copy(link, entry, "link_netnsid")
        _copy(link, entry, "master")
        if "info_kind" in link.get("linkinfo", {}):
            entry["linkinfo"] = {"info_kind": link["linkinfo"]["info_kind"]}
        found.append(entry)
    return found


def addresses(printed: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the interfaces of ``ip -j address`` with their addresses."""
    (there,) = printed
    return [
        {
            "ifindex": link["ifindex"],
            "ifname": link["ifname"],
            "addr_info": [
                {key: info.get(key) for key in ("family", "local", "prefixlen", "scope")}
                for info in link["addr_info"]
                if info
            ],
        }
        for link in there
    ]


def routes(printed: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the routes of ``ip -j -4 route show table all`` and then those of ``-6``."""
    found: list[dict[str, Any]] = []
    for route in (route for family in printed for route in family):
        entry: dict[str, Any] = {key: route[key] for key in _ROUTE_FIELDS if key in route}
        if "nexthops" in route:
            entry["nexthops"] = [
                {key: hop.get(key) for key in ("gateway", "dev", "weight")} for hop in route["nexthops"]
            ]
        found.append(entry)
    return found


def rules(printed: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the policy rules of ``ip -j -4 rule`` and then those of ``-6``."""
    found = []
    for family, there in zip(("inet", "inet6"), printed, strict=True):
        for rule in there:
            entry = {"family": family, "priority": rule["priority"], "src": _prefix(rule, "src")}
            if "dst" in rule:
                entry["dst"] = _prefix(rule, "dst")
            _copy(rule, entry, "iif")
            _copy(rule, entry, "oif")
            if "fwmark" in rule:
                entry["fwmark"], entry["fwmask"] = rule["fwmark"], rule.get("fwmask", "0xffffffff")
            if "goto" in rule or "nop" in rule:
                entry["action"] = "goto" if "goto" in rule else "nop"
            _copy(rule, entry, "action")
            if "action" not in entry:
                _copy(rule, entry, "table")
            found.append(entry)
    return found


#: From all that the commands of `COMMANDS` printed to the form of `kernel_state`.
FORMS: Final[dict[str, Callable[[Sequence[list[dict[str, Any]]]], list[dict[str, Any]]]]] = {
    "links": links,
    "addresses": addresses,
    "routes": routes,
    "rules": rules,
}


def _prefix(rule: dict[str, Any], which: str) -> str:
    length = rule.get(f"{which}len")
    return str(rule[which]) if length is None else f"{rule[which]}/{length}"


def _copy(source: dict[str, Any], entry: dict[str, Any], key: str) -> None:
    if key in source:
        entry[key] = source[key]
