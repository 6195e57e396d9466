"""Does a report say what the kernel says? Every check that a recording's truth allows.

Compares nattrace's public report with `Truth` and with the slow oracle; it knows nothing of how nattrace
decides. Each check raises AssertionError with what differs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from typing import TYPE_CHECKING, Any

from lab import oracle, pieces
from lab.error_oracle import SeenError, expected_errors, is_error, read_error_points
from lab.oracle import ExpectedRow, Seen, expected_rows, token_rows
from lab.truth import ANSWERING_TYPE, Addressing, Entry, Hop, Truth

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Points = dict[str, list[Seen]]
#: Protocol, original, reply: what one translation says, without its times.
Binding = tuple[str, Addressing, Addressing]


def check_against_truth(report: Any, truth: Truth, folder: Path) -> None:
    """Compare the report of the pcaps in `folder` with what the kernel did; raises AssertionError."""
    points = read_points(folder, truth)
    check_translations(report, truth, points)
    check_rows(report, truth, points)
    check_sizes(report, truth, points)
    check_losses(report, truth, points)
    check_lives(report)
    check_errors(report, truth, folder)
    check_accounting(report, folder)


def read_points(folder: Path, truth: Truth | None = None) -> Points:
    """Read every pcap of a folder with the oracle's reader for packets of this truth, by point name."""
    found: Points = {}
    for path in sorted(folder.glob("*.pcap")):
        if truth is not None and truth.resized:
            found[path.stem] = pieces.read(path)
        else:
            found |= oracle.read_points(path)
    return found


def _expected(truth: Truth, hop: Hop, points: Points) -> set[ExpectedRow]:
    return set(pieces.expected_pieces(hop, points)) if truth.resized else expected_rows(hop, points)


def check_translations(report: Any, truth: Truth, points: Points) -> None:
    """Check that the translations are the kernel's entries: each seen one exactly once, and no other.

    Where packets are tied, a translation may be left unsaid, never invented.
    """
    said: dict[frozenset[str], list[tuple[Binding, tuple[str, str]]]] = defaultdict(list)
    for flow in report.flows:
        for each in flow.translations:
            binding = (flow.protocol, _plain(each.original), _plain(each.reply))
            way = (each.from_point, each.to_point)
            said[frozenset(way)].append((binding, way))
    for hop in truth.hops:
        name = "-".join(hop.chain)
        pairs = _places(hop)
        shown = Counter(each for pair in pairs for each in said[pair])
        twice = [way for way, count in shown.items() if count > 1 and _overlap(report, *way)]
        assert not twice, f"{name}: translations shown more than once: {twice}"
        bindings = {binding for binding, _ in shown}
        seen = {_binding(entry): entry for entry in _seen_entries(truth, hop, points)}
        parts = {part for entry in seen.values() for part in _parts(entry)}
        of_others = {
            binding
            for other in truth.hops
            if other is not hop and other.conntrack == hop.conntrack
            for entry in other.entries
            for binding in (_binding(entry), *_parts(entry))
        }
        invented = bindings - set(seen) - parts - of_others
        assert not invented, f"{name}: translations that the kernel does not have: {invented}"
        missing = {
            binding
            for binding, entry in seen.items()
            if binding not in bindings
            and not any(_seen_of(both, points) <= bindings for both in _cuts(entry))
        }
        assert truth.tied or not missing, f"{name}: kernel entries without a translation: {missing}"
    neighbours = {pair for hop in truth.hops for pair in _places(hop)}
    strangers = [pair for pair, each in said.items() if each and pair not in neighbours]
    assert not strangers, f"translations between points that have none: {strangers}"


