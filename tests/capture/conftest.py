"""The Docker engine that the end-to-end tests share."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from capture import engine as engines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capture.engine import Engine


@pytest.fixture(scope="package")  # no child process is left for the tests of other rooms
def engine() -> Iterator[Engine]:
    """A running engine; the tests that want one are skipped where none can run."""
    reason = engines.missing()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            made = stack.enter_context(engines.engine())
        except engines.EngineError as error:
            pytest.skip(f"needs docker: {error}")
        # The helper image is built once, here; what the build says is tested where it is asked for.
        built = made.nattrace("install-tcpdump", "--target", str(made.folder / "bin"))
        assert built.returncode == 0, built.stderr
        assert "building the helper image localtcpdump from this machine's tcpdump" in built.stderr
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold every test that uses the engine to what it leaves in it."""
    if "engine" not in request.fixturenames:
        yield
        return
    engine: Engine = request.getfixturevalue("engine")
    before = engine.left()
    engine.host.run("conntrack -F")
    yield
    for container in set(engine.docker("ps -aq --filter label=test").split()):
        engine.docker(f"rm -f {container}")
    assert engine.left() == before
