"""The load generator as Python calls it: compiled once, one row at a time, and what the machine paid for it."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TICK = os.sysconf("SC_CLK_TCK")


class LoadError(Exception):
    """A run had an error, or did not do what it claims: its figures are worth nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of work. `words` go to the generator before address, port and time; `share` is the least share of the
    rate without a mesh, `p50` the most times its median latency; None where the issue names no target."""

    name: str
    words: tuple[str, ...]
    share: float | None = None
    p50: float | None = None

    @property
    def bulk(self) -> bool:
        """The rate is bytes, not operations."""
        return self.words[0] == "bulk"


ROWS = (
    Row("64 B round trips, 1 connection", ("rr", "64", "1"), p50=2.65),
    Row("64 B round trips, 16 connections", ("rr", "64", "16"), share=0.21),
    Row("16 KiB round trips, 4 connections", ("rr", "16384", "4"), share=0.12),
    Row("bulk, 1 connection", ("bulk", "1"), share=0.23),
    Row("bulk, 4 connections", ("bulk", "4"), share=0.16),
    Row("connect-request-close, 1 at a time", ("crr", "1"), share=0.20),
    Row("connect-request-close, 16 at a time", ("crr", "16"), share=0.20),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. `rate` is operations or bytes per second; `cpu_s` is what the whole machine worked, per operation or
    byte; `total_ops` and `total_bytes` (request direction) belong to the whole run, warm-up included."""

    rate: float
    p50_ns: int
    p99_ns: int
    cpu_s: float
    total_ops: int
    total_bytes: int


def build() -> Path:
    """Compiles load.c where it is newer than the program. Returns the program's path."""
    source, binary = Path(__file__).with_name("load.c"), ROOT / "build/load"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        new = binary.with_suffix(".new")
        flags = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", str(new), str(source)], check=True)
        new.rename(binary)
    return binary


def busy_s() -> float:
    """CPU seconds that all CPUs have worked since boot: /proc/stat (proc_stat(5)) without idle, iowait and steal."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields[:3]) + sum(fields[5:7])) / TICK


def process_s(pid: int) -> float:
    """CPU seconds of one process, all its threads (proc_pid_stat(5), utime and stime)."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / TICK


def measure(row: Row, prefix: Sequence[str], address: str, port: int, seconds: float) -> Sample:
    """Runs a row's client; `prefix` is the command that puts it where it belongs, the program last.

    Raises LoadError when the generator counted an error.
    """
    command = [*prefix, *row.words, address, str(port), str(seconds)]
    before = busy_s()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    worked = busy_s() - before
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise LoadError(f"{row.name}: {' '.join(command)}: {done.stderr or done.stdout}") from None
    if done.returncode != 0 or found["errors"]:
        raise LoadError(f"{row.name}: {found['errors']} errors, the last: {found['error']}")
    amount, total = ("bytes", "total_bytes") if row.bulk else ("ops", "total_ops")
    if not found[amount]:
        raise LoadError(f"{row.name}: nothing was done in {seconds} s")
    return Sample(
        rate=found[amount] / found["seconds"],
        p50_ns=found["p50_ns"],
        p99_ns=found["p99_ns"],
        cpu_s=worked / found[total],
        total_ops=found["total_ops"],
        total_bytes=found["total_bytes"],
    )
