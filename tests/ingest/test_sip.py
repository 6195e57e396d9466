"""A SIP message keeps its name when a helper writes other addresses into it, and shares it with no other message."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nattrace.ingest.sip import OTHER, may_be_sip, message_names
from nattrace.ingest.source import PADDING
from nattrace.table import ALL_BYTES, KIND, NAMED

INVITE = (
    b"INVITE sip:bob@203.0.113.10:5060 SIP/2.0\r\n"
    b"Via: SIP/2.0/UDP 172.17.0.2;rport=5060;branch=z9hG4bKnashds8;received=172.17.0.2\r\n"
    b"Max-Forwards: 70\r\n"
    b"To: Bob <sip:bob@biloxi.example>\r\n"
    b"From: Alice <sip:alice@172.17.0.2>;tag=1928301774\r\n"
    b"Call-ID: a84b4c76e66710@172.17.0.2\r\n"
    b"CSeq: 314159 INVITE\r\n"
    b"Contact: <sip:alice@172.17.0.2:5060>\r\n"
    b"Content-Type: application/sdp\r\n"
    b"Content-Length: 58\r\n\r\n"
    b"v=0\r\no=- 1 1 IN IP4 172.17.0.2\r\nc=IN IP4 172.17.0.2\r\nm=audio 4000 RTP/AVP 0\r\n"
)
RINGING = re.sub(rb"^INVITE sip\S+ SIP/2.0", b"SIP/2.0 180 Ringing", INVITE)


def name(text: bytes, comparable: int = ALL_BYTES) -> tuple[int, int]:
    """Return the name of one message that lies between rubbish."""
    buffer = np.frombuffer(b"\xa5" * 7 + text + b"INVITE" + bytes(PADDING), np.uint8)
    assert may_be_sip(buffer, np.array([7]))[0] == (text[:4] in (b"INVI", b"SIP/", b"INFO", b"CANC"))
    names, known = message_names(buffer, np.array([7]), np.array([7 + len(text)]), comparable)
    return int(names[0]), int(known[0])


def helped(text: bytes, address: bytes = b"203.0.113.10", port: bytes = b"61234") -> bytes:
    """Return what nf_nat_sip makes of a message: addresses, ports, and the length of the body."""
    head, body = text.split(b"\r\n\r\n", 1)
    call = re.search(rb"Call-ID: [^\r]*", head)
    assert call is not None
    head = re.sub(rb"(?<=[ @])172\.17\.0\.2(?::\d+)?", address + b":" + port, head)
    head = re.sub(rb"received=172\.17\.0\.2", b"received=" + address, head)
    head = re.sub(rb"rport=\d+", b"rport=" + port, head)
    head = re.sub(rb"Call-ID: [^\r]*", call[0], head)
    body = body.replace(b"172.17.0.2", address).replace(b"audio 4000", b"audio 40102")
    return re.sub(rb"(?<=Content-Length: )\d+", b"%d" % len(body), head) + b"\r\n\r\n" + body


@pytest.mark.parametrize("message", [INVITE, RINGING])
@pytest.mark.parametrize("address", [b"203.0.113.10", b"1.1.1.1", b"[2001:db8::face]"])
@pytest.mark.parametrize("comparable", [ALL_BYTES, 1500, 300])
def test_a_helper_leaves_the_name(message: bytes, address: bytes, comparable: int) -> None:
    rewritten = helped(message, address)

    assert rewritten != message
    assert name(rewritten, comparable) == name(message, comparable)
    assert name(message, comparable)[1] == (KIND if comparable == 300 else NAMED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"INVITE", b"CANCEL"),
        (b"branch=z9hG4bKnashds8", b"branch=z9hG4bKnashds9"),
        (b"Call-ID: a84b4c76e66710", b"Call-ID: a84b4c76e66711"),
        (b"CSeq: 314159", b"CSeq: 314160"),
        (b"biloxi.example>", b"biloxi.example>;tag=8321234356"),
        (b"Via:", b"Via: SIP/2.0/UDP proxy.example;branch=z9hG4bK77\r\nVia:"),
    ],
)
@pytest.mark.parametrize("comparable", [ALL_BYTES, 1500])
def test_other_messages_have_other_names(old: bytes, new: bytes, comparable: int) -> None:
    assert old in INVITE
    assert name(INVITE.replace(old, new), comparable) != name(INVITE, comparable)


def test_of_a_whole_message_every_word_counts() -> None:
    other = INVITE.replace(b"RTP/AVP", b"RTP/SAVP")

    assert name(other) != name(INVITE)
    assert name(other, 1500) == name(INVITE, 1500)


def test_compact_header_names_are_the_same_headers() -> None:
    compact = INVITE.replace(b"Via:", b"v:").replace(b"To:", b"t:").replace(b"Call-ID:", b"i :")

    assert name(compact)[1] == NAMED
    assert name(compact, 1500) == name(INVITE, 1500)


def test_a_message_cut_before_its_names_is_known_by_its_kind() -> None:
    start = INVITE[: INVITE.index(b"CSeq") + 8]

    assert name(start, 1500)[1] == KIND
    assert name(start, 1500) == name(INVITE, 300) == name(INVITE[:20], 300)
    assert name(INVITE, 300) != name(RINGING, 300)


@pytest.mark.parametrize(
    "text", [b"INFO worker 7 started\r\n", b"SIP/3.0 200 OK\r\n", b"INVITE 172.17.0.2 SIP/2.0\r\n"]
)
def test_what_only_begins_alike_is_no_message(text: bytes) -> None:
    assert name(text) == (0, OTHER)
    assert name(text[:12]) == (0, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"v:;branch=" + b"a" * 60_000,
        b"v:" + b";branch=a" * 6_000,
        b"v:" + b" ; " * 20_000,
        b"v:;branch" + b" " * 60_000,
        b"\nv:;branch=" * 5_500,
        b"t" + b" " * 60_000,
        b"i:" + b" " * 60_000,
    ],
    ids=range(7),
)
def test_no_message_takes_long(line: bytes) -> None:
    start = time.process_time()
    assert name(b"INVITE sip:x SIP/2.0\r\n" + line)[1] == KIND
    assert name(INVITE.replace(b"To:", line + b"\r\nTo:"))[1] == NAMED
    assert time.process_time() - start < 1


@given(st.binary(max_size=200), st.sampled_from([b"INVITE sip:", b"SIP/2.0 200", b"BYE tel:", b""]))
def test_nothing_that_follows_a_start_is_an_error(rest: bytes, start: bytes) -> None:
    text = start + rest
    buffer = np.frombuffer(text + bytes(PADDING), np.uint8)
    for comparable in (ALL_BYTES, 1500, 100):
        names, known = message_names(buffer, np.array([0]), np.array([len(text)]), comparable)
        assert known[0] in (0, OTHER, KIND, NAMED)
        assert (names[0] != 0) == (known[0] in (KIND, NAMED))
