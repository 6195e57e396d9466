"""Engines that an ordinary user runs: where their networks are, and what cannot be seen from there.

Bridges, rules and conntrack of such an engine lie in a network namespace of the user's. What leaves it is taken by a
program (slirp4netns, pasta) that opens connections of its own on the machine: no NAT, and nothing that a helper sees.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.engines.engine import engine_errors, is_podman
from nattrace.capture.errors import CaptureError
from nattrace.capture.helper.holder import hold

if TYPE_CHECKING:
    from contextlib import ExitStack

    from nattrace.capture.plan import PointPlan

#: What is said of every capture with such an engine.
LIMIT: Final = (
    "the engine is rootless: captured is the namespace of its networks. What leaves the machine is sent by a program "
    "(slirp4netns, pasta) under an address and ports of its own; root captures that with --via host -i IF"
)

#: How the manifest calls that namespace.
_NAMESPACE: Final = "netns:rootless"

#: Where Podman keeps it, below the user's runtime folder: 4.x, and 5.0 and later.
_PLACES: Final = ("netns/rootless-netns-*", "containers/networks/rootless-netns/rootless-netns")


def namespace(client: Any, image: str, duration_s: float, stack: ExitStack) -> str:
    """Return the namespace of the engine's networks, as ``docker run --network`` names it; `stack` ends what it takes.

    Docker's is the one that it calls the host's. Podman's exists only while a container is on a network, and its host
    network is the machine's own, where its helpers have no right.
    """
    if not is_podman(client):
        return "host"
    container = hold(client, image, "bridge", duration_s, stack)
    with engine_errors("rootless Podman"):
        container.reload()
    key = str((container.attrs.get("NetworkSettings") or {}).get("SandboxKey"))
    # A container's own namespace is RUNTIME/netns/netns-UUID.
    found = [path for place in _PLACES for path in Path(key).parent.parent.glob(place)]
    if not found:
        raise CaptureError(
            f"{key}: the namespace of rootless Podman's networks is not to be found beside this one; "
            "--container NAME captures inside a container"
        )
    return f"ns:{found[0]}"


def placed(point: PointPlan, network: str) -> PointPlan:
    """Return a point of the engine's machine as one of that namespace; a container's own stays."""
    return replace(point, joins=network, namespace=_NAMESPACE) if point.joins == "host" else point
