"""Compares what nattrace says of a generated pair with the truth: `python -m bench.accuracy FOLDER`.

Prints one JSON object of counts. A pair is one packet's frame number inside and outside; a binding is
(protocol, client, port, outside address, outside port, server, server port), ports being ids for ICMP.
This module runs nattrace as a library and measures no time.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import nattrace
from bench.traffic import ICMP, PUBLIC, TCP, UDP

if TYPE_CHECKING:
    from nattrace.model import Translation, Tuple

_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}

Binding = tuple[str, str, int, str, int, str, int]


def compare(folder: Path) -> dict[str, int]:
    """Return the counts of right, wrong and missing pairs and bindings.

    ``pairs_wrong_same_flow`` are those wrong pairs whose two packets belong to one flow: packets equal to the
    last byte, of which one took the other's place.
    """
    report = nattrace.analyze(f"inside={folder / 'inside.pcap'}", f"outside={folder / 'outside.pcap'}")
    with np.load(folder / "truth.npz") as archive:
        truth = {name: archive[name] for name in archive.files}
    pairs = {(inside, outside) for inside, outside in truth["pairs"].tolist()}
    flow_of = [
        dict(zip(truth["pairs"][:, n].tolist(), truth["flow_of_pair"].tolist(), strict=True)) for n in (0, 1)
    ]

    right = wrong = wrong_same_flow = 0
    for row in report.rewrites:
        ends = {row.before.point: row.before.frame, row.after.point: row.after.frame}
        pair = ends["inside"], ends["outside"]
        if pair in pairs:
            right += 1
            continue
        wrong += 1
        flow = flow_of[0].get(pair[0])
        wrong_same_flow += flow is not None and flow == flow_of[1].get(pair[1])

    expected = _true_bindings(truth)
    said = {_binding(flow.protocol, t) for flow in report.flows for t in flow.translations}
    return {
        "packets": report.accounting.packets,
        "pairs": len(pairs),
        "pairs_right": right,
        "pairs_wrong": wrong,
        "pairs_wrong_same_flow": wrong_same_flow,
        "ambiguous": sum(count for why, count in report.accounting.unmatched.items() if "ambiguous" in why),
        "bindings": len(expected),
        "bindings_found": len(said & expected),
        "bindings_invented": len(said - expected),
    }


def _true_bindings(truth: dict[str, Any]) -> set[Binding]:
    columns = ("protocol", "client", "client_port", "outside_port", "server", "server_port")
    return {
        (_NAMES[protocol], _text(client), port, _text(PUBLIC), outside, _text(server), server_port)
        for protocol, client, port, outside, server, server_port in zip(
            *(truth[name].tolist() for name in columns), strict=True
        )
    }


def _binding(protocol: str, translation: Translation) -> Binding:
    """Return a translation the way the truth has it, whichever end is said to have begun."""
    original, reply = translation.original, translation.reply
    client, public, server = original.src, reply.dst, original.dst
    port, outside, server_port = _sport(original), _dport(reply), _dport(original)
    if translation.nat == "dnat":
        client, public, server = reply.src, original.dst, original.src
        port, outside, server_port = _sport(reply), _dport(original), _sport(original)
    return (protocol, client, port, public, outside, server, 0 if protocol == "icmp" else server_port)


def _sport(end: Tuple) -> int:
    return end.id if end.id is not None else end.sport or 0


def _dport(end: Tuple) -> int:
    return end.id if end.id is not None else end.dport or 0


def _text(address: int) -> str:
    return str(ipaddress.IPv4Address(address))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Compare nattrace with the truth of a generated pair.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    print(json.dumps(compare(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
