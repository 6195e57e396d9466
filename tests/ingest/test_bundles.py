"""Bundles and archives as sources: every container gives the same points, and none leads anywhere else."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import nattrace
from nattrace.bundle.writing import assemble
from nattrace.cli import main
from nattrace.errors import InputError
from nattrace.ingest import ReadOptions, open_capture, parse_sources
from nattrace.ingest.archive import members_of
from nattrace.ingest.tar import is_tar
from nattrace.report.json import report_dict

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = Path(nattrace.__file__).parent / "samples"
POINTS = ("docker0", "eth0")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    assemble([str(SAMPLES / f"{point}.pcap") for point in POINTS], folder)
    return folder


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def pack_zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))


def tar(*words: str) -> Callable[[Path, Path], None]:
    def pack(folder: Path, target: Path) -> None:
        subprocess.run(["tar", *words, "-cf", target, "-C", folder.parent, folder.name], check=True)

    return pack


def tar_flat(folder: Path, target: Path) -> None:
    subprocess.run(["tar", "-czf", target, "-C", folder, "."], check=True)


PACKERS = {
    "zip": pack_zip,
    "tar": tar(),
    "tar.gz": tar("-z"),
    "tar.xz": tar("-J"),
    "pax": tar("--format=pax"),
    "v7-like ustar": tar("--format=ustar"),
    "flat": tar_flat,
}


def flows(*sources: str) -> Any:
    report = report_dict(nattrace.analyze(*sources))
    return [flow["translations"] for flow in report["flows"]], [point["name"] for point in report["points"]]


@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_reads_like_its_folder(kind: str, bundle: Path, tmp_path: Path) -> None:
    PACKERS[kind](bundle, tmp_path / "packed")
    before = sorted(tmp_path.rglob("*"))
    assert flows(str(tmp_path / "packed")) == flows(str(bundle))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


@pytest.mark.parametrize("kind", PACKERS)
def test_an_archive_without_manifest_gives_its_captures(kind: str, bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json").write_text('{"name": "of a browser extension"}')
    PACKERS[kind](bundle, tmp_path / "packed")
    assert flows(str(tmp_path / "packed"))[1] == [*POINTS]


def test_the_archives_name_stands_before_its_members(bundle: Path, tmp_path: Path) -> None:
    tar("-z")(bundle, tmp_path / "b.tar.gz")
    points = nattrace.analyze(str(tmp_path / "b.tar.gz")).points
    assert [point.file for point in points] == [f"{tmp_path}/b.tar.gz/bundle/{p}.pcap" for p in POINTS]


def test_two_bundles_with_points_of_one_name(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "other")
    assert flows(str(bundle), str(tmp_path / "other"))[1] == [
        "bundle/docker0",
        "bundle/eth0",
        "other/docker0",
        "other/eth0",
    ]


def test_a_name_goes_before_the_points_of_a_bundle(bundle: Path) -> None:
    assert flows(f"host1={bundle}")[1] == ["host1:docker0", "host1:eth0"]


def test_names_and_counters_come_from_the_manifest(bundle: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["points"][1] |= {
            "name": "uplink",
            "interface": "enp3s0",
            "counters": {"dropped_by_kernel": 9},
        }

    rewrite_manifest(bundle, change)
    points = nattrace.analyze(str(bundle)).points
    assert [(p.name, p.interface, p.dropped_by_kernel) for p in points] == [
        ("docker0", None, None),
        ("uplink", "enp3s0", 9),
    ]


def test_rotated_files_in_an_archive_are_one_point(bundle: Path, tmp_path: Path) -> None:
    whole = (bundle / "eth0.pcap").read_bytes()
    cut = 24 + sum(16 + struct.unpack_from("<I", whole, 24 + 8)[0] for _ in range(1))
    (bundle / "eth0.pcap").write_bytes(whole[:cut])
    (bundle / "eth0.pcap1").write_bytes(whole[:24] + whole[cut:])
    rewrite_manifest(bundle, lambda d: d["points"][1].update(files=["eth0.pcap1", "eth0.pcap"]))
    tar("-z")(bundle, tmp_path / "b.tgz")
    for source in (bundle, tmp_path / "b.tgz"):
        point = nattrace.analyze(str(source)).points[1]
        assert (point.name, point.packets, point.truncated) == ("eth0", 40, False)


@pytest.mark.parametrize(
    "name", ["../secret.pcap", "/etc/passwd", "link.pcap", "up/secret.pcap", "a\0b", "x" * 5000, "."]
)
def test_a_manifest_never_leads_out_of_the_bundle(name: str, bundle: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.pcap"
    secret.write_bytes((SAMPLES / "eth0.pcap").read_bytes())
    (bundle / "link.pcap").symlink_to(secret)
    (bundle / "up").symlink_to(tmp_path)
    rewrite_manifest(bundle, lambda d: d["points"][1].update(files=[name[:4000]]))
    report = nattrace.analyze(str(bundle))
    assert [point.name for point in report.points] == ["docker0"]
    (finding,) = [f for f in report.findings if f.code == "incomplete-bundle"]
    assert "point eth0: " in finding.message


def test_what_a_bundle_lacks_is_a_finding(bundle: Path) -> None:
    (bundle / "eth0.pcap").unlink()
    rewrite_manifest(bundle, lambda d: d["points"][0].update(problem="tcpdump was killed by signal 9"))
    rewrite_manifest(bundle, lambda d: d["points"].append({"name": "br0", "files": []}))
    messages = [f.message for f in nattrace.analyze(str(bundle)).findings if f.code == "incomplete-bundle"]
    assert messages == [
        f"{bundle}: point br0: nothing was captured",
        f"{bundle}: point docker0: tcpdump was killed by signal 9",
        f"{bundle}: point eth0: eth0.pcap is not in the bundle",
    ]
    (bundle / "docker0.pcap").unlink()
    with pytest.raises(InputError, match="none of the manifest's 3 points has a capture"):
        nattrace.analyze(str(bundle))


def test_a_wrong_manifest_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_manifest(bundle, lambda d: d.update(points=3))
    assert main(["analyze", str(bundle)]) == 2
    assert capsys.readouterr().err.startswith(f"nattrace: {bundle}/manifest.json: points: not a list")


def test_a_cut_archive_gives_what_is_there(bundle: Path, tmp_path: Path) -> None:
    tar()(bundle, tmp_path / "b.tar")
    whole = (tmp_path / "b.tar").read_bytes()
    members = {member.name: member for member in members_of(tmp_path / "b.tar")}
    last = max((m for m in members.values() if m.name.endswith("pcap")), key=lambda m: m.offset or 0)
    assert last.offset is not None
    (tmp_path / "cut.tar").write_bytes(whole[: last.offset + 1000])
    if members["bundle/manifest.json"].offset > last.offset:  # type: ignore[operator]
        (bundle / "manifest.json").unlink()
    points = nattrace.analyze(str(tmp_path / "cut.tar")).points
    assert [point.truncated for point in points] == [point.file.endswith(last.name) for point in points]


def test_every_cut_of_every_archive_is_read_or_refused(bundle: Path, tmp_path: Path) -> None:
    for kind in ("zip", "tar", "tar.gz"):
        PACKERS[kind](bundle, tmp_path / "packed")
        whole = (tmp_path / "packed").read_bytes()
        for size in [*range(0, min(len(whole), 1200), 97), *range(1200, len(whole), len(whole) // 12)]:
            for content in (whole[:size], whole[:size] + b"\xff" * 8 + whole[size + 8 :]):
                (tmp_path / "f").write_bytes(content)
                with contextlib.suppress(nattrace.NattraceError):
                    assert nattrace.analyze(str(tmp_path / "f")).points


# --- hostile containers ----------------------------------------------------------------------------------


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    made = bytearray(512)
    made[:100] = name.ljust(100, b"\0")
    made[124:136] = size.ljust(12, b"\0")
    made[148:156] = b" " * 8
    made[156:157] = kind
    made[257:265] = b"ustar\x0000"
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


CAPTURE = (SAMPLES / "eth0.pcap").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"a.pcap", b"\xff" + b"\xff" * 11), "impossible size"),
        (header(b"a.pcap", b"9x"), "impossible size"),
        (header(b"a", b"77777777777", b"x"), "a name of 8589934591 bytes"),
        (header(b"a", b"77777777777", b"L"), "a name of 8589934591 bytes"),
        (header(b"a.pcap", b"0") + b"\1" * 512, "byte 512: damaged tar header"),
        (header(b"d/", b"0", b"5") + bytes(1024), "an archive without files"),
        (header(b"link.pcap", b"0", b"2") + bytes(1024), "an archive without files"),
        (header(b"a.txt", b"3") + b"abc".ljust(512) + bytes(1024), "an archive without pcap"),
        (b"".join(header(b"%d" % n, b"0") for n in range(10_001)), "more than 10000 files"),
    ],
)
def test_a_tar_archive_that_lies_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    assert is_tar(content[:512])
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        parse_sources([str(tmp_path / "x.tar")])
    assert str(caught.value).startswith(f"{tmp_path}/x.tar")


def test_a_size_larger_than_the_archive_is_a_cut_capture(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(header(b"eth0.pcap", b"77777777777") + CAPTURE)
    (point,) = nattrace.analyze(str(tmp_path / "x.tar")).points
    assert (point.packets, point.truncated) == (40, True)


def test_gnu_and_pax_names(tmp_path: Path) -> None:
    name = "/".join(["deep"] * 60) + "/eth0.pcap"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
            info = tarfile.TarInfo(name)
            info.size = len(CAPTURE)
            archive.addfile(info, io.BytesIO(CAPTURE))
        assert [member.name for member in members_of(tmp_path / "x.tar")] == [name]
        assert nattrace.analyze(str(tmp_path / "x.tar")).points[0].packets == 40


def test_a_stream_that_grows_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nattrace.ingest import compressed  # noqa: PLC0415

    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    bomb = header(b"eth0.pcap", b"77777777777") + CAPTURE + bytes(64 << 20)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bomb))
    (point,) = nattrace.analyze(str(tmp_path / "x.tar.gz")).points
    assert point.truncated


def test_a_zip_member_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for method, message in ((zipfile.ZIP_BZIP2, "rare compression"), (zipfile.ZIP_LZMA, "rare compression")):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
            archive.writestr("eth0.pcap", CAPTURE)
        (member,) = members_of(tmp_path / "x.zip")
        with pytest.raises(InputError, match=message):
            member.open()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eth0.pcap", CAPTURE)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    directory = content.rfind(b"PK\x01\x02")
    struct.pack_into(
        "<L", content, directory + 24, 300 << 20
    )  # file size: 300 MiB out of a few hundred bytes
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match="grows more than 200 times"):
        members_of(tmp_path / "x.zip")[0].open()
    struct.pack_into("<L", content, content.rfind(b"PK\x05\x06") + 12, 5 << 20)  # the directory's size
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match="its directory has 5242880 bytes"):
        members_of(tmp_path / "x.zip")


def test_two_bundles_in_one_archive_are_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "w" / "one")
    shutil.copytree(bundle, tmp_path / "w" / "two")
    tar_flat(tmp_path / "w", tmp_path / "w.tgz")
    with pytest.raises(InputError, match="2 bundles in one archive"):
        parse_sources([str(tmp_path / "w.tgz")])


def test_a_pipe_is_not_used_up_by_looking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cp", SAMPLES / "eth0.pcap", tmp_path / "pipe"]):
        (source,) = parse_sources([str(tmp_path / "pipe")])
        capture = open_capture(source, ReadOptions())
        assert sum(len(batch.table) for batch in capture.batches(ReadOptions())) == 40


def test_the_demo_still_reads_its_folder() -> None:
    assert [source.files[0] for source in parse_sources([str(SAMPLES)])] == [
        SAMPLES / "docker0.pcap",
        SAMPLES / "eth0.pcap",
    ]
