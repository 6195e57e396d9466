"""Endpoints as tcpdump prints them, ``172.17.0.3.40000`` or ``fe80::1.53``: an address and maybe a port.

A name is never resolved: it is a reason why the packet cannot be used.
"""

from __future__ import annotations

import re
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_pton

from nattrace.ingest.text_words import SERVICES

#: Endpoints remembered by their text: a busy capture's worth, some 10 MB.
_ENDPOINT_CACHE = 1 << 15

#: ``SRC > DST: ``; what follows is the upper layer.
ADDRESSES = re.compile(r"(\S{1,300}) > (\S{1,300}):(?: |$)", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,300}\Z", re.ASCII)


def port_number(text: str) -> int | None:
    """Return the port that tcpdump printed as a number or as a service name."""
    if text.isascii() and text.isdigit():
        return int(text) if len(text) <= 5 and int(text) <= 0xFFFF else None
    return SERVICES.get(text)


@lru_cache(_ENDPOINT_CACHE)
def endpoint(text: str) -> tuple[bytes, int | None] | str:
    """Return (address in network order, port or None) of ``ADDRESS`` or ``ADDRESS.PORT``, or why not.

    The reasons are "name-not-address", "service-name" and "text-unparsed".
    """
    if ":" in text:
        head, _, tail = text.rpartition(".")
        for address, port in ((text, None), (head, tail)):
            try:
                packed = inet_pton(AF_INET6, address)
            except (OSError, ValueError):
                continue
            if port is None:
                return packed, None
            number = port_number(port)
            return (packed, number) if number is not None else "service-name"
        return "text-unparsed"
    parts = text.split(".")
    if len(parts) in (4, 5) and all(part.isdigit() for part in parts[:4]):
        try:
            packed = inet_pton(AF_INET, ".".join(parts[:4]))
        except (OSError, ValueError):
            return "text-unparsed"
        if len(parts) == 4:
            return packed, None
        number = port_number(parts[4])
        return (packed, number) if number is not None else "service-name"
    return "name-not-address" if _HOST_NAME.match(text) else "text-unparsed"
