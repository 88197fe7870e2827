"""State batches: the layout byte by byte, sealed memfds, and that streaming says the same as building in memory."""

import fcntl
import os
import struct

import pytest

from sidestep.wire.batch import CHUNK, SEALS, Batch, Op, Record, encode, pack


def test_layout() -> None:
    record = Record(Op.ADDRESS_SET, "a/b", "v1", b"\x0a\x00")
    assert pack(record) == struct.pack("<IIII", 1, 3, 2, 2) + b"a/bv1\x0a\x00" + b"\0"
    assert encode([record], full=True) == b"SSB1" + struct.pack("<III", 1, 1, 0) + pack(record)
    assert encode([]) == b"SSB1" + bytes(12)


@pytest.mark.parametrize("size", range(9))
def test_records_are_padded_to_eight(size: int) -> None:
    packed = pack(Record(Op.POLICY_SET, "n", "", b"x" * size))
    assert len(packed) % 8 == 0
    assert packed[16 + 1 + size :].strip(b"\0") == b""


@pytest.mark.parametrize(
    "record", [Record(Op.ADDRESS_DEL, ""), Record(Op.ADDRESS_DEL, "n" * 2049), Record(Op.ADDRESS_DEL, "n", "v" * 1025)]
)
def test_refused(record: Record) -> None:
    with pytest.raises(ValueError, match="a record with a name"):
        pack(record)


def test_streamed_is_what_is_built_in_memory() -> None:
    records = [Record(Op.ADDRESS_SET, f"u{i}", str(i), bytes([i % 251]) * (i % 97)) for i in range(9000)]
    with Batch(full=True) as batch:
        for record in records:
            batch.add(record)
        fd, size = batch.seal()
    try:
        assert size > 2 * CHUNK
        assert os.fstat(fd).st_size == size
        assert os.pread(fd, size, 0) == encode(records, full=True)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_a_batch_that_is_thrown_away_leaves_no_fd() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Batch() as batch:
        batch.add(Record(Op.ADDRESS_DEL, "a"))
    assert len(os.listdir("/proc/self/fd")) == before
