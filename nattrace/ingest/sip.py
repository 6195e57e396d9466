"""SIP over UDP: what names a message whose addresses a helper on the way rewrites.

NAT helpers put the translated address and port into request line, Via, Contact, From, To, Route and the session
description, where they grow or shrink with it (kernel: nf_nat_sip). They leave alone what SIP itself tells messages
apart by: method or status, the Via's branch, To, Call-ID, CSeq (RFC 3261 sections 17.1.3, 17.2.3). Proxies put a Via
of their own on top, so another hop of a message has another name. This module names messages; it never reads more
of them than that, and never believes that a message is where a port says so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.ingest.gather import gather
from nattrace.lookup import contains
from nattrace.table import ALL_BYTES, KIND, NAMED

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Payload bytes that show how a message may begin.
START_BYTES: Final = 4
#: First bytes of what may be a message: a response, or a method of RFC 3261, 3262, 3265, 3311, 3428, 3515, 3903, 6086.
_STARTS: Final = np.sort(
    np.frombuffer(b"SIP/INVIACK BYE CANCREGIOPTIPRACSUBSNOTIPUBLINFOREFEMESSUPDA", np.uint32)
)

#: Which byte may be a message's first one: most payloads are told by that.
_FIRST: Final = np.zeros(256, np.bool_)
_FIRST[_STARTS.view(np.uint8)[::START_BYTES]] = True

_KIND: Final = re.compile(rb"SIP/2\.0 \d{3}|[A-Z]+(?= (?:sips?|tel):)")
#: Bytes of an IP packet in which the headers that name a message nearly always are.
_HEADER_BYTES: Final = 1024
#: Payload bytes that show whether that which may be a message is one.
_KIND_BYTES: Final = len(b"SUBSCRIBE sips:")
#: What `message_names` says of that which is no message.
OTHER: Final = 1
#: The first of each header that names the message, by its long or compact name, and what of it does. Nothing here
#: goes back over what it has read: a datagram may hold 64 KiB of anything.
_NAMING: Final = tuple(
    (
        re.compile(rb"\n(?:" + name + rb")[ \t]*+:([^\r\n]*+)\r?\n", re.IGNORECASE),
        re.compile(part, re.IGNORECASE),
    )
    for name, part in (
        (b"via|v", rb";[ \t]*+branch[ \t]*+=[ \t]*+([^\s;,]++)"),
        (b"to|t", rb";[ \t]*+tag[ \t]*+=[ \t]*+([^\s;,]++)"),
        (b"call-id|i", rb"(\S.*+)"),
        (b"cseq", rb"(\S.*+)"),
    )
)
#: What addresses, ports and lengths are written with; without these bytes a whole message stays as it was.
_WRITTEN_ANEW: Final = b"0123456789abcdefABCDEF.:[]"


def may_be_sip(buffer: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the payloads at the given positions begin like a message; START_BYTES must be there."""
    found = _FIRST[buffer[at]]
    likely = np.flatnonzero(found)
    if likely.size:
        found[likely] = contains(_STARTS, gather(buffer, at[likely], START_BYTES).view(np.uint32))
    return found


def message_names(
    buffer: NDArray[np.uint8], start: NDArray[np.int64], stop: NDArray[np.int64], comparable_bytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return a hash of what names each message, and how far it does: NAMED, KIND, 0 where too little of it is there.

    Of what is no message they are 0 and OTHER.

    `start` and `stop` are where the captured text begins and ends in the buffer. Where captures are cut, a header
    that one point shows may be cut off at another: then messages are known by their kind alone, or, with
    `comparable_bytes` enough, by their headers. Of whole ones everything counts that no address is written with.
    """
    names = np.zeros(start.size, np.uint64)
    known = np.zeros(start.size, np.uint8)
    depth = KIND if comparable_bytes < _HEADER_BYTES else NAMED
    whole = comparable_bytes == ALL_BYTES
    for row, (begin, end) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        names[row], known[row] = _name(buffer[begin:end].tobytes(), depth, whole=whole)
    return names, known


def _name(text: bytes, depth: int, *, whole: bool) -> tuple[int, int]:
    kind = _KIND.match(text)
    if kind is None:
        return 0, OTHER if len(text) >= _KIND_BYTES else 0
    parts = [kind[0]]
    if depth == NAMED:
        headers = [header.search(text) for header, _ in _NAMING]
        if None in headers:
            depth = KIND
        else:
            told = (part.search(line[1]) for (_, part), line in zip(_NAMING, headers, strict=True) if line)
            parts += [found[1] if found else b"" for found in told]
            if whole:
                parts.append(text.translate(None, _WRITTEN_ANEW))
    from hashlib import blake2b  # noqa: PLC0415 - loads OpenSSL, and most captures hold no SIP

    return int.from_bytes(blake2b(b"\n".join(parts), digest_size=8).digest(), "little"), depth
