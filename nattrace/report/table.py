"""What `nattrace analyze` prints: the verdict first, then what changed, then why.

Made for a tired person at a terminal of 80 columns or more: flows in one table when it fits, else three lines
a flow. No colours, no decisions: everything said here stands in the report. Text only; all names pass
`escape.terminal`.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from nattrace.report import human
from nattrace.report.escape import terminal
from nattrace.report.flow_table import path_lines
from nattrace.report.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import TextIO

    from nattrace.model import Finding, Point, Status
    from nattrace.report.summary import Pair, Summary
    from nattrace.report.view import ReportView

#: Flows shown for each path unless asked otherwise: about two screens.
FLOWS_SHOWN: Final = 40

#: Findings and comments shown; the JSON has all of them. Hostile input must not push the verdict out of reach.
FINDINGS_SHOWN: Final = 40
COMMENTS_SHOWN: Final = 10

#: Headlines, paths and notes shown: one pcapng may declare thousands of interfaces, each a point.
POINTS_SHOWN: Final = 40
PATHS_SHOWN: Final = 40

#: Points without packets that are named.
POINTS_NAMED: Final = 8

#: Packets named with a finding.
PACKETS_NAMED: Final = 6

_STATUS_ORDER: Final[tuple[Status, ...]] = ("translated", "untranslated", "lost", "one-sided", "ambiguous")
_SEVERITY_ORDER: Final = {"error": 0, "warning": 1, "info": 2}

#: Longest name that the headlines are aligned to.
_NAMES_ALIGNED: Final = 40

#: Stands for a space where a line must not be broken; captured text cannot hold it, `terminal` escapes it.
_NO_BREAK: Final = "\u00a0"

#: First column of the lines after the flows.
_LABEL_WIDTH: Final = 9


def write_table(
    data: ReportView, stream: TextIO, *, limit: int = FLOWS_SHOWN, width: int | None = None
) -> None:
    """Write the report as text.

    `limit` is the number of flows shown for each path, 0 for all. `width` is the number of columns to stay
    within where that is possible, None for as wide as it takes (a file, a pipe).
    """
    summary = summarise(data.flows, limit)
    stream.writelines(line.rstrip() + "\n" for line in _lines(data, summary, limit, width))


def _lines(data: ReportView, summary: Summary, limit: int, width: int | None) -> Iterator[str]:
    headlines = list(_headlines(data.points, summary))
    for head, text in headlines[:POINTS_SHOWN]:
        yield from _wrapped(head, text, width, indent="    ")
    if len(headlines) > POINTS_SHOWN:
        yield f"... {len(headlines) - POINTS_SHOWN:,} more: -f json has all points"
    yield from _wrapped("", _verdict(summary), width, indent="    ")
    trouble = _trouble(data.findings)
    if trouble:
        yield trouble
    # What could be compared comes first, the busiest paths before others; equal ones in the order of their flows.
    groups = sorted(summary.paths.values(), key=lambda group: (len(group.path) == 1, -group.total()))
    for group in groups[:PATHS_SHOWN]:
        yield ""
        if len(summary.paths) > 1:
            yield f"{_path(group.path)}   {human.count(group.total(), 'flow')}"
        yield from path_lines(group, limit, width)
    if len(groups) > PATHS_SHOWN:
        hidden = sum(group.total() for group in groups[PATHS_SHOWN:])
        paths = human.count(len(groups) - PATHS_SHOWN, "more path")
        yield f"\n... {human.count(hidden, 'flow')} on {paths}: -f json has all"
    for part in (_rules(summary), _findings(data.findings), _notes(data)):
        paragraphs = list(part)
        if paragraphs:
            yield ""
        for label, text in paragraphs:
            yield from _labelled(label, text, width)


# --- verdict ---------------------------------------------------------------------------------------------


def _headlines(points: Sequence[Point], summary: Summary) -> Iterator[tuple[str, str]]:
    by_name = {point.name: point for point in points}
    pairs = list(summary.pairs.values())
    paired = {name for pair in pairs for name in (pair.first, pair.second)}
    heads = [_pair_name(pair) for pair in pairs]
    alone = [point for point in points if point.name not in paired]
    # A pcapng lists every interface of the machine; those that saw nothing share one line.
    empty = [point for point in alone if not point.packets] if len(points) > 1 else []
    alone = [point for point in alone if point.packets or not empty]
    names = max((len(text) for text in (*heads, *(terminal(point.name) for point in alone))), default=0)
    names = min(names, _NAMES_ALIGNED)
    for pair, head in zip(pairs, heads, strict=True):
        both = [by_name[name] for name in dict.fromkeys((pair.first, pair.second)) if name in by_name]
        packets = human.count(sum(point.packets for point in both), "packet")
        yield (
            f"{head:<{names}}   ",
            _unbroken(human.count(len(both), "point"), packets, f"{_together(both)}:") + " " + _outcome(pair),
        )
    for point in alone:
        length = "no time known"
        if point.first is not None and point.last is not None:
            length = human.span(point.last - point.first)
        reason = "nothing to compare with" if len(points) == 1 else "no packet of it was matched elsewhere"
        packets = human.count(point.packets, "packet")
        yield (
            f"{terminal(point.name):<{names}}   ",
            _unbroken("1 point", packets, f"{length}:") + " " + reason,
        )
    if empty:
        yield (
            f"{human.count(len(empty), 'point')} without packets: ",
            human.listed((terminal(point.name) for point in empty), POINTS_NAMED),
        )


def _pair_name(pair: Pair) -> str:
    return f"{terminal(pair.first)} {'<->' if pair.both_ways else '->'} {terminal(pair.second)}"


def _outcome(pair: Pair) -> str:
    matched = f"{human.count(pair.matched, 'crossing')} matched"
    unknowable = [f"{pair.unknowable:,} unknowable"] if pair.unknowable else []
    return _unbroken(matched, f"{pair.lost:,} lost", f"{pair.ambiguous:,} ambiguous", *unknowable)


def _together(points: Sequence[Point]) -> str:
    """Return how long all points were capturing, on the reference clock."""
    spans = [
        (point.first - point.clock.offset_ns, point.last - _last_offset_ns(point))
        for point in points
        if point.first is not None and point.last is not None
    ]
    if not spans or len(spans) < len(points):
        return "no time in common"
    common_ns = min(last for _, last in spans) - max(first for first, _ in spans)
    return f"{human.span(common_ns)} together" if common_ns >= 0 else "no time in common"


def _last_offset_ns(point: Point) -> int:
    steps = point.clock.steps
    return steps[-1].offset_ns if steps else point.clock.offset_ns


def _verdict(summary: Summary) -> str:
    total = summary.statuses.total()
    if not total:
        return "no flow was found"
    parts = []
    for status in _STATUS_ORDER:
        number = summary.statuses[status]
        if number:
            detail = f" ({_targets(summary)})" if status == "translated" and summary.targets else ""
            parts.append((number, status + detail))
    flows = human.count(total, "flow")
    if len(parts) == 1:
        return f"{flows}, {'all ' if total > 1 else ''}{parts[0][1]}"
    return f"{flows}: " + ", ".join(f"{number:,} {text}" for number, text in parts)


def _targets(summary: Summary) -> str:
    return ", ".join(
        f"{nat} to {human.listed(sorted(targets, key=lambda address: (-targets[address], address)))}"
        for nat, targets in sorted(summary.targets.items())
    )


def _trouble(findings: Sequence[Finding]) -> str:
    """Return the line that says that there is bad news further down, empty when there is none."""
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    parts = [
        human.count(number, word) for number, word in ((errors, "error"), (warnings, "warning")) if number
    ]
    return f"{' and '.join(parts)}, see below" if parts else ""


# --- why -------------------------------------------------------------------------------------------------


def _rules(summary: Summary) -> Iterator[tuple[str, str]]:
    for rule, flows in summary.rules.items():
        where = f"{terminal(rule.table)} {terminal(rule.chain)} {rule.number}"
        yield "rule", f"{where} ({_flow_numbers(flows)}): {terminal(rule.text)}"


def _findings(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    ordered = sorted(
        findings, key=lambda finding: _SEVERITY_ORDER.get(finding.severity, len(_SEVERITY_ORDER))
    )
    for finding in ordered[:FINDINGS_SHOWN]:
        yield finding.severity, f"{terminal(finding.code)}   {terminal(finding.message)}"
        named = [f"{terminal(ref.point)}:{ref.frame}" for ref in finding.packets]
        if named:
            yield "", f"packets {human.listed(named, PACKETS_NAMED)}"
        if finding.advice:
            # advice is nattrace's own text: its line breaks are commands to be copied one by one
            first, *more = finding.advice.split("\n")
            yield "", f"try: {terminal(first)}"
            yield from (("", f"     {terminal(line)}") for line in more)
    hidden = len(ordered) - FINDINGS_SHOWN
    if hidden > 0:
        yield "", f"... {human.count(hidden, 'more finding')}: -f json has all"


def _notes(data: ReportView) -> Iterator[tuple[str, str]]:
    """Yield what the reader should know of the captures themselves."""
    for label, reasons in (("skipped", data.accounting.skipped), ("unmatched", data.accounting.unmatched)):
        if any(reasons.values()):
            yield (
                label,
                f"{sum(reasons.values()):,} of {human.count(data.accounting.packets, 'packet')}: {_reasons(reasons)}",
            )
    notes = [note for point in data.points for note in _point_notes(point)]
    yield from notes[:POINTS_SHOWN]
    if len(notes) > POINTS_SHOWN:
        yield "", f"... {human.count(len(notes) - POINTS_SHOWN, 'more note')}: -f json has all"
    comments = [(point, comment) for point in data.points for comment in point.comments]
    for point, comment in comments[:COMMENTS_SHOWN]:
        where = terminal(point.name) + (f":{comment.frame}" if comment.frame is not None else "")
        yield "comment", f"{where}: {terminal(comment.text)}"
    if len(comments) > COMMENTS_SHOWN:
        yield "", f"... {human.count(len(comments) - COMMENTS_SHOWN, 'more comment')}: -f json has all"


def _point_notes(point: Point) -> Iterator[tuple[str, str]]:
    name = terminal(point.name)
    if point.truncated:
        yield (
            "damaged",
            f"{name}: {terminal(point.file)} is cut or damaged; what follows the damage is missing here",
        )
    if point.dropped_by_kernel:
        drops = human.count(point.dropped_by_kernel, "packet")
        yield "dropped", f"{name}: the capturing kernel dropped {drops}; they may look like losses"
    if not point.dated:
        yield "undated", f"{name}: {terminal(point.file)} has times without dates; instants are left out"


def _reasons(reasons: Mapping[str, int]) -> str:
    return terminal(human.counts(reasons))


def _flow_numbers(flows: Sequence[int]) -> str:
    return f"flow {flows[0]}" if len(flows) == 1 else f"flows {human.numbers(flows)}"


def _path(path: Sequence[str]) -> str:
    return " -> ".join(map(terminal, path))


def _labelled(label: str, text: str, width: int | None) -> list[str]:
    """Return a paragraph behind its label, the text under the text."""
    return _wrapped(f"{label:<{_LABEL_WIDTH}} ", text, width, indent=" " * (_LABEL_WIDTH + 1))


def _wrapped(head: str, text: str, width: int | None, *, indent: str) -> list[str]:
    """Return `head` and `text` in lines of at most `width` columns, the second and later ones indented."""
    if width is None or len(head) + len(text) <= width:
        return [(head + text).replace(_NO_BREAK, " ")]
    wrapped = textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=indent,
        # Addresses, paths and commands must stay whole, to be copied.
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in wrapped] or [head]


def _unbroken(*parts: str) -> str:
    """Return `parts` separated by commas, with line breaks allowed only between them."""
    return ", ".join(part.replace(" ", _NO_BREAK) for part in parts)
