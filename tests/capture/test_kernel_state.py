"""Links, addresses, routes and rules: every field we write is the one that ``ip -j`` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from lab import topology

from nattrace.capture.context import kernel_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.topology import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    reason = topology.missing()
    if reason is not None:
        pytest.skip(reason)
    with topology.lab(1, ipv6=True) as made:
        made.router.run("ip rule add fwmark 0x10/0xff table 100 priority 500")
        made.router.run("ip rule add from 172.17.0.0/24 to 198.51.100.1 iif docker0 unreachable priority 600")
        made.router.run("ip route add default via 203.0.113.1 table 100 metric 7")
        made.router.run("ip route add blackhole 192.0.2.0/24")
        made.router.run(
            "ip route add 192.0.2.128/25 nexthop via 203.0.113.1 weight 2 nexthop via 203.0.113.2 weight 1"
        )
        yield made


def asked(lab: Lab, name: str) -> list[dict[str, Any]]:
    with lab.router.netlink() as kernel:
        return kernel_state.QUESTIONS[name](kernel)


def printed(lab: Lab, line: str) -> list[dict[str, Any]]:
    # ip pads its lists with empty objects
    return [entry for entry in json.loads(lab.router.run(f"ip -j -N {line}".replace(" -N", ""))) if entry]


def test_links(lab: Lab) -> None:
    ours = {link["ifname"]: link for link in asked(lab, "links")}
    theirs = {link["ifname"]: link for link in printed(lab, "-d link")}
    assert ours.keys() == theirs.keys() >= {"lo", "docker0", "eth0", "veth1"}
    for name, link in ours.items():
        kind = link.pop("linkinfo", {}).get("info_kind")
        assert kind == theirs[name].get("linkinfo", {}).get("info_kind")
        flags = set(theirs[name]["flags"]) - {"NO-CARRIER", "M-DOWN"}
        assert set(link.pop("flags")) == flags
        assert link == {key: theirs[name][key] for key in link}
    assert ours["veth1"]["master"] == "docker0"
    assert ours["veth1"]["link_index"]


def test_addresses(lab: Lab) -> None:
    ours = {entry["ifname"]: entry for entry in asked(lab, "addresses")}
    theirs = {entry["ifname"]: entry for entry in printed(lab, "address")}
    assert ours.keys() == theirs.keys()
    for name, entry in ours.items():
        wanted = [
            {key: info[key] for key in ("family", "local", "prefixlen", "scope")}
            for info in theirs[name]["addr_info"]
        ]
        assert sorted(map(str, entry["addr_info"])) == sorted(map(str, wanted))


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_routes(lab: Lab, family: str) -> None:
    theirs = printed(lab, f"{family} route show table all")
    ours = asked(lab, "routes")
    keys = ("dst", "type", "gateway", "dev", "table", "prefsrc", "metric")

    def form(route: dict[str, Any]) -> str:
        hops = [(hop.get("gateway"), hop.get("dev"), hop.get("weight")) for hop in route.get("nexthops", ())]
        return str([(key, route[key]) for key in keys if key in route] + hops)

    assert len(theirs) > 3
    missing = {form(route) for route in theirs} - {form(route) for route in ours}
    assert missing == set()


def test_rules(lab: Lab) -> None:
    ours = [rule for rule in asked(lab, "rules") if rule.pop("family") == "inet"]
    theirs = printed(lab, "-4 rule")
    for rule in theirs:
        if "srclen" in rule:
            rule["src"] = f"{rule['src']}/{rule.pop('srclen')}"
    keys = {key for rule in ours for key in rule}
    assert ours == [{key: value for key, value in rule.items() if key in keys} for rule in theirs]
    assert len(ours) == 5
