"""ICMP errors that become errors of the other IP version: what both versions say, written alike.

A translator between IP versions (NAT64, SIIT) makes another error of an error, and translates the quote as well
(RFC 7915 sections 4.2, 4.3, 5.2, 5.3). Several codes of one version become one of the other, so errors are written here
as what is left of them whichever way they went; MTU and pointer, which are counted anew, are left out. This module
pairs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nattrace.match.keys import as_icmp, without_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.table import AddressBook

#: By IP version: (type, codes) of what the two have in common, in one order.
_COMMON: Final[tuple[dict[int, tuple[int, tuple[int, ...]]], ...]] = (
    {4: (3, (0, 1, 5, 6, 7, 8, 11, 12)), 6: (1, (0, 2, 3))},  # no way to the destination
    {4: (3, (9, 10, 13, 15)), 6: (1, (1,))},  # prohibited
    {4: (3, (3,)), 6: (1, (4,))},  # nobody listens on the port
    {4: (3, (2,)), 6: (4, (1,))},  # unknown protocol
    {4: (3, (4,)), 6: (2, (0,))},  # too big
    {4: (11, (0,)), 6: (3, (0,))},  # expired on the way
    {4: (11, (1,)), 6: (3, (1,))},  # expired while fragments were awaited
    {4: (12, (0, 2)), 6: (4, (0,))},  # a header field is wrong
)
#: IP headers without options or extensions, which do not survive translation.
_HEADER_BYTES: Final = {4: 20, 6: 40}


def _meanings() -> NDArray[np.uint8]:
    """Return what every type and code means, 1 for the first of _COMMON, 0 for nothing; shape (2, 256, 256)."""
    table = np.zeros((2, 256, 256), np.uint8)
    for meaning, kinds in enumerate(_COMMON, 1):
        for version, (kind, codes) in kinds.items():
            table[int(version == 6), kind, list(codes)] = meaning
    return table


_MEANINGS: Final = _meanings()


def meaning(errors: Errors) -> NDArray[np.uint8]:
    """Return a number for what each error says in either version, 0 where it has no like in the other one."""
    packets = errors.packets
    found: NDArray[np.uint8] = _MEANINGS[
        (packets.version == 6).astype(np.int64), packets.icmp_type, packets.icmp_code
    ]
    return found


def in_common(errors: Errors, book: AddressBook) -> Errors:
    """Return the errors as they are in either version; what has no like in the other version stays of its own.

    Addresses are those of IPv4 that a prefix of 96 bits leaves (RFC 6052 section 2.2), or what stands in their place.
    IPv6 has no identifications, so there are none.
    """
    packets, quoted = errors.packets, errors.quoted
    said = meaning(errors)
    none = np.zeros(len(errors), np.uint32)
    protocol, icmp_type = as_icmp(quoted.protocol, quoted.icmp_type)
    header = np.where(quoted.version == 6, np.uint32(_HEADER_BYTES[6]), np.uint32(_HEADER_BYTES[4]))
    return replace(
        errors,
        packets=replace(
            packets,
            version=np.where(said > 0, np.uint8(0), packets.version),
            icmp_type=np.where(said > 0, said, packets.icmp_type),
            icmp_code=np.where(said > 0, np.uint8(0), packets.icmp_code),
            ip_id=none,
            src=book.as_four(packets.version, packets.src),
            dst=book.as_four(packets.version, packets.dst),
        ),
        quoted=replace(
            quoted,
            version=np.zeros_like(quoted.version),
            protocol=protocol,
            icmp_type=icmp_type,
            ip_id=none,
            ip_length=(quoted.ip_length - header).astype(quoted.ip_length.dtype),
            residual=without_length(quoted, slice(None)),
            fragment=np.zeros_like(quoted.fragment),
            src=book.as_four(quoted.version, quoted.src),
            dst=book.as_four(quoted.version, quoted.dst),
        ),
        rest=none,
    )
