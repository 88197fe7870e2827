"""State batches for the engine (docs/interfaces.md): records on their way from xDS into a sealed memfd.

A *record* is an operation, a name, a version and a body; the body is the resource as it came by xDS, which nobody here
looks into. `Batch` streams: records go to the file in pieces of CHUNK bytes, so that a hundred thousand workloads cost
one piece of memory, not all of it.
"""

import fcntl
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"SSB1"
FULL = 1
NAME_MAX = 2048
VERSION_MAX = 1024
BODY_MAX = 2**32 - 1
CHUNK = 256 * 1024
HEADER = struct.Struct("<4sIII")
RECORD = struct.Struct("<IIII")
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Op(IntEnum):
    """What to do with the record of that name."""

    ADDRESS_SET = 1
    ADDRESS_DEL = 2
    POLICY_SET = 3
    POLICY_DEL = 4


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `body`: serialized istio.workload.Address or istio.security.Authorization; empty for a removal."""

    op: Op
    name: str
    version: str = ""
    body: bytes = b""


def sealed(content: bytes) -> int:
    """A memfd with these bytes, which nobody can change; the caller's. Raises OSError."""
    fd = os.memfd_create("sidestep-batch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def pack(record: Record) -> bytes:
    """Bytes of one record, padded to 8. Raises ValueError for a name or version that the engine would not take."""
    name, version = record.name.encode(), record.version.encode()
    if not 0 < len(name) <= NAME_MAX or len(version) > VERSION_MAX or len(record.body) > BODY_MAX:
        raise ValueError(f"a record with a name of {len(name)} bytes and a version of {len(version)} bytes")
    used = RECORD.size + len(name) + len(version) + len(record.body)
    head = RECORD.pack(record.op, len(name), len(version), len(record.body))
    return b"".join((head, name, version, record.body, bytes(-used % 8)))


def encode(records: Iterable[Record], full: bool = False) -> bytes:
    """A whole batch in memory: for small ones."""
    packed = [pack(record) for record in records]
    return HEADER.pack(MAGIC, FULL if full else 0, len(packed), 0) + b"".join(packed)


class Batch:
    """A batch that is being written into a memfd. `seal` ends it and gives the fd away; `close` throws it away.

    `full`: the engine drops every record that is not in this batch.
    """

    def __init__(self, full: bool = False) -> None:
        self._fd = os.memfd_create("sidestep-batch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._full = full
        self._pending = bytearray(HEADER.size)
        self._size = 0
        self.count = 0

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def add(self, record: Record) -> None:
        """Appends a record. Raises ValueError (then nothing was appended) or OSError."""
        self._pending += pack(record)
        self.count += 1
        if len(self._pending) >= CHUNK:
            self._flush()

    def seal(self) -> tuple[int, int]:
        """Ends the batch: (fd, bytes). The fd is the caller's, nobody can change what is in it."""
        self._flush()
        os.pwrite(self._fd, HEADER.pack(MAGIC, FULL if self._full else 0, self.count, 0), 0)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        fd, self._fd = self._fd, -1
        return fd, self._size

    def close(self) -> None:
        """Throws it away, unless it was sealed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        view = memoryview(bytes(self._pending))
        self._pending.clear()
        while view:
            written = os.write(self._fd, view)
            self._size += written
            view = view[written:]
