"""What every scenario does: record all points while traffic runs, then read what the kernel did."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from lab.recorder import WHOLE, Recording
from lab.truth import Hop, Truth, parse_conntrack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.topology import Lab, Namespace


def _conntrack_name(hop: int) -> str:
    return "conntrack.txt" if hop == 0 else f"conntrack-{hop + 1}.txt"


class NotHereError(RuntimeError):
    """This machine's kernel cannot do what a scenario is about."""


@contextmanager
def recorded(
    net: Lab, folder: Path, *, snaplen: int = WHOLE, without: str = "", outside: Namespace | None = None
) -> Iterator[Recording]:
    """Record all points (except `without`) and every router's conntrack events while the body runs.

    The last point is the interface of the last router, or the one of the same name at the host `outside`.
    """
    with Recording.into(folder) as recording:
        for number, (router, _, _) in enumerate(net.hops):
            recording.conntrack(router, _conntrack_name(number))
        points = [(net.router, net.hops[0][1]), *((router, outer) for router, _, outer in net.hops)]
        if outside is not None:
            points[-1] = (outside, points[-1][1])
        for host, point in points:
            if point != without:
                recording.capture(host, point, snaplen=snaplen)
        yield recording


def kernel_truth(
    net: Lab,
    folder: Path,
    *,
    dropped: int = 0,
    unique_payloads: bool = True,
    partial: bool = False,
    tied: bool = False,
    resized: bool = False,
    keeps: str = "all",
) -> Truth:
    hops = tuple(
        Hop(inner, outer, name, tuple(parse_conntrack((folder / name).read_text())), keeps)
        for name, (_, inner, outer) in zip(
            (_conntrack_name(number) for number in range(len(net.hops))), net.hops, strict=True
        )
    )
    return Truth(hops, dropped, unique_payloads, partial, tied, resized)
