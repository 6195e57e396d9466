"""Which interfaces to capture on. Asks the kernel; starts nothing."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from nattrace.capture.errors import CaptureError
from nattrace.capture.plan import PointPlan

if TYPE_CHECKING:
    from collections.abc import Sequence


def interfaces_named(names: Sequence[str]) -> list[PointPlan]:
    """Return the points of interfaces of this machine; CaptureError names those there are when one is not.

    ``any`` is refused: its packets stand there several times, without the names of their interfaces.
    """
    there = {name: index for index, name in socket.if_nameindex()}
    points = []
    for name in names:
        if name == "any":
            raise CaptureError("any: one capture of all interfaces cannot be told apart; give -i for each")
        if name not in there:
            raise CaptureError(f"{name}: no such interface; there are {', '.join(sorted(there))}")
        points.append(PointPlan(name, name, ifindex=there[name]))
    return points
