"""The lab's runs: each builds hosts, sets rules, sends traffic, and returns what the kernel did.

A scenario takes an empty folder, leaves one pcap for each point and conntrack's text in it, and returns the
`Truth`. Its docstring's first line is the fixture's description. Nothing here looks at nattrace. One module
for each family; a family lists its scenarios in SCENARIOS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.scenarios import (
    addresses,
    basic,
    datagram_helpers,
    helpers,
    icmp_errors,
    nat64_errors,
    points,
    proxies,
    rebinding,
    resized,
    traces,
    translators,
    tunnels,
    twice_errors,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab.truth import Truth

FAMILIES = (
    basic,
    addresses,
    rebinding,
    points,
    resized,
    icmp_errors,
    nat64_errors,
    twice_errors,
    traces,
    tunnels,
    translators,
    helpers,
    datagram_helpers,
    proxies,
)

SCENARIOS: dict[str, Callable[[Path], Truth]] = {
    scenario.__name__: scenario for family in FAMILIES for scenario in family.SCENARIOS
}
