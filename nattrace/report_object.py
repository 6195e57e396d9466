"""The report as an object: what `nattrace.analyze` returns. Flow objects are made when somebody looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

from nattrace.icmp import error_name
from nattrace.model import Crossing, Flow, IcmpErrors, Latency, Segments, Translation, Tuple
from nattrace.nat.conversations import STATUS_NAMES, changed_fields, nat_kind
from nattrace.table import ICMP, ICMPV6, PORTED, protocol_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nattrace.model import Accounting, Finding, Point
    from nattrace.nat.conversations import Conversations
    from nattrace.rewrites import Rewrites
    from nattrace.table import AddressBook

#: Flows turned into objects at a time: enough to make column access cheap, few enough to hold no memory.
_BLOCK = 256

_UNMEASURED = Latency(measurable=False, min_ns=None, median_ns=None, p99_ns=None, max_ns=None)


class FlowSequence(Sequence[Flow]):
    """All flows of a report, in the order of their ids. Built block by block, nothing is kept."""

    def __init__(self, conversations: Conversations, names: Sequence[str], book: AddressBook) -> None:
        self._c = conversations
        self._names = tuple(names)
        self._book = book
        self._text = lru_cache(maxsize=65536)(book.text)

    def __len__(self) -> int:
        """Count of flows."""
        return len(self._c)

    @overload
    def __getitem__(self, index: int) -> Flow: ...
    @overload
    def __getitem__(self, index: slice) -> list[Flow]: ...
    def __getitem__(self, index: int | slice) -> Flow | list[Flow]:
        """Return flow number `index` (0-based; its id is one more), or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self._block(row, row + 1)[0]

    def __iter__(self) -> Iterator[Flow]:
        """Give all flows."""
        for start in range(0, len(self), _BLOCK):
            yield from self._block(start, min(start + _BLOCK, len(self)))

    def json_texts(self, undated: frozenset[str]) -> Iterator[str]:
        """Give the JSON texts of all flows in pieces that follow each other, without making the objects."""
        from nattrace.report.flow_lines import flow_texts  # noqa: PLC0415 - only the JSON report needs it

        return flow_texts(self._c, self._names, self._book, undated)

    def _block(self, start: int, stop: int) -> list[Flow]:
        c, names, text = self._c, self._names, self._text
        rows = slice(start, stop)
        hop_start = c.hop_start[start : stop + 1].tolist()
        steps = c.steps[hop_start[0] : hop_start[-1]]
        translations, crossings, to_points = self._hops(steps)
        wraps = c.encapsulations
        found: list[Flow] = []
        errors = c.errors.between(start, stop)
        base = hop_start[0]
        i = c.initiator
        columns = zip(
            range(start + 1, stop + 1), c.version[rows].tolist(), c.protocol[rows].tolist(),
            c.status[rows].tolist(), c.point[rows].tolist(), i.src[rows].tolist(), i.dst[rows].tolist(),
            i.sport[rows].tolist(), i.dport[rows].tolist(), c.packets_original[rows].tolist(),
            c.packets_reply[rows].tolist(), c.first_ns[rows].tolist(), c.last_ns[rows].tolist(),
            hop_start, hop_start[1:], strict=False,
        )  # fmt: skip
        for (
            number,
            version,
            protocol,
            status,
            point,
            src,
            dst,
            sport,
            dport,
            out,
            back,
            first,
            last,
            h0,
            h1,
        ) in columns:
            h0 -= base  # noqa: PLW2901 - relative to this block
            h1 -= base  # noqa: PLW2901
            found.append(
                Flow(
                    number,
                    protocol_name(protocol),
                    STATUS_NAMES[status],  # type: ignore[arg-type]
                    _path(names[point], tuple(to_points[h0:h1])),
                    _tuple(protocol, text(version, src), text(version, dst), sport, dport),
                    tuple([t for t in translations[h0:h1] if t is not None]),
                    out,
                    back,
                    tuple([c for pair in crossings[h0:h1] for c in pair]),
                    first,
                    last,
                    encapsulation=wraps.along(number - 1, steps[h0:h1].tolist()) if wraps else None,
                    icmp_errors=_errors(errors.get(number - 1, ())),
                )
            )
        return found

    def _hops(
        self, steps: Any
    ) -> tuple[list[Translation | None], list[tuple[Crossing, Crossing]], list[str]]:
        """Build the translation and the crossings of the given hops."""
        c, names, text = self._c, self._names, self._text
        b, a, n = c.before.take(steps), c.after.take(steps), c.counts
        columns = zip(
            c.version_of_hop[steps].tolist(), c.protocol_of_hop[steps].tolist(),
            c.version_after[steps].tolist(), c.protocol_after[steps].tolist(),
            c.hops.from_point[steps].tolist(), c.hops.to_point[steps].tolist(),
            c.changed[steps].tolist(), c.hops.first_ns[steps].tolist(), c.hops.last_ns[steps].tolist(),
            b.src.tolist(), b.dst.tolist(), b.sport.tolist(), b.dport.tolist(),
            a.src.tolist(), a.dst.tolist(), a.sport.tolist(), a.dport.tolist(),
            n.matched[steps].tolist(), n.lost[steps].tolist(), n.unknowable[steps].tolist(),
            n.ambiguous[steps].tolist(), n.measurable[steps].tolist(), n.latency[steps].tolist(),
            [None] * steps.size if n.segments is None else n.segments[steps].tolist(),
            strict=True,
        )  # fmt: skip
        translations: list[Translation | None] = []
        crossings: list[tuple[Crossing, Crossing]] = []
        to_points: list[str] = []
        for (
            v, p, v2, p2, f, t, changed, first, last, src, dst, sport, dport, src2, dst2, sport2, dport2,
            matched, lost, unknowable, ambiguous, measurable, latency, segments,
        ) in columns:  # fmt: skip
            source, target = names[f], names[t]
            to_points.append(target)
            if changed:
                kind, fields = _change(changed)
                translations.append(
                    Translation(
                        source,
                        target,
                        kind,
                        fields,
                        _tuple(p, text(v, src), text(v, dst), sport, dport),
                        _tuple(p2, text(v2, dst2), text(v2, src2), dport2, sport2),
                        first=first,
                        last=last,
                    )
                )
            else:
                translations.append(None)
            crossings.append(
                (
                    Crossing(
                        source,
                        target,
                        "original",
                        matched[0],
                        lost[0],
                        unknowable[0],
                        ambiguous[0],
                        Latency(True, *latency[0]) if measurable[0] else _UNMEASURED,
                        Segments(*segments[0]) if segments and segments[0][0] else None,
                    ),
                    Crossing(
                        source,
                        target,
                        "reply",
                        matched[1],
                        lost[1],
                        unknowable[1],
                        ambiguous[1],
                        Latency(True, *latency[1]) if measurable[1] else _UNMEASURED,
                        Segments(*segments[1]) if segments and segments[1][0] else None,
                    ),
                )
            )
        return translations, crossings, to_points


