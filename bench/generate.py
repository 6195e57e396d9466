"""Makes a pair of captures of one NAT and the truth about them: `python -m bench.generate N FOLDER`.

Writes inside.pcap, outside.pcap and truth.npz. Each point misses one packet in a hundred, independently.
The truth holds `pairs`, shape (n, 2) uint32: frame numbers of one packet inside and outside; and of each
flow with at least one pair, `protocol`, `client`, `client_port`, `outside_port`, `server`, `server_port`,
besides `flow_of_pair`, the row of these that each pair belongs to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.frames import Pool, write_pcap
from bench.traffic import PACKETS_PER_FLOW, Flows, Packets, make_flows, make_identical, make_packets

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Part of the packets that each point misses.
MISSED: Final = 0.01

#: Bytes of a packet that are kept: what tcpdump users choose to have all headers and little payload.
SNAPLEN: Final = 96

#: The fewest flows, so that each protocol has some.
FEWEST_FLOWS: Final = 10


def generate(
    count: int, folder: Path, *, flow_count: int | None, identical: bool, snaplen: int, seed: int
) -> None:
    """Write a pair of captures of `count` packets each, and the truth."""
    rng = np.random.default_rng(seed)
    total = int(np.ceil(count / (1 - MISSED)))
    if identical:
        flows, packets = make_identical(rng, total)
    else:
        flows = make_flows(rng, max(FEWEST_FLOWS, flow_count or count // PACKETS_PER_FLOW))
        packets = make_packets(rng, total, flows)
    inside = _seen(rng, packets.inside_us, count)
    outside = _seen(rng, packets.outside_us, count)
    pool = Pool(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, seen in (("inside", inside), ("outside", outside)):
        with (folder / f"{name}.pcap").open("wb") as stream:
            write_pcap(stream, flows, packets, seen, pool, inside=name == "inside", snaplen=snaplen)
    _write_truth(folder / "truth.npz", flows, packets, inside, outside)


def _seen(rng: np.random.Generator, time_us: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return which packets a point sees, in the order in which it sees them."""
    kept = np.sort(rng.permutation(time_us.size)[:count])
    return kept[np.argsort(time_us[kept], kind="stable")]


def _write_truth(
    path: Path, flows: Flows, packets: Packets, inside: NDArray[np.int64], outside: NDArray[np.int64]
) -> None:
    frame_outside = np.zeros(len(packets), np.uint32)
    frame_outside[outside] = np.arange(1, outside.size + 1)
    partner = frame_outside[inside]
    both = np.flatnonzero(partner)
    crossed, flow_of_pair = np.unique(packets.flow[inside[both]], return_inverse=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        pairs=np.stack([both + 1, partner[both]], axis=1).astype(np.uint32),
        flow_of_pair=flow_of_pair.astype(np.uint32),
        protocol=flows.protocol[crossed],
        client=flows.client[crossed],
        client_port=flows.client_port[crossed],
        outside_port=flows.outside_port[crossed],
        server=flows.server[crossed],
        server_port=flows.server_port[crossed],
    )
    # Last and at once: who finds the truth finds whole captures beside it.
    partial.replace(path)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description="Make a pair of captures of one NAT, and the truth about them."
    )
    parser.add_argument("count", type=int, metavar="N", help="packets of each capture")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--identical", action="store_true", help="all packets are the same but for the time")
    parser.add_argument(
        "--flows", type=int, metavar="F", help="flows (one for every 20 packets, 10 at least)"
    )
    parser.add_argument("--snaplen", type=int, default=SNAPLEN)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.count < 1 or chosen.snaplen < 1:
        parser.error("N and --snaplen are at least 1")
    generate(
        chosen.count,
        chosen.folder,
        flow_count=chosen.flows,
        identical=chosen.identical,
        snaplen=chosen.snaplen,
        seed=chosen.seed,
    )


if __name__ == "__main__":
    main()
