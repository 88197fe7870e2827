"""Protobuf's wire format, as much of it as the agent's few messages need: fields to bytes, bytes to fields.

google.protobuf with its descriptors costs 3 MiB and a tenth of a second at the agent's start, for six small messages.
What is large the agent does not read (decision 0001). Field numbers stand where the messages are made.
"""

from collections.abc import Iterator, Mapping

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5


def varint(number: int) -> bytes:
    """A number that is not negative."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: bytes | str | int) -> bytes:
    """One field; a message is its fields, one after the other. Nothing for a value that is the type's default."""
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value) if value else b""
    packed = value.encode() if isinstance(value, str) else value
    return b"".join((varint(number << 3 | _LEN), varint(len(packed)), packed)) if packed else b""


def struct(texts: Mapping[str, str]) -> bytes:
    """google.protobuf.Struct of texts."""
    return b"".join(
        field(1, field(1, key) + field(2, b"\x1a" + varint(len(value.encode())) + value.encode()))
        for key, value in texts.items()
    )


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message: number, and bytes or a number. Raises ValueError."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {_I64: 8, _I32: 4}.get(wire, 0)
        if wire == _LEN:
            size, at = _varint(message, at)
        elif not size:
            raise ValueError("a field of no known type")
        if number == 0 or size > end - at:
            raise ValueError("a message that is cut")
        yield number, message[at : at + size]
        at += size


def texts(message: bytes, number: int) -> list[str]:
    """The values of a repeated text. Raises ValueError."""
    return [value.decode() for found, value in fields(message) if found == number and isinstance(value, bytes)]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise ValueError("a message that is cut")
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError("a number that does not end")
