"""The engines that the end-to-end tests share."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from capture import engine as engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from capture.engine import Engine


@contextmanager
def running(server: Callable[[Path], tuple[str, ...]], program: str) -> Iterator[Engine]:
    reason = engines.missing(program)
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            made = stack.enter_context(engines.engine(server))
        except engines.EngineError as error:
            pytest.skip(f"needs {program}: {error}")
        # The helper image is built once, here; what the build says is tested where it is asked for.
        built = made.nattrace("install-tcpdump", "--target", str(made.folder / "bin"))
        assert built.returncode == 0, built.stderr
        assert "building the helper image localtcpdump from this machine's tcpdump" in built.stderr
        yield made


@pytest.fixture(scope="package")  # no child process is left for the tests of other rooms
def engine() -> Iterator[Engine]:
    """A running Docker engine; the tests that want one are skipped where none can run."""
    with running(engines.dockerd, "dockerd") as made:
        yield made


@pytest.fixture(scope="module")
def unproxied() -> Iterator[Engine]:
    """A running Docker engine without docker-proxy."""
    with running(engines.without_proxy, "dockerd") as made:
        yield made


@pytest.fixture(scope="module")
def podman() -> Iterator[Engine]:
    """A running Podman that serves Docker's API."""
    with running(engines.podman, "podman") as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold every test that uses the engine to what it leaves in it."""
    wanted = {"engine", "podman", "unproxied"}.intersection(request.fixturenames)
    if not wanted:
        yield
        return
    engine: Engine = request.getfixturevalue(wanted.pop())
    before = engine.left()
    engine.host.run("conntrack -F")
    yield
    for container in set(engine.docker("ps -aq --filter label=test").split()):
        engine.docker(f"rm -f {container}")
    assert engine.left() == before
