"""Who opened a conversation, and which point came first, where single edges do not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Network, routed

import nattrace
from nattrace.nat.orientation import _joined

if TYPE_CHECKING:
    from pathlib import Path

CLIENT, VIRTUAL, SERVER = ("172.17.0.2", 50000), ("198.51.100.99", 53), ("198.51.100.1", 5353)


def test_a_system_port_that_one_hop_shows_tells_who_opened_all_of_them(tmp_path: Path) -> None:
    """The capture begins with an answer, and behind the DNAT both ports are high."""
    network = Network(1)
    each = routed(
        "udp", CLIENT, VIRTUAL, {"server": SERVER}, {"client": ("203.0.113.10", 40000)},
        points=("one", "two", "three"),
    )  # fmt: skip
    for n in range(6):
        network.wait_us(300)
        network.send(each, network.rng.randbytes(24), reply=n % 2 == 0)
    (flow,) = nattrace.analyze(*network.write(tmp_path).sources).flows

    assert flow.path == ("one", "two", "three")
    assert (flow.initiator.src, flow.initiator.dport) == (CLIENT[0], 53)
    assert [t.nat for t in flow.translations] == ["dnat", "snat"]
    assert (flow.translations[1].original.src, flow.translations[1].original.dst) == (CLIENT[0], SERVER[0])


def test_a_bridge_that_gets_copies_of_both_directions_turns_no_translation_round(tmp_path: Path) -> None:
    """One veth sees requests before DNAT, the other one after it; the bridge sees copies of all, later."""
    network = Network(2)
    way = routed("udp", CLIENT, VIRTUAL, {"server": SERVER}, points=("veth1", "veth2"), bridged=True)
    for n in range(8):
        network.wait_us(300)
        serials = network.send(way, network.rng.randbytes(24), reply=n % 2 == 1)
        at_ns, frame, _ = next(p for p in reversed(network.point("veth2").packets) if p[2] == serials[0])
        sooner = next(p for p in reversed(network.point("veth1").packets) if p[2] == serials[0])[0]
        late_ns = max(at_ns, sooner) + 5_000 + (40_000 if n % 2 else 0)
        network.point("br").packets.append((late_ns, frame, serials[0]))
    report = nattrace.analyze(*network.write(tmp_path).sources)

    said = {(t.nat, t.original.dst, t.reply.src) for flow in report.flows for t in flow.translations}
    assert said == {("dnat", VIRTUAL[0], SERVER[0])}


LINKS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=25)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(LINKS, st.lists(st.booleans(), min_size=10, max_size=10))
def test_linked_edges_share_a_leader_and_agree_on_the_direction(
    links: list[tuple[int, int]], turned: list[bool]
) -> None:
    """Against a walk over the links. `turned` says how each item lies, so no two links contradict."""
    one, other = (np.array([link[n] for link in links], np.int64) for n in range(2))
    lies = np.where(np.array(turned), -1, 1)

    leader, sign = _joined(10, one, other, lies[one] * lies[other])

    for start in range(10):
        reached = {start}
        while True:
            more = {b for a, b in links if a in reached} | {a for a, b in links if b in reached}
            if more <= reached:
                break
            reached |= more
        assert leader[start] == min(reached)
        assert sign[start] == lies[start] * lies[min(reached)]
