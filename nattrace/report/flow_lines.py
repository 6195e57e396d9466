"""Flows as JSON text straight from columns: what a report of tens of thousands of flows is written with.

The text is the one that `flow_json` writes for the `Flow` objects of the same columns (tests hold them
equal); this is several times faster because no object is made. Nothing here decides or computes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nattrace.forking import may_fork, texts_of_both
from nattrace.nat.conversations import STATUS_NAMES, changed_fields, nat_kind
from nattrace.report.escape import json_string
from nattrace.table import ICMP, ICMPV6, PORTED, protocol_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nattrace.nat.conversations import Conversations, Tuples
    from nattrace.table import AddressBook

#: Flows turned into text at a time.
_BLOCK = 4096

#: Flows from which on two processes write them faster than one.
_WORTH_A_FORK = 16_384

_UNMEASURED = '"measurable": false, "min_ns": null, "median_ns": null, "p99_ns": null, "max_ns": null'


def flow_texts(
    c: Conversations, names: Sequence[str], book: AddressBook, undated: frozenset[str]
) -> Iterator[str]:
    """Give the JSON texts of all flows in the order of their ids, several at a time, joined by a comma and a line break."""
    quoted = [json_string(name) for name in names]
    dated = [name not in undated for name in names]
    text = lru_cache(maxsize=262_144)(book.text)

    def some(start: int, stop: int) -> Iterator[str]:
        for low in range(start, stop, _BLOCK):
            yield ",\n".join(_block(c, low, min(low + _BLOCK, stop), quoted, dated, text))

    half = len(c) // 2
    if len(c) >= _WORTH_A_FORK and may_fork():
        return texts_of_both(lambda: some(0, half), lambda: some(half, len(c)), ",\n")
    return some(0, len(c))


def _block(
    c: Conversations, start: int, stop: int, names: list[str], dated: list[bool], text: Any
) -> Iterator[str]:
    rows = slice(start, stop)
    bounds = c.hop_start[start : stop + 1]
    steps = c.steps[bounds[0] : bounds[-1]]
    translations, crossings = _hops(c, steps, names, text)
    targets = c.hops.to_point[steps].tolist()
    first, last = _instants(c.first_ns[rows]), _instants(c.last_ns[rows])
    initiators = _tuples(c.initiator.take(rows), c.version[rows], c.protocol[rows], text)
    ends = (bounds - bounds[0]).tolist()
    columns = zip(
        range(start + 1, stop + 1), c.protocol[rows].tolist(), c.status[rows].tolist(), c.point[rows].tolist(),
        initiators, c.packets_original[rows].tolist(), c.packets_reply[rows].tolist(), first, last,
        ends, ends[1:], strict=False,
    )  # fmt: skip
    for number, protocol, status, point, initiator, original, reply, begin, end, low, high in columns:
        path = [point, *targets[low:high]]
        if not all([dated[p] for p in path]):  # noqa: C419 - a list is faster for two points
            begin = end = "null"  # noqa: PLW2901
        yield (
            f'{{"id": {number}, "protocol": "{protocol_name(protocol)}", "status": "{STATUS_NAMES[status]}", '
            f'"path": [{", ".join([names[p] for p in path])}], "initiator": {initiator}, '
            f'"translations": [{", ".join([t for t in translations[low:high] if t])}], '
            f'"packets": {{"original": {original}, "reply": {reply}}}, '
            f'"crossings": [{", ".join(crossings[low:high])}], "first": {begin}, "last": {end}, '
            '"endpoints": {"initiator": null, "responder": null}}'
        )


def _hops(c: Conversations, steps: Any, names: list[str], text: Any) -> tuple[list[str], list[str]]:
    """Return the text of each hop's translation ("" for none) and of its two crossings."""
    version, protocol = c.version_of_hop[steps], c.protocol_of_hop[steps]
    before, after = c.before.take(steps), c.after.take(steps)
    after.src, after.dst, after.sport, after.dport = after.dst, after.src, after.dport, after.sport
    original = _tuples(before, version, protocol, text)
    reply = _tuples(after, version, protocol, text)
    n = c.counts
    translations: list[str] = []
    crossings: list[str] = []
    columns = zip(
        c.hops.from_point[steps].tolist(), c.hops.to_point[steps].tolist(), c.changed[steps].tolist(),
        original, reply, n.matched[steps].tolist(), n.lost[steps].tolist(), n.unknowable[steps].tolist(),
        n.ambiguous[steps].tolist(), n.measurable[steps].tolist(), n.latency[steps].tolist(), strict=True,
    )  # fmt: skip
    for (
        source,
        target,
        changed,
        out,
        back,
        matched,
        lost,
        unknowable,
        ambiguous,
        measurable,
        latency,
    ) in columns:
        way = f'{{"from": {names[source]}, "to": {names[target]}, '
        translations.append(
            f'{way}{_change(changed)}"original": {out}, "reply": {back}, "rule": null}}' if changed else ""
        )
        (m0, m1), (l0, l1), (u0, u1), (a0, a1) = matched, lost, unknowable, ambiguous
        t0, t1 = _UNMEASURED, _UNMEASURED
        if measurable[0]:
            low, median, p99, high = latency[0]
            t0 = f'"measurable": true, "min_ns": {low}, "median_ns": {median}, "p99_ns": {p99}, "max_ns": {high}'
        if measurable[1]:
            low, median, p99, high = latency[1]
            t1 = f'"measurable": true, "min_ns": {low}, "median_ns": {median}, "p99_ns": {p99}, "max_ns": {high}'
        crossings.append(
            f'{way}"direction": "original", "matched": {m0}, "lost": {l0}, "unknowable": {u0}, '
            f'"ambiguous": {a0}, "latency": {{{t0}}}}}, '
            f'{way}"direction": "reply", "matched": {m1}, "lost": {l1}, "unknowable": {u1}, '
            f'"ambiguous": {a1}, "latency": {{{t1}}}}}'
        )
    return translations, crossings


@lru_cache(maxsize=32)
def _change(changed: int) -> str:
    return f'"nat": "{nat_kind(changed)}", "changed": {json.dumps(list(changed_fields(changed)))}, '


def _tuples(tuples: Tuples, versions: Any, protocols: Any, text: Any) -> list[str]:
    """Return the text of TUPLEs: with ports, with an id, or with addresses only."""
    found: list[str] = []
    columns = zip(
        versions.tolist(), protocols.tolist(), tuples.src.tolist(), tuples.dst.tolist(),
        tuples.sport.tolist(), tuples.dport.tolist(), strict=True,
    )  # fmt: skip
    for version, protocol, src, dst, sport, dport in columns:
        addresses = f'{{"src": "{text(version, src)}", "dst": "{text(version, dst)}"'
        if protocol in PORTED:
            found.append(f'{addresses}, "sport": {sport}, "dport": {dport}}}')
        elif protocol in (ICMP, ICMPV6):
            found.append(f'{addresses}, "id": {sport}}}')
        else:
            found.append(addresses + "}")
    return found


def _instants(times_ns: Any) -> list[str]:
    """Return instants as ISO 8601 in UTC with nine decimals, in quotes."""
    return [f'"{instant}Z"' for instant in np.datetime_as_string(times_ns.view("datetime64[ns]")).tolist()]
