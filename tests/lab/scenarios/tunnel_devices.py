"""Tunnels between two hosts of the lab: the kernel's own devices, or a forwarder where the kernel has none.

The forwarder is a thread that moves packets between a TUN or TAP device and a socket, behind headers written
here from the standards; routing, NAT and the outer IP headers stay the kernel's. Nothing here looks at nattrace.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.scenarios.recording import NotHereError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.topology import Namespace

#: The addresses of the two ends, inside the tunnel.
NEAR, FAR = "10.200.0.1", "10.200.0.2"
NEAR_V6, FAR_V6 = "fd00:200::1", "fd00:200::2"
DEVICE = "tun0"
#: Room for the headers of any kind inside an Ethernet frame.
MTU = 1400

_TUNSETIFF, _IFF_TUN, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 1, 2, 0x1000
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tunnel is made: `device` is the end of ``ip link add``, `header` what the forwarder writes."""

    name: str  #: as the report should call it
    device: str
    ethernet: bool
    protocol: int  #: IP protocol of the outer header
    header: bytes
    port: int = 0
    version: int = 4  #: of the packets that are sent through it


#: GRE of RFC 2890 with key 7, Geneve of RFC 8926 with one option and VNI 5001.
_GRE_KEY = struct.pack(">HHI", 0x2000, 0x0800, 7)
_GRE_ETHERNET = struct.pack(">HH", 0, 0x6558)
_GENEVE = struct.pack(">BBHI", 2, 0, 0x6558, 5001 << 8) + struct.pack(">HBBI", 0xFFFF, 1, 1, 42)

KINDS = {
    "vxlan": Kind("vxlan 42", "type vxlan id 42 dstport 4789 remote {there} local {here}", True, 17, b""),
    "geneve": Kind("geneve 5001", "type geneve id 5001 remote {there}", True, 17, _GENEVE, 6081),
    "gre": Kind("gre 7", "type gre key 7 remote {there} local {here}", False, 47, _GRE_KEY),
    "gretap": Kind("gre", "type gretap remote {there} local {here}", True, 47, _GRE_ETHERNET),
    "ipip": Kind("ipip", "type ipip remote {there} local {here}", False, 4, b""),
    "sit": Kind("6in4", "type sit remote {there} local {here}", False, 41, b"", version=6),
}


@contextmanager
def tunnel(kind: Kind, ends: tuple[tuple[Namespace, str], tuple[Namespace, str]]) -> Iterator[None]:
    """Join two hosts, each with its own outer address; DEVICE has NEAR at the first and FAR at the second.

    Raises NotHereError where neither the kernel nor the forwarder can make such a tunnel.
    """
    (near, here), (far, there) = ends
    with ExitStack() as stack:
        if not all(_kernel_device(kind, *each) for each in ((near, here, there), (far, there, here))):
            if not kind.header and kind.protocol == socket.IPPROTO_UDP:
                raise NotHereError(f"kernel has no {kind.device.split()[1]}")
            stack.enter_context(_forwarding(kind, ((near, here, there), (far, there, here))))
        for host, address, address_v6 in ((near, NEAR, NEAR_V6), (far, FAR, FAR_V6)):
            if kind.version == 4:
                host.address(DEVICE, address, 30)
            else:
                host.address(DEVICE, address_v6, 64)
            host.run(f"ip link set {DEVICE} mtu {MTU}")
            host.up(DEVICE)
            if kind.ethernet:
                host.run(f"ethtool -K {DEVICE} tso off gso off gro off")
        yield


def _kernel_device(kind: Kind, host: Namespace, here: str, there: str) -> bool:
    """Make the kernel's own device; return False where the kernel does not know the type."""
    try:
        host.run(f"ip link add {DEVICE} {kind.device.format(here=here, there=there)}")
    except RuntimeError as error:
        if "Unknown device type" in str(error) or "not supported" in str(error):
            return False
        raise
    return True


@contextmanager
def _forwarding(kind: Kind, ends: tuple[tuple[Namespace, str, str], ...]) -> Iterator[None]:
    if not Path("/dev/net/tun").exists():
        raise NotHereError("needs /dev/net/tun")
    stop, stopped = os.pipe()
    with ExitStack() as stack:
        for descriptor in (stop, stopped):
            stack.callback(os.close, descriptor)
        threads = []
        for host, here, there in ends:
            device, outer = _open(kind, host, here, there)
            stack.callback(os.close, device)
            stack.callback(outer.close)
            threads.append(threading.Thread(target=_forward, args=(kind, device, outer, stop), daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            os.write(stopped, b"\0")
            for thread in threads:
                thread.join(timeout=5)


def _open(kind: Kind, host: Namespace, here: str, there: str) -> tuple[int, socket.socket]:
    mode = _IFF_TAP if kind.ethernet else _IFF_TUN
    with host.inside():
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", DEVICE.encode(), mode | _IFF_NO_PI))
        if kind.port:
            outer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            outer.bind((here, kind.port))
        else:
            outer = socket.socket(socket.AF_INET, socket.SOCK_RAW, kind.protocol)
            outer.bind((here, 0))
        outer.connect((there, kind.port))
    return device, outer


def _forward(kind: Kind, device: int, outer: socket.socket, stop: int) -> None:
    """Move packets both ways until something can be read from `stop`."""
    while True:
        ready, _, _ = select.select([device, outer.fileno(), stop], [], [])
        if stop in ready:
            return
        with suppress(OSError):  # a device that is not up yet loses packets, as any does
            if device in ready:
                outer.send(kind.header + os.read(device, 65535))
            if outer.fileno() in ready:
                packet = outer.recv(65535)
                if not kind.port:  # raw sockets are given the IP header
                    packet = packet[(packet[0] & 15) * 4 :]
                os.write(device, packet[len(kind.header) :])
