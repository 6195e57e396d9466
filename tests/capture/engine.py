"""An engine of its own, Docker or Podman, in a network namespace of its own, with a second one as the internet.

    containers --- docker0 [engine] eth0 --- eth0 [internet]

Nothing is pulled: the one image, ``busybox``, is made from the machine's static busybox. The engine keeps all its
files in one temporary folder, and folder, processes and namespaces are gone afterwards.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab import topology
from lab.topology import GATEWAY, GATEWAY_V6, SERVERS, SERVERS_V6, UPLINK, UPLINK_V6, Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOOLS = ("docker", "nsenter", "busybox", "conntrack", "tcpdump")

#: What the containers' image can do.
APPLETS = ("sh", "ping", "sleep", "httpd", "nc", "wget", "cat", "ls", "ip")

#: Seconds for an engine to start or to end.
PATIENCE_S = 40.0


def missing(server: str) -> str | None:
    """Say what keeps the engine, ``dockerd`` or ``podman``, from running here, or None."""
    for tool in (server, *TOOLS):
        if shutil.which(tool) is None:
            return f"needs {'docker' if tool.startswith('docker') else tool}"
    busybox = Path(str(shutil.which("busybox"))).read_bytes()
    if b"/ld-linux" in busybox or b"/ld-musl" in busybox:
        return "needs a static busybox"
    return topology.missing()


class EngineError(RuntimeError):
    """The engine does not start on this machine."""


@dataclass(slots=True)
class Engine:
    """A running engine: its host, its internet, and how to talk to it."""

    host: Namespace
    internet: Namespace
    folder: Path
    server: tuple[str, ...]  #: the command that serves the socket
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What DOCKER_HOST is set to."""
        return f"unix://{self.folder}/sock"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of commands that use the engine."""
        return {**os.environ, "DOCKER_HOST": self.url, "DOCKER_CONFIG": str(self.folder / "config")}

    def docker(self, line: str) -> str:
        """Run a docker command and return what it printed; raises when it fails."""
        done = subprocess.run(
            ["docker", *line.split()],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"docker {line}: {done.stderr.strip()}")
        return done.stdout.strip()

    def command(self, *words: str) -> list[str]:
        """Return the command line of a nattrace on the engine's host."""
        return self.host.command(sys.executable, "-m", "nattrace", *words)

    def nattrace(self, *words: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run nattrace on the engine's host; `url` is another way to the engine."""
        environment = self.environment | ({} if url is None else {"DOCKER_HOST": url})
        return subprocess.run(
            self.command(*words), env=environment, capture_output=True, text=True, timeout=90, check=False
        )

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.host.name}", *self.server],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.docker("version")
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise EngineError((self.folder / "log").read_text()[-500:])
            time.sleep(0.2)

    def stop(self) -> None:
        """End the engine, gently first."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        # Docker leaves the namespace of --network host mounted, Podman its containers' files.
        for mount in (*(self.folder / "exec/netns").glob("*"), self.folder / "data/overlay"):
            subprocess.run(["umount", mount], capture_output=True, timeout=30, check=False)

    def import_image(self, name: str, files: dict[str, bytes], links: dict[str, str]) -> None:
        """Make an image out of files (mode 755) and symbolic links."""
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(content), 0o755
                archive.addfile(info, io.BytesIO(content))
            for path, target in links.items():
                info = tarfile.TarInfo(path)
                info.type, info.linkname = tarfile.SYMTYPE, target
                archive.addfile(info)
        subprocess.run(
            ["docker", "import", "-", name],
            input=made.getvalue(),
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def left(self) -> dict[str, str]:
        """Return what lies around in the engine besides images: containers and volumes."""
        return {"containers": self.docker("ps -aq"), "volumes": self.docker("volume ls -q")}


def dockerd(folder: Path) -> tuple[str, ...]:
    """Return the command that serves Docker from a folder."""
    return (
        *("dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "-p", f"{folder}/pid"),
        *("-H", f"unix://{folder}/sock"),
        *("-H", "tcp://127.0.0.1:2375"),  # inside the namespace: as if on another machine
        *("--experimental", "--ip6tables"),  # IPv6 is translated as IPv4 is
    )


def without_proxy(folder: Path) -> tuple[str, ...]:
    """Return the command that serves Docker without docker-proxy: the kernel alone publishes ports, by hairpins too."""
    return (*dockerd(folder), "--userland-proxy=false")


#: runc, because crun refuses a machine with both kinds of cgroups; limits, because raising them takes a right.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
[engine]
runtime = "runc"
events_logger = "file"
"""


def podman(folder: Path) -> tuple[str, ...]:
    """Return the command that serves Podman from a folder."""
    (folder / "networks").mkdir()
    (folder / "containers.conf").write_text(_CONTAINERS_CONF.format(folder=folder))
    return (
        *("env", f"CONTAINERS_CONF={folder}/containers.conf", "podman", "--cgroup-manager=cgroupfs"),
        *("--root", f"{folder}/data", "--runroot", f"{folder}/run", "--tmpdir", f"{folder}/tmp"),
        *("system", "service", "--time=0", f"unix://{folder}/sock"),
    )


@contextmanager
def engine(server: Callable[[Path], tuple[str, ...]]) -> Iterator[Engine]:
    """Start an engine with one image, and take everything down again."""
    tag = f"nt-{os.getpid()}-{server.__name__}"
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="nt-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in (tag, f"{tag}-net"):
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, timeout=30)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, timeout=30)
        made = Engine(Namespace(tag), Namespace(f"{tag}-net"), folder, server(folder))
        for host in (made.host, made.internet):
            host.up("lo")
        with made.host.netlink() as ip:
            ip.link(
                "add", ifname="eth0", kind="veth", peer={"ifname": "eth0", "net_ns_fd": made.internet.name}
            )
        for host, addresses in ((made.host, (UPLINK,)), (made.internet, (GATEWAY, *SERVERS))):
            host.run("ethtool -K eth0 tso off gso off gro off")
            host.up("eth0")
            for address in addresses:
                host.address("eth0", address, 32 if address in SERVERS else 24)
        made.host.route("default", GATEWAY)
        made.host.sysctl("ipv6.conf.all.forwarding", 1)
        made.host.address("eth0", UPLINK_V6, 64)
        made.internet.address("eth0", GATEWAY_V6, 64)
        for address in SERVERS_V6:
            made.internet.address("eth0", address, 128)
        made.host.route("default", GATEWAY_V6)
        made.start()
        stack.callback(made.stop)
        busybox = Path(str(shutil.which("busybox"))).read_bytes()
        made.import_image("busybox", {"bin/busybox": busybox}, {f"bin/{name}": "busybox" for name in APPLETS})
        yield made
        for container in made.docker("ps -aq").split():
            made.docker(f"rm -f {container}")
