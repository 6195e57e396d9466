"""conntrack's own output becomes entries: both tuples, ICMP ids, lives and deaths."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.truth import Addressing, Entry, Truth, parse_conntrack, translations

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RECORDED = sorted((FIXTURES / "lab").iterdir())


def test_reads_the_list_of_a_docker_host() -> None:
    entries = parse_conntrack((FIXTURES / "docker-ping" / "conntrack.txt").read_text())

    assert [(entry.original.src, entry.original.id, entry.reply.id) for entry in entries] == [
        ("172.17.0.2", 7, 7),
        ("172.17.0.3", 8, 8),
        ("172.17.0.5", 1, 50024),
        ("172.17.0.4", 1, 1),
    ]
    assert all(entry.translated and entry.protocol == "icmp" for entry in entries)
    assert {entry.reply.dst for entry in entries} == {"203.0.113.10"}


def test_events_of_one_entry_are_one_entry_with_its_life() -> None:
    tuples = (
        "src=172.17.0.2 dst=198.51.100.1 sport=40000 dport=53 "
        "src=198.51.100.1 dst=203.0.113.10 sport=53 dport=11777"
    )
    text = (
        f"[1795459616.888470]\t    [NEW] ipv4     2 udp      17 30 {tuples} id=749128716\n"
        f"[1795459616.9]\t [UPDATE] ipv4     2 udp      17 30 {tuples} [ASSURED] id=749128716\n"
        f"[1795459617.000001]\t[DESTROY] ipv4     2 udp      17 {tuples} [ASSURED] id=749128716\n"
    )

    assert parse_conntrack(text) == [
        Entry(
            "udp",
            Addressing("172.17.0.2", "198.51.100.1", 40000, 53),
            Addressing("198.51.100.1", "203.0.113.10", 53, 11777),
            1795459616_888470000,
            1795459617_000001000,
        )
    ]


def test_conntracks_own_id_is_not_the_icmp_id() -> None:
    text = (
        "ipv4     2 icmp     1 29 src=172.17.0.2 dst=198.51.100.1 type=8 code=0 id=1 "
        "src=198.51.100.1 dst=203.0.113.10 type=0 code=0 id=50024 mark=0 use=1 id=3184976553\n"
    )

    (entry,) = parse_conntrack(text)

    assert (entry.original.id, entry.reply.id) == (1, 50024)


def test_an_entry_whose_reply_mirrors_it_is_not_translated() -> None:
    text = (
        "ipv6     10 icmpv6   58 29 src=fd00:17:0:0:0:0:0:2 dst=2001:db8:2::1 type=128 code=0 id=1 "
        "src=2001:db8:2::1 dst=fd00:17::2 type=129 code=0 id=1 mark=0 use=1\n"
    )

    (entry,) = parse_conntrack(text)

    assert not entry.translated
    assert translations([entry]) == set()


def test_only_a_change_of_both_ends_has_a_half() -> None:
    outside, host, container = "198.51.100.1", "203.0.113.10", "172.17.0.2"
    both = Entry(
        "tcp", Addressing(outside, host, 50000, 8080), Addressing(container, "172.17.0.1", 80, 20001)
    )
    one = Entry("tcp", Addressing(outside, host, 50000, 8080), Addressing(container, outside, 80, 50000))

    assert both.halves == (Addressing(outside, container, 50000, 80),)
    assert one.halves == ()


def test_a_line_with_one_tuple_is_an_error_not_an_entry() -> None:
    with pytest.raises(ValueError, match="not two tuples"):
        parse_conntrack("ipv4     2 udp      17 30 src=172.17.0.2 dst=198.51.100.1 sport=1 dport=2\n")


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_truth_is_what_conntrack_printed(folder: Path) -> None:
    truth = Truth.load(folder / "truth.json")

    for hop in truth.hops:
        if not hop.conntrack:  # a stateless box, of which the kernel keeps no entries
            assert not any(
                entry.translated for entry in parse_conntrack((folder / "conntrack.txt").read_text())
            )
            continue
        assert list(hop.entries) == parse_conntrack((folder / hop.conntrack).read_text())
