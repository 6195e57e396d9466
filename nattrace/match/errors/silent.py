"""Silent flows: conversations of which a point shows nothing but the ICMP errors about them.

Captures with a filter for ICMP are common, and an error that two points show tells the translation of the packet that
it quotes by itself: the tuple on either side. Such a flow is made of the quote, without packets, and bound as flows are
that only errors bind (see `binding`). What nothing binds is left out by whoever counts flows. Nothing here makes matches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nattrace.match.edges import Edges, merge_edges
from nattrace.match.errors.binding import bind_by_errors
from nattrace.match.errors.quoted import outer_fits
from nattrace.match.keys import flow_hash, has_ports, icmp_query_rows
from nattrace.match.roll import FlowRoll

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nattrace.match.errors.icmp_errors import Errors
    from nattrace.match.flows import Flows
    from nattrace.match.usual import Usual
    from nattrace.table import AddressBook


def silent(flows: Flows) -> NDArray[np.bool_]:
    """Say which flows have no packet of their own."""
    nothing: NDArray[np.bool_] = (flows.forward == 0) & (flows.backward == 0)
    return nothing


def silent_flows(errors: Errors, flows: Flows) -> Flows:
    """Return the flows that a point's errors quote and that are not among its `flows`.

    They begin and end with their errors.
    """
    quoted = errors.quoted
    named = (has_ports(quoted.protocol) & (quoted.sport != 0) & (quoted.dport != 0)) | icmp_query_rows(quoted)
    named &= outer_fits(errors, np.arange(len(errors)))
    key, backward = flow_hash(quoted)
    rows = np.flatnonzero(named & ~np.isin(key, flows.hash))
    roll = FlowRoll()
    roll.number(replace(quoted, time_ns=errors.packets.time_ns).take(rows), key[rows], backward[rows])
    made = roll.flows()
    return replace(made, forward=np.zeros(len(made), np.int64), backward=np.zeros(len(made), np.int64))


def bind_silent(
    parts: Sequence[Edges],
    errors: tuple[Errors, Errors],
    flows: tuple[Flows, Flows],
    members: tuple[NDArray[np.int64], NDArray[np.int64]],
    usual: Usual,
    book: AddressBook,
    *,
    renumbered: bool,
) -> Edges:
    """Return edges of silent flows of two points, between flow numbers like the `parts` that are known already.

    They have no packets; their deltas say which way the errors went. `members` say where flow numbers are among the
    ordered `flows`; for `renumbered` see `bind_by_errors`.
    """
    known, _ = merge_edges(parts, *members)
    told = bind_by_errors(errors, flows, known, usual, book, renumbered=renumbered)
    told = told.take(silent(flows[0])[told.flow_a] | silent(flows[1])[told.flow_b])
    first_a, first_b = (np.unique(member, return_index=True)[1] for member in members)
    nothing = np.zeros(len(told), np.int64)
    return replace(
        told,
        flow_a=first_a[told.flow_a],
        flow_b=first_b[told.flow_b],
        forward=nothing,
        backward=nothing,
        ttl_forward=nothing,
        ttl_backward=nothing,
        delta_forward=told.delta_forward // np.maximum(told.forward, 1),
        delta_backward=told.delta_backward // np.maximum(told.backward, 1),
    )
