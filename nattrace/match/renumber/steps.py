"""Steps: one TCP stream without IP identifications, followed packet by packet at two points (see `walk`).

A packet is found by its own number and the one that it acknowledges, moved by the shifts of both directions so far.
Behind bytes that one of the captures missed nobody knows the shift: what was missed may have grown or shrunk. What
follows tells it: of all shifts that some packet there would make possible, the one under which far more of the next
packets have their selves than under any that contradicts it. Where several do equally well, none is believed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nattrace.match.renumber.anchors import GROWTH_BYTES
from nattrace.match.renumber.ways import FLOOR_NS, M32, Packet, There, Way
from nattrace.match.votes import MARGIN

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Packets behind a gap that may be the first one whose shift is known again.
_STARTS = 6
#: Packets behind it by which a shift is judged.
_AHEAD = 12
#: What a shift must count to be believed (see `_weight`); one less where some packet says what its self says.
_ENOUGH = 4
#: Packets without a self in a row, after which a flow is no longer followed: every one costs many looks.
_PATIENCE = 1_024
#: What a packet with data counts whose self says the same; one without data, or that was rewritten, counts 1.
_SAYS_THE_SAME = 2


@dataclass(slots=True)
class Steps:
    """How far a flow was followed: the shifts of both directions, and the pairs found."""

    there: There
    ways: tuple[Way, Way]
    taken: set[int] = field(default_factory=set)  #: rows of the second point
    before: set[int] = field(default_factory=set)  #: others that were taken before
    pairs: list[tuple[Packet, Packet]] = field(default_factory=list)
    told: int = 0  #: packets found whose numbers are shifted otherwise than the flow began
    shifted_acks: int = 0  #: of these, without data: offload cuts and merges nothing of the kind
    unknown: list[Packet] = field(default_factory=list)  #: the first point's packets that stayed behind gaps

    def follow(self, packets: list[Packet]) -> None:
        """Find the first point's packets, in the order of time."""
        left = self._walk(packets)
        tried: dict[tuple[int, int], _Guess] = {}
        start = 0
        while start < min(len(left), _PATIENCE):
            guess = self._resume(left, start, tried)
            if guess is None:
                start += 1
                continue
            self.unknown += left[:start]
            self.ways = guess.ways
            tried = {}
            left = self._walk(left[start:])
            start = 0
        self.unknown += left

    def _walk(self, packets: list[Packet]) -> list[Packet]:
        """Find packets as far as shifts are known, and return the others."""
        left: list[Packet] = []
        for packet in packets:
            # before anything was found, what is behind a missing packet may be shifted already
            if (left and not self.told and not self.pairs) or not self.step(packet):
                left.append(packet)
        return left

    def step(self, packet: Packet) -> bool:
        """Find a packet at the second point; return whether it is known what its numbers are there."""
        own, other = self.ways[packet.way], self.ways[1 - packet.way]
        if not own.knows(packet.seq) or not other.knows(packet.ack):
            return False
        shifts = own.at(packet.seq), other.at(packet.ack)
        near = self.there.numbered(packet, packet.seq + shifts[0], packet.ack + shifts[1])
        near = [each for each in near if not self._is_taken(each)]
        if not near and (own.untold or other.untold):
            return False
        if len(near) == 1:
            growth = near[0].length - packet.length
            if abs(growth) <= GROWTH_BYTES and own.found(packet, growth):
                self.taken.add(near[0].row)
                changed = shifts != (own.shifts[0], other.shifts[0])
                self.told += changed
                self.shifted_acks += changed and not packet.size
                self.pairs.append((packet, near[0]))
        return True

    def _is_taken(self, packet: Packet) -> bool:
        return packet.row in self.taken or packet.row in self.before

    def possible(self, packet: Packet) -> Iterator[tuple[Packet, list[tuple[Way, int, int]]]]:
        """Return what a packet behind a gap may be, and what shifts that says: direction, number, shift."""
        own, other = self.ways[packet.way], self.ways[1 - packet.way]
        for each in self.there.around(packet):
            if self._is_taken(each) or abs(each.length - packet.length) > GROWTH_BYTES:
                continue
            said = []
            for way, mine, its in ((own, packet.seq, each.seq), (other, packet.ack, each.ack)):
                before = way.at(mine)
                change = ((its - mine - before + 2**31) & M32) - 2**31
                if way.knows(mine) and not way.untold:
                    if change:
                        break
                elif abs(change) > GROWTH_BYTES:
                    break
                else:
                    said.append((way, mine, before + change))
            else:
                yield each, said

    def _resume(self, left: list[Packet], start: int, tried: dict[tuple[int, int], _Guess]) -> _Guess | None:
        """Return what the packets from a start on say of the shifts there, beyond doubt; None when they do not."""
        guesses = []
        for place in range(start, min(start + _STARTS, len(left))):
            for each, said in self.possible(left[place]):
                key = left[place].row, each.row
                if key not in tried:
                    tried[key] = self._guess(left[place : place + _AHEAD], said)
                guesses.append((place, tried[key]))
        best = max(
            (guess for place, guess in guesses if place == start), key=lambda each: each.score, default=None
        )
        if best is None or best.score < _ENOUGH - bool(best.said):
            return None
        rivals = [guess for _, guess in guesses if guess.score and guess.contradicts(best)]
        clear = all(2 * guess.score_beside(best) <= best.score for guess in rivals)
        near = best.said or all(best.apart_ns <= guess.apart_ns for guess in rivals)
        return best if clear and near else None

    def _guess(self, packets: list[Packet], said: list[tuple[Way, int, int]]) -> _Guess:
        """Return what is found of packets when shifts are what the first one says."""
        begun = self.ways[0].copy(), self.ways[1].copy()
        for way, number, shift in said:
            begun[0 if way is self.ways[0] else 1].resume(number, shift)
        ahead = Steps(self.there, (begun[0].copy(), begun[1].copy()), before=self.taken)
        for packet in packets:
            ahead.step(packet)
        held = tuple(way for way in (0, 1) if all(each is not self.ways[way] for each, _, _ in said))
        return _Guess(begun, ahead.pairs, held)


