"""Ways to an engine: through ssh, with a real sshd, and by TCP with certificates that openssl makes on the spot."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab.topology import GATEWAY

from capture.evidence import captured, capturing, manifest_of, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capture.engine import Engine

SSHD = "/usr/sbin/sshd"

SERVER = """
ListenAddress 127.0.0.1
HostKey {0}/host
AuthorizedKeysFile {0}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
"""
#: ssh reads its configuration from the home that the system knows, so the test's own comes with the command.
CLIENT = """
IdentityFile {0}/user
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {0}/known
GlobalKnownHostsFile none
StrictHostKeyChecking yes
"""


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=30)


@dataclass(slots=True)
class Ssh:
    """sshd on the engine's host, and an ssh command that knows it."""

    engine: Engine
    folder: Path

    @property
    def url(self) -> str:
        return f"ssh://root@127.0.0.1:2222{self.engine.folder}/sock"

    def nattrace(self, *words: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        environment = self.engine.environment | {"DOCKER_HOST": url or self.url, "PATH": path}
        return subprocess.run(
            self.engine.command(*words),
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )


@pytest.fixture(scope="module")
def ssh(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    if shutil.which("ssh") is None or not Path(SSHD).exists():
        pytest.skip("needs openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        make_key(folder / name)
    (folder / "server").write_text(SERVER.format(folder))
    (folder / "client").write_text(CLIENT.format(folder))
    (folder / "known").write_text(f"[127.0.0.1]:2222 {(folder / 'host.pub').read_text()}")
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    # sshd wants this folder, which its service makes where it is started.
    made = not Path("/run/sshd").exists()
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        command = engine.host.command(SSHD, "-D", "-e", "-p", "2222", "-f", f"{folder}/server")
        server = subprocess.Popen(command, stderr=log)
    try:
        wait_for(lambda: "listening" in (folder / "log").read_text() or server.poll() is not None)
        yield Ssh(engine, folder)
    finally:
        server.terminate()
        server.wait()
        if made:
            Path("/run/sshd").rmdir()


def test_a_capture_through_ssh(ssh: Ssh, tmp_path: Path) -> None:
    before = set(Path("/tmp").glob("nattrace-ssh-*"))
    done = ssh.nattrace(
        *("capture", "-i", "eth0", "--filter", "icmp", "-w", f"{tmp_path}/b", "--"),
        *("ping", "-q", "-c", "3", "-i", "0.1", GATEWAY),
    )
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"eth0": 6}
    manifest = manifest_of(tmp_path / "b")
    assert manifest.missing == ()
    # the machine is another one, whatever it is: the context came out of a helper
    assert "during/conntrack-events" in manifest.context
    left = set(Path("/tmp").glob("nattrace-ssh-*")) - before
    assert {folder.name: sorted(path.name for path in folder.iterdir()) for folder in left} == {}


def test_ctrl_c_leaves_the_connection_until_all_is_collected(
    ssh: Ssh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ssh.folder}/bin:{os.environ['PATH']}")
    with capturing(ssh.engine, tmp_path, "-i", "eth0", "--filter", "icmp", url=ssh.url) as process:
        subprocess.run(ssh.engine.host.command("ping", "-q", "-c", "1", GATEWAY), check=True, timeout=30)
        (master,) = [
            int(number)
            for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if b"shared" in Path(f"/proc/{number}/cmdline").read_bytes()
        ]
        os.kill(master, 2)  # as the terminal does to all of its group
    assert captured(tmp_path / "b") == {"eth0": 2}
    with contextlib.suppress(ProcessLookupError):
        os.kill(master, 0)
        raise AssertionError("ssh still runs")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ssh://root@127.0.0.1:2223",
            "ssh://root@127.0.0.1:2223: ssh: connect to host 127.0.0.1 port 2223: Con",
        ),
        (
            "ssh://root@127.0.0.1:2222/run/nosuch",
            "no Docker engine there; start it, or give its socket as ssh://",
        ),
        ("ssh://nosuch@127.0.0.1:2222", "nosuch@127.0.0.1: Permission denied (publickey)."),
        ("ssh://root@[::1:2222", "give ssh://USER@HOST"),
        ("ssh://-oProxyCommand=touch@/x", "ssh://-oProxyCommand=touch@/x: no such address"),
        ("ssh://127.0.0.1:2222/$(id)", "no such address; give ssh://USER@HOST"),
        ("ssh://root:hunter2@127.0.0.1:2222", "leave the password out; ssh asks for it, or takes a key"),
    ],
)
def test_what_keeps_ssh_from_the_engine_is_one_line(ssh: Ssh, tmp_path: Path, url: str, message: str) -> None:
    done = ssh.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/b", "--", "true", url=url)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hunter2" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_host_key_is_refused(ssh: Ssh, tmp_path: Path) -> None:
    known = (ssh.folder / "known").read_text()
    (ssh.folder / "known").write_text(f"[127.0.0.1]:2222 {(ssh.folder / 'user.pub').read_text()}")
    try:
        done = ssh.nattrace("capture", "-i", "eth0", "-w", f"{tmp_path}/b", "--", "true")
    finally:
        (ssh.folder / "known").write_text(known)
    assert (done.returncode, done.stderr) == (2, f"nattrace: {ssh.url}: Host key verification failed.\n")


