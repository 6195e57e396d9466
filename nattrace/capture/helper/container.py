"""tcpdump in a helper container, one for each point.

The container shares the network namespace of the host or of another container and has nothing but the right to open
packet sockets. The captures land in a volume, a folder for each point, and come out as archives, so no folder of
the host is mounted and the engine may be on another machine. A helper ends by itself when the capture has lasted too
long or grown too large, whoever looks after it. Containers and volumes are labelled with the process
that made them, and those whose process is gone are removed by the next capture.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.engines.engine import complaint, engine_errors, is_podman
from nattrace.capture.errors import UncollectedError
from nattrace.capture.helper.image import StreamFile
from nattrace.capture.helper.watchdog import SIZE_REACHED, watched
from nattrace.capture.plan import tcpdump_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nattrace.capture.plan import Options, PointPlan

#: What marks a helper: whose it is, and when it is surely forgotten.
OWNER_LABEL: Final = "org.nattrace.capture.owner"
UNTIL_LABEL: Final = "org.nattrace.capture.until"

#: Seconds after the end of its capture at which a helper whose owner cannot be looked up is taken for forgotten.
_GRACE_S: Final = 3600

#: Seconds beyond the capture's duration that a helper may run: until all listen, and until all are drained.
SPARE_S: Final = 120

#: Where the captures lie in the helpers.
_FOLDER: Final = "/capture"

#: Rights of a helper. The second set is for a tcpdump that insists on changing its user (Debian's, Fedora's):
#: ``-Z root`` keeps it the same, but setgroups(2) wants the right all the same.
_CAPABILITIES: Final = ("NET_RAW",)
_CAPABILITIES_TO_STAY: Final = ("NET_RAW", "SETGID")

#: What such a tcpdump says without that right.
_WANTS_TO_CHANGE: Final = ("Couldn't change to", "Couldn't find user", "Couldn't change ownership")

#: How often the engine is asked whether a helper still runs.
_ASK_S: Final = 0.25

#: How often an engine that refuses to remove something is asked, and how long it has between two times.
_REMOVALS: Final = 5
_BETWEEN_REMOVALS_S: Final = 0.2

#: Last lines of the log that are read: the counters, and a complaint. Of the last lines Podman 4 drops what was
#: printed without the end of its line, as tcpdump's are; there the whole is read, at most what a log may hold.
_LOG_LINES: Final = 30


def tcpdump_command(point: PointPlan, options: Options, folder: str, *, stays_root: bool) -> list[str]:
    """Return the tcpdump that a helper runs, writing into `folder`."""
    stay = ["-Z", "root"] if stays_root else []
    return ["tcpdump", *stay, *tcpdump_arguments(point, options, f"{folder}/{point.file_name}")]


def container_options(point: PointPlan, *, stays_root: bool) -> dict[str, Any]:
    """Return where the point's helper is and what it may, in the words of docker-py's containers.create."""
    return {
        "network_mode": point.joins,
        **privileges(_CAPABILITIES_TO_STAY if stays_root else _CAPABILITIES),
    }


def privileges(rights: Sequence[str]) -> dict[str, Any]:
    """Return what the engine is told of the rights of a container of ours."""
    return {
        "cap_drop": ["ALL"],
        "cap_add": [*rights],
        "security_opt": ["no-new-privileges"],
        "read_only": True,
        "user": "0:0",
        "pids_limit": 16,
    }


def docker_command(point: PointPlan, options: Options, image: str, target: str) -> list[str]:
    """Return the docker command line that does the same by hand, with the folder `target` for the output."""
    command = tcpdump_command(point, options, _FOLDER, stays_root=True)
    made = container_options(point, stays_root=True)
    return by_hand(made, image, command, "--volume", f"{target}:{_FOLDER}")


def by_hand(made: dict[str, Any], image: str, command: list[str], *more: str) -> list[str]:
    """Return the docker command line of a container with a network and `privileges`."""
    # Never pulled: the name of an image that is built here may be somebody else's in a registry.
    words = [
        "docker",
        "run",
        "--rm",
        "--pull",
        "never",
        "--network",
        made["network_mode"],
        "--cap-drop",
        "ALL",
    ]
    words += [word for right in made["cap_add"] for word in ("--cap-add", right)]
    words += ["--security-opt", "no-new-privileges", "--read-only", "--user", "0:0", *more]
    return [*words, "--entrypoint", command[0], image, *command[1:]]


def marks(duration_s: float) -> dict[str, str]:
    """Return what marks a container or volume of a capture that may last so long."""
    return {
        OWNER_LABEL: owner(os.getpid()) or "?",
        UNTIL_LABEL: str(int(time.time() + duration_s + _GRACE_S)),
    }


class Helpers:
    """Starts the helpers of one capture; `start` is what the session calls for each point, `close` ends it."""

    def __init__(self, client: Any, image: str, options: Options) -> None:
        self._client, self._image, self._options = client, image, options
        self._volume: Any = None
        self._tail: int | str = "all" if is_podman(client) else _LOG_LINES
        self._stays_root: bool | None = None  #: None until the first helper has shown what its tcpdump wants

    def start(self, point: PointPlan, folder: Path) -> HelperRecorder:
        """Start capturing a point, for a bundle in `folder`; CaptureError when the engine refuses."""
        helper = self._run(point, folder, stays_root=bool(self._stays_root))
        if self._stays_root is not None:
            return helper
        deadline = time.monotonic() + 10
        while (
            not (said := helper.said()).endswith("\n")
            and helper.exit_code() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        self._stays_root = any(text in said for text in _WANTS_TO_CHANGE)
        if not self._stays_root:
            return helper
        helper.close()
        return self._run(point, folder, stays_root=True)

    def close(self) -> None:
        """Remove the volume, after all helpers are removed."""
        if self._volume is not None:
            remove(self._volume)
            self._volume = None

    def _run(self, point: PointPlan, folder: Path, *, stays_root: bool) -> HelperRecorder:
        from docker.types import LogConfig, Ulimit  # noqa: PLC0415

        options = self._options
        inside = PurePosixPath(_FOLDER, Path(point.file_name).stem)
        command = tcpdump_command(point, options, str(inside), stays_root=stays_root)
        labels = marks(options.duration_s)
        helper = HelperRecorder(point, tuple(command), folder, inside, self._tail)
        try:
            with engine_errors(f"{point.name}: the engine starts no helper"):
                if self._volume is None:
                    self._volume = self._client.volumes.create(labels=labels)
                helper.container = self._client.containers.create(
                    self._image,
                    entrypoint=watched(
                        command,
                        seconds=math.ceil(options.duration_s) + SPARE_S,
                        max_bytes=options.max_bytes,
                        volume=_FOLDER,
                        folder=inside.name,
                    ),
                    **container_options(point, stays_root=stays_root),
                    volumes={self._volume.name: {"bind": _FOLDER, "mode": "rw"}},
                    labels=labels,
                    # The watchdog looks once a second; within it one file cannot outgrow the whole either.
                    # Beside one limit Podman sets others to the greatest there are, which takes a right.
                    ulimits=[
                        Ulimit(name=name, soft=most, hard=most)
                        for name, most in (("fsize", options.max_bytes), ("nofile", 1024), ("nproc", 4096))
                    ],
                    log_config=LogConfig(type="json-file", config={"max-size": "1m", "max-file": "2"}),
                )
                helper.container.start()
        except BaseException:
            helper.close()
            raise
        return helper


class HelperRecorder:
    """A helper container that runs; see `nattrace.capture.recorder.Recorder`."""

    def __init__(
        self,
        point: PointPlan,
        command: tuple[str, ...],
        folder: Path,
        inside: PurePosixPath,
        tail: int | str,
    ) -> None:
        """Take the point, its tcpdump, the bundle's folder, the one that tcpdump writes into, and how much of a log."""
        self.point = point
        self.command = command
        self.container: Any = None
        self._folder, self._inside, self._tail = folder, inside, tail
        self._said = ""
        self._code: int | None = None
        self._asked_s = 0.0
        self._closed = False

    def said(self) -> str:
        """Return the last lines of tcpdump's messages; what was known of them when the engine is silent."""
        text = self._ask(lambda: self.container.logs(stdout=True, stderr=True, tail=self._tail))
        if isinstance(text, bytes):
            self._said = text.decode("utf-8", "replace")
        return self._said

    def exit_code(self) -> int | None:
        """Return None while tcpdump runs, as far as the engine said a quarter of a second ago."""
        now = time.monotonic()
        if self._code is None and now - self._asked_s >= _ASK_S:
            self._asked_s = now
            self._ask(self.container.reload)
            state = self.container.attrs.get("State", {})
            if state.get("Status") in {"exited", "dead", "removing"}:
                code = int(state.get("ExitCode", 1))
                self._code = 128 - code if code > 128 else code  # a shell's way of saying "by a signal"
                if SIZE_REACHED in self.said():
                    self._code = (
                        -signal.SIGXFSZ
                    )  # as if the kernel had stopped it, which counts one file only
        return self._code

    def send(self, which: signal.Signals) -> None:
        """Send a signal, if the helper still runs."""
        if self._code is None:
            self._ask(lambda: self.container.kill(which.name), fatal=False)

    def size_bytes(self) -> int | None:
        """Return None: it lies in the engine's volume, where the watchdog looks after it."""
        return None

    def collect(self) -> tuple[str, ...]:
        """Copy the capture files into the bundle; UncollectedError when the engine or the disk has not enough."""
        import docker  # noqa: PLC0415

        names: list[str] = []
        try:
            stream, _ = self.container.get_archive(f"{self._inside}/.")
            with tarfile.open(fileobj=StreamFile(stream), mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if member.isfile() and member.size and self.point.owns(name):
                        source = archive.extractfile(member)
                        if source is not None:
                            with (self._folder / name).open("wb") as file:
                                names.append(name)
                                shutil.copyfileobj(source, file, 1 << 20)
        # What requests raises is an OSError as well.
        except (docker.errors.DockerException, OSError, tarfile.TarError) as error:
            raise UncollectedError(
                f"the capture, or its end, is missing: {complaint(error)}", tuple(sorted(names))
            ) from error
        return tuple(sorted(names))

    def close(self) -> None:
        """Remove the helper."""
        if self.container is not None and not self._closed:
            self._closed = True
            remove(self.container)

    def _ask(self, question: Callable[[], Any], *, fatal: bool = True) -> Any:
        """Ask the engine; one that does not answer, or knows the helper no more, ends this recorder."""
        import docker  # noqa: PLC0415
        import requests  # noqa: PLC0415

        try:
            return question()
        except (docker.errors.DockerException, requests.RequestException) as error:
            gone = isinstance(error, docker.errors.NotFound)
            if self._code is None and (fatal or gone) and not isinstance(error, requests.Timeout):
                self._code = 1
                what = "the helper container is gone" if gone else "the engine does not answer"
                self._said += f"\ntcpdump: {what}: {complaint(error)}"
            return None


def owner(process_id: int) -> str | None:
    """Return what tells a process of this machine from all others, None when it is gone.

    That is where its number counts (boot and PID namespace), its number, and when it started.
    """
    try:
        namespace = Path("/proc/self/ns/pid").readlink()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + f"/{namespace}".replace(":", "")
        # comm, the second field, may hold anything but ends with the last parenthesis (proc(5)).
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot}:{process_id}:{fields[19]}"