@dataclass(slots=True)
class _Guess:
    """Shifts that may be, and what is found with them."""

    ways: tuple[Way, Way]  #: before any of that
    pairs: list[tuple[Packet, Packet]]
    held: tuple[int, ...]  #: directions of which nothing was guessed
    score: int = field(init=False)
    said: int = field(init=False)  #: of the score, by what packets say
    apart_ns: int = field(init=False)

    def __post_init__(self) -> None:
        weights: dict[tuple[int, ...], int] = {}
        held, seen = set(self.held), set[tuple[int, int]]()
        for here, there in self.pairs:
            numbers = {(here.way, here.seq), (1 - here.way, here.ack)} - seen
            # what was rewritten fits everywhere, unless by a number that no guess has moved; so does the first one
            pinned = any(way in held for way, _ in numbers)
            tells = here.length == there.length and (bool(weights) or here.content == there.content)
            weights.setdefault(
                (here.way, here.seq, here.ack, here.length), _weight(here, there) * (pinned or tells)
            )
            seen |= numbers
            if here.length != there.length:
                held.discard(here.way)
        self.score = sum(weights.values())
        self.said = sum(weight for weight in weights.values() if weight == _SAYS_THE_SAME)
        apart = sorted(abs(here.due_ns - there.due_ns) for here, there in self.pairs)
        self.apart_ns = apart[len(apart) // 2] if apart else 0

    def contradicts(self, other: _Guess) -> bool:
        """Return whether some packet is another one here than there."""
        forth = {here.row: there.row for here, there in other.pairs}
        back = {there.row: here.row for here, there in other.pairs}
        return any(
            forth.get(here.row, there.row) != there.row or back.get(there.row, here.row) != here.row
            for here, there in self.pairs
        )

    def score_beside(self, other: _Guess) -> int:
        """Return what counts of the score where the other one is much nearer in time: what packets say."""
        return self.said if self.apart_ns >= MARGIN * max(other.apart_ns, FLOOR_NS) else self.score


def _weight(here: Packet, there: Packet) -> int:
    """Return what a pair counts: most that says the same, nothing that says other things at the same length."""
    if here.length != there.length or not here.length or here.content_length != there.content_length:
        return 1
    if here.repeated or there.repeated:
        return 0
    return _SAYS_THE_SAME if here.content == there.content else 0
