from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nattrace.report.instants import iso_utc


def test_an_instant_reads_as_tshark_shows_it() -> None:
    # frame.time_utc of the first packet of samples/docker0.pcap: Nov 23, 2026 16:25:55.280642000 UTC
    assert iso_utc(1_795_451_155_280_642_000) == "2026-11-23T16:25:55.280642000Z"


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (-1, "1969-12-31T23:59:59.999999999Z"),
        (2**63 - 1, "2262-04-11T23:47:16.854775807Z"),
        (-(2**63), "1677-09-21T00:12:43.145224192Z"),
    ],
)
def test_the_ends_of_int64(time_ns: int, text: str) -> None:
    # The texts are those of numpy's datetime64[ns].
    assert iso_utc(time_ns) == text


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_agrees_with_numpy(time_ns: int) -> None:
    numpy = pytest.importorskip("numpy")
    assert iso_utc(time_ns) == f"{numpy.datetime64(time_ns, 'ns')}Z"


def test_the_time_zone_of_the_reader_does_not_matter() -> None:
    code = "from nattrace.report.instants import iso_utc; print(iso_utc(1795451155280642000))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TZ": zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for zone in ("UTC", "Asia/Kathmandu", "America/St_Johns")
    }
    assert texts == {"2026-11-23T16:25:55.280642000Z\n"}
