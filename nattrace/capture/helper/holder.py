"""Containers that keep a network's bridge there for as long as a capture runs.

Podman makes the bridge of a network with its first container and removes it with its last one, and with it the rules
that translate. A capture that begins before the workload's container, and outlives it, needs one of its own there.
"""

from __future__ import annotations

import math
import socket
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nattrace.capture.engines.engine import engine_errors
from nattrace.capture.helper.container import SPARE_S, by_hand, marks, privileges, remove

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nattrace.capture.plan import PointPlan


@contextmanager
def held(
    client: Any,
    image: str,
    points: list[PointPlan],
    duration_s: float,
    *,
    local: bool,
) -> Iterator[list[PointPlan]]:
    """Keep the bridges of the points there inside the block; give the points as they are then.

    Raises CaptureError when the engine refuses.
    """
    with ExitStack() as stack:
        for point in points:
            if point.held_by is not None:
                hold(client, image, point.held_by, duration_s, stack)
        yield [_found(point) if local else point for point in points]


def hold(client: Any, image: str, network: str, duration_s: float, stack: ExitStack) -> Any:
    """Start a container on a network, return it, and have `stack` remove it."""
    with engine_errors(f"network {network}: the engine starts no helper there"):
        container = client.containers.create(
            image, entrypoint=_wait(duration_s), **_options(network), labels=marks(duration_s)
        )
        stack.callback(remove, container)
        container.start()
    return container


def holder_command(point: PointPlan, image: str, duration_s: float) -> list[str]:
    """Return the docker command line that keeps the point's bridge there."""
    return by_hand(_options(str(point.held_by)), image, _wait(duration_s))


def _options(network: str) -> dict[str, Any]:
    return {"network_mode": network, **privileges(())}


def _wait(duration_s: float) -> list[str]:
    # The first process of a container ends by no signal that it does not ask for.
    return ["sh", "-c", f"trap 'exit 0' INT TERM; sleep {math.ceil(duration_s) + SPARE_S} & wait"]


def _found(point: PointPlan) -> PointPlan:
    if point.held_by is not None:
        with suppress(OSError):
            return replace(point, ifindex=socket.if_nametoindex(point.interface))
    return point