def test_without_an_ssh_command(ssh: Ssh, tmp_path: Path) -> None:
    (tmp_path / "ip").symlink_to(str(shutil.which("ip")))
    environment = ssh.engine.environment | {"DOCKER_HOST": ssh.url, "PATH": str(tmp_path)}
    command = ssh.engine.command("capture", "-i", "eth0", "-w", f"{tmp_path}/b", "--", "true")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"nattrace: {ssh.url}: no ssh command on this machine; install an OpenSSH client\n"


# --- TLS -------------------------------------------------------------------------------------------------


def certify(folder: Path, name: str, signer: str | None, *extensions: str) -> None:
    """Make ``NAME-key.pem`` and ``NAME.pem``, signed by `signer` or by itself."""
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}-key.pem", "-out", f"{name}.pem"]
    words += [word for extension in extensions for word in ("-addext", extension)]
    if signer is not None:
        words += ["-CA", f"{signer}.pem", "-CAkey", f"{signer}-key.pem"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=30)


@pytest.fixture
def certificates(engine: Engine, tmp_path: Path) -> Iterator[Path]:
    """Certificates, and the engine with a TCP port that wants them."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certify(tmp_path, "ca", None)
    certify(tmp_path, "server", "ca", "subjectAltName=IP:127.0.0.1", "basicConstraints=CA:FALSE")
    certify(tmp_path, "cert", "ca", "extendedKeyUsage=clientAuth", "basicConstraints=CA:FALSE")
    (tmp_path / "cert-key.pem").rename(tmp_path / "key.pem")
    files = [f"--tlscacert={tmp_path}/ca.pem", f"--tlscert={tmp_path}/server.pem"]
    server = engine.server
    engine.stop()
    engine.server = (*server, "--tlsverify", *files, f"--tlskey={tmp_path}/server-key.pem")
    try:
        engine.start()
        yield tmp_path
    finally:
        engine.stop()
        engine.server = server
        engine.start()


def test_an_engine_that_wants_certificates(engine: Engine, certificates: Path, tmp_path: Path) -> None:
    def nattrace(folder: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = engine.environment | {"DOCKER_HOST": "tcp://127.0.0.1:2375"} | more
        # requests, which docker-py asks with, believes these more than the certificates of the engine.
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            environment.pop(name, None)
        words = ("capture", "-i", "eth0", "--filter", "icmp", "-w", f"{tmp_path}/{folder}", "--")
        command = engine.command(*words, "ping", "-q", "-c", "1", GATEWAY)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=90, check=False
        )

    verified = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(certificates)}
    done = nattrace("b", **verified)
    assert done.returncode == 0, done.stderr
    assert captured(tmp_path / "b") == {"eth0": 2}
    assert manifest_of(tmp_path / "b").missing == ()
    # without certificates, with none there, and with those of somebody else
    (certificates / "other").mkdir()
    for name in ("ca", "cert"):
        certify(certificates / "other", name, None)
    (certificates / "other/cert-key.pem").rename(certificates / "other/key.pem")
    for more, message in (
        ({}, "tcp://127.0.0.1:2375: "),
        (verified | {"DOCKER_CERT_PATH": f"{certificates}/nosuch"}, "certificate"),
        (verified | {"DOCKER_CERT_PATH": f"{certificates}/other"}, "CERTIFICATE_VERIFY_FAILED"),
    ):
        done = nattrace("none", **more)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
