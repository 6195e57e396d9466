"""What wraps a packet in a tunnel, as one number: the kind of tunnel and the identifier its header carries.

0 is a packet on the wire itself. Several packets of one flow may be wrapped differently; `common` says what
they share. This module holds numbers and names; it never reads packets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Kinds of tunnel. IP in IP goes by the two versions: RFC 2003, RFC 4213, RFC 2473.
IPIP, SIX_IN_FOUR, FOUR_IN_SIX, SIX_IN_SIX, GRE, ERSPAN, PPTP, VXLAN, GENEVE, GTP_U, L2TP, TEREDO = range(
    1, 13
)

_NAMES: Final = (
    "tunnel", "ipip", "6in4", "4in6", "6in6", "gre", "erspan", "pptp", "vxlan", "geneve", "gtp-u", "l2tp", "teredo",
)  # fmt: skip

#: An encapsulation is kind, whether it has an identifier, and the identifier: 8, 1 and 32 bits.
_IDENTIFIED = np.uint64(1 << 32)
_KIND_SHIFT = np.uint64(40)
#: Several identifiers in one flow and direction.
_SEVERAL = np.uint64(1 << 33)
_NONE = np.uint64(2**64 - 1)


def encapsulation(
    kind: NDArray[np.int64] | int, identifier: NDArray[np.int64] | None = None
) -> NDArray[np.uint64]:
    """Return the number of each encapsulation; `identifier` is below 2**32 (VNI, key, TEID), None for none."""
    number = np.asarray(kind, np.uint64) << _KIND_SHIFT
    if identifier is None:
        return number
    return number | _IDENTIFIED | identifier.astype(np.uint64)


def common(numbers: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return what the encapsulations of each run share: `starts` are the runs' first indices, as in reduceat.

    Zeros do not count. Runs of several identifiers keep their kind only, runs of several kinds not even that.
    """
    if not starts.size:
        return np.zeros(0, np.uint64)
    low = np.minimum.reduceat(np.where(numbers == 0, _NONE, numbers), starts)
    high = np.maximum.reduceat(numbers, starts)
    kind = np.where(
        low >> _KIND_SHIFT == high >> _KIND_SHIFT, high >> _KIND_SHIFT << _KIND_SHIFT, np.uint64(0)
    )
    one: NDArray[np.uint64] = np.where(high == 0, np.uint64(0), np.where(low == high, high, kind | _SEVERAL))
    return one


def encapsulation_name(number: int) -> str | None:
    """Name an encapsulation: ``vxlan 42``, ``ipip``; ``l2tp 7/1`` is tunnel and session. None for 0."""
    if not number:
        return None
    kind = number >> int(_KIND_SHIFT)
    name = _NAMES[kind] if kind < len(_NAMES) else _NAMES[0]
    if number & int(_SEVERAL):
        return f"{name} (several)"
    if not number & int(_IDENTIFIED):
        return name
    identifier = number & 0xFFFFFFFF
    return f"{name} {identifier >> 16}/{identifier & 0xFFFF}" if kind == L2TP else f"{name} {identifier}"


def both_ways(forth: int, back: int) -> str | None:
    """Name what wraps a conversation's packets; GTP-U, L2TP and some overlays number each direction its own way."""
    if not back or forth == back:
        return encapsulation_name(forth)
    if not forth:
        return encapsulation_name(back)
    return f"{encapsulation_name(forth)}, back {encapsulation_name(back)}"
