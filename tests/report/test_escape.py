from __future__ import annotations

import csv
import io
import json
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nattrace.report.escape import csv_cell, json_string, terminal, well_formed

any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates too: file names have them


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("eth0", "eth0"),
        ("caf\u00e9 \u4f8b", "caf\u00e9 \u4f8b"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\x0ab\x0d\x09c"),
        ("\x7f\x9b31m", r"\x7f\x9b31m"),  # DEL, and CSI as one C1 character
        ("gpj.\u202eexe", r"gpj.\u202eexe"),  # right-to-left override
        ("a\u2066b\u2069", r"a\u2066b\u2069"),
        ("one\u2028two", r"one\u2028two"),
        ("\U000e0041", r"\U000e0041"),  # a tag character: invisible
        (os.fsdecode(b"\xff.pcap"), r"\xff.pcap"),
    ],
)
def test_terminal_text_shows_what_would_act(text: str, shown: str) -> None:
    assert terminal(text) == shown


@given(any_text)
def test_terminal_text_is_one_printable_line(text: str) -> None:
    shown = terminal(text)
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)
    assert not any(
        unicodedata.bidirectional(c) in {"RLO", "LRO", "RLE", "LRE", "PDF", "LRI", "RLI", "FSI", "PDI"}
        for c in shown
    )
    shown.encode()


@given(any_text)
def test_json_string_is_ascii_and_reads_back(text: str) -> None:
    written = json_string(text)
    assert written.isascii()
    assert json.loads(written) == well_formed(text)
    json.loads(written).encode()  # no lone surrogate is left for a strict reader to refuse


@given(any_text)
def test_csv_cell_is_never_a_formula(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([csv_cell(text), "next"])
    ((cell, following),) = csv.reader(io.StringIO(stream.getvalue()))
    assert following == "next"
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_csv_cell_keeps_what_is_harmless() -> None:
    assert csv_cell("docker0") == "docker0"
    assert csv_cell("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
