"""The capture as a shell script, for an admin who wants to run it by hand (``--dry-run``). Text only."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def script(
    folder: str,
    holders: Sequence[Sequence[str]],
    captures: Sequence[tuple[str, Sequence[str]]],
    context: Sequence[tuple[str, Sequence[str]]],
    workload: Sequence[str],
    duration_s: float,
) -> str:
    """Return the script: every tcpdump, the context before and after, and the bundle of all of it.

    `holders` run all the while, `captures` are file stems and commands, `context` file names and commands. Files
    land in ``FOLDER.parts``.
    """
    parts = f"{folder}.parts"
    at = shlex.quote
    phases = ("before", "after") if context else ()
    made = " ".join(at(f"{parts}/{phase}") for phase in phases) or at(parts)
    lines = ["set -u", f"mkdir -p {made}"]
    # A job's number is not known beforehand; tcpdump says on stderr when it listens, and the sleep waits for it.
    lines.append("pids=")
    lines += [f'{shlex.join(command)} 2> /dev/null & pids="$pids $!"' for command in holders]
    lines += ["sleep 2"] * bool(holders)
    lines += _context_lines(parts, "before", context)
    for stem, command in captures:
        lines.append(f'{shlex.join(command)} 2> {at(f"{parts}/{stem}.log")} & pids="$pids $!"')
    lines.append("sleep 2")
    lines.append(shlex.join(workload) if workload else f"sleep {duration_s:g}")
    lines += ["sleep 1", "kill -INT $pids", "wait"]
    lines += _context_lines(parts, "after", context)
    lines.append(f"nattrace bundle {at(parts)} -w {at(folder)}")
    return "\n".join(lines) + "\n"


def _context_lines(parts: str, phase: str, context: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return [f"{shlex.join(command)} > {shlex.quote(f'{parts}/{phase}/{file}')}" for file, command in context]
