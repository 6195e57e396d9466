"""The README under test: its blocks, its output, its commands, its library example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nattrace.cli import main

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SAMPLES = ROOT / "nattrace" / "samples"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_it_opens_with_two_one_line_blocks() -> None:
    before, *_ = README.split("\nThe first line installs", 1)
    lines = [line for line in before.splitlines() if line]
    assert lines[0].startswith("# nattrace")
    assert [line for line in lines if line.startswith("```")] == ["```sh", "```", "```sh", "```"]
    main_job, tests = blocks("sh")
    assert main_job.count("\n") == tests.count("\n") == 1
    assert main_job.endswith("nattrace demo\n")
    assert "pytest" in tests


def test_the_report_shown_is_what_analyze_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(block for block in blocks("") if block.startswith("$ nattrace analyze"))
    command, expected = shown.split("\n", 1)
    names = command.removeprefix("$ nattrace analyze ").split()
    assert main(["analyze", *(str(SAMPLES / name) for name in names)]) == 0
    assert capsys.readouterr().out == expected


def test_every_command_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^    ([a-z][a-z-]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) >= 4
    for command in listed:
        assert f"`nattrace {command}" in README


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docker0.pcap", "eth0.pcap"):
        (tmp_path / name).write_bytes((SAMPLES / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    printed: list[tuple[object, ...]] = []
    exec(compile(example, "README.md", "exec"), {"print": lambda *words: printed.append(words)})
    assert sum(len(words) == 5 and words[1] == "snat" for words in printed) == 4
    assert [words[0] for words in printed if len(words) == 4] == list(range(1, 41))
    assert (tmp_path / "incident.json").is_file()
