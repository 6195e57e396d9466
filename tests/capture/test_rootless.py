"""Engines of ordinary users, by what they answered on a real machine: rootless Docker 20.10, rootless Podman 4.3."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from nattrace.capture.engines.engine import is_local, is_rootless
from nattrace.capture.engines.rootless import namespace, placed
from nattrace.capture.errors import CaptureError
from nattrace.capture.plan import PointPlan

if TYPE_CHECKING:
    from pathlib import Path

ROOT = {"SecurityOptions": ["name=seccomp,profile=default"]}
DOCKER = {"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}
PODMAN = {"SecurityOptions": ["name=seccomp,profile=default"], "Rootless": True}


class Container:
    """A container whose namespace lies where `key` says."""

    def __init__(self, key: str) -> None:
        self.attrs = {"NetworkSettings": {"SandboxKey": key}}
        self.removed = False

    def start(self) -> None:
        pass

    def reload(self) -> None:
        pass

    def remove(self, **_: object) -> None:
        self.removed = True


class Client:
    """An engine at a socket of this machine."""

    base_url = "http+docker://localhost"

    def __init__(
        self, info: dict[str, Any], part: str = "Engine", container: Container | None = None
    ) -> None:
        self.api = self.containers = self
        self._info, self._part, self._container = info, part, container
        self.created: dict[str, Any] = {}

    def info(self) -> dict[str, Any]:
        return self._info

    def version(self) -> dict[str, Any]:
        return {"Components": [{"Name": self._part}]}

    def create(self, *_: object, **options: Any) -> Container | None:
        self.created = options
        return self._container


@pytest.mark.parametrize(("info", "rootless"), [(ROOT, False), (DOCKER, True), (PODMAN, True), ({}, False)])
def test_interfaces_of_a_rootless_engine_are_not_those_seen_here(
    info: dict[str, Any], rootless: bool
) -> None:
    assert is_rootless(Client(info)) is rootless
    assert is_local(Client(info)) is not rootless


def test_what_docker_calls_the_host_is_its_own_namespace() -> None:
    with ExitStack() as stack:
        assert namespace(Client(DOCKER), "image", 60, stack) == "host"


@pytest.mark.parametrize(
    "place",
    ["netns/rootless-netns-6fdd47d5e85ee42f16f8", "containers/networks/rootless-netns/rootless-netns"],
)
def test_podman_keeps_it_beside_those_of_containers(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.touch()
    container = Container(f"{tmp_path}/netns/netns-b1e77b87")
    client = Client(PODMAN, "Podman Engine", container)
    with ExitStack() as stack:
        assert namespace(client, "image", 60, stack) == f"ns:{path}"
        # it exists with a container, which may nothing and goes with the capture
        assert (client.created["network_mode"], client.created["cap_add"]) == ("bridge", [])
        assert not container.removed
    assert container.removed


def test_where_it_is_not_found_the_message_says_what_can_be_done(tmp_path: Path) -> None:
    client = Client(PODMAN, "Podman Engine", Container(f"{tmp_path}/netns/netns-b1e77b87"))
    with ExitStack() as stack, pytest.raises(CaptureError, match="--container NAME captures inside"):
        namespace(client, "image", 60, stack)


def test_the_engines_interfaces_lie_there_and_a_containers_own_do_not() -> None:
    bridge, inside = PointPlan("podman0", "podman0"), PointPlan("job:eth0", "eth0", joins="ns:/run/x")
    assert placed(bridge, "ns:/run/y").joins == "ns:/run/y"
    assert placed(bridge, "ns:/run/y").namespace == "netns:rootless"
    assert placed(inside, "ns:/run/y") is inside
