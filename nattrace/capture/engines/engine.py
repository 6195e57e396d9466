"""The Docker engine: which one, whether it answers, and what is said when it does not.

The only module that imports the docker package. It knows engines, not captures.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from nattrace.capture.engines.ssh import SshBridge
from nattrace.capture.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where engines listen when nothing says otherwise: Docker, rootless Docker, Podman, rootless Podman.
_SOCKETS: Final = (
    "/var/run/docker.sock",
    "{runtime}/docker.sock",
    "/run/podman/podman.sock",
    "{runtime}/podman/podman.sock",
)

#: The same on a machine behind ssh.
_SOCKETS_THERE: Final = (
    "${DOCKER_HOST#unix://}",
    *(place.format(runtime="${XDG_RUNTIME_DIR:-/run/user/$(id -u)}") for place in _SOCKETS),
)

#: Whether a client of ours speaks through an SshBridge, whose socket is here and whose engine is not.
_BRIDGED: Final = "nattrace_bridged"

#: Seconds that an engine may take for one answer; building an image takes longer and says so.
TIMEOUT_S: Final = 60


@contextmanager
def connected() -> Iterator[Any]:
    """Give a client of the engine that DOCKER_HOST, DOCKER_CONTEXT or the docker command's context name.

    Without any of them, the first socket that exists is taken: Docker's, rootless Docker's, Podman's.

    Raises
    ------
    CaptureError
        No engine answers, or it refuses the caller; the message says which one was asked.
    """
    with ExitStack() as stack:
        yield _connect(stack)


def _connect(stack: ExitStack) -> Any:
    import docker  # noqa: PLC0415 - a second to load

    address, bridge = "?", None
    try:
        address, tls = _address()
        if address.startswith("ssh://"):
            bridge = SshBridge(address, _SOCKETS_THERE)
            stack.callback(bridge.close)
        url = address if bridge is None else bridge.url
        _knock(url)
        client = docker.DockerClient(base_url=url, tls=tls or False, timeout=TIMEOUT_S, version="auto")
        stack.callback(client.close)
        client.ping()
    except (docker.errors.DockerException, OSError, ValueError) as error:
        if bridge is not None and (said := bridge.complaint()):
            raise CaptureError(f"{address}: {said}") from error
        raise _no_engine(address, error) from error
    setattr(client, _BRIDGED, bridge is not None)
    return client


def is_local(client: Any) -> bool:
    """Tell whether the engine's interfaces are the ones seen here: it runs on this machine, and as root."""
    sockets = ("http+docker://localhost", "http+docker://localunixsocket")
    is_here = not getattr(client, _BRIDGED, False) and str(client.api.base_url).startswith(sockets)
    return is_here and not is_rootless(client)


def is_rootless(client: Any) -> bool:
    """Tell whether the engine is an ordinary user's: its networks lie in a namespace of their own."""
    info = client.info()
    return bool(info.get("Rootless")) or "name=rootless" in (info.get("SecurityOptions") or ())


def is_podman(client: Any) -> bool:
    """Tell whether it is Podman that answers as Docker would."""
    return any(part.get("Name") == "Podman Engine" for part in client.version().get("Components") or ())


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn the engine's complaints inside the block into a CaptureError that begins with `what`."""
    import docker  # noqa: PLC0415
    import requests  # noqa: PLC0415

    try:
        yield
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise CaptureError(f"{what}: {complaint(error)}") from error


def complaint(error: Exception) -> str:
    """Return what the engine said, on one line."""
    text = getattr(error, "explanation", None)
    if text is None:
        # requests and urllib3 wrap what the system said, several times.
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "strerror", None) is None:
            cause = cause.__cause__ or cause.__context__
        text = getattr(cause, "strerror", None) or error
    return " ".join(str(text).split())[:300]


def _address() -> tuple[str, Any]:
    """Return the engine's URL and its TLS configuration."""
    from docker.context import ContextAPI  # noqa: PLC0415
    from docker.utils import kwargs_from_env  # noqa: PLC0415

    if os.environ.get("DOCKER_HOST"):
        known = kwargs_from_env()
        return known.get("base_url", os.environ["DOCKER_HOST"]), known.get("tls")
    wanted = os.environ.get("DOCKER_CONTEXT")
    context = ContextAPI.get_context(wanted or None)
    if wanted and context is None:
        raise CaptureError(f"DOCKER_CONTEXT {wanted}: there is no such context; see docker context ls")
    if context is not None and context.name != "default" and context.Host:
        return context.Host, context.TLSConfig
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    for place in _SOCKETS:
        path = place.format(runtime=runtime)
        if os.path.exists(path):  # noqa: PTH110 - False where it may not be looked at
            return f"unix://{path}", None
    return f"unix://{_SOCKETS[0]}", None


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at a socket of this machine; docker-py leaves its own socket open then."""
    if address.startswith("unix://"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.settimeout(TIMEOUT_S)
            knock.connect("/" + address.removeprefix("unix://").lstrip("/"))


def _no_engine(address: str, error: Exception) -> CaptureError:
    text = f"{type(error).__name__} {error}"
    if "PermissionError" in text or "Permission denied" in text:
        return CaptureError(f"{address}: no right to use this engine; use sudo, or join the group docker")
    if "FileNotFoundError" in text or "No such file" in text or "Connection refused" in text:
        return CaptureError(
            f"{address}: no Docker engine there; start it, set DOCKER_HOST, or capture with --via host"
        )
    return CaptureError(f"{address}: {complaint(error)}; set DOCKER_HOST, or capture with --via host")
