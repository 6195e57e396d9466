"""Which interfaces to capture on: named, those of containers and Docker networks, or found out.

Asks the machine and the engine; starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.context.host import Lacking
from nattrace.capture.engines.engine import engine_errors, is_podman
from nattrace.capture.engines.networks import bridge_of, network, used_networks
from nattrace.capture.errors import CaptureError
from nattrace.capture.plan import PointPlan, distinct
from nattrace.capture.routing import outgoing_interfaces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nattrace.capture.context.host import Host

#: The name that engines give a container's first interface.
_CONTAINER_INTERFACE: Final = "eth0"
#: What slirp4netns calls it, to which rootless Podman connects containers that are on no network.
_SLIRP_INTERFACE: Final = "tap0"
#: The bridges of their default networks, for when no engine can be asked: Docker's, Podman's with netavark and CNI.
_DEFAULT_BRIDGES: Final = ("docker0", "podman0", "cni-podman0")


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user asked for; nothing at all means: find it out."""

    interfaces: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()

    @property
    def is_automatic(self) -> bool:
        """Whether the points are to be found out."""
        return not (self.interfaces or self.containers or self.networks)


def resolve(
    selection: Selection,
    client: Any | None,
    host: Host | None,
    *,
    local: bool = True,
    holds: bool = True,
    on_message: Callable[[str], None] = lambda _: None,
) -> list[PointPlan]:
    """Return the points of a selection, each interface once.

    Parameters
    ----------
    selection
        What was asked for.
    client
        The engine, None where there is none; needed for containers and networks.
    host
        The machine with the interfaces; None where nobody can be asked, and names are taken as they are.
    local
        Whether that is this machine.
    holds
        Whether a container will keep a bridge there that comes and goes with containers: not without helpers.
    on_message
        Told what was chosen, or could not be found, on one line each.

    Raises
    ------
    CaptureError
        There is no such interface, container or network, or nothing can be found out.
    """
    if (selection.containers or selection.networks) and client is None:
        raise CaptureError("--container and --network need a Docker engine; give -i IF")
    seen = _look(host)
    points = interfaces_named(selection.interfaces, seen)
    for name in selection.containers:
        points += container_points(client, name, seen if local else None, on_message=on_message)
    points += [network_point(client, name, seen, holds=holds) for name in selection.networks]
    if selection.is_automatic:
        points = automatic_points(client, seen, holds=holds)
        on_message(f"capturing on {', '.join(point.name for point in points)} (-i IF picks others)")
    return distinct(points)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a machine says of itself: nothing, where it cannot be asked."""

    host: Host | None
    state: dict[str, list[dict[str, Any]]] | None  #: as `kernel_state` gives it
    why_not: str = ""

    @property
    def indices(self) -> dict[str, int] | None:
        """The interfaces with their indices, None where they are not known."""
        return (
            None if self.state is None else {link["ifname"]: link["ifindex"] for link in self.state["links"]}
        )


def _look(host: Host | None) -> Seen:
    if host is None:
        return Seen(None, None, "its machine is not asked in a dry run")
    try:
        return Seen(host, host.kernel_state())
    except Lacking as lacking:
        return Seen(host, None, lacking.reason)


def interfaces_named(names: Sequence[str], seen: Seen) -> list[PointPlan]:
    """Return the points of interfaces; CaptureError names those there are when one is not, if that is known.

    ``any`` is refused: its packets stand there several times, without the names of their interfaces.
    """
    there = seen.indices
    points = []
    for name in names:
        if name == "any":
            raise CaptureError("any: one capture of all interfaces cannot be told apart; give -i for each")
        if there is not None and name not in there:
            raise CaptureError(f"{name}: no such interface; there are {', '.join(sorted(there))}")
        points.append(PointPlan(name, name, ifindex=None if there is None else there[name]))
    return points


def container_points(
    client: Any, name: str, here: Seen | None, *, on_message: Callable[[str], None]
) -> list[PointPlan]:
    """Return a container's eth0, in its namespace, and the host's side of it where that can be found.

    `here` is this machine where the container is on it.
    """
    import docker  # noqa: PLC0415 - only where there is an engine

    with engine_errors(f"container {name}"):
        try:
            container = client.containers.get(name)
        except docker.errors.NotFound as error:
            running = ", ".join(sorted(each.name for each in client.containers.list())) or "none"
            raise CaptureError(f"{name}: no such container; running: {running}") from error
    state, settings = container.attrs.get("State", {}), container.attrs.get("NetworkSettings", {})
    if not state.get("Running"):
        raise CaptureError(
            f"{container.name}: the container does not run ({state.get('Status', '?')}); start it first"
        )
    mode = str(container.attrs.get("HostConfig", {}).get("NetworkMode", ""))
    if mode in {"host", "none"}:
        raise CaptureError(f"{container.name}: has no network of its own (--network {mode}); give -i IF")
    process_id = None if here is None else state.get("Pid")
    interface = _SLIRP_INTERFACE if mode.startswith("slirp4netns") else _CONTAINER_INTERFACE
    inside = PointPlan(
        f"{container.name}:{interface}",
        interface,
        namespace=f"container:{container.name}",
        container=container.name,
        joins=_network_of(container, podman=is_podman(client)),
        process_id=process_id,
    )
    if here is None:
        return [inside]
    addresses = [settings.get("MacAddress")]
    addresses += [each.get("MacAddress") for each in (settings.get("Networks") or {}).values()]
    index = _peer_index(process_id) or _port_index({each for each in addresses if each})
    link = next((link for link in (here.state or {}).get("links", ()) if link["ifindex"] == index), None)
    if link is None:
        on_message(
            f"{container.name}: its side in the host's namespace is not to be found; root can look it up"
        )
        return [inside]
    # A macvlan's other side is the interface that it lies on, and others may use that.
    is_shared = any(bridge_of(network(client, each)) is None for each in settings.get("Networks") or ())
    owner = None if is_shared else container.name
    return [inside, PointPlan(link["ifname"], link["ifname"], ifindex=index, container=owner)]


def _network_of(container: Any, *, podman: bool) -> str:
    # Podman does not remove a container as long as another one shares its network by its name.
    key = (container.attrs.get("NetworkSettings") or {}).get("SandboxKey")
    return f"ns:{key}" if podman and key else f"container:{container.id}"


def network_point(client: Any, name: str, seen: Seen, *, holds: bool) -> PointPlan:
    """Return the bridge of a network."""
    attributes = network(client, name)
    if bridge_of(attributes) is None:
        parent = (attributes.get("Options") or {}).get("parent") or "IF"
        raise CaptureError(
            f"{name}: a {attributes.get('Driver')} network has no bridge on this machine; give -i {parent}"
        )
    with engine_errors(f"network {name}"):
        return _bridge_point(attributes, seen, comes_and_goes=is_podman(client), holds=holds)


def automatic_points(client: Any | None, seen: Seen, *, holds: bool) -> list[PointPlan]:
    """Return the bridges of the engine's networks that are in use, and the interfaces that their packets leave by.

    The default network counts as used: a workload may start a container on it. Raises CaptureError when there are
    not both.
    """
    if seen.host is None or seen.state is None or seen.indices is None:
        raise CaptureError(f"the engine's interfaces are not known: {seen.why_not}; give -i IF for each")
    there = seen.indices
    bridges: list[PointPlan] = []
    if client is None:
        bridges = interfaces_named([name for name in _DEFAULT_BRIDGES if name in there], seen)
    else:
        with engine_errors("networks"):
            comes_and_goes = is_podman(client)
            for each in used_networks(client):
                if bridge_of(each) in there or (comes_and_goes and holds):
                    bridges.append(_bridge_point(each, seen, comes_and_goes=comes_and_goes, holds=holds))
    outgoing = outgoing_interfaces(seen.host, seen.state, [point.interface for point in bridges])
    if not bridges:
        raise CaptureError("no bridge of Docker's here; give -i IF for the inner and the outer interface")
    if not outgoing:
        raise CaptureError(
            "no route leads out of here, so the outgoing interface is unknown; give -i IF for each"
        )
    return distinct(sorted(bridges, key=lambda point: point.name) + interfaces_named(outgoing, seen))


def _bridge_point(attributes: dict[str, Any], seen: Seen, *, comes_and_goes: bool, holds: bool) -> PointPlan:
    bridge, there = str(bridge_of(attributes)), seen.indices
    if comes_and_goes and holds:
        index = None if there is None else there.get(bridge)
        return PointPlan(bridge, bridge, ifindex=index, held_by=str(attributes.get("Name")))
    if comes_and_goes and there is not None and bridge not in there:
        raise CaptureError(
            f"{bridge}: not there yet: Podman makes it with the first container of network "
            f"{attributes.get('Name')}; start one, or leave --via host out"
        )
    return interfaces_named([bridge], seen)[0]


def _peer_index(process_id: int | None) -> int | None:
    """Return the interface index, in the host's namespace, of the other end of a container's eth0."""
    # The container's own /sys shows its own interfaces; reading it there takes root.
    try:
        path = Path(f"/proc/{process_id}/root/sys/class/net/{_CONTAINER_INTERFACE}/iflink")
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _port_index(addresses: set[str]) -> int | None:
    """Return the bridge port behind which one of the hardware addresses was seen."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow to load

    wanted = {address.lower() for address in addresses}
    with IPRoute() as kernel:
        for entry in kernel.fdb("dump"):
            if str(entry.get_attr("NDA_LLADDR")).lower() in wanted:
                return int(entry["ifindex"])
    return None
