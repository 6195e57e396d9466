from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nattrace.errors import UsageError
from nattrace.report import report_format, row_format, save_report, write_report, write_rows
from nattrace.report.output import whole_file

if TYPE_CHECKING:
    from nattrace.model import ReportData


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    with whole_file(target) as stream:
        stream.write("half")
        stream.flush()
        assert not target.exists()
        stream.write(" and half \u00e9\n")
    assert target.read_bytes() == b"half and half \xc3\xa9\n"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupt_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(error), whole_file(target) as stream:  # noqa: PT012 - the block is what is interrupted
        stream.write("new")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_the_old_file_or_of_the_umask(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.touch(mode=0o600)
    mask = os.umask(0o027)
    try:
        for name in ("old", "new"):
            with whole_file(tmp_path / name):
                pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole_file(tmp_path / "link") as stream:
        stream.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_written_not_replaced() -> None:
    with whole_file(os.devnull) as stream:
        stream.write("gone")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    with whole_file(tmp_path / ("n" * 255)) as stream:
        stream.write("x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "report.json"
    with pytest.raises(FileNotFoundError) as caught, whole_file(target):
        pass
    assert caught.value.filename == str(target)


def test_the_suffix_picks_the_format() -> None:
    assert report_format("a/b.JSON") == "json"
    assert report_format("notes.txt") == "table"
    assert row_format("rows.jsonl") == "jsonl"
    assert row_format("rows.csv") == "csv"


@pytest.mark.parametrize("name", ["report", "report.xml", "json", ".json"])
def test_an_unknown_suffix_names_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.txt \(table\), \.json \(json\)"):
        report_format(name)


def test_an_unknown_format_is_refused(docker_ping: ReportData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="table, json"):
        save_report(docker_ping, tmp_path / "x.json", "xml")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="table, jsonl, csv"), (tmp_path / "y").open("w") as stream:
        write_rows([], stream, "xml")  # type: ignore[arg-type]
    assert not (tmp_path / "x.json").exists()


def test_save_report_writes_what_write_report_writes(docker_ping: ReportData, tmp_path: Path) -> None:
    save_report(docker_ping, tmp_path / "report.json")
    with (tmp_path / "direct").open("w") as stream:
        write_report(docker_ping, stream, "json")
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "direct").read_bytes()
