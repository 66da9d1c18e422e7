"""What the hosts' cables end in: a bridge in a network namespace of its own, which writes down who asks for a foreign
address and lets nobody through: `python -m tests.multihost.switch FILE`, inside that namespace, until stdin ends."""

from __future__ import annotations

import ipaddress
import json
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BRIDGE = "bridge"
NETWORK = ipaddress.ip_network("10.77.0.0/24")
GATEWAY = "10.77.0.254"
"""The hosts' default route. It answers "unreachable", so that an attempt is seen here and fails there at once."""
_LOCAL = (
    NETWORK,
    *map(ipaddress.ip_network, ("127.0.0.0/8", "224.0.0.0/24", "255.255.255.255/32", "::1/128", "fe80::/10")),
    *map(ipaddress.ip_network, ("ff01::/16", "ff02::/16")),
)
"""Addresses that a packet cannot leave the network by; multicast only as far as no router passes it on."""
_OWN_NAMES = ".".join(reversed(str(NETWORK.network_address).split(".")[:3])) + ".in-addr.arpa"
"""Asking for the name of an address of this network is no attempt to leave it."""
_ETHERNET = {0x0800: "ipv4", 0x86DD: "ipv6", 0x0806: "arp"}
_TRANSPORT = {6: "tcp", 17: "udp"}
_ALL_PROTOCOLS = 0x0003


def main(file: Path) -> None:
    """Make the bridge, say `ready`, write a line of JSON for every packet to a foreign address."""
    for command in (
        "link set lo up",
        f"link add {BRIDGE} type bridge",
        f"link set {BRIDGE} up",
        f"address add {GATEWAY}/{NETWORK.prefixlen} dev {BRIDGE}",
        "route add unreachable default",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    packets.bind((BRIDGE, 0))  # what is sent to the gateway or to everybody; not what hosts send to each other
    print("ready", flush=True)
    with file.open("a", buffering=1) as out:
        while True:
            ready, _, _ = select.select([packets, sys.stdin], [], [])
            if packets in ready:
                attempt = foreign(packets.recv(65536))
                if attempt is not None:
                    out.write(json.dumps({"time": time.time(), **attempt}) + "\n")
            elif not sys.stdin.read(1):
                return


def foreign(frame: bytes) -> dict[str, Any] | None:
    """What an Ethernet frame wants from a foreign address; None when its destination is local."""
    kind, packet = _ETHERNET.get(struct.unpack("!H", frame[12:14])[0]), frame[14:]
    protocol, payload = 0, b""
    if kind == "ipv4":
        source, target = packet[12:16], packet[16:20]
        protocol, payload = packet[9], packet[4 * (packet[0] & 15) :]
    elif kind == "ipv6":
        source, target = packet[8:24], packet[24:40]
        protocol, payload = packet[6], packet[40:]
        if protocol == 58 and payload[:1] == b"\x87":  # neighbour solicitation: who has the address at byte 8?
            target = payload[8:24]
    elif kind == "arp":
        source, target = packet[14:18], packet[24:28]
    else:
        return None
    address = ipaddress.ip_address(target)
    if any(address.version == network.version and address in network for network in _LOCAL):
        return None
    attempt: dict[str, Any] = {
        "kind": _TRANSPORT.get(protocol, kind),
        "source": str(ipaddress.ip_address(source)),
        "target": str(address),
    }
    if protocol in _TRANSPORT:
        attempt["port"] = struct.unpack("!H", payload[2:4])[0]
        if attempt["port"] == 53:
            attempt["text"] = "".join(chr(byte) if 32 < byte < 127 else "." for byte in payload[20:])
            if _OWN_NAMES in attempt["text"]:
                return None
    return attempt


if __name__ == "__main__":
    main(Path(sys.argv[1]))
