"""Flows as JSON text straight from columns: what a report of tens of thousands of flows is written with.

The text is the one that `flow_json` writes for the `Flow` objects of the same columns (tests hold them
equal); this is several times faster because no object is made. Nothing here decides or computes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import starmap
from socket import inet_ntoa
from struct import iter_unpack
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.forking import may_fork, texts_of_both
from nattrace.icmp import error_name
from nattrace.match.keys import has_ports
from nattrace.model import IcmpErrors
from nattrace.nat.conversations import STATUS_NAMES, changed_fields, nat_kind
from nattrace.report.escape import json_string
from nattrace.report.json import NO_LATENCY, encapsulation_json, icmp_errors_json
from nattrace.table import ICMP, ICMPV6, protocol_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nattrace.nat.conversations import Conversations, Tuples
    from nattrace.nat.hops import HopCounts
    from nattrace.table import AddressBook

#: Flows turned into text at a time: about a megabyte, which stays in the cache.
_BLOCK = 1024

#: Flows from which on two processes write them faster than one.
_WORTH_A_FORK = 16_384

_NOTHING_MISSING = ', "lost": 0, "unknowable": 0, "ambiguous": 0, "latency": '
_NOTHING_RESIZED = ', "segments": null}'


def flow_texts(
    c: Conversations, names: Sequence[str], book: AddressBook, undated: frozenset[str]
) -> Iterator[str]:
    """Give the JSON texts of all flows, in the order of their ids and in pieces that follow each other.

    Each flow begins a line, and commas stand between flows.
    """
    quoted = [json_string(name) for name in names]
    dated = [name not in undated for name in names]
    text = lru_cache(maxsize=262_144)(book.text)

    def some(start: int, stop: int) -> Iterator[str]:
        for low in range(start, stop, _BLOCK):
            yield ",\n" if low else "\n"
            yield ",\n".join(_block(c, low, min(low + _BLOCK, stop), quoted, dated, text))

    half = len(c) // 2
    if len(c) >= _WORTH_A_FORK and may_fork():
        return texts_of_both(lambda: some(0, half), lambda: some(half, len(c)))
    return some(0, len(c))


def _block(
    c: Conversations, start: int, stop: int, names: list[str], dated: list[bool], text: Any
) -> Iterator[str]:
    rows = slice(start, stop)
    bounds = c.hop_start[start : stop + 1]
    steps = c.steps[bounds[0] : bounds[-1]]
    targets = c.hops.to_point[steps].tolist()
    first, last = _instants(c.first_ns[rows]), _instants(c.last_ns[rows])
    flow = np.repeat(np.arange(stop - start), np.diff(bounds))
    begun = _lives(first, c.first_ns[rows], flow, c.hops.first_ns[steps])
    ended = _lives(last, c.last_ns[rows], flow, c.hops.last_ns[steps])
    if not all(dated):
        undated = ~np.array(dated)
        touched = np.zeros(stop - start, np.bool_)
        touched[flow[undated[c.hops.from_point[steps]] | undated[c.hops.to_point[steps]]]] = True
        for step in np.flatnonzero(touched[flow]).tolist():
            begun[step] = ended[step] = "null"
    translations, crossings, befores = _hops(c, steps, names, text, begun, ended)
    # a flow with a path begins as its first hop does; only the others need a text of their own
    initiators = [""] * (stop - start)
    pathless = np.flatnonzero(bounds[1:] == bounds[:-1])
    alone = pathless + start
    for row, initiator in zip(
        pathless.tolist(),
        _tuples(c.initiator.take(alone), c.version[alone], c.protocol[alone], text),
        strict=True,
    ):
        initiators[row] = initiator
    ends = (bounds - bounds[0]).tolist()
    wraps, wrapped = c.encapsulations, ""
    heads: dict[tuple[int, ...], tuple[str, bool]] = {}
    errors = _errors(c, start, stop)
    columns = zip(
        range(start + 1, stop + 1), c.protocol[rows].tolist(), c.status[rows].tolist(), c.point[rows].tolist(),
        initiators, c.packets_original[rows].tolist(), c.packets_reply[rows].tolist(), first, last,
        ends, ends[1:], strict=False,
    )  # fmt: skip
    for number, protocol, status, point, initiator, original, reply, begin, end, low, high in columns:
        key = (protocol, status, point, *targets[low:high])
        known = heads.get(key)
        if known is None:
            path = key[2:]
            known = heads[key] = (
                (
                    f'"protocol": "{protocol_name(protocol)}", "status": "{STATUS_NAMES[status]}", '
                    f'"path": [{", ".join([names[p] for p in path])}], "initiator": '
                ),
                all(dated[p] for p in path),
            )
        head, has_date = known
        if not has_date:
            begin = end = "null"  # noqa: PLW2901
        if low < high:
            initiator = befores[low]  # noqa: PLW2901
        if high - low == 1:
            translated, crossed = translations[low], crossings[low]
        else:
            translated = ", ".join([t for t in translations[low:high] if t])
            crossed = ", ".join(crossings[low:high])
        if wraps is not None:
            wrapped = encapsulation_json(wraps.along(number - 1, steps[low:high].tolist()))
        yield (
            f'{{"id": {number}, {head}{initiator}, "translations": [{translated}], '
            f'"packets": {{"original": {original}, "reply": {reply}}}, "crossings": [{crossed}], '
            f'"first": {begin}, "last": {end}, "endpoints": {{"initiator": null, "responder": null}}, '
            f'"icmp_errors": {errors.get(number, "[]")}{wrapped}}}'
        )


def _errors(c: Conversations, start: int, stop: int) -> dict[int, str]:
    """Return the text of the ICMP errors of each flow that has some, by flow id."""
    return {
        row + 1: icmp_errors_json(
            IcmpErrors(kind, code, error_name(version, kind, code), mtu, count)
            for version, kind, code, mtu, count in counts
        )
        for row, counts in c.errors.between(start, stop).items()
    }


def _hops(
    c: Conversations, steps: Any, names: list[str], text: Any, begun: list[str], ended: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return the text of each hop's translation ("" for none), of its two crossings, and of its tuple before."""
    version, protocol = c.version_of_hop[steps], c.protocol_of_hop[steps]
    before, after = c.before.take(steps), c.after.take(steps)
    after.src, after.dst, after.sport, after.dport = after.dst, after.src, after.dport, after.sport
    counts = c.counts
    original, reply = _directions(counts, steps, 0), _directions(counts, steps, 1)
    befores = _tuples(before, version, protocol, text)
    heads: dict[tuple[int, int, int], tuple[str, str, str]] = {}
    translations: list[str] = []
    crossings: list[str] = []
    columns = zip(
        c.hops.from_point[steps].tolist(), c.hops.to_point[steps].tolist(), c.changed[steps].tolist(),
        befores, _tuples(after, c.version_after[steps], c.protocol_after[steps], text), original, reply, begun, ended,
        strict=True,
    )  # fmt: skip
    for source, target, changed, out, back, there, again, first, last in columns:
        known = heads.get((source, target, changed))
        if known is None:
            way = f'{{"from": {names[source]}, "to": {names[target]}, '
            known = heads[source, target, changed] = (
                f'{way}{_change(changed)}"original": ' if changed else "",
                f'{way}"direction": "original", "matched": ',
                f'{way}"direction": "reply", "matched": ',
            )
        translation, way_out, way_back = known
        translations.append(
            f'{translation}{out}, "reply": {back}, "rule": null, "first": {first}, "last": {last}}}'
            if changed
            else ""
        )
        crossings.append(f"{way_out}{there}, {way_back}{again}")
    return translations, crossings, befores


