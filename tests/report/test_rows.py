from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nattrace.model import PacketRef, Rewrite, Sighting, Unmatched
from nattrace.report.rows import CSV_COLUMNS, rewrite_dict, row_json, write_csv, write_jsonl
from nattrace.report.rows_table import ROWS_PER_BLOCK, write_rows_table

names = st.text(st.characters(exclude_categories=()), min_size=1, max_size=8)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
numbers = st.none() | st.integers(0, 2**32 - 1)
sightings = st.builds(
    Sighting,
    point=names,
    frame=st.integers(1, 2**32),
    time=st.none() | st.integers(-(2**63), 2**63 - 1),
    protocol=st.sampled_from(["icmp", "icmpv6", "tcp", "udp", "sctp", "gre"]),
    src=addresses,
    dst=addresses,
    ttl=numbers,
    ip_id=numbers,
    flags=st.none() | st.sampled_from(["S", "S.", ".", "P.", "F.", "R"]),
    **dict.fromkeys(("sport", "dport", "type", "code", "id", "seq", "ack", "length"), numbers),
)
directions = st.sampled_from(["original", "reply"])
words = st.lists(st.sampled_from(["src", "dst", "sport", "id"]), unique=True).map(tuple)
rewrites = st.builds(
    Rewrite,
    st.integers(1, 2**40),
    directions,
    st.none() | st.sampled_from(["snat", "dnat", "snat+dnat"]),
    words,
    st.none() | st.integers(-(2**62), 2**62),
    sightings,
    sightings,
    words,
)
unmatched_rows = st.builds(
    Unmatched,
    st.none() | st.integers(1, 2**40),
    st.none() | directions,
    st.sampled_from(["lost", "ambiguous", "one-sided"]),
    sightings,
    st.lists(st.builds(PacketRef, names, st.integers(1, 99)), max_size=3).map(tuple),
)


def test_a_rewrite_is_written_as_the_contract_says(rewrite: Rewrite) -> None:
    stream = io.StringIO()
    write_jsonl([rewrite], stream)
    assert stream.getvalue() == (
        '{"flow": 4, "direction": "original", "nat": "snat", "changed": ["src", "id"], "latency_ns": 36000, '
        '"before": {"point": "docker0", "frame": 7, "time": "2026-11-23T16:25:55.690290000Z", '
        '"protocol": "icmp", "src": "172.17.0.5", "dst": "202.89.233.100", '
        '"type": 8, "code": 0, "id": 1, "seq": 0, "ttl": 64, "ip_id": 4701}, '
        '"after": {"point": "eth0", "frame": 7, "time": "2026-11-23T16:25:55.690326000Z", '
        '"protocol": "icmp", "src": "203.0.113.10", "dst": "202.89.233.100", '
        '"type": 8, "code": 0, "id": 50024, "seq": 0, "ttl": 63, "ip_id": 4701}, '
        '"evidence": ["icmp-seq", "payload", "ip-id"]}\n'
    )


@given(rewrites | unmatched_rows)
def test_the_fast_text_of_a_row_is_that_of_json_dumps(row: Rewrite | Unmatched) -> None:
    assert row_json(row) == json.dumps(rewrite_dict(row))


def test_a_packet_without_a_crossing_has_no_after_and_a_reason(unmatched: Unmatched) -> None:
    row = rewrite_dict(unmatched)
    assert row["nat"] is None
    assert row["after"] is None
    assert row["reason"] == "ambiguous"
    assert row["candidates"] == [{"point": "eth0", "frame": 8}, {"point": "eth0", "frame": 9}]
    assert row["before"] == {
        "point": "docker0",
        "frame": 9,
        "time": None,
        "protocol": "tcp",
        "src": "2001:db8::5",
        "dst": "2001:db8::1",
        "sport": 40000,
        "dport": 443,
        "seq": 7,
        "ack": 9,
        "flags": "P.",
        "length": 12,
        "ttl": 64,
        "ip_id": None,
    }


def test_a_tcp_row_has_its_fields_even_where_they_were_cut_off() -> None:
    cut = Sighting("eth0", 1, None, "tcp", "192.0.2.1", "192.0.2.2", 64, 1, 40000, 80)
    row = rewrite_dict(Unmatched(1, "original", "lost", cut))["before"]
    assert {name: row[name] for name in ("seq", "ack", "flags", "length")} == dict.fromkeys(
        ("seq", "ack", "flags", "length")
    )
    assert "id" not in row


