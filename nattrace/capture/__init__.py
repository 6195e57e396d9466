"""Capture: tcpdump on several interfaces at once, and the bundle it leaves.

The only room that talks to Docker and to the kernel. It never reads a captured packet: what it leaves is read as
any other SOURCE. `run` is ``nattrace capture``, `install_tcpdump` is ``nattrace install-tcpdump``.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from nattrace.bundle.writing import new_folder, write_manifest
from nattrace.capture.context.host import LocalHost
from nattrace.capture.context.snapshot import EVENTS, Snapshot, context_commands
from nattrace.capture.errors import CaptureError
from nattrace.capture.helper.image import DEFAULT_BASE, DEFAULT_TAG, Recipe, helper_image, install
from nattrace.capture.plan import Options, PointPlan, with_buffers
from nattrace.capture.points import Selection, resolve
from nattrace.capture.recorder import HostRecorder, find_tcpdump, host_command
from nattrace.capture.records import counted
from nattrace.capture.script import script
from nattrace.capture.session import run_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nattrace.bundle.manifest import Manifest
    from nattrace.capture.context.host import Host
    from nattrace.capture.recorder import Recorder
    from nattrace.capture.session import Progress

__all__ = ["Options", "PointPlan", "Request", "Selection", "dry_run", "install_tcpdump", "run"]

Via = Literal["docker", "host"]

#: Bytes that a manifest may need: one of 20 points has 20,000.
_MANIFEST_ROOM: Final = 1 << 18

#: What a dry run says of an engine whose networks are not this machine's.
_ELSEWHERE: Final = "For the engine's machine, and for a rootless engine inside its namespace: interfaces, context and folder are there."


@dataclass(frozen=True, slots=True)
class Request:
    """One capture as it was asked for."""

    selection: Selection
    options: Options
    via: Via = "docker"
    tcpdump: str | None = None  #: the program, with ``host``
    image: str = DEFAULT_TAG  #: with ``docker``
    recipe: Recipe = "auto"  #: how the image is built when the engine lacks it
    base: str = DEFAULT_BASE
    workload: tuple[str, ...] = ()
    context: bool = True  #: take the host's context before, during and after


def run(
    request: Request,
    path: str | Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Capture into a new bundle at `path`; return its manifest.

    Raises CaptureError when there is no engine, image, tcpdump, interface, container or right for it, or the workload
    does not start; UsageError when `path` is in use.
    """
    with ExitStack() as stack:
        client = _client(request, stack)
        points, start, host = _prepare(request, client, stack, on_message)
        folder = new_folder(path)
        snapshot = Snapshot(folder, client, host) if request.context else None
        try:
            with _room_for_a_manifest(folder), snapshot or nullcontext():
                manifest = run_session(
                    points,
                    lambda point: start(point, folder),
                    request.options,
                    request.workload,
                    on_listening=snapshot.watch if snapshot is not None else lambda: None,
                    on_progress=on_progress,
                    on_message=on_message,
                )
            if snapshot is not None:
                manifest = replace(manifest, context=snapshot.files, missing=snapshot.missing)
            if request.options.ring_files is None:  # a ring drops packets on purpose
                manifest = replace(manifest, points=tuple(counted(each, folder) for each in manifest.points))
            write_manifest(manifest, folder)
        except BaseException:
            # The folder was empty before, and what tells of a capture is nothing without one.
            if not any(file.stat().st_size for file in folder.glob("*.pcap*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return manifest


@contextmanager
def _room_for_a_manifest(folder: Path) -> Iterator[None]:
    """Keep some space while captures may fill the disk: without its manifest a bundle is none."""
    reserve = folder / ".reserve"
    try:
        reserve.write_bytes(bytes(_MANIFEST_ROOM))
        yield
    finally:
        reserve.unlink(missing_ok=True)


def dry_run(request: Request, path: str) -> str:
    """Return the shell script that does by hand what `run` would; starts nothing and builds nothing."""
    with ExitStack() as stack:
        client = _client(request, stack)
        local = client is None or _local(client)
        points = resolve(
            request.selection,
            client,
            LocalHost() if local else None,
            local=local,
            holds=request.via != "host",
        )
        options = with_buffers(request.options, len(points), _memory_bytes(request.via, client))
        commands, holders = [], []
        for point in points:
            target = f"{path}.parts"
            if request.via == "host":
                words = host_command(
                    point, options, request.tcpdump or "tcpdump", f"{target}/{point.file_name}"
                )
            else:
                from nattrace.capture.helper.container import docker_command  # noqa: PLC0415
                from nattrace.capture.helper.holder import holder_command  # noqa: PLC0415

                words = docker_command(point, options, request.image, str(Path(target).absolute()))
                if point.held_by is not None:
                    holders.append(holder_command(point, request.image, options.duration_s))
            commands.append((point.file_name.removesuffix(".pcap"), words))
        checks = [] if request.via == "host" else [("docker", "image", "inspect", request.image)]
        return script(
            path,
            checks,
            holders,
            commands,
            context_commands(docker=client is not None) if request.context else (),
            EVENTS,
            request.workload,
            request.options.duration_s,
            remark="" if local else _ELSEWHERE,
        )


def install_tcpdump(
    target: str | Path,
    *,
    image: str = DEFAULT_TAG,
    recipe: Recipe = "auto",
    base: str = DEFAULT_BASE,
    on_message: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Put a tcpdump that needs no libraries of the host into the folder `target`; return the names put there."""
    from nattrace.capture.engines.engine import connected  # noqa: PLC0415 - docker takes a second to load

    with connected() as client:
        identity = helper_image(client, image, recipe=recipe, base=base, on_message=on_message)
        return install(client, identity, Path(target))


def _prepare(
    request: Request, client: Any | None, stack: ExitStack, on_message: Callable[[str], None]
) -> tuple[list[PointPlan], Callable[[PointPlan, Path], Recorder], Host]:
    """Return the points, what starts capturing one of them into a folder, and whom to ask for the context.

    What all this needs is removed by `stack`.
    """
    if request.via == "host":
        program = find_tcpdump(request.tcpdump)
        here = LocalHost()
        points = resolve(request.selection, client, here, holds=False, on_message=on_message)
        options = with_buffers(request.options, len(points), _memory_bytes(request.via, client))
        return points, lambda point, folder: HostRecorder(point, options, program, folder), here

    from nattrace.capture.engines import rootless  # noqa: PLC0415
    from nattrace.capture.engines.engine import is_rootless  # noqa: PLC0415
    from nattrace.capture.helper.container import Helpers, remove_leftovers  # noqa: PLC0415
    from nattrace.capture.helper.holder import held  # noqa: PLC0415
    from nattrace.capture.helper.remote_host import HelperHost  # noqa: PLC0415

    local = _local(client)
    removed = remove_leftovers(client)
    if removed:
        on_message(f"removed {removed} helper container{'s' * (removed > 1)} of a capture that was killed")
    identity = helper_image(
        client, request.image, recipe=request.recipe, base=request.base, on_message=on_message
    )
    duration_s = request.options.duration_s
    network, is_of_user = "host", is_rootless(client)
    if is_of_user:
        network = rootless.namespace(client, identity, duration_s, stack)
        on_message(rootless.LIMIT)
    host: Host = LocalHost()
    if not local:
        host = helper_host = HelperHost(client, identity, duration_s, network)
        stack.callback(helper_host.close)
    points = resolve(request.selection, client, host, local=local, on_message=on_message)
    points = stack.enter_context(held(client, identity, points, duration_s, local=local))
    if is_of_user:
        points = [rootless.placed(point, network) for point in points]
    options = with_buffers(request.options, len(points), _memory_bytes(request.via, client))
    helpers = Helpers(client, identity, options)
    stack.callback(helpers.close)
    return points, helpers.start, host


def _client(request: Request, stack: ExitStack) -> Any | None:
    """Return the engine, None where ``host`` does without: there is none, or it knows nothing of this machine."""
    selection = request.selection
    from nattrace.capture.engines.engine import connected  # noqa: PLC0415 - docker takes a second to load

    dispensable = request.via == "host" and not (selection.containers or selection.networks)
    try:
        client = stack.enter_context(connected())
    except CaptureError:
        if dispensable:
            return None
        raise
    if request.via == "host" and not _local(client):
        if dispensable:
            return None
        raise CaptureError(
            "the engine is on another machine, or rootless: its networks cannot be captured from here without "
            "helpers; leave --via host out"
        )
    return client


def _local(client: Any) -> bool:
    from nattrace.capture.engines.engine import is_local  # noqa: PLC0415

    return is_local(client)


def _memory_bytes(via: Via, client: Any | None) -> int | None:
    """Return the memory of the machine that captures, None when the engine does not say."""
    if via == "host":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    from nattrace.capture.engines.engine import engine_errors  # noqa: PLC0415

    with engine_errors("docker info"):
        return (client.info().get("MemTotal") if client is not None else None) or None