def check_rows(report: Any, truth: Truth, points: Points) -> None:
    """Check that the rewrite rows are exactly the packets that the kernel rewrote: none wrong, none missing.

    Where packets are tied, rows may be missing, and still none may be wrong.
    """
    shown = Counter(
        ExpectedRow(row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction)
        for row in report.rewrites
        if row.changed and not is_error(row.before)
    )
    expected: set[ExpectedRow] = set()
    for hop in truth.hops:
        expected |= _expected(truth, hop, points)
    wrong = sorted(set(shown) - expected)
    assert not wrong, f"{len(wrong)} wrong rows of {len(shown)}: {wrong[:5]}"
    missing = sorted(expected - set(shown))
    assert truth.tied or not missing, f"{len(missing)} of {len(expected)} rows are missing: {missing[:5]}"
    twice = [row for row, count in shown.items() if count > 1]
    assert not twice, f"rows shown more than once: {twice[:5]}"
    if truth.unique_payloads:
        _check_tokens(truth, points, set(shown))
    frames = {name: {packet.frame: packet for packet in packets} for name, packets in points.items()}
    for row in report.rewrites:
        if row.changed and not is_error(row.before):
            _check_row(row, frames)


def _check_tokens(truth: Truth, points: Points, shown: set[ExpectedRow]) -> None:
    """Check the rows against the payloads' tokens, which no tuple and no conntrack entry comes into."""
    for hop in truth.hops:
        for inner, outer in pairwise(hop.chain):
            rows = {
                (row.before_frame, row.after_frame)
                if row.before_point == inner
                else (row.after_frame, row.before_frame)
                for row in shown
                if {row.before_point, row.after_point} == {inner, outer}
            }
            changed, same = token_rows(Hop(inner, outer, hop.conntrack, hop.entries), points)
            assert changed <= rows, f"tokens that crossed without a row: {sorted(changed - rows)[:5]}"
            assert not same & rows, f"rows of packets that nobody changed: {sorted(same & rows)[:5]}"


def _check_row(row: Any, frames: Mapping[str, Mapping[int, Seen]]) -> None:
    """Check one row's two sightings, and what it says has changed, against the packets themselves."""
    before, after = frames[row.before.point][row.before.frame], frames[row.after.point][row.after.frame]
    for sighting, packet in ((row.before, before), (row.after, after)):
        assert sighting.protocol == packet.protocol, row
        assert _plain(sighting) == _without_type(packet.addressing), row
        assert sighting.ttl == packet.ttl, row
        assert packet.protocol not in ("icmp", "icmpv6") or sighting.type == packet.addressing.type, row
    changed = {
        name
        for name in ("src", "dst", "sport", "dport", "id")
        if getattr(before.addressing, name) != getattr(after.addressing, name)
    }
    assert set(row.changed) == changed, row


def check_sizes(report: Any, truth: Truth, points: Points) -> None:
    """Check that of packets which changed size as many bytes are said to have crossed as the oracle finds.

    Every byte of a packet that the oracle finds no place for must be called missing. Of tied packets nothing is known.
    """
    counts = Counter[str]()
    for hop in truth.hops if truth.resized and not truth.tied else ():
        rows = pieces.expected_pieces(hop, points)
        changed = {row: each for row, each in rows.items() if not each.size == each.before == each.after}
        before = {(row.before_point, row.before_frame): each.before for row, each in changed.items()}
        size = sum(each.size for each in changed.values())
        counts["before"] += len(before)
        counts["after"] += len({(row.after_point, row.after_frame) for row in changed})
        counts["bytes"] += size
        counts["missing_bytes"] += sum(before.values()) - size
    shown = [crossing.segments for flow in report.flows for crossing in flow.crossings if crossing.segments]
    for name, count in counts.items():
        said = sum(getattr(each, name) for each in shown)
        assert said == count, f"{name} of packets that changed size: {said}, the oracle says {count}"


