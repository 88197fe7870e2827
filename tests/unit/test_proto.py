"""The agent's own protobuf against google's: what one writes the other reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.wire import proto
from sidestep.wire.pb import citadel_pb2, discovery_pb2

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(TEXT, st.dictionaries(TEXT, TEXT, max_size=4), st.integers(0, 2**63 - 1))
def test_a_request_is_read_as_it_was_meant(csr: str, metadata: dict[str, str], seconds: int) -> None:
    written = proto.field(1, csr) + proto.field(3, seconds) + proto.field(4, proto.struct(metadata))
    found = citadel_pb2.IstioCertificateRequest.FromString(written)
    assert (found.csr, found.validity_duration, dict(found.metadata)) == (csr, seconds, metadata)


@given(st.lists(TEXT, max_size=5), TEXT)
def test_what_others_write_is_read(names: list[str], nonce: str) -> None:
    message = discovery_pb2.DeltaDiscoveryResponse(removed_resources=names, nonce=nonce)
    written = message.SerializeToString()
    assert proto.texts(written, 6) == names and proto.texts(written, 5) == ([nonce] if nonce else [])


@given(st.integers(0, 2**64 - 1))
def test_numbers(number: int) -> None:
    assert list(proto.fields(b"\x08" + proto.varint(number))) == [(1, number)]


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",
        b"\x0a\x02a",
        b"\x08",
        b"\x08\x80",
        b"\x08" + b"\xff" * 11,
        b"\x0b",
        b"\x0d\0\0",
        b"\x09\0",
        b"\x02\x01a",
    ],
)
def test_what_is_no_message(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut|end|known"):
        list(proto.fields(message))


def test_fields_of_every_kind() -> None:
    assert list(proto.fields(b"\x08\x01\x11abcdefgh\x1a\x02hi\x25wxyz")) == [
        (1, 1),
        (2, b"abcdefgh"),
        (3, b"hi"),
        (4, b"wxyz"),
    ]
