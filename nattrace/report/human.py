"""Numbers and addresses as a person reads them: ``21 us``, ``1-4, 7``, ``[2001:db8::1]:80``.

For the table formats only; JSON and CSV carry the exact figures. Nothing here depends on the locale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nattrace.model import Tuple

#: What stands for a latency that the captures cannot tell, see docs: taps on one path may share a timestamp.
NOT_MEASURABLE = "n/m"

_UNITS = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns"))


def duration(time_ns: int) -> str:
    """Return ns in the largest unit that gives a figure of at least 1, with two digits where there are two."""
    sign, size_ns = ("-" if time_ns < 0 else ""), abs(time_ns)
    for unit_ns, unit in _UNITS:
        # Half a digit below the unit already rounds up to it: 999.6 us reads 1 ms, never 1000 us.
        if size_ns * 2000 >= unit_ns * 1999 or unit_ns == 1:
            figure = size_ns / unit_ns
            text = f"{figure:.1f}".removesuffix(".0") if figure < 9.95 else f"{figure:.0f}"
            return f"{sign}{text} {unit}"
    raise AssertionError


def span(time_ns: int) -> str:
    """Return the length of a capture: ``4.4 s``, ``12 min 5 s``, ``3 h 12 min``, ``2 d 3 h``."""
    seconds = time_ns // 1_000_000_000
    if seconds < 60:
        return duration(time_ns) if time_ns < 1_000_000_000 else f"{time_ns / 1e9:.1f} s"
    for size, unit, rest_size, rest_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            rest = seconds % size // rest_size
            return f"{seconds // size} {unit} {rest} {rest_unit}" if rest else f"{seconds // size} {unit}"
    raise AssertionError


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return ``1 flow``, ``48,092 flows``."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def endpoint(address: str, port: int | None = None, icmp_id: int | None = None) -> str:
    """Return an address with its port or ICMP id (RFC 5952 section 6 for the brackets)."""
    if port is not None:
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return address if icmp_id is None else f"{address} id {icmp_id}"


def source(addresses: Tuple) -> str:
    """Return the source of a tuple, with port or id."""
    return endpoint(addresses.src, addresses.sport, addresses.id)


def destination(addresses: Tuple) -> str:
    """Return the destination of a tuple, with its port."""
    return endpoint(addresses.dst, addresses.dport)


def numbers(values: Iterable[int], limit: int = 8) -> str:
    """Return numbers in ranges, ``1-4, 7``, at most `limit` ranges of them."""
    ranges: list[list[int]] = []
    for value in sorted(set(values)):
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    texts = [f"{low}-{high}" if low < high else f"{low}" for low, high in ranges[:limit]]
    return ", ".join(texts) + (", ..." if len(ranges) > limit else "")


def listed(texts: Iterable[str], limit: int = 3) -> str:
    """Return ``a, b, c and 4 more``."""
    all_texts = list(texts)
    more = len(all_texts) - limit
    return ", ".join(all_texts[:limit]) + (f" and {more:,} more" if more > 0 else "")


def counts(reasons: Mapping[str, int]) -> str:
    """Return ``3 arp, 1 truncated``: the largest first, equal ones by name."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} {reason}" for reason, number in ordered if number)