def test_rows_are_written_as_they_come(rewrite: Rewrite) -> None:
    asked = 0

    def rows() -> object:
        nonlocal asked
        for asked in range(1, 10_001):  # noqa: B007 - counted for the reader of the first line
            yield rewrite

    class First(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    try:
        write_jsonl(rows(), First())  # type: ignore[arg-type]
    except BrokenPipeError:
        assert asked < 1000
    else:
        raise AssertionError


def test_csv_reads_back(rewrite: Rewrite, unmatched: Unmatched) -> None:
    stream = io.StringIO()
    write_csv([rewrite, unmatched], stream)
    first, second = csv.DictReader(io.StringIO(stream.getvalue()))
    assert tuple(first) == CSV_COLUMNS
    assert (first["before_src"], first["before_id"], first["after_src"], first["after_id"]) == (
        "172.17.0.5",
        "1",
        "203.0.113.10",
        "50024",
    )
    assert (first["changed"], first["latency_ns"], first["evidence"]) == (
        "src id",
        "36000",
        "icmp-seq payload ip-id",
    )
    assert first["before_time"] == "2026-11-23T16:25:55.690290000Z"
    assert (second["reason"], second["candidates"], second["after_src"]) == ("ambiguous", "eth0:8 eth0:9", "")
    assert (second["before_time"], second["flags"]) == ("", "P.")
    assert "\r" not in stream.getvalue()


def test_csv_names_cannot_be_formulas(rewrite: Rewrite) -> None:
    stream = io.StringIO()
    write_csv([replace(rewrite, before=replace(rewrite.before, point='=HYPERLINK("x")'))], stream)
    (row,) = csv.DictReader(io.StringIO(stream.getvalue()))
    assert row["before_point"] == '\'=HYPERLINK("x")'


def test_table_side_by_side_and_stacked(rewrite: Rewrite, unmatched: Unmatched) -> None:
    wide, narrow = io.StringIO(), io.StringIO()
    write_rows_table([rewrite, unmatched], wide)
    write_rows_table([rewrite, unmatched], narrow, width=80)
    header, rewritten, ambiguous = [line.split("  ") for line in wide.getvalue().splitlines()]
    assert [cell.strip() for cell in header if cell] == [
        "flow",
        "packet",
        "before",
        "after",
        "nat",
        "latency",
    ]
    assert [cell.strip() for cell in rewritten if cell] == [
        "4",
        "icmp echo request seq 0",
        "docker0:7 172.17.0.5 id 1 > 202.89.233.100",
        "eth0:7 203.0.113.10 id 50024 > 202.89.233.100",
        "snat src id",
        "36 us",
    ]
    assert [cell.strip() for cell in ambiguous if cell] == [
        "-",
        "tcp P. seq 7 length 12",
        "docker0:9 [2001:db8::5]:40000 > [2001:db8::1]:443",
        "ambiguous: eth0:8, eth0:9",
        "none",
    ]
    assert narrow.getvalue().splitlines() == [
        "4     icmp echo request seq 0, snat src id, 36 us",
        "      docker0:7 172.17.0.5 id 1 > 202.89.233.100",
        "   -> eth0:7 203.0.113.10 id 50024 > 202.89.233.100",
        "-     tcp P. seq 7 length 12, none",
        "      docker0:9 [2001:db8::5]:40000 > [2001:db8::1]:443",
        "   -> ambiguous: eth0:8, eth0:9",
    ]


def test_a_long_table_comes_in_blocks(rewrite: Rewrite) -> None:
    stream = io.StringIO()
    write_rows_table([rewrite] * (ROWS_PER_BLOCK + 1), stream)
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("flow ") for line in lines) == 2
    assert sum("id 50024" in line for line in lines) == ROWS_PER_BLOCK + 1


def test_no_row_is_said() -> None:
    stream = io.StringIO()
    write_rows_table([], stream)
    assert stream.getvalue() == "no row\n"


@given(st.lists(rewrites | unmatched_rows, max_size=4), st.sampled_from([None, 80, 120]))
def test_a_table_never_carries_control_characters(rows: list[Rewrite | Unmatched], width: int | None) -> None:
    stream = io.StringIO()
    write_rows_table(rows, stream, width=width)
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))
