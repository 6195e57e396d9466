"""SIP, SDP and RTP for the lab's telephones, as RFC 3261, RFC 4566 and RFC 3550 write them.

Each message has a token of its own in its last header, where no helper changes anything: it says which message is
which. This module writes and reads text; it knows nothing of what a helper would put in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lab.traffic import token

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Headers of a request that an answer to it repeats (RFC 3261 section 8.2.6.2).
_REPEATED = ("Via", "From", "To", "Call-ID", "CSeq")


@dataclass(slots=True)
class Dialog:
    """One side of a dialog: who asks whom, reachable at `contact`, which is HOST:PORT."""

    call: str
    contact: str
    caller: str
    callee: str
    transport: str = "UDP"
    _number: int = field(default=0)

    def request(self, method: str, uri: str, body: str = "") -> bytes:
        """Write the next request."""
        self._number += method != "ACK"
        return _message(
            f"{method} {uri} SIP/2.0",
            (
                f"Via: SIP/2.0/{self.transport} {self.contact};branch=z9hG4bK-{self.call}-{self._number}{method[0]};rport",
                "Max-Forwards: 70",
                f"From: <{self.caller}>;tag=from-{self.call}",
                f"To: <{self.callee}>",
                f"Call-ID: {self.call}",
                f"CSeq: {self._number} {method}",
                f"Contact: <sip:user@{self.contact}>",
            ),
            body,
        )


def response(asked: bytes, status: str, contact: str, body: str = "") -> bytes:
    """Write an answer to a request as it arrived: what it repeats is what the helper made of it."""
    lines = asked.decode().split("\r\n")
    repeated = [line for line in lines if line.split(":", 1)[0] in _REPEATED]
    repeated = [line + ";tag=to" if line.startswith("To:") else line for line in repeated]
    return _message(f"SIP/2.0 {status}", (*repeated, f"Contact: <sip:desk@{contact}>"), body)


def _message(first: str, headers: Iterable[str], body: str) -> bytes:
    kind = ["Content-Type: application/sdp"] if body else []
    lines = [first, *headers, *kind, f"Content-Length: {len(body)}", f"Subject: {token(16).decode()}"]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def offer(address: str, port: int) -> str:
    """Write an SDP body that offers one audio stream."""
    kind = "IP6" if ":" in address else "IP4"
    return (
        f"v=0\r\no=- 1 1 IN {kind} {address}\r\ns=call\r\nc=IN {kind} {address}\r\nt=0 0\r\n"
        f"m=audio {port} RTP/AVP 0\r\na=rtpmap:0 PCMU/8000\r\n"
    )


def media(message: bytes) -> tuple[str, int]:
    """Return address and port of the audio stream that a message offers."""
    address = re.search(rb"^c=IN IP[46] (\S+)\r$", message, re.MULTILINE)
    port = re.search(rb"^m=audio (\d+)", message, re.MULTILINE)
    assert address is not None
    assert port is not None
    return address[1].decode(), int(port[1])


def rtp(sequence: int) -> bytes:
    """Write an RTP packet of 20 ms."""
    return bytes([0x80, 0]) + sequence.to_bytes(2, "big") + (160 * sequence).to_bytes(4, "big") + token(64)


def host(address: str) -> str:
    """Return an address as a URI has it."""
    return f"[{address}]" if ":" in address else address
