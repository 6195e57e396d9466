"""What the printed report says about many flows at once, gathered in one pass over them.

Flows may be built lazily and be many, so only the few that will be shown are kept. This module counts what
the engine decided; it decides nothing itself and prints nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nattrace.model import Tuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nattrace.model import Crossing, Flow, Nat, Rule, Status, Translation

#: When not all flows are shown, these are shown first: a limit must not hide the trouble.
MOST_WORRYING: Final[tuple[Status, ...]] = ("lost", "ambiguous", "one-sided", "translated", "untranslated")


@dataclass(slots=True)
class Pair:
    """Two neighbouring points of some path and what became of the packets between them."""

    first: str  #: the point nearer to the initiator, in the first flow that shows it
    second: str
    both_ways: bool = False  #: other flows run through the two points the other way round
    matched: int = 0
    lost: int = 0
    unknowable: int = 0
    ambiguous: int = 0

    def add(self, crossing: Crossing) -> None:
        """Count one direction of one flow."""
        self.matched += crossing.matched
        self.lost += crossing.lost
        self.unknowable += crossing.unknowable
        self.ambiguous += crossing.ambiguous


@dataclass(slots=True)
class PathFlows:
    """The flows of one path: how many there are, and those of each status that may be shown."""

    path: tuple[str, ...]
    statuses: Counter[Status] = field(default_factory=Counter)
    kept: dict[Status, list[Flow]] = field(default_factory=dict)

    def total(self) -> int:
        """Flows of this path."""
        return self.statuses.total()

    def shown(self, limit: int) -> list[Flow]:
        """Return at most `limit` flows (0: all), the most worrying ones, in the order of their ids."""
        chosen = [flow for status in MOST_WORRYING for flow in self.kept.get(status, ())]
        return sorted(chosen[:limit] if limit else chosen, key=lambda flow: flow.id)


@dataclass(slots=True)
class Summary:
    """Everything that the printed report says about the flows."""

    pairs: dict[frozenset[str], Pair] = field(default_factory=dict)
    statuses: Counter[Status] = field(default_factory=Counter)
    paths: dict[tuple[str, ...], PathFlows] = field(default_factory=dict)
    #: new addresses by kind of NAT, with the number of translations that lead to each
    targets: dict[Nat, Counter[str]] = field(default_factory=dict)
    rules: dict[Rule, list[int]] = field(default_factory=dict)  #: ids of the flows that a rule translated


def summarise(flows: Iterable[Flow], limit: int) -> Summary:
    """Gather the summary of `flows`, keeping at most `limit` flows (0: all) for each path and status."""
    summary = Summary()
    for flow in flows:
        summary.statuses[flow.status] += 1
        group = summary.paths.get(flow.path)
        if group is None:
            group = summary.paths[flow.path] = PathFlows(flow.path)
        group.statuses[flow.status] += 1
        kept = group.kept.setdefault(flow.status, [])
        if not limit or len(kept) < limit:
            kept.append(flow)
        _count_pairs(summary.pairs, flow)
        for translation in flow.translations:
            targets = summary.targets.setdefault(translation.nat, Counter())
            targets[_target(translation)] += 1
            if translation.rule is not None:
                summary.rules.setdefault(translation.rule, []).append(flow.id)
    return summary


def _count_pairs(pairs: dict[frozenset[str], Pair], flow: Flow) -> None:
    for first, second in zip(flow.path, flow.path[1:], strict=False):
        key = frozenset((first, second))
        pair = pairs.get(key)
        if pair is None:
            pairs[key] = Pair(first, second)
        elif pair.first != first:
            pair.both_ways = True
    for crossing in flow.crossings:
        # A reply crosses from the second point to the first; the pair is the same.
        pair = pairs.get(frozenset((crossing.from_point, crossing.to_point)))
        if pair is not None:
            pair.add(crossing)


def _target(translation: Translation) -> str:
    """Return the address that the translation put in: where replies go (snat), where packets went (dnat)."""
    reply = translation.reply
    if translation.nat == "snat":
        return reply.dst
    return reply.src if translation.nat == "dnat" else f"{reply.dst} > {reply.src}"


def forward(reply: Tuple) -> Tuple:
    """Return a reply tuple turned round: the original direction as it looks behind the NAT."""
    return Tuple(reply.dst, reply.src, reply.dport, reply.sport, reply.id)
