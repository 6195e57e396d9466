"""The helper image: found, built, and its tcpdump copied out (``nattrace install-tcpdump``).

Two recipes lie in ``helper/``: FROM scratch with the programs of this machine, which needs no registry, and one
from a distribution's image. What goes into them is `nattrace.capture.helper.packing`'s.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from nattrace.capture.engines.engine import engine_errors
from nattrace.capture.errors import CaptureError
from nattrace.capture.helper.packing import build_context, packable

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_TAG: Final = "localtcpdump"
DEFAULT_BASE: Final = "alpine:3"
HELPER_LABEL: Final = "org.nattrace.helper"

#: Which programs an image of ours holds; one that another nattrace built may lack some, and is built anew.
_HELPER_VERSION: Final = "2"

Recipe = Literal["auto", "scratch", "base"]


def helper_image(
    client: Any,
    tag: str,
    *,
    recipe: Recipe = "auto",
    base: str = DEFAULT_BASE,
    on_message: Callable[[str], None] = lambda _: None,
) -> str:
    """Return the image's id; build the image when the engine lacks it, or has one that another version built.

    An image of another tag than `DEFAULT_TAG` is never built, and none is ever pulled but the base of a recipe.

    Raises
    ------
    CaptureError
        There is no such image, or it cannot be built.
    """
    import docker  # noqa: PLC0415

    with engine_errors(f"image {tag}"):
        try:
            image = client.images.get(tag)
        except docker.errors.ImageNotFound as error:
            if tag != DEFAULT_TAG:
                raise CaptureError(
                    f"image {tag}: the engine has none; docker pull {tag}, or leave --image out"
                ) from error
            image = None
        if image is None or (tag == DEFAULT_TAG and _is_outdated(image)):
            built = build(client, tag, recipe=recipe, base=base, on_message=on_message)
            if image is not None:
                with suppress(docker.errors.APIError):  # another capture uses it
                    client.images.remove(image.id)
            image = built
    return str(image.id)


def _is_outdated(image: Any) -> bool:
    label = (image.labels or {}).get(HELPER_LABEL)
    return label is not None and label != _HELPER_VERSION


def build(
    client: Any,
    tag: str,
    *,
    recipe: Recipe = "auto",
    base: str = DEFAULT_BASE,
    on_message: Callable[[str], None],
) -> Any:
    """Build the helper image and return it. ``auto`` is ``scratch`` where this machine has a tcpdump."""
    chosen = recipe
    if recipe == "auto":
        try:
            packable()
            chosen = "scratch"
        except CaptureError:
            chosen = "base"
    on_message(
        f"building the helper image {tag} "
        + ("from this machine's tcpdump" if chosen == "scratch" else f"from {base}")
    )
    scratch = chosen == "scratch"
    with build_context(scratch=scratch) as context, engine_errors(f"image {tag}: cannot be built"):
        return _built(
            client,
            fileobj=context,
            custom_context=True,
            dockerfile="Dockerfile.scratch" if scratch else "Dockerfile",
            tag=tag,
            buildargs={} if scratch else {"BASE": base},
            # Packages come by the host's own way out: an engine need not have a bridge, or a way from it.
            network_mode="none" if scratch else "host",
            rm=True,
            forcerm=True,
        )


#: How lines begin that the builder prints between those of the commands.
_BUILDERS_OWN: Final = ("Step ", "--->", "Removing intermediate container")
#: It prints in red what the commands say on stderr.
_COLOURS: Final = re.compile(r"\x1b\[[\d;]*m")


def _built(client: Any, **options: Any) -> Any:
    """Build an image; the error of a failed build ends with the last line that it printed."""
    import docker  # noqa: PLC0415

    try:
        return client.images.build(**options)[0]
    except docker.errors.BuildError as error:
        printed = _COLOURS.sub("", "".join(str(step.get("stream", "")) for step in error.build_log))
        said = [line.strip() for line in printed.splitlines()]
        last = ([line for line in said if line and not line.startswith(_BUILDERS_OWN)] or [""])[-1]
        raise CaptureError(f"image {options['tag']}: cannot be built: {last[-300:] or error.msg}") from error


def install(client: Any, image_id: str, target: Path) -> list[str]:
    """Copy the image's tcpdump into the folder `target`, made when missing; return the names that are there now.

    The files come out of a container that is never started, so nothing runs and nothing is mounted.

    Raises
    ------
    CaptureError
        The image holds no such tcpdump, or the folder cannot be written.
    """
    with engine_errors("install-tcpdump"):
        container = client.containers.create(image_id, network_mode="none", labels={HELPER_LABEL: "install"})
        try:
            stream, _ = container.get_archive("/install/.")
            return _unpack(stream, target)
        finally:
            container.remove(force=True, v=True)


def _unpack(stream: Any, target: Path) -> list[str]:
    names: list[str] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nattrace-", dir=target) as scratch:
            with tarfile.open(fileobj=StreamFile(stream), mode="r|") as archive:
                for member in archive:
                    parts = Path(member.name).parts
                    if not member.isfile() or ".." in parts or len(parts) > 2:
                        continue
                    made = Path(scratch, *parts)
                    made.parent.mkdir(exist_ok=True)
                    source = archive.extractfile(member)
                    if source is not None:
                        with made.open("wb") as file:
                            shutil.copyfileobj(source, file)
                        made.chmod(0o755 if member.mode & 0o111 else 0o644)
            for entry in sorted(Path(scratch).iterdir()):
                place = target / entry.name
                if place.is_dir():
                    shutil.rmtree(place)
                entry.replace(place)
                names.append(entry.name)
    except (OSError, tarfile.TarError) as error:
        raise CaptureError(f"{target}: {getattr(error, 'strerror', None) or error}") from error
    if "tcpdump" not in names:
        raise CaptureError(
            "install-tcpdump: the image holds no packed tcpdump; leave --image out to build one"
        )
    return names


class StreamFile(io.RawIOBase):
    """The byte pieces that the engine sends, as a file that is read forward."""

    def __init__(self, pieces: Any) -> None:
        super().__init__()
        self._pieces = iter(pieces)
        self._left = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer from one piece; 0 at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