def remove_leftovers(client: Any) -> int:
    """Remove the helpers of captures that were killed; return how many there were.

    A helper stays while its process lives. One of another machine or boot stays until its time is long over.
    """
    removed = 0
    with engine_errors("helpers of earlier captures"):
        for container in client.containers.list(
            all=True, filters={"label": OWNER_LABEL}, ignore_removed=True
        ):
            if _is_left_over(container.labels):
                remove(container)
                removed += 1
        for volume in client.volumes.list(filters={"label": OWNER_LABEL}):
            if _is_left_over(volume.attrs.get("Labels") or {}):
                remove(volume)
    return removed


def _is_left_over(labels: dict[str, str]) -> bool:
    boot, _, rest = labels.get(OWNER_LABEL, "").partition(":")
    process_id = rest.partition(":")[0]
    mine = owner(os.getpid())
    if mine is not None and boot == mine.partition(":")[0] and process_id.isdecimal():
        return owner(int(process_id)) != labels[OWNER_LABEL]
    until = labels.get(UNTIL_LABEL, "")
    return until.isdecimal() and time.time() > int(until)


def remove(thing: Any) -> None:
    """Remove a container or a volume, as far as the engine lets it."""
    import docker  # noqa: PLC0415
    import requests  # noqa: PLC0415

    for _ in range(_REMOVALS):
        try:
            thing.remove(force=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError:
            # Podman refuses what ends at this very moment ("container state improper: stopped").
            time.sleep(_BETWEEN_REMOVALS_S)
        except (docker.errors.DockerException, requests.RequestException):
            return  # the engine went away: the next capture removes it
        else:
            return
