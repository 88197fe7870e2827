"""The witness must find every kind of violation, and none in what is right."""

import struct

import pytest

from sidestep.lab.link import Endpoint, Flow, Violation, parse, records, violations

CLIENT, SERVER = Endpoint("10.0.0.1", 40000), Endpoint("10.0.0.2", 15008)


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("!BHH", kind, 0x0303, len(body)) + body


def server_hello(version: int | None) -> bytes:
    extension = b"" if version is None else struct.pack("!HHH", 43, 2, version)
    body = (
        struct.pack("!H", 0x0303)
        + bytes(32)
        + b"\0"
        + b"\x13\x01"
        + b"\0"
        + struct.pack("!H", len(extension))
        + extension
    )
    return record(22, b"\x02" + len(body).to_bytes(3, "big") + body)


def flow(source: Endpoint, destination: Endpoint, payload: bytes) -> Flow:
    made = Flow(source, destination, syn=True, answered=True)
    made.add(1000, payload)
    return made


def kinds(found: list[Violation]) -> list[str]:
    return [violation.kind for violation in found]


@pytest.mark.parametrize(
    ("seen", "canaries", "expected"),
    [
        ([flow(CLIENT, SERVER, record(22, b"\x01abc"))], [], []),
        ([flow(SERVER, CLIENT, server_hello(0x0304) + record(23, b"x"))], [], []),
        ([flow(SERVER, CLIENT, server_hello(0x0303))], [], ["old-tls"]),
        ([flow(SERVER, CLIENT, server_hello(None))], [], ["old-tls"]),
        ([flow(SERVER, CLIENT, record(23, b"x"))], [], ["no-server-hello"]),
        ([flow(CLIENT, SERVER, b"GET / HTTP/1.1\r\n")], [], ["not-tls"]),
        ([flow(CLIENT, Endpoint("10.0.0.2", 80), b"GET /")], [], ["clear-connection"]),
        ([flow(CLIENT, Endpoint("10.0.0.2", 80), b"")], [], []),
        ([flow(CLIENT, SERVER, record(23, b"the word"))], [b"the word"], ["canary"]),
    ],
)
def test_violations(seen: list[Flow], canaries: list[bytes], expected: list[str]) -> None:
    assert kinds(violations(seen, canaries)) == expected


def test_payload_is_put_back_into_order() -> None:
    made = Flow(CLIENT, SERVER)
    for sequence, part in [(2**32 - 2, b"ab"), (3, b"fg"), (0, b"cde"), (0, b"cd")]:
        made.add(sequence, part)
    assert made.payload() == b"abcdefg"
    assert made.payload_bytes == 7


def test_a_gap_ends_the_payload_but_not_the_search() -> None:
    made = Flow(CLIENT, SERVER)
    made.add(0, b"ab")
    made.add(10, b"secret")
    assert made.payload() == b"ab"
    assert kinds(violations([made], [b"secret"])) == ["canary", "not-tls"] or b"secret" in made.fragments()


def test_records_refuses_what_is_not_tls() -> None:
    with pytest.raises(ValueError, match="byte 6"):
        list(records(record(23, b"x") + b"plain text"))


@pytest.mark.parametrize("family", [4, 6])
def test_parse_both_families(family: int) -> None:
    tcp = struct.pack("!HHIIBBHHH", 5, 15008, 77, 0, 5 << 4, 0x18, 0, 0, 0) + b"data"
    if family == 4:
        packet = (
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + tcp
        )
        frame = bytes(12) + b"\x08\x00" + packet + b"padding of the link"
    else:
        packet = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2" + tcp
        frame = bytes(12) + b"\x86\xdd" + packet
    segment = parse(frame)
    assert segment is not None
    assert (segment.source.port, segment.destination.port, segment.sequence, segment.payload) == (5, 15008, 77, b"data")


def test_parse_ignores_the_rest() -> None:
    assert parse(b"") is None
    assert parse(bytes(60)) is None
    assert parse(bytes(12) + b"\x08\x00" + bytes([0x45] + [0] * 8 + [17] + [0] * 30)) is None