def check_errors(report: Any, truth: Truth, folder: Path) -> None:
    """Check that ICMP errors crossed as the kernel's entries say, each counted once, and none called faulty."""
    points: dict[str, list[SeenError]] = {}
    for path in sorted(folder.glob("*.pcap")):
        points |= read_error_points(path)
    shown = Counter(
        ExpectedRow(row.before.point, row.before.frame, row.after.point, row.after.frame, row.direction)
        for row in report.rewrites
        if is_error(row.before)
    )
    expected: set[ExpectedRow] = set()
    for hop in truth.hops:
        expected |= expected_errors(hop, points)
    assert set(shown) == expected, sorted(set(shown) ^ expected)[:5]
    assert not shown or max(shown.values()) == 1
    frames = {(name, error.frame): error for name, errors in points.items() for error in errors}
    for row in report.rewrites:
        if is_error(row.before):
            for sighting in (row.before, row.after):
                seen = frames[sighting.point, sighting.frame]
                assert (sighting.src, sighting.dst, sighting.type, sighting.code) == (
                    seen.src,
                    seen.dst,
                    seen.type,
                    seen.code,
                ), row
            flow = report.flows[row.flow - 1]
            quoted = {frames[each.point, each.frame].quoted_protocol for each in (row.before, row.after)}
            assert flow.protocol in quoted, row
    told = Counter[tuple[int, int]]()
    for flow in report.flows:
        for errors in flow.icmp_errors:
            told[errors.type, errors.code] += errors.count
    # each is told as it is nearest to the path's beginning
    beyond = {
        (row.before_point, row.before_frame)
        if row.direction == "reply"
        else (row.after_point, row.after_frame)
        for row in expected
    }
    # all errors of the lab quote packets that were captured
    assert told == Counter((e.type, e.code) for place, e in frames.items() if place not in beyond)
    faults = [f for f in report.findings if f.code.startswith("icmp-error-")]
    assert not faults, faults


def check_losses(report: Any, truth: Truth, points: Points) -> None:
    """Check that as many packets are called lost as the kernel dropped, and no others.

    Where a point was captured for a shorter time, what it cannot have seen must be called unknowable.
    """
    lost = sum(crossing.lost for flow in report.flows for crossing in flow.crossings)
    assert lost == truth.dropped, f"{lost} packets called lost, the kernel dropped {truth.dropped}"
    ambiguous = sum(crossing.ambiguous for flow in report.flows for crossing in flow.crossings)
    assert truth.tied or ambiguous == 0, (
        f"{ambiguous} packets called ambiguous, the kernel's entries decide them all"
    )
    if truth.partial:
        (hop,) = truth.hops
        # A request that nobody can have seen outside may have been lost; a reply that came was not.
        originals = {entry.original for entry in hop.entries}
        requests = sum(packet.addressing in originals for packet in points[hop.inner])
        crossed = sum(row.direction == "original" for row in expected_rows(hop, points))
        outside = requests - crossed
        unknowable = sum(crossing.unknowable for flow in report.flows for crossing in flow.crossings)
        assert unknowable == outside, f"{unknowable} packets called unknowable, {outside} were outside"


def check_lives(report: Any) -> None:
    """Check that what flows say of their packets is what the rows say, row by row.

    The rows themselves are held against the kernel's entries; here they say how many packets of each
    direction crossed each hop of a flow, when the first and the last did, and that one packet belongs to
    one flow all along its path. A packet that crossed in pieces has a row for each and counts once.
    """
    rows = [row for row in report.rewrites.all() if hasattr(row, "before")]
    sent: dict[tuple[int, str, str, str], set[int]] = defaultdict(set)
    times: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    flow_of: dict[tuple[str, int], int] = {}
    for row in rows:
        ends = (row.before, row.after) if row.direction == "original" else (row.after, row.before)
        if not is_error(row.before):  # errors are not packets of the flow, as in conntrack
            hop = (row.flow, ends[0].point, ends[1].point)
            sent[*hop, row.direction].add(row.before.frame)
            times[hop].append(ends[0].time)
        for sighting in ends:
            own = flow_of.setdefault((sighting.point, sighting.frame), row.flow)
            assert own == row.flow, f"{sighting.point}:{sighting.frame} is of flows {own} and {row.flow}"
    crossed = {hop: len(frames) for hop, frames in sent.items()}
    # a path may pass one point twice (hairpin): its hops then share their names
    said: Counter[tuple[int, str, str, str]] = Counter()
    for flow in report.flows:
        for c in flow.crossings:
            said[flow.id, c.from_point, c.to_point, c.direction] += c.matched
    said = +said
    assert said == crossed, f"flows and rows count differently: {said.items() ^ crossed.items()}"
    for flow in report.flows:
        hops = Counter(pairwise(flow.path))
        for each in flow.translations:
            if hops[each.from_point, each.to_point] > 1:
                continue
            own_times = times[flow.id, each.from_point, each.to_point]
            assert (each.first, each.last) == (min(own_times), max(own_times)), (flow.id, each)
        whole = not any(c.lost or c.unknowable or c.ambiguous or c.segments for c in flow.crossings)
        if flow.crossings and whole:
            first = [c.matched for c in flow.crossings[:2]]
            assert [flow.packets_original, flow.packets_reply] == first, flow


