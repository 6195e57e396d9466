"""Proxies: two TCP connections that carry the same payload, one inside the other. That is no translation.

docker-proxy, socat, a TLS passthrough or a load balancer in TCP mode accept a connection, open one of their own
with other initial sequence numbers, and copy what is said. What is not copied as it is (an HTTP proxy that adds
a header) is not recognised, and equal lengths or times alone are never enough: captures cut at the headers show
no payload, and then nothing is said. This module reads what ingest noted and never touches a match.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nattrace.diagnose.connections import CLIENT, SERVER, Connections, connections
from nattrace.model import Finding, PacketRef, Tuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from nattrace.ingest.openings import Openings
    from nattrace.model import Flow
    from nattrace.table import AddressBook

#: Payload bytes that must be seen equal, both directions together; less only where it is all that was said.
ENOUGH_BYTES = 16
#: ... and even then not less than this: a single letter is said by everybody.
FEWEST_BYTES = 4
#: Pairs of connections with equal totals that are compared; more are those of a load test, and all the same.
MAX_COMPARED = 65_536
#: Flows listed in one finding.
MAX_FLOWS = 100
#: TTLs that packets begin with (Linux 64, Windows 128, others 255): seen so, they were sent by this very host.
_INITIAL_TTLS = (64, 128, 255)


@dataclass(frozen=True, slots=True)
class _Connection:
    """One connection, at all points that saw it."""

    rows: tuple[int, ...]  #: one for each point that saw it, that nearest to the server first
    points: frozenset[int]
    client: tuple[bytes, int]
    server: tuple[bytes, int]

    @property
    def row(self) -> int:
        """The row that stands for it."""
        return self.rows[0]

    @property
    def to_itself(self) -> bool:
        """Whether both ends have one address: loopback, or a host that calls its own name."""
        return self.client[0] == self.server[0]


def proxied(
    openings: Sequence[tuple[str, Openings]], flows: Iterable[Flow], book: AddressBook
) -> list[Finding]:
    """Return a finding ``proxied`` for each port behind which a proxy was seen at work.

    `openings` are the points' names with what was noted there. `flows` are read only when there is a finding.
    """
    known = connections([each for _, each in openings])
    if len(known) < 2:
        return []
    pairs = _pairs(known, _distinct(known, book))
    if not pairs:
        return []
    names = [name for name, _ in openings]
    ids = _flow_ids(known, names, [connection for pair in pairs for connection in pair], flows, book)
    # one finding for each proxy: where it listens, from where it connects, and to whom
    proxies: dict[tuple[object, ...], list[tuple[_Connection, _Connection]]] = defaultdict(list)
    for outer, inner in pairs:
        if outer.row in ids and inner.row in ids:
            proxies[outer.server, inner.client[0], inner.server].append((outer, inner))
    return [_finding(known, names, found, ids, book) for found in proxies.values()]


def _distinct(known: Connections, book: AddressBook) -> list[_Connection]:
    """Return each connection once, whatever number of points saw it: NAT keeps both initial sequence numbers."""
    answer = known.answer
    order = np.argsort(answer.time_ns, kind="stable")
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in order.tolist():
        rows[int(answer.seq[row]), int(answer.ack[row])].append(row)
    found = []
    for seen in rows.values():
        row = seen[0]
        version = int(answer.version[row])
        found.append(
            _Connection(
                rows=tuple(seen),
                points=frozenset(known.point[seen].tolist()),
                client=(book.packed(version, int(answer.dst[row])), int(answer.dport[row])),
                server=(book.packed(version, int(answer.src[row])), int(answer.sport[row])),
            )
        )
    return found


def _pairs(known: Connections, each: Sequence[_Connection]) -> list[tuple[_Connection, _Connection]]:
    """Return (outer, inner) connections that belong together and to nobody else."""
    by_totals: dict[tuple[int, int], list[_Connection]] = defaultdict(list)
    for connection in each:
        total = known.total_bytes[connection.row]
        if total.any():
            by_totals[int(total[CLIENT]), int(total[SERVER])].append(connection)
    inside: dict[int, list[tuple[_Connection, bool]]] = defaultdict(list)
    around: dict[int, list[tuple[_Connection, bool]]] = defaultdict(list)
    compared = 0
    for alike in by_totals.values():
        if len(alike) < 2:
            continue
        compared += len(alike) * (len(alike) - 1)
        if compared > MAX_COMPARED:
            break
        for outer in alike:
            for inner in alike:
                if outer is not inner and _nested(known, outer.row, inner.row):
                    role = _role(known, outer, inner)
                    if role is not None and _same_payload(known, outer.row, inner.row):
                        inside[outer.row].append((inner, role))
                        around[inner.row].append((outer, role))
    found = []
    for outer in each:
        best = _only(inside[outer.row])
        if best is not None:
            back = _only(around[best.row])
            if back is not None and back.row == outer.row:
                found.append((outer, best))
    return found


def _only(candidates: list[tuple[_Connection, bool]]) -> _Connection | None:
    """Return the one candidate; of several, the one whose address says that it is the proxy's."""
    direct = [connection for connection, role in candidates if role]
    chosen = direct or [connection for connection, _ in candidates]
    return chosen[0] if len(chosen) == 1 else None


def _nested(known: Connections, outer: int, inner: int) -> bool:
    """Say whether the inner connection lies in the outer one: opened and spoken on later, answered earlier."""
    opened = known.answer.time_ns
    if (
        known.answer.seq[outer] == known.answer.seq[inner]
        or known.answer.ack[outer] == known.answer.ack[inner]
    ):
        return False  # a proxy's own sequence numbers are others; equal ones are a box's that shifts one side
    asked, answered = known.first_ns[:, CLIENT], known.first_ns[:, SERVER]
    return bool(
        opened[outer] <= opened[inner] <= known.last_ns[outer].max()
        and asked[outer] <= asked[inner]
        and answered[inner] <= answered[outer]
    )


