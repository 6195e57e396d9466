"""The networks of an engine and their bridges, Docker's and Podman's.

Docker's bridge of a network is there as long as the network is. Podman makes it with the first container and removes
it with the last, and Docker's API has no word for how Podman calls it: only Podman's own API has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.engines.engine import engine_errors, is_podman
from nattrace.capture.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Where Docker tells a network's bridge.
_BRIDGE_OPTION: Final = "com.docker.network.bridge.name"

#: The name that both engines give their default network in a list. Inspected, Podman's has another.
_DEFAULT: Final = "bridge"

#: Podman's own question; every Podman since 4.0 answers it.
_PODMAN_NETWORKS: Final = "/v4.0.0/libpod/networks/json"


def networks(client: Any) -> list[dict[str, Any]]:
    """Return all networks as ``docker network inspect`` does, Podman's with their bridges where Docker has them."""
    found = inspected(client, client.networks.list())
    return sorted(found, key=lambda attributes: str(attributes.get("Name")))


def network(client: Any, name: str) -> dict[str, Any]:
    """Return one network as `networks` does; CaptureError names those there are when it is not one of them."""
    import docker  # noqa: PLC0415 - only where there is an engine

    with engine_errors(f"network {name}"):
        try:
            found = client.networks.get(name)
        except docker.errors.NotFound as error:
            there = ", ".join(sorted(each.name for each in client.networks.list()))
            raise CaptureError(f"{name}: no such network; there are {there}") from error
        return inspected(client, [found])[0]


def used_networks(client: Any) -> list[dict[str, Any]]:
    """Return the networks with a bridge that have containers, and the default one: a workload may use it."""
    listed = client.networks.list(filters={"driver": "bridge"})
    defaults = {each.id for each in listed if each.name == _DEFAULT}
    found = inspected(client, listed)
    return [each for each in found if each.get("Containers") or each.get("Id") in defaults]


def inspected(client: Any, listed: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the attributes of networks that were listed."""
    bridges = _podman_bridges(client) if is_podman(client) else {}
    found = []
    for each in listed:
        each.reload()
        attributes = each.attrs
        if each.id in bridges:
            attributes["Options"] = {**(attributes.get("Options") or {}), _BRIDGE_OPTION: bridges[each.id]}
        found.append(attributes)
    return found


def bridge_of(attributes: dict[str, Any]) -> str | None:
    """Return the name of a network's bridge, None when it has none."""
    if attributes.get("Driver") != "bridge":
        return None
    given = (attributes.get("Options") or {}).get(_BRIDGE_OPTION)
    return given or f"br-{str(attributes.get('Id', ''))[:12]}"


def _podman_bridges(client: Any) -> dict[str, str]:
    """Return the bridges of Podman's networks by the networks' ids."""
    answer = client.api.get(f"{client.api.base_url}{_PODMAN_NETWORKS}", timeout=client.api.timeout)
    answer.raise_for_status()
    return {
        each["id"]: each["network_interface"]
        for each in answer.json()
        if each.get("driver") == "bridge" and each.get("network_interface")
    }
