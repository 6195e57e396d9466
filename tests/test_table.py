"""The address book: one handle an address, whatever the addresses look like."""

from __future__ import annotations

import numpy as np

from nattrace.table import AddressBook


def packed(*addresses: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Addresses from their two 64-bit halves, as the machine stores them."""
    return np.array(addresses, np.uint64).view(np.uint8).reshape(-1, 16)


def test_handles_follow_first_sight_and_give_the_address_back() -> None:
    book = AddressBook()
    rows = packed((9, 1), (3, 2), (9, 1), (1, 3))
    assert book.handles(rows).tolist() == [0, 1, 0, 2]
    assert book.handles(rows[::-1]).tolist() == [2, 0, 1, 0]
    assert [book.packed(6, handle) for handle in (0, 1, 2)] == [rows[at].tobytes() for at in (0, 1, 3)]


def test_addresses_made_to_collide_stay_apart() -> None:
    """(1, 5) and its partner have one sum under the book's sorting hash."""
    factor, mask = 0x9E3779B185EBCA87, (1 << 64) - 1
    partner = (2, (factor + 5 - 2 * factor) & mask)
    assert AddressBook().handles(packed((1, 5), partner, (1, 5))).tolist() == [0, 1, 0]


def test_no_addresses_have_no_handles() -> None:
    assert AddressBook().handles(np.zeros((0, 16), np.uint8)).tolist() == []
