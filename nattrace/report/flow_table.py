"""The flows of one path as text: a table with one column a point, or three lines a flow where that is too wide.

A point's column shows the end of the flow that NAT changed: the source for snat, the destination for dnat,
both where both changed. ICMP errors about its packets are named where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nattrace.report import human
from nattrace.report.escape import terminal
from nattrace.report.summary import forward

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nattrace.model import Endpoint, Flow, Tuple
    from nattrace.report.summary import PathFlows


#: Kinds of ICMP errors named with a flow.
ERRORS_NAMED: Final = 2


def path_lines(group: PathFlows, limit: int, width: int | None) -> Iterator[str]:
    """Yield the lines that show at most `limit` flows (0: all) of one path, in `width` columns if possible."""
    shown = group.shown(limit)
    table = _flow_table(group, shown)
    if width is None or max(map(len, table)) <= width:
        yield from table
    else:
        for flow in shown:
            yield from _stacked(flow, width)
    hidden = group.total() - len(shown)
    if hidden:
        yield f"  ... {human.count(hidden, 'more flow')}: --limit 0 shows all, -f json has all"


def _flow_table(group: PathFlows, flows: Sequence[Flow]) -> list[str]:
    from tabulate import tabulate  # noqa: PLC0415 - takes longer to load than the rest of the command line

    # Columns that would say the same in every row of an ordinary report appear only when they say something.
    with_status = len(group.statuses) > 1 or "translated" not in group.statuses
    counters = [name for name in ("unknowable", "ambiguous") if any(_sum(flow, name) for flow in flows)]
    with_points = len(group.path) > 1
    with_errors = any(flow.icmp_errors for flow in flows)
    headers = ["flow", "who", "to"]
    if with_points:
        headers += [terminal(group.path[0]), *(f"-> {terminal(name)}" for name in group.path[1:])]
    headers += ["packets"]
    if with_points:
        headers += ["loss", *counters, "median"]
    if with_status:
        headers += ["status"]
    if with_errors:
        headers += ["icmp errors"]
    rows = []
    for flow in flows:
        row = [str(flow.id), _who(flow), _whom(flow)]
        if with_points:
            first, *others = _cells(flow)
            row += [first, *(f"-> {cell}" for cell in others)]
        row += [f"{flow.packets_original}+{flow.packets_reply}"]
        if with_points:
            row += [str(_sum(flow, "lost")), *(str(_sum(flow, name)) for name in counters), _median(flow)]
        if with_status:
            row += [flow.status]
        rows.append([*row, _errors(flow)] if with_errors else row)
    # The header is a row like others: tabulate widens the columns of real headers by two.
    text = tabulate([headers, *rows], tablefmt="plain", disable_numparse=True)
    return ["  " + line for line in text.splitlines()]


def _stacked(flow: Flow, width: int) -> Iterator[str]:
    """Yield one flow in three or more short lines."""
    number = f"  {flow.id:<4} "
    indent = " " * len(number)
    yield f"{number}{_who(flow)} to {_whom(flow)}"
    if len(flow.path) > 1:
        cells = [f"{terminal(name)} {cell}" for name, cell in zip(flow.path, _cells(flow), strict=True)]
        line = indent + cells[0]
        for cell in cells[1:]:
            if len(line) + len(cell) + 4 <= width:
                line += f" -> {cell}"
            else:
                yield line
                line = f"{indent}-> {cell}"
        yield line
    packets = f"{flow.packets_original}+{flow.packets_reply} packets"
    losses = [
        f"{_sum(flow, name)} {name}"
        for name in ("lost", "unknowable", "ambiguous")
        if name == "lost" or _sum(flow, name)
    ]
    details = [*losses, f"median {_median(flow)}"] if len(flow.path) > 1 else []
    yield indent + ", ".join([packets, *details, flow.status])
    if flow.icmp_errors:
        yield f"{indent}icmp errors: {_errors(flow)}"


def _who(flow: Flow) -> str:
    """Return protocol, address and container of the initiator; its port stands in the points' columns."""
    initiator = flow.initiator
    visible = len(flow.path) > 1 and "src" in _sides(flow)
    address = human.endpoint(initiator.src) if visible else human.source(initiator)
    return f"{terminal(flow.protocol)} {address}{_container(flow.endpoint_initiator)}"


def _whom(flow: Flow) -> str:
    # a flow of several points says it in their columns
    wrap = flow.encapsulation[0] if flow.encapsulation is not None and len(flow.path) == 1 else None
    wrapped = f" in {terminal(wrap)}" if wrap else ""
    return f"{human.destination(flow.initiator)}{_container(flow.endpoint_responder)}{wrapped}"


def _container(endpoint: Endpoint | None) -> str:
    return f" {terminal(endpoint.container)}" if endpoint is not None and endpoint.container else ""


def _sides(flow: Flow) -> set[str]:
    """Return which ends of the flow NAT changed anywhere on the path; the source when it changed nothing."""
    nats = {translation.nat for translation in flow.translations}
    sides = {"src" for nat in nats if nat != "dnat"} | {"dst" for nat in nats if nat != "snat"}
    return sides or {"src"}


def _cells(flow: Flow) -> list[str]:
    """Return what the changed end of the flow looks like at each point of its path."""
    sides = _sides(flow)
    addresses = flow.initiator
    cells = [_end(addresses, sides)]
    ahead = list(flow.translations)  # in the order of the path, which may show one point twice
    for hop in zip(flow.path, flow.path[1:], strict=False):
        if ahead and (ahead[0].from_point, ahead[0].to_point) == hop:
            translation = ahead.pop(0)
            addresses = forward(translation.reply)
            cells.append(_end(addresses, sides))
        else:
            cells.append("same" if _crossed(flow, hop) else "not seen")
    wraps = flow.encapsulation or (None,) * len(cells)
    return [f"{cell} in {terminal(wrap)}" if wrap else cell for cell, wrap in zip(cells, wraps, strict=True)]


def _end(addresses: Tuple, sides: set[str]) -> str:
    if sides == {"src"}:
        return human.source(addresses)
    if sides == {"dst"}:
        return human.endpoint(addresses.dst, addresses.dport, addresses.id)
    return f"{human.source(addresses)} > {human.destination(addresses)}"


def _crossed(flow: Flow, hop: tuple[str, str]) -> bool:
    return any(c.matched and {c.from_point, c.to_point} == set(hop) for c in flow.crossings)


def _errors(flow: Flow) -> str:
    """Return the ICMP errors about a flow's packets: ``6 port-unreachable``, with the MTU where one is named."""
    kinds = sorted(flow.icmp_errors, key=lambda kind: -kind.count)
    told = [f"{kind.count} {kind.name}" + (f" mtu {kind.mtu}" if kind.mtu else "") for kind in kinds]
    return human.listed(told, ERRORS_NAMED)


def _sum(flow: Flow, name: str) -> int:
    return sum(getattr(crossing, name) for crossing in flow.crossings)


def _median(flow: Flow) -> str:
    """Return the median latency of the original direction, hop by hop."""
    medians = [crossing.latency for crossing in flow.crossings if crossing.direction == "original"]
    texts = [
        human.duration(latency.median_ns)
        if latency.measurable and latency.median_ns is not None
        else human.NOT_MEASURABLE
        for latency in medians
    ]
    return " + ".join(texts) or human.NOT_MEASURABLE
