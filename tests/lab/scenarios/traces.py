"""traceroute and mtr from containers, through the NAT host and several routers: what strangers attach to tickets."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lab import rules
from lab.probes import MTR_PAYLOAD, Probes
from lab.scenarios.icmp_errors import unlimited
from lab.scenarios.recording import kernel_truth, recorded
from lab.topology import (
    FARS,
    FARS_V6,
    GATEWAY,
    GATEWAY_V6,
    client_address,
    client_address_v6,
    far_behind,
    lab,
)
from lab.traffic import Pinger, closing_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab.truth import Truth

#: Routers outside; with the NAT host and the gateway before them, the target is hop ROUTERS + 3.
ROUTERS = 3
HOPS = ROUTERS + 3
#: Pause between the probes of one burst, and between bursts.
_BETWEEN_S, _AFTER_S = 0.0005, 0.01


def trace_udp(folder: Path) -> Truth:
    """traceroute from two containers at once: every probe has ports of its own and says the same."""
    return _traced(folder, _udp)


def trace_udp_fixed_ids(folder: Path) -> Truth:
    """The same with DF set, so that no probe has an IP id."""
    return _traced(folder, _udp_df)


def trace_echo(folder: Path) -> Truth:
    """mtr from two containers at once, both with ICMP id 1: one flow each, sequence numbers count up."""
    return _traced(folder, _echo)


def trace_tcp(folder: Path) -> Truth:
    """tcptraceroute from two containers at once: every SYN has a port of its own."""
    return _traced(folder, _tcp)


def trace_v6(folder: Path) -> Truth:
    """traceroute6 and mtr -6 from two containers at once, one further along than the other: nothing has an IP id."""
    return _traced(folder, _udp_ahead, _echo, v6=True)


def _udp(probes: Probes, client: int, hop: int, number: int) -> None:
    probes.udp(hop, 40000 + 100 * client + number, 33434 + number)


def _udp_ahead(probes: Probes, client: int, hop: int, number: int) -> None:
    probes.udp(hop, 40000 + 100 * client + number, 33434 + 20 * client + number)


def _udp_df(probes: Probes, client: int, hop: int, number: int) -> None:
    probes.udp(hop, 40000 + 100 * client + number, 33434 + number, df=True)


def _echo(probes: Probes, _: int, hop: int, number: int) -> None:
    probes.echo(hop, 1, 33000 + number, payload=MTR_PAYLOAD)


def _tcp(probes: Probes, client: int, hop: int, number: int) -> None:
    probes.tcp(hop, 50000 + number, 80, 0x1234567 * (1 + client) + 0x10001 * number)


def _traced(folder: Path, *senders: Callable[[Probes, int, int, int], None], v6: bool = False) -> Truth:
    with lab(clients=2, ipv6=v6) as net, far_behind(net, ROUTERS) as beyond:
        unlimited(net, *beyond)
        if v6:
            rules.masquerade_v6(net.router, "fd00:17::/64")
        else:
            rules.docker_nat(net.router)
        address, target = (client_address_v6, FARS_V6[0]) if v6 else (client_address, FARS[0])
        tracers = [Probes(client, address(n), target) for n, client in enumerate(net.clients, 1)]
        near = Pinger(net.clients[0], GATEWAY_V6 if v6 else GATEWAY, 7)
        with closing_all(*tracers, near), recorded(net, folder):
            near.ping(
                1
            )  # so that both points are known to be recording before the first probe and after the last
            for send in senders:
                for hop in range(1, HOPS + 1):
                    for number in range(3 * hop, 3 * hop + 3):
                        for client, tracer in enumerate(tracers):
                            send(tracer, client, hop, number)
                        time.sleep(_BETWEEN_S)
                    time.sleep(_AFTER_S)
            near.ping(2)
        return kernel_truth(net, folder, unique_payloads=False)


SCENARIOS = (trace_udp, trace_udp_fixed_ids, trace_echo, trace_tcp, trace_v6)
