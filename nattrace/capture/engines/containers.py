"""Containers as context, and the containers that come and go while a capture runs.

Only what says who has which address is kept: a container's environment, command and mounts hold secrets, and a bundle
is made to be sent to somebody.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, Final

#: Fields of ``docker inspect`` that are kept; a tuple names what is kept of an object inside.
_KEPT: Final[dict[str, tuple[str, ...] | None]] = {
    "Id": None,
    "Name": None,
    "Image": None,
    "Created": None,
    "State": ("Status", "Running", "Pid", "StartedAt", "FinishedAt"),
    "Config": ("Image", "Labels", "Hostname", "ExposedPorts"),
    "HostConfig": ("NetworkMode", "PortBindings"),
    "NetworkSettings": None,
}

#: Containers that are noted while a capture runs: a machine that starts more has other troubles.
_MOST: Final = 10_000


def running(client: Any) -> list[dict[str, Any]]:
    """Return the running containers as ``docker inspect`` does, without what may be secret."""
    found = [_kept(each.attrs) for each in client.containers.list(ignore_removed=True)]
    return sorted((each for each in found if not _is_ours(each)), key=lambda kept: str(kept.get("Name")))


class ContainerWatch:
    """Notes every container that starts, by listening to the engine's events in a thread of its own."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._seen: dict[str, dict[str, Any]] = {}
        self._stream = client.events(decode=True, filters={"type": "container", "event": "start"})
        self._thread = threading.Thread(target=self._listen, daemon=True, name="nattrace-containers")
        self._thread.start()

    def stop(self) -> list[dict[str, Any]]:
        """Stop listening; return the containers that were started, in the order of their names."""
        with suppress(Exception):  # the engine may be gone
            self._stream.close()
        self._thread.join(5)
        return sorted(self._seen.values(), key=lambda kept: (str(kept.get("Name")), str(kept.get("Id"))))

    def _listen(self) -> None:
        # Closing the stream from the other thread ends the loop, in one way or another.
        with suppress(Exception):
            for event in self._stream:
                self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        actor = event.get("Actor") or {}
        identity, said = str(actor.get("ID", "")), actor.get("Attributes") or {}
        if not identity or len(self._seen) >= _MOST:
            return
        # One that ended before it could be asked is known by its name and image at least.
        kept: dict[str, Any] = {
            "Id": identity,
            "Name": f"/{said.get('name')}",
            "Config": {"Image": said.get("image")},
        }
        with suppress(Exception):
            kept = _kept(self._client.api.inspect_container(identity))
        if not _is_ours(kept):
            self._seen[identity] = kept


def _kept(attributes: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, inside in _KEPT.items():
        value = attributes.get(key)
        if inside is not None and isinstance(value, dict):
            value = {name: value[name] for name in inside if name in value}
        made[key] = value
    return made


def _is_ours(kept: dict[str, Any]) -> bool:
    labels = (kept.get("Config") or {}).get("Labels") or {}
    return any(str(label).startswith("org.nattrace.capture.") for label in labels)
