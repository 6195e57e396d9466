"""``nattrace bundle``: files captured by hand become a bundle that is analysed like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nattrace
from nattrace.bundle.manifest import Counters
from nattrace.bundle.writing import assemble
from nattrace.cli import main
from nattrace.errors import InputError, UsageError
from nattrace.report.json import report_dict

SAMPLES = Path(nattrace.__file__).parent / "samples"
LOG = """tcpdump: listening on {}, link-type EN10MB (Ethernet), snapshot length 65535 bytes
40 packets captured
40 packets received by filter
{} packets dropped by kernel
"""


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    folder = tmp_path / "hand"
    (folder / "context" / "before").mkdir(parents=True)
    for point, drops in (("docker0", 0), ("eth0", 7)):
        (folder / f"{point}.pcap").write_bytes((SAMPLES / f"{point}.pcap").read_bytes())
        (folder / f"{point}.log").write_text(LOG.format(point, drops))
    (folder / "context" / "before" / "iptables-save.txt").write_text("*nat\nCOMMIT\n")
    (folder / "context" / "links.json").write_text("[]")
    return folder


def test_a_folder_of_captures_messages_and_context_becomes_a_bundle(by_hand: Path, tmp_path: Path) -> None:
    manifest = assemble([str(by_hand)], tmp_path / "b")
    assert [(p.name, p.files, p.interface, p.counters) for p in manifest.points] == [
        ("docker0", ("docker0.pcap",), "docker0", Counters(40, 40, 0, None)),
        ("eth0", ("eth0.pcap",), "eth0", Counters(40, 40, 7, None)),
    ]
    assert dict(manifest.context) == {
        "before/iptables-save": "context/before/iptables-save.txt",
        "links": "context/links.json",
    }
    assert (tmp_path / "b/context/before/iptables-save.txt").read_text() == "*nat\nCOMMIT\n"
    assert (tmp_path / "b/eth0.pcap").read_bytes() == (SAMPLES / "eth0.pcap").read_bytes()


def test_the_bundle_gives_the_report_of_its_captures(by_hand: Path, tmp_path: Path) -> None:
    assemble([str(by_hand)], tmp_path / "b")
    plain = report_dict(nattrace.analyze(str(SAMPLES / "docker0.pcap"), str(SAMPLES / "eth0.pcap")))
    found = report_dict(nattrace.analyze(str(tmp_path / "b")))
    assert [p["dropped_by_kernel"] for p in found["points"]] == [0, 7]
    assert [p["interface"] for p in found["points"]] == ["docker0", "eth0"]
    assert [f["translations"] for f in found["flows"]] == [f["translations"] for f in plain["flows"]]


def test_a_name_and_rotated_files(tmp_path: Path) -> None:
    eth0 = str(SAMPLES / "eth0.pcap")
    manifest = assemble([f"out={eth0}", f"out={eth0}", f"in={SAMPLES / 'docker0.pcap'}"], tmp_path / "b")
    assert [(p.name, p.files) for p in manifest.points] == [
        ("in", ("docker0.pcap",)),
        ("out", ("eth0.pcap", "eth0-2.pcap")),
    ]


def test_a_message_file_of_another_name_is_found_by_its_interface(tmp_path: Path) -> None:
    log = tmp_path / "err.txt"
    log.write_text(LOG.format("eth0", 3))
    (point,) = assemble([str(SAMPLES / "eth0.pcap"), str(log)], tmp_path / "b").points
    assert point.counters == Counters(40, 40, 3, None)


def test_what_belongs_to_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x7fELF")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "f").touch()
    capture = str(SAMPLES / "eth0.pcap")
    for files, folder, message in [
        ([str(tmp_path / "x.bin")], "b", "no capture, no tcpdump messages"),
        ([capture, capture], "b", "a second point called eth0"),
        ([capture], "used", "not empty"),
        ([capture], "x.bin", "no folder for a bundle"),
        ([capture], "a\0b", "no folder for a bundle"),
    ]:
        with pytest.raises(UsageError, match=message):
            assemble(files, tmp_path / folder)
    (tmp_path / "links.json").write_text("[]")
    with pytest.raises(InputError, match="no capture among"):
        assemble([str(tmp_path / "links.json")], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command(by_hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", str(by_hand), "-w", str(tmp_path / "b")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"nattrace: bundle {tmp_path / 'b'}: docker0, eth0\n"
    assert json.loads((tmp_path / "b/manifest.json").read_text())["schema"] == "nattrace/bundle/1"
    assert main(["bundle", "missing.pcap", "-w", str(tmp_path / "c")]) == 2
