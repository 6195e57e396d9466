"""Compares a report with what a simulation knows to be true. It knows nothing of how nattrace decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from nattrace.model import Rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulation import Conversation, Endpoint, Seen, Simulated

    from nattrace import Report
    from nattrace.model import Crossing, Flow
    from nattrace.model import Tuple as ModelTuple

#: src, dst, sport, dport, id: as conntrack prints one direction.
Sides = tuple[str, str, int | None, int | None, int | None]
#: from point, to point, nat, changed fields, original, reply.
Change = tuple[str, str, str, tuple[str, ...], Sides, Sides]
#: protocol, path, initiator, translations.
Told = tuple[str, tuple[str, ...], Sides, tuple[Change, ...]]


@dataclass(frozen=True)
class Rows:
    """Crossings that a report tells, judged."""

    wrong: tuple[tuple[str, int, str, int], ...]  #: point and frame before, point and frame after
    #: packets that two neighbouring points saw and no row tells, by the first record of each at either point
    missed: frozenset[tuple[str, int, str, int]]
    right: int


def judge_rows(report: Report, truth: Simulated) -> Rows:
    """Compare all crossings with the truth: is it the same packet, the right way, of the right flow."""
    wrong: list[tuple[str, int, str, int]] = []
    found: set[tuple[str, str, int]] = set()
    right = 0
    for row in report.rewrites.all():
        if not isinstance(row, Rewrite):
            continue
        b, a = row.before, row.after
        here = truth.serials[b.point][b.frame - 1]
        there = truth.serials[a.point][a.frame - 1]
        path = truth.conversations[truth.owner[here]].points
        reply = here in truth.replies
        onward = a.point in path and (path.index(b.point) < path.index(a.point)) != reply
        if here == there and onward and (row.direction == "reply") == reply:
            right += 1
            found |= {(b.point, a.point, here), (a.point, b.point, here)}
        else:
            wrong.append((b.point, b.frame, a.point, a.frame))
    missed = {
        (first, here, second, there)
        for first, second in truth.neighbours()
        for here, there in truth.pairs(first, second)
        if (first, second, truth.serials[first][here - 1]) not in found
    }
    return Rows(tuple(wrong), frozenset(missed), right)


def sides(each: ModelTuple) -> Sides:
    """Return a report's tuple as plain values."""
    return (each.src, each.dst, each.sport, each.dport, each.id)


def told(flow: Flow) -> Told:
    """Return what a flow says about NAT, as plain values."""
    changes = tuple(
        (t.from_point, t.to_point, t.nat, t.changed, sides(t.original), sides(t.reply))
        for t in flow.translations
    )
    return flow.protocol, flow.path, sides(flow.initiator), changes


def flows_told(report: Report) -> Counter[Told]:
    """Return what all flows of a report say."""
    return Counter(told(flow) for flow in report.flows)


def expected(conversation: Conversation) -> Told:
    """Return what a report has to say about a conversation that all points of its path saw."""
    c = conversation
    protocol = "icmpv6" if c.protocol == "icmp" and c.version == 6 else c.protocol
    changes = tuple(
        (here, there, *_change(c.protocol, before, after), _sides(c.protocol, before.client, before.server),
         _sides(c.protocol, after.server, after.client, reply=True))
        for (here, before), (there, after) in pairwise(zip(c.points, c.seen, strict=True))
        if _change(c.protocol, before, after)[1]
    )  # fmt: skip
    return protocol, c.points, _sides(c.protocol, c.seen[0].client, c.seen[0].server), changes


def expected_flows(truth: Simulated) -> Counter[Told]:
    """Return what a report has to say when no conversation was missed anywhere."""
    return Counter(expected(each) for each in truth.conversations)


def _sides(protocol: str, source: Endpoint, target: Endpoint, *, reply: bool = False) -> Sides:
    src, dst = str(ip_address(source.address)), str(ip_address(target.address))
    if protocol == "icmp":
        return src, dst, None, None, target.port if reply else source.port
    return src, dst, source.port, target.port, None


def _change(protocol: str, before: Seen, after: Seen) -> tuple[str, tuple[str, ...]]:
    """Return (nat, changed) as the contract names them."""
    src = before.client.address != after.client.address
    dst = before.server.address != after.server.address
    near = before.client.port != after.client.port
    far = before.server.port != after.server.port and protocol != "icmp"
    icmp = protocol == "icmp"
    names = (("src", src), ("dst", dst), ("sport", near and not icmp), ("dport", far), ("id", near and icmp))
    changed = tuple(name for name, differs in names if differs)
    client, server = src or (near and not (icmp and dst)), dst or far
    return "+".join([*["snat"] * client, *["dnat"] * server]), changed


def check_accounting(report: Report) -> None:
    """Check packets = matched + unmatched + skipped in total, and what points and flows add up to."""
    a = report.accounting
    assert a.packets == a.matched + _total(a.unmatched) + _total(a.skipped)
    assert a.packets == sum(p.packets for p in report.points)
    assert all(p.packets == p.decoded + _total(p.skipped) for p in report.points)
    assert min([a.matched, *a.unmatched.values(), *a.skipped.values()]) >= 0


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def crossing(flow: Flow, first: str, second: str, direction: str) -> Crossing:
    """Return a flow's crossing between two points."""
    return next(
        c
        for c in flow.crossings
        if (c.from_point, c.to_point, c.direction) == (first, second, direction)
    )  # fmt: skip


def plain(value: Any) -> Any:
    """Return numpy arrays as lists, for readable comparisons."""
    return value.tolist() if hasattr(value, "tolist") else value


def rows_told(report: Report) -> dict[tuple[int, int], Rewrite]:
    """Return the rows that a report tells by (inside frame, outside frame)."""
    rows: dict[tuple[int, int], Rewrite] = {}
    for row in report.rewrites.all():
        if isinstance(row, Rewrite):
            frames = {each.point: each.frame for each in (row.before, row.after)}
            if len(frames) == 1:  # two sightings of one point
                continue
            pair = (frames["inside"], frames["outside"])
            assert pair not in rows, pair
            rows[pair] = row
    return rows