def check_accounting(report: Any, folder: Path) -> None:
    """Check that every record of every file is accounted for; the records are counted by their own headers."""
    total = report.accounting
    records = sum(_count_records(path) for path in folder.glob("*.pcap"))
    assert total.packets == records
    assert total.packets == total.matched + sum(total.unmatched.values()) + sum(total.skipped.values())


def _count_records(path: Path) -> int:
    """Count records of a native-order pcap, as tcpdump writes it (draft-ietf-opsawg-pcap)."""
    data, offset, count = path.read_bytes(), 24, 0
    while offset < len(data):
        offset += 16 + int.from_bytes(data[offset + 8 : offset + 12], "little")
        count += 1
    assert offset == len(data), path
    return count


def _seen_entries(truth: Truth, hop: Hop, points: Points) -> list[Entry]:
    """Return the hop's translated entries of which both points show at least one same packet."""
    return [
        entry
        for entry in {_binding(each): each for each in hop.entries if each.translated}.values()
        if _expected(truth, replace(hop, entries=(entry,)), points)
    ]


def _binding(entry: Entry) -> Binding:
    return entry.protocol, _without_type(entry.original), _without_type(entry.reply)


def _places(hop: Hop) -> set[frozenset[str]]:
    """Return between which points a hop may show a translation; one alone where packets pass it twice."""
    return {frozenset(pair) for pair in combinations_with_replacement(hop.chain, 2)}


def _overlap(report: Any, binding: Binding, way: tuple[str, str]) -> bool:
    """Whether one binding is shown for one time twice; conversations that part later share it in turns."""
    lives = sorted(
        (each.first, each.last)
        for flow in report.flows
        for each in flow.translations
        if (flow.protocol, _plain(each.original), _plain(each.reply)) == binding
        and (each.from_point, each.to_point) == way
    )
    return any(later[0] <= earlier[1] for earlier, later in pairwise(lives))


def _parts(entry: Entry) -> set[Binding]:
    """Return the translations into which points that show a packet halfway cut an entry."""
    return {part for both in _cuts(entry) for part in both}


def _cuts(entry: Entry) -> list[set[Binding]]:
    """Return for each half of an entry the translation before it and the one after it."""
    return [
        {
            _binding(Entry(entry.protocol, entry.original, half.inverted())),
            _binding(Entry(entry.protocol, half, entry.reply)),
        }
        for half in entry.halves
    ]


def _seen_of(both: set[Binding], points: Points) -> set[Binding]:
    """Return those of an entry's two parts that packets can tell: some packet was seen before each, or its answer."""
    carried = {
        (packet.protocol, _without_type(packet.addressing)) for seen in points.values() for packet in seen
    }
    return {
        part
        for part in both
        if not carried.isdisjoint({(part[0], part[1]), (part[0], _without_type(part[1].inverted()))})
    }


def _plain(said: Any) -> Addressing:
    """Return a nattrace tuple or sighting as the lab's own type."""
    ports = (-1 if said.sport is None else said.sport, -1 if said.dport is None else said.dport)
    return Addressing(said.src, said.dst, *ports, id=-1 if said.id is None else said.id)


def _without_type(addressing: Addressing) -> Addressing:
    """Drop the ICMP type: a report's tuples do not carry it."""
    assert addressing.type == -1 or addressing.type in ANSWERING_TYPE
    return Addressing(addressing.src, addressing.dst, addressing.sport, addressing.dport, id=addressing.id)
