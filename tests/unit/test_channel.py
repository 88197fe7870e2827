"""The channel's codec: whatever comes, a packet or PacketError, and nothing else."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import channel

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), st.dictionaries(st.text(), JSON, max_size=5))
def test_what_was_encoded_is_decoded(kind: int, sequence: int, body: dict[str, object]) -> None:
    packet = channel.decode(channel.encode(kind, sequence, body))
    assert (packet.kind, packet.sequence, packet.body, packet.version) == (kind, sequence, body, channel.VERSION)


@given(st.binary(max_size=200))
def test_bytes_are_a_packet_or_an_error(data: bytes) -> None:
    for packet in (data, channel.HEADER.pack(channel.MAGIC, 1, 1, 1, len(data)) + data):
        try:
            assert isinstance(channel.decode(packet).body, dict)
        except channel.PacketError:
            pass


def test_changed_packets_are_packets_or_errors() -> None:
    chance = random.Random(7)
    real = [
        channel.encode(channel.HELLO, 1, {"min": 1, "max": 1}),
        channel.encode(channel.POD_ADD, 2, {"uid": "u", "addresses": ["10.0.0.1"], "netns_cookie": 2**63}),
    ]
    refused = 0
    for _ in range(20000):
        packet = bytearray(chance.choice(real))
        for _ in range(chance.randint(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        try:
            channel.decode(bytes(packet))
        except channel.PacketError:
            refused += 1
    assert refused > 5000


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"SSTP",
        channel.HEADER.pack(b"SSTQ", 1, 1, 1, 2) + b"{}",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 3) + b"{}",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 1) + b"{}",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 2) + b"[]",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 4) + b"null",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 2) + b"\xff\xff",
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 9) + b'{"a":NaN}',
        channel.HEADER.pack(b"SSTP", 1, 1, 1, 40000) + b"[" * 40000,
        b"x" * (channel.PACKET_MAX + 1),
    ],
)
def test_refused(packet: bytes) -> None:
    with pytest.raises(channel.PacketError):
        channel.decode(packet)


def test_the_largest_body_fits_and_no_larger() -> None:
    overhead = len(json.dumps({"a": ""}, separators=(",", ":")))
    assert len(channel.encode(1, 1, {"a": "x" * (channel.BODY_MAX - overhead)})) == channel.PACKET_MAX
    with pytest.raises(channel.PacketError):
        channel.encode(1, 1, {"a": "x" * (channel.BODY_MAX - overhead + 1)})