def _role(known: Connections, outer: _Connection, inner: _Connection) -> bool | None:
    """Say whether one host can be the outer connection's server and the inner one's client.

    True: they have one address. False: they may be two addresses of one host. None: they are two hosts.
    """
    if outer.server == inner.server:
        return None  # two clients of one server
    if outer.client[0] == inner.client[0] and not outer.to_itself:
        return None  # one client of two servers
    if outer.server[0] == inner.client[0]:
        return True
    # two interfaces of one host: two points, and what it sends has not been forwarded yet
    answered = int(known.answer.ttl[list(outer.rows)].max())
    asked = int(known.client_ttl[list(inner.rows)].max()) or _INITIAL_TTLS[0]  # 0: it only listened
    own = {answered, asked}
    apart = not outer.points & inner.points
    return False if apart and own <= set(_INITIAL_TTLS) else None


def _same_payload(known: Connections, outer: int, inner: int) -> bool:
    """Say whether both connections begin to say the same in both directions, as far as was captured.

    Segments may be cut differently, so the shorter beginning counts; the totals are known to be equal.
    """
    equal = 0
    for side in (CLIENT, SERVER):
        total = int(known.total_bytes[outer, side])
        seen = int(min(known.head_length[outer, side], known.head_length[inner, side], total))
        if seen < min(total, FEWEST_BYTES):
            return False
        if not np.array_equal(known.heads[outer, side, :seen], known.heads[inner, side, :seen]):
            return False
        equal += seen
    everything = int(known.total_bytes[outer].sum())
    return equal >= min(ENOUGH_BYTES, max(everything, FEWEST_BYTES))


def _flow_ids(
    known: Connections,
    names: Sequence[str],
    chosen: Iterable[_Connection],
    flows: Iterable[Flow],
    book: AddressBook,
) -> dict[int, int]:
    """Return the flow ids of connections, by their row; what no flow, or more than one, can be is left out.

    A flow is known by its tuple at its first point, which is one of those that saw the connection.
    """
    answer = known.answer
    wanted: dict[tuple[str, Tuple], list[_Connection]] = defaultdict(list)
    for connection in chosen:
        for row in connection.rows:
            client, server = (
                _text(column[row], answer.version[row], book) for column in (answer.dst, answer.src)
            )
            at = Tuple(client, server, int(answer.dport[row]), int(answer.sport[row]))
            wanted[names[int(known.point[row])], at].append(connection)
    candidates: dict[int, list[Flow]] = defaultdict(list)
    for flow in flows:
        if flow.protocol == "tcp":
            for connection in wanted.get((flow.path[0], flow.initiator), ()):
                candidates[connection.row].append(flow)
    ids = {}
    for row, several in candidates.items():
        opened = int(answer.time_ns[row])
        then = [flow for flow in several if flow.first <= opened <= flow.last]
        one = several if len(several) == 1 else then
        if len(one) == 1:
            ids[row] = one[0].id
    return ids


def _finding(
    known: Connections,
    names: Sequence[str],
    found: Sequence[tuple[_Connection, _Connection]],
    ids: dict[int, int],
    book: AddressBook,
) -> Finding:
    """Tell of one proxy and the connections that went through it."""
    outer, inner = found[0]
    answer = known.answer

    def ends(connection: _Connection) -> tuple[str, str]:
        row, version = connection.row, answer.version[connection.row]
        client, server = _text(answer.dst[row], version, book), _text(answer.src[row], version, book)
        return client, f"[{server}]:{answer.sport[row]}" if ":" in server else f"{server}:{answer.sport[row]}"

    (caller, listens), (own, backend) = ends(outer), ends(inner)
    couples = sorted((ids[outside.row], ids[within.row]) for outside, within in found)
    if len(couples) == 1:
        said = known.total_bytes[outer.row]
        which = f"flows {couples[0][0]} and {couples[0][1]} carry the same payload ({_bytes(said)})"
        asked = f"{caller} called {listens}"
    else:
        shown = ", ".join(f"{a} and {b}" for a, b in couples[:3]) + (", ..." if len(couples) > 3 else "")
        which = f"{len(couples)} pairs of flows carry the same payload each (flows {shown})"
        asked = f"clients called {listens}"
    message = (
        f"{which}, yet they are two connections and no NAT: {asked}, and a proxy there opened a connection of its "
        f"own from {own} to {backend}, with sequence numbers of its own, inside the first. The server sees the "
        f"proxy's address {own}, not the client's"
    )
    return Finding(
        code="proxied",
        severity="info",
        message=message,
        flows=tuple(sorted(number for couple in couples for number in couple))[:MAX_FLOWS],
        packets=tuple(
            PacketRef(names[int(known.point[each.row])], int(answer.frame[each.row]))
            for each in (outer, inner)
        ),
        advice=(
            "read the client's address where the proxy knows it: its log, X-Forwarded-For, or the PROXY protocol. "
            'If the proxy is docker-proxy, "userland-proxy": false in /etc/docker/daemon.json leaves published '
            "ports to NAT alone, which keeps the client's address"
        ),
    )


def _text(handle: int, version: int, book: AddressBook) -> str:
    return book.text(int(version), int(handle))


def _bytes(total: NDArray[np.int64]) -> str:
    return f"{int(total[CLIENT])} bytes out, {int(total[SERVER])} back"
