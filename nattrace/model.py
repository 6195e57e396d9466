"""The words of a report as types: frozen, typed, no behaviour.

The names are those of the report schema ``nattrace/report/1``. Instants are integers, ns since the epoch
in UTC; the renderers write them as ISO 8601. Durations are integers in ns. What is not known is None,
never a made-up zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Direction = Literal["original", "reply"]
Nat = Literal["snat", "dnat", "snat+dnat"]
Status = Literal["translated", "untranslated", "lost", "one-sided", "ambiguous"]
Severity = Literal["error", "warning", "info"]
Field = Literal["src", "dst", "sport", "dport", "id"]


@dataclass(frozen=True, slots=True)
class Tuple:
    """Addresses and ports of one direction, as conntrack prints them.

    For ICMP queries `id` is set and the ports are None; for TCP, UDP, SCTP, DCCP the ports are set;
    for other protocols only the addresses are.
    """

    src: str
    dst: str
    sport: int | None = None
    dport: int | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True)
class ClockStep:
    """A clock that was set, or began to run at another pace, while it was captured: what holds from then on."""

    at: int  #: the clock's own reading, ns since the epoch, of the first packet known to be behind the step
    offset_ns: int  #: against the reference, at that reading: no difference to the offset before
    drift_ppm: float = 0.0  #: counts from that reading


@dataclass(frozen=True, slots=True)
class Clock:
    """A point's clock against the reference point: reference time = time - offset_ns - drift.

    `offset_ns` is right when this clock reads `at`, the first packet that both clocks were seen to stamp. The drift
    counts from there: reference time = time - offset_ns - drift_ppm / 1e6 * (time - at), rounded to ns. From the
    reading of a step on (in the order of the file), its own offset, drift and reading take their place.
    """

    reference: str
    offset_ns: int = 0
    drift_ppm: float = 0.0
    #: the true offset is no further away while both points captured; 0: the reference's own clock; None: unknown
    bound_ns: int | None = 0
    at: int | None = None  #: ns since the epoch; None for the reference's own clock
    steps: tuple[ClockStep, ...] = ()


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment found in a pcapng; `frame` is None for one about the section or the interface."""

    frame: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """One observation point: where a capture was taken, normally one interface (RFC 7011)."""

    name: str
    file: str
    interface: str | None
    link_type: str
    snaplen: int | None
    packets: int
    decoded: int
    skipped: Mapping[str, int]
    first: int | None
    last: int | None
    truncated: bool  #: the file ends inside a record or is damaged before its end
    dropped_by_kernel: int | None
    clock: Clock
    comments: tuple[Comment, ...] = ()
    dated: bool = True  #: False: a printed capture without dates; its instants are times of day only


@dataclass(frozen=True, slots=True)
class Rule:
    """The ruleset line that made a translation."""

    text: str
    table: str
    chain: str
    number: int


@dataclass(frozen=True, slots=True)
class Translation:
    """What one NAT hop did to a flow, as conntrack's original and reply tuples."""

    from_point: str
    to_point: str
    nat: Nat
    changed: tuple[Field, ...]
    original: Tuple
    reply: Tuple
    rule: Rule | None = None
    first: int | None = None  #: of its matched packets of either direction, at from_point
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Time from one point to the next; the figures are None where they cannot be measured."""

    measurable: bool
    min_ns: int | None
    median_ns: int | None
    p99_ns: int | None
    max_ns: int | None


@dataclass(frozen=True, slots=True)
class Segments:
    """Packets that changed size between two points: segmentation offload, other fragments. Counts and bytes."""

    before: int  #: packets sent that were at least partly found
    after: int  #: packets they arrived as
    bytes: int  #: of their payload, in both
    missing_bytes: int  #: of what was sent, not found after


@dataclass(frozen=True, slots=True)
class Crossing:
    """What became of one direction of a flow between two neighbouring points of its path."""

    from_point: str
    to_point: str
    direction: Direction
    matched: int
    lost: int
    unknowable: int
    ambiguous: int
    latency: Latency
    segments: Segments | None = None  #: None: every packet kept its size


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who an address belongs to, where the context says so."""

    container: str | None
    network: str | None
    image: str | None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IcmpErrors:
    """ICMP errors of one kind that quote a flow's packets, counted where they were seen nearest to path[0]."""

    type: int
    code: int
    name: str  #: see `nattrace.icmp.error_name`
    mtu: int | None  #: of fragmentation-needed and packet-too-big, where it is given
    count: int


@dataclass(frozen=True, slots=True)
class Flow:
    """A conversation, both directions (RFC 5103 biflow), along its path."""

    id: int
    protocol: str
    status: Status
    path: tuple[str, ...]
    initiator: Tuple
    translations: tuple[Translation, ...]
    packets_original: int  #: seen at path[0]
    packets_reply: int  #: seen at path[0]
    crossings: tuple[Crossing, ...]
    first: int
    last: int
    endpoint_initiator: Endpoint | None = None
    endpoint_responder: Endpoint | None = None
    #: what wraps its packets at each point of the path, None where nothing does; None when nothing does anywhere
    encapsulation: tuple[str | None, ...] | None = None
    icmp_errors: tuple[IcmpErrors, ...] = ()  #: not counted as packets of the flow, as conntrack does not


@dataclass(frozen=True, slots=True)
class PacketRef:
    """One packet: a point and a 1-based frame number in that point's file."""

    point: str
    frame: int


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosed problem or a fact worth knowing."""

    code: str
    severity: Severity
    message: str
    flows: tuple[int, ...] = ()
    packets: tuple[PacketRef, ...] = ()
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where every packet went: packets = matched + sum(unmatched) + sum(skipped)."""

    packets: int
    matched: int
    unmatched: Mapping[str, int]
    skipped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Sighting:
    """One packet as it was seen at one point. Fields that its protocol lacks are None."""

    point: str
    frame: int
    time: int | None
    protocol: str
    src: str
    dst: str
    ttl: int | None
    ip_id: int | None
    sport: int | None = None
    dport: int | None = None
    type: int | None = None
    code: int | None = None
    id: int | None = None
    seq: int | None = None
    ack: int | None = None
    flags: str | None = None  #: TCP flags as tcpdump prints them: S, S., ., P., F., R
    length: int | None = None  #: payload bytes
    encapsulation: str | None = None  #: what it is wrapped in: ``vxlan 42``, ``gre``


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A packet at two neighbouring points of its path, with what changed between them."""

    flow: int
    direction: Direction
    nat: Nat | None  #: None: the crossing changed nothing
    changed: tuple[Field, ...]
    latency_ns: int | None
    before: Sighting
    after: Sighting
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A packet that has no crossing: lost, ambiguous, or seen at one point only."""

    flow: int | None
    direction: Direction | None
    reason: str
    packet: Sighting
    candidates: tuple[PacketRef, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything that the renderers read; `flows` may build its items lazily."""

    version: str
    points: Sequence[Point]
    flows: Sequence[Flow]
    findings: Sequence[Finding]
    accounting: Accounting
