"""Parses captures with dpkt and does nothing with them: `python -m bench.dpkt_loop [-c N] FILE...`.

What a tool written the usual way pays before it does anything of its own.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import dpkt


def parse(path: Path, limit: int | None) -> int:
    """Parse up to `limit` packets of a capture and return how many there were."""
    count = 0
    with path.open("rb") as stream:
        for _, frame in islice(dpkt.pcap.Reader(stream), limit):
            dpkt.ethernet.Ethernet(frame)
            count += 1
    return count


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Parse captures with dpkt.")
    parser.add_argument("-c", dest="limit", type=int, help="stop each file after this many packets")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    chosen = parser.parse_args()
    print(sum(parse(path, chosen.limit) for path in chosen.files))


if __name__ == "__main__":
    main()
