"""ICMP errors about packets of which NAT changed both ends: twice NAT, and hairpins, which one point shows twice."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from lab import rules, topology
from lab.scenarios.addresses import VIRTUAL, VIRTUAL_2
from lab.scenarios.icmp_errors import CLOSED, OUTSIDE, Prober, Tracer, refused_connection, unlimited
from lab.scenarios.recording import NotHereError, kernel_truth, recorded
from lab.topology import FARS, SERVERS, UPLINK, beyond, client_address, lab
from lab.traffic import closing_all, token

if TYPE_CHECKING:
    from pathlib import Path

    from lab.truth import Truth


def errors_twice_nat(folder: Path) -> Truth:
    """Virtual addresses outside, masquerade inside: refused, prohibited and expired probes of containers that collide."""
    return _errors_of_both_ends(folder, bridge_netfilter=False)


def errors_twice_nat_half(folder: Path) -> Truth:
    """The same with bridge netfilter: docker0 may show packets, errors and quotes after half of the translation."""
    if not topology.BRIDGE_NETFILTER.exists():
        raise NotHereError("kernel has no br_netfilter")
    return _errors_of_both_ends(folder, bridge_netfilter=True)


def _errors_of_both_ends(folder: Path, *, bridge_netfilter: bool) -> Truth:
    with lab(clients=2, bridge_netfilter=bridge_netfilter) as net, beyond(net):
        unlimited(net)
        rules.docker_nat(net.router)
        rules.dnat(net.router, VIRTUAL, "udp", 53, f"{SERVERS[0]}:{CLOSED}")
        rules.dnat(net.router, VIRTUAL_2, "udp", 33434, f"{FARS[0]}:33435")
        rules.dnat(net.router, VIRTUAL_2, "tcp", 80, f"{FARS[0]}:81")
        rules.dnat(net.router, VIRTUAL_2, "icmp", None, FARS[0])
        refused = [Prober(client, 40000, (VIRTUAL, 53)) for client in net.clients]
        expired = [Prober(client, 40001, (VIRTUAL_2, 33434)) for client in net.clients]
        tracers = [Tracer(client, VIRTUAL_2, 1, OUTSIDE) for client in net.clients]
        with closing_all(*refused, *expired, *tracers), recorded(net, folder):
            for round_ in range(3):
                for may_fragment in (True, False):
                    for closed, dying in zip(refused, expired, strict=True):
                        assert closed.provoke(token(), may_fragment=may_fragment) == errno.ECONNREFUSED
                        code = dying.provoke(token(), ttl=OUTSIDE, may_fragment=may_fragment)
                        assert code == errno.EHOSTUNREACH
                for client, tracer in zip(net.clients, tracers, strict=True):
                    tracer.trace(round_)
                    to = (VIRTUAL_2, 80)
                    assert refused_connection(client, 41000 + round_, to, ttl=OUTSIDE) == errno.EHOSTUNREACH
        return kernel_truth(net, folder)


def errors_hairpin(folder: Path) -> Truth:
    """Containers reach one of them by the host's published port, where nobody listens: docker0 shows all twice."""
    with lab(clients=3, bridge_netfilter=False) as net:
        unlimited(net)
        topology.hairpin_mode(net.router, "veth3")
        rules.dnat(net.router, UPLINK, "udp", 5353, f"{client_address(3)}:{CLOSED}")
        rules.masquerade(net.router, "docker0")
        rules.docker_masquerade(net.router, "172.17.0.0/16", "docker0")
        probers = [Prober(client, 40000, (UPLINK, 5353)) for client in net.clients]
        inward = Prober(net.internet, 40002, (UPLINK, 5353))
        with closing_all(inward, *probers), recorded(net, folder):
            for may_fragment in (True, False) * 3:
                for prober in (*probers, inward):
                    assert prober.provoke(token(), may_fragment=may_fragment) == errno.ECONNREFUSED
        return kernel_truth(net, folder)


SCENARIOS = (errors_twice_nat, errors_twice_nat_half, errors_hairpin)