def _errors(counts: Sequence[tuple[int, int, int, int | None, int]]) -> tuple[IcmpErrors, ...]:
    return tuple([IcmpErrors(t, c, error_name(version, t, c), mtu, n) for version, t, c, mtu, n in counts])


@lru_cache(maxsize=4096)
def _path(first: str, rest: tuple[str, ...]) -> tuple[str, ...]:
    return (first, *rest)


@lru_cache(maxsize=32)
def _change(changed: int) -> Any:
    return nat_kind(changed), changed_fields(changed)


def _tuple(protocol: int, src: str, dst: str, sport: int, dport: int) -> Tuple:
    if protocol in PORTED:
        return Tuple(src, dst, sport, dport)
    if protocol in (ICMP, ICMPV6):
        return Tuple(src, dst, None, None, sport)
    return Tuple(src, dst)


@dataclass(frozen=True, slots=True)
class Report:
    """What NAT did, as the captures show it.

    `flows` builds its items when they are looked at; `rewrites` reads matched packets back one by one.
    """

    version: str
    points: tuple[Point, ...]
    flows: Sequence[Flow]
    findings: tuple[Finding, ...]
    accounting: Accounting
    rewrites: Rewrites

    def write(self, path: str | Path) -> None:
        """Write the report to a file; the suffix picks the format (.json, .txt).

        Raises UsageError for an unknown suffix and OSError when the file cannot be written; a file that
        exists is replaced only when the new one is complete.
        """
        from nattrace.report import save_report  # noqa: PLC0415 - renderers are loaded when used

        save_report(self, path)
