"""What goes into a helper image: programs of this machine with their libraries, or a recipe for a distribution.

FROM scratch, the image's root holds each program and each library where it lies on this machine. Beside that both
recipes have ``/install``: a tcpdump that runs on any host, with its libraries and its loader in a folder of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nattrace.capture.errors import CaptureError
from nattrace.capture.recorder import find_program, find_tcpdump

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Sequence

#: What a helper cannot do without: the watchdog's tools, and cp for ``install-tcpdump`` by hand.
_NEEDED: Final = ("sh", "sleep", "stat", "mkdir", "cp", "cat")

#: What takes the context of another machine, as far as this one has it. iptables comes in two kinds, and the other
#: machine may use the one that is not this machine's choice.
_WANTED: Final = (
    "ip",
    "nft",
    "conntrack",
    *(f"{name}{kind}-save" for name in ("iptables", "ip6tables") for kind in ("", "-nft", "-legacy")),
)

#: ldd's lines, glibc's and musl's: "libpcap.so.0.8 => /lib/... (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)".
_LIBRARY: Final = re.compile(r"(/\S+) \(0x")


@contextmanager
def build_context(*, scratch: bool) -> Iterator[io.BufferedRandom]:
    """Give the build context, a tar archive in an unnamed temporary file. CaptureError when nothing can be packed."""
    with ExitStack() as stack:
        helper = stack.enter_context(as_file(files("nattrace.capture.helper")))
        output = stack.enter_context(tempfile.TemporaryFile())
        with tarfile.open(fileobj=output, mode="w") as archive:
            if scratch:
                tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nattrace-")))
                _pack(helper, tree)
                archive.add(helper / "Dockerfile.scratch", "Dockerfile.scratch")
                archive.add(tree, "tree", filter=_of_root)
            else:
                for name in ("Dockerfile", "pack.sh", "run.sh"):
                    archive.add(helper / name, name, filter=_of_root)
        output.seek(0)
        yield output


def packable() -> str:
    """Return this machine's tcpdump; CaptureError when there is none, or only a script such as we install."""
    tcpdump = find_tcpdump(None)
    try:
        with Path(tcpdump).open("rb") as file:
            is_program = file.read(4) == b"\x7fELF"
    except OSError as error:
        raise CaptureError(f"{tcpdump}: {error.strerror}") from error
    if not is_program:
        raise CaptureError(
            f"{tcpdump}: a script, which cannot be packed; build from a distribution with --build base"
        )
    return tcpdump


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Have the image's files belong to root, whoever packs them, with the same bytes every time."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member


def _pack(helper: Path, tree: Path) -> None:
    tcpdump = packable()
    tree.chmod(0o755)
    wanted = [program for name in _WANTED if (program := find_program(name)) is not None]
    _add_programs([tcpdump, *(_found(name) for name in _NEEDED), *wanted], tree)
    done = subprocess.run(  # noqa: S603 - our own script
        ["/bin/sh", str(helper / "pack.sh"), tcpdump, str(tree / "install/tcpdump.lib")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CaptureError(f"{tcpdump}: cannot be packed: {done.stderr.strip()[:200]}")
    shutil.copyfile(helper / "run.sh", tree / "install/tcpdump")
    (tree / "install/tcpdump").chmod(0o755)
    # tcpdump looks up the user that -Z names, even root.
    (tree / "etc").mkdir()
    (tree / "etc/passwd").write_text("root:x:0:0:root:/:\n")
    (tree / "etc/group").write_text("root:x:0:\n")
    # nft prints the names that it finds here, and else numbers.
    if Path("/etc/protocols").exists():
        _copy("/etc/protocols", tree / "etc/protocols")


def _found(name: str) -> str:
    program = find_program(name)
    if program is None:
        raise CaptureError(f"no {name} on this machine, which a helper needs; use --build base")
    return program


def _add_programs(programs: Sequence[str], tree: Path) -> None:
    """Copy programs into ``/usr/bin`` of the tree, and their libraries to where they lie here."""
    for program in programs:
        _copy(program, tree / "usr/bin" / Path(program).name)
        # A static program has no libraries, and ldd says so with an exit code.
        listed = subprocess.run(  # noqa: S603 - a program of this machine
            ["ldd", program],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        for library in _LIBRARY.findall(listed.stdout):
            _copy(library, tree / library.lstrip("/"))
            if Path(library).name.startswith("libxtables."):
                # What it knows of each match and target lies beside it; /lib may be a link to /usr/lib.
                for extension in Path(library).parent.resolve().joinpath("xtables").glob("*.so"):
                    _copy(str(extension), tree / str(extension).lstrip("/"))


def _copy(file: str, place: Path) -> None:
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            place.chmod(0o755)
        except OSError as error:
            raise CaptureError(f"{file}: cannot be packed: {error.strerror}") from error
