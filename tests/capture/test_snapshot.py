"""What cannot be had is named with what it needs, and never ends a capture."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
from docker.errors import APIError

from nattrace.capture.context import host, snapshot
from nattrace.capture.context.snapshot import Snapshot, context_commands
from nattrace.capture.engines import engine
from nattrace.capture.engines.containers import running
from nattrace.capture.errors import CaptureError
from nattrace.capture.helper import container as helper_container
from nattrace.capture.helper.container import OWNER_LABEL, UNTIL_LABEL, owner, remove_leftovers

if TYPE_CHECKING:
    from pathlib import Path

TOOLS = ("iptables-save", "ip6tables-save", "nft", "conntrack", "conntrack-events")


def fake(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def take(folder: Path, monkeypatch: pytest.MonkeyPatch, find: Any) -> Snapshot:
    monkeypatch.setattr(host, "find_program", find)
    monkeypatch.setattr(snapshot, "_SUBSCRIBE_S", 0.1)
    with Snapshot(folder, None, host.LocalHost()) as taken:
        taken.watch()
    return taken


def test_a_missing_tool_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(tmp_path, monkeypatch, lambda _: None)
    assert {each.what: each.needs for each in taken.missing} == {
        **{what: what.removesuffix("-events") for what in TOOLS},
        "docker": "a Docker engine, and the right to use it",
    }


def test_a_tool_without_the_right_is_named_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = fake(tmp_path, "tool", "echo first >&2; echo 'Permission denied (you must be root)' >&2; exit 4")
    taken = take(tmp_path / "b", monkeypatch, lambda _: tool)
    named = {each.what: each for each in taken.missing}
    assert set(TOOLS) <= named.keys()
    assert {named[what].reason for what in TOOLS} == {"Permission denied (you must be root)"}
    assert all("CAP_NET_ADMIN" in str(named[what].needs) for what in TOOLS)
    assert not any(what.endswith(TOOLS) for what in taken.files)


def test_lost_events_are_said_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = fake(
        tmp_path,
        "tool",
        "echo event; echo 'WARNING: We have hit ENOBUFS!' >&2; [ $1 = -E ] && exec sleep 9; true",
    )
    taken = take(tmp_path / "b", monkeypatch, lambda _: tool)
    (lost,) = [each for each in taken.missing if each.what == "conntrack-events"]
    assert "some events were lost" in lost.reason
    assert (tmp_path / "b" / taken.files["during/conntrack-events"]).read_text() == "event\n"
    # both families, one after the other
    assert (tmp_path / "b" / taken.files["after/conntrack"]).read_text() == "event\nevent\n"


def test_the_commands_to_run_by_hand_give_files_of_the_same_names() -> None:
    names = [file.rpartition(".")[0] for file, _ in context_commands(docker=True)]
    assert sorted(names) == sorted(
        [
            *("links", "addresses", "routes", "rules", "iptables-save", "ip6tables-save", "nft", "conntrack"),
            "docker-networks",
        ]
    )


class Thing:
    """A container or a volume of an engine that is not there."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.attrs = {"Labels": labels, "Config": {"Labels": labels}, "Name": "/x"}
        self.removed = False

    def remove(self, **_: object) -> None:
        self.removed = True


class Client:
    """An engine with containers and no volumes."""

    def __init__(self, *things: Thing) -> None:
        self.containers = self.volumes = self
        self.things = things

    def list(self, **options: Any) -> tuple[Thing, ...]:
        return self.things if options.get("all") or "ignore_removed" in options else ()


def test_helpers_are_left_over_when_their_process_is_gone() -> None:
    mine = owner(os.getpid())
    assert mine is not None
    boot, number, start = mine.split(":")
    alive = Thing({OWNER_LABEL: mine, UNTIL_LABEL: "0"})
    reused = Thing({OWNER_LABEL: f"{boot}:{number}:{int(start) + 1}", UNTIL_LABEL: "0"})
    gone = Thing({OWNER_LABEL: f"{boot}:4194305:1", UNTIL_LABEL: str(2**40)})
    elsewhere = Thing({OWNER_LABEL: "other/pid:1:1", UNTIL_LABEL: str(2**40)})
    forgotten = Thing({OWNER_LABEL: "other/pid:1:1", UNTIL_LABEL: "1000"})
    strange = Thing({OWNER_LABEL: "", UNTIL_LABEL: "never"})
    things = (alive, reused, gone, elsewhere, forgotten, strange)
    assert remove_leftovers(Client(*things)) == 3
    assert [thing.removed for thing in things] == [False, True, True, False, True, False]


class Ending(Thing):
    """A container that the engine does not let go at first."""

    def __init__(self, refusals: int) -> None:
        super().__init__({OWNER_LABEL: ""})
        self.refusals = refusals

    def remove(self, **options: object) -> None:
        if self.refusals:
            self.refusals -= 1
            raise APIError("cannot remove container: container state improper: stopped")
        super().remove(**options)


@pytest.mark.parametrize(("refusals", "removed"), [(0, True), (2, True), (99, False)])
def test_a_helper_that_ends_at_this_moment_is_removed(
    refusals: int, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper_container, "_BETWEEN_REMOVALS_S", 0.0)
    ending = Ending(refusals)
    helper_container.remove(ending)
    assert ending.removed == removed


def test_helpers_are_no_context() -> None:
    assert running(Client(Thing({OWNER_LABEL: "x"}))) == []
    assert len(running(Client(Thing({"app": "web"})))) == 1


@pytest.fixture
def no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "_SOCKETS", ("/nonexistent/docker.sock", "{runtime}/podman/podman.sock"))
    return tmp_path


def test_without_an_engine_the_message_says_where_it_was_looked_for(
    no_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        CaptureError, match=r"unix:///nonexistent/docker\.sock: no Docker engine there; start it"
    ):
        engine.connected().__enter__()
    (no_engine / "podman").mkdir()
    (no_engine / "podman/podman.sock").touch()
    with pytest.raises(CaptureError, match=f"unix://{no_engine}/podman/podman.sock: no Docker engine there"):
        engine.connected().__enter__()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{no_engine}/mine.sock")
    with pytest.raises(CaptureError, match=f"unix://{no_engine}/mine.sock: no Docker engine there"):
        engine.connected().__enter__()


def test_the_context_of_the_docker_command_is_used(no_engine: Path) -> None:
    meta = no_engine / "docker/contexts/meta" / sha256(b"far").hexdigest()
    meta.mkdir(parents=True)
    host = f"unix://{no_engine}/far.sock"
    meta.joinpath("meta.json").write_text(
        json.dumps(
            {"Name": "far", "Metadata": {}, "Endpoints": {"docker": {"Host": host, "SkipTLSVerify": False}}}
        )
    )
    # docker-py looks for contexts beside the command's configuration.
    (no_engine / "docker/config.json").write_text('{"currentContext": "far"}')
    with pytest.raises(CaptureError, match=f"{host}: no Docker engine there"):
        engine.connected().__enter__()
