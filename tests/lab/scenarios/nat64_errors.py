"""ICMP errors through a NAT64: each becomes an error of the other IP version, with its quote (RFC 7915)."""

from __future__ import annotations

import errno
import ipaddress
import shutil
from typing import TYPE_CHECKING

from lab import rules
from lab.scenarios.icmp_errors import CLOSED, Prober, Tracer, unlimited
from lab.scenarios.recording import NotHereError, recorded
from lab.scenarios.translators import NAT64_POOL, NAT64_PREFIX, by_construction, keeping, tayga
from lab.topology import FARS, SERVERS, UPLINK, beyond, client_address_v6, lab
from lab.traffic import closing_all, token
from lab.truth import Addressing, Entry

if TYPE_CHECKING:
    from pathlib import Path

    from lab.truth import Truth

#: Hops to the gateway: the host counts twice, before and after the translator, which counts as well.
OUTSIDE = 4
#: What the containers ask for: server, port, and the source port of the first of them.
REFUSED, EXPIRED, PROHIBITED, LARGE = (
    (SERVERS[0], CLOSED, 40000), (FARS[0], 33434, 40010), (FARS[0], 53, 40020), (FARS[0], 54, 40030),
)  # fmt: skip


def nat64_errors(folder: Path) -> Truth:
    """NAT64 by tayga: errors of servers, routers, firewalls and containers become errors of the other IP version."""
    if shutil.which("tayga") is None:
        raise NotHereError("needs tayga")
    with lab(clients=2, ipv6=True) as net, beyond(net) as far:
        unlimited(net, far)
        rules.reject(net.internet)
        mapped = {client_address_v6(n): f"198.18.0.{100 + n}" for n in (1, 2)}
        first = mapped[client_address_v6(1)]
        with tayga(net.router, folder, mapped):
            net.internet.route(NAT64_POOL, UPLINK)
            refused, expired, prohibited, large = (
                [Prober(client, sport + n, (_embedded(server), port)) for n, client in enumerate(net.clients)]
                for server, port, sport in (REFUSED, EXPIRED, PROHIBITED, LARGE)
            )
            inward = Prober(net.internet, 50000, (first, CLOSED), SERVERS[1])
            tracers = [Tracer(client, _embedded(FARS[0]), 1, OUTSIDE) for client in net.clients]
            probers = (*refused, *expired, *prohibited, *large, inward)
            with closing_all(*probers, *tracers), recorded(net, folder):
                for seq in range(3):
                    for n, tracer in enumerate(tracers):
                        assert refused[n].provoke(token()) == errno.ECONNREFUSED
                        assert expired[n].provoke(token(), ttl=OUTSIDE) == errno.EHOSTUNREACH
                        assert prohibited[n].provoke(token()) == errno.EACCES
                        tracer.trace(seq)
                    assert inward.provoke(token()) == errno.ECONNREFUSED
                for n, _ in enumerate(tracers):
                    for ttl in range(1, OUTSIDE):  # at the host, at the translator, at the host again
                        assert expired[n].provoke(token(), ttl=ttl) == errno.EHOSTUNREACH
                    assert large[n].provoke(token(1440)) == errno.EMSGSIZE
        return keeping(by_construction(net, folder, _entries(mapped, first)), "version")


def _entries(mapped: dict[str, str], first: str) -> tuple[Entry, ...]:
    """Return what the translator does to the flows of the scenario, as the kernel would list it."""
    found = []
    for n, (inside, outside) in enumerate(mapped.items()):
        for server, port, sport in (REFUSED, EXPIRED, PROHIBITED, LARGE):
            asked = Addressing(inside, _embedded(server), sport + n, port)
            found.append(Entry("udp", asked, Addressing(server, outside, port, sport + n)))
        asked = Addressing(inside, _embedded(FARS[0]), type=128, id=1)
        found.append(Entry("icmpv6", asked, Addressing(FARS[0], outside, type=0, id=1)))
    asked = Addressing(SERVERS[1], first, 50000, CLOSED)
    found.append(Entry("udp", asked, Addressing(next(iter(mapped)), _embedded(SERVERS[1]), CLOSED, 50000)))
    return tuple(found)


def _embedded(address: str) -> str:
    return str(ipaddress.ip_address(f"{NAT64_PREFIX}{address}"))


SCENARIOS = (nat64_errors,)
