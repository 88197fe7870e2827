"""Packets of the channel between agent and engine (docs/interfaces.md): bytes to values and back, no I/O.

A packet is one datagram of a SEQPACKET socket: a header of 16 bytes (`<4sHHII`: magic, version, type, sequence, body
length) and a JSON object in UTF-8. A *command* has a type below 0x8000; its *reply* has the same sequence and the type
with the top bit set, and says `ok`. File descriptors ride beside the packet and are none of this module's business.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAGIC = b"SSTP"
VERSION = 1
REPLY = 0x8000
PACKET_MAX = 65536
FDS_MAX = 16
HEADER = struct.Struct("<4sHHII")
BODY_MAX = PACKET_MAX - HEADER.size

HELLO = 1
SETTINGS = 2
POD_ADD = 3
POD_MODE = 4
POD_DEL = 5
IDENTITY_SET = 6
IDENTITY_DEL = 7
APPLY = 8
METRICS = 9
DUMP = 10
POD_STATS = 11
SHUTDOWN = 12
AUTHZ = 13

NAMES: Mapping[int, str] = {
    HELLO: "HELLO",
    SETTINGS: "SETTINGS",
    POD_ADD: "POD_ADD",
    POD_MODE: "POD_MODE",
    POD_DEL: "POD_DEL",
    IDENTITY_SET: "IDENTITY_SET",
    IDENTITY_DEL: "IDENTITY_DEL",
    APPLY: "APPLY",
    METRICS: "METRICS",
    DUMP: "DUMP",
    POD_STATS: "POD_STATS",
    SHUTDOWN: "SHUTDOWN",
    AUTHZ: "AUTHZ",
}


class PacketError(ValueError):
    """Not a packet of this channel."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet. `kind`: a command's type, with REPLY set in a reply; `body`: the JSON object."""

    kind: int
    sequence: int
    body: Mapping[str, Any]
    version: int = VERSION


def encode(kind: int, sequence: int, body: Mapping[str, Any]) -> bytes:
    """Bytes of a packet. Raises PacketError when the body does not fit."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")
    if len(text) > BODY_MAX:
        raise PacketError(f"a body of {len(text)} bytes, the limit is {BODY_MAX}")
    return HEADER.pack(MAGIC, VERSION, kind, sequence, len(text)) + text


def decode(packet: bytes) -> Packet:
    """The packet these bytes are. Raises PacketError for anything else, whatever the bytes."""
    if len(packet) > PACKET_MAX:
        raise PacketError("a packet that is too long")
    if len(packet) < HEADER.size:
        raise PacketError(f"a packet of {len(packet)} bytes")
    magic, version, kind, sequence, length = HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise PacketError("a packet without the magic number")
    if length != len(packet) - HEADER.size:
        raise PacketError(f"a body of {len(packet) - HEADER.size} bytes where the header says {length}")
    try:
        body = json.loads(packet[HEADER.size :].decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as err:
        raise PacketError(f"a body that is not JSON: {err}") from None
    if not isinstance(body, dict):
        raise PacketError("a body that is not an object")
    return Packet(kind, sequence, body, version)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