def _directions(counts: HopCounts, steps: Any, direction: int) -> list[str]:
    """Return the text of one direction's crossings, from the count of matched packets on."""
    matched, latency = counts.matched[steps, direction].tolist(), counts.latency[steps, direction].T.tolist()
    missing = [_NOTHING_MISSING] * steps.size
    lost, unknowable, ambiguous = (
        column[steps, direction] for column in (counts.lost, counts.unknowable, counts.ambiguous)
    )
    for row in np.flatnonzero(lost | unknowable | ambiguous).tolist():
        missing[row] = (
            f', "lost": {lost[row]}, "unknowable": {unknowable[row]}, "ambiguous": {ambiguous[row]}, "latency": '
        )
    pieces = [_NOTHING_RESIZED] * steps.size
    if counts.segments is not None:
        for row, (before, after, size, lacking) in enumerate(counts.segments[steps, direction].tolist()):
            if before:
                pieces[row] = (
                    f', "segments": {{"before": {before}, "after": {after}, "bytes": {size}, "missing_bytes": {lacking}}}}}'
                )
    found = [
        f'{count}{rest}{{"measurable": true, "min_ns": {low}, "median_ns": {median}, "p99_ns": {p99}, '
        f'"max_ns": {high}}}{segments}'
        for count, rest, low, median, p99, high, segments in zip(
            matched, missing, *latency, pieces, strict=True
        )
    ]
    for row in np.flatnonzero(~counts.measurable[steps, direction]).tolist():
        found[row] = f"{matched[row]}{missing[row]}{NO_LATENCY}{pieces[row]}"
    return found


@lru_cache(maxsize=32)
def _change(changed: int) -> str:
    return f'"nat": "{nat_kind(changed)}", "changed": {json.dumps(list(changed_fields(changed)))}, '


def _tuples(tuples: Tuples, versions: Any, protocols: Any, text: Any) -> list[str]:
    """Return the text of TUPLEs: with ports, with an id, or with addresses only."""
    named = _addresses(np.concatenate([versions, versions]), np.concatenate([tuples.src, tuples.dst]), text)
    sources, targets = named[: tuples.src.size], named[tuples.src.size :]
    sports, dports = tuples.sport.tolist(), tuples.dport.tolist()
    found = [
        f'{{"src": "{src}", "dst": "{dst}", "sport": {sport}, "dport": {dport}}}'
        for src, dst, sport, dport in zip(sources, targets, sports, dports, strict=True)
    ]
    numbers = protocols.tolist()
    for row in np.flatnonzero(~has_ports(protocols)).tolist():
        with_id = f', "id": {sports[row]}' if numbers[row] in (ICMP, ICMPV6) else ""
        found[row] = f'{{"src": "{sources[row]}", "dst": "{targets[row]}"{with_id}}}'
    return found


def _addresses(versions: Any, handles: Any, text: Any) -> list[str]:
    """Return the text of addresses; those of version 4 are their own handles."""
    found = list(starmap(inet_ntoa, iter_unpack("4s", handles.astype(">u4").tobytes())))
    for row in np.flatnonzero(versions == 6).tolist():
        found[row] = text(6, int(handles[row]))
    return found


def _lives(texts: list[str], of_flow: Any, flow: Any, of_hop: Any) -> list[str]:
    """Return the texts of the hops' instants, `flow` being each hop's; most are their flow's own."""
    found = [texts[n] for n in flow.tolist()]
    others = np.flatnonzero(of_hop != of_flow[flow])
    for n, instant in zip(others.tolist(), _instants(of_hop[others]), strict=True):
        found[n] = instant
    return found


def _instants(times_ns: Any) -> list[str]:
    """Return instants as ISO 8601 in UTC with nine decimals, in quotes."""
    return [f'"{instant}Z"' for instant in np.datetime_as_string(times_ns.view("datetime64[ns]")).tolist()]
