"""The capture as a shell script, for an admin who wants to run it by hand (``--dry-run``). Text only."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


#: Tells whether every file that follows says that its tcpdump listens, for 20 seconds at most.
_LISTENING = """\
listening() {
  for log; do
    left=20
    until grep -q "listening on" "$log" || [ $left -eq 0 ]; do sleep 1; left=$((left - 1)); done
    grep -q "listening on" "$log" || { cat "$log" >&2; return 1; }
  done
}"""


def script(
    folder: str,
    checks: Sequence[Sequence[str]],
    holders: Sequence[Sequence[str]],
    captures: Sequence[tuple[str, Sequence[str]]],
    context: Sequence[tuple[str, Sequence[Sequence[str]]]],
    events: Sequence[str],
    workload: Sequence[str],
    duration_s: float,
    *,
    remark: str = "",
) -> str:
    """Return the script: every tcpdump, the context before, during and after, and the bundle of all of it.

    `checks` must succeed or nothing is begun; `holders` run all the while; `captures` are file stems and commands;
    `context` file names and the commands whose output they hold, and with it `events` prints what happens meanwhile.
    Files land in ``FOLDER.parts``. `remark` is a line for whoever runs it.
    """
    parts = f"{folder}.parts"
    at = shlex.quote
    phases = ("before", "during", "after") if context else ()
    made = " ".join(at(f"{parts}/{phase}") for phase in phases) or at(parts)
    logs = [f"{parts}/{stem}.log" for stem, _ in captures]
    lines = [f"# {remark}"] * bool(remark)
    lines += ["set -u", *(f"{shlex.join(check)} > /dev/null || exit" for check in checks), f"mkdir -p {made}"]
    lines += [_LISTENING, "pids="]
    lines += [f'{shlex.join(command)} 2> /dev/null & pids="$pids $!"' for command in holders]
    lines += ["sleep 2"] * bool(holders)
    lines += _context_lines(parts, "before", context)
    if context:
        place = at(f"{parts}/during/conntrack-events.txt")
        lines.append(f'{shlex.join(events)} > {place} & pids="$pids $!"')
    for (_, command), log in zip(captures, logs, strict=True):
        lines.append(f'{shlex.join(command)} 2> {at(log)} & pids="$pids $!"')
    lines.append(f"if listening {shlex.join(logs)}; then")
    lines.append(shlex.join(workload) if workload else f"sleep {duration_s:g}")
    lines += ["fi", "sleep 1", "kill -INT $pids", "wait"]
    lines += _context_lines(parts, "after", context)
    lines.append(f"nattrace bundle {at(parts)} -w {at(folder)}")
    return "\n".join(lines) + "\n"


def _context_lines(
    parts: str, phase: str, context: Sequence[tuple[str, Sequence[Sequence[str]]]]
) -> list[str]:
    lines = []
    for file, commands in context:
        place = shlex.quote(f"{parts}/{phase}/{file}")
        lines += [
            f"{shlex.join(command)} {'>>' if number else '>'} {place}"
            for number, command in enumerate(commands)
        ]
    return lines
