"""One run of a row: the program that does the work, compiled or Debian's, and what the machine paid for it."""

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.machine import Cpu, worked
from tests.bench.machine import process_s as process_s
from tests.bench.rows import ROWS as ROWS
from tests.bench.rows import Row as Row

ROOT = Path(__file__).resolve().parents[2]
BODY = 1024  # bytes of the page that wrk asks for
QUERY = 64  # bytes that a pgbench transaction moves at least
CARRIED = 0.97  # an open loop that does less than this of its rate is saturated


class LoadError(Exception):
    """A run had an error, or did not do what it claims: its figures are worth nothing."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. `rate` is operations or bytes per second; `cpu` is what the whole machine worked, seconds per operation
    or byte; `total_ops` and `total_bytes` (one direction) belong to the whole run, warm-up included. `saturated`: an
    open loop whose rate was not carried, so its latencies grow with the length of the run."""

    rate: float
    p50_ns: float
    p99_ns: float
    cpu: Cpu
    total_ops: int
    total_bytes: int
    saturated: bool = False

    @property
    def cpu_s(self) -> float:
        """User, system and softirq together."""
        return self.cpu.all


def compiled(name: str, *libraries: str) -> Path:
    """Compiles NAME.c of this folder where it is newer than the program. Returns the program's path."""
    source, binary = Path(__file__).with_name(f"{name}.c"), ROOT / "build" / name
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        new = binary.with_suffix(".new")
        flags = ["-O2", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", str(new), str(source), *libraries], check=True)
        new.rename(binary)
    return binary


def build() -> Path:
    """The load generator."""
    return compiled("load")


def pg_bin() -> Path:
    """Where Debian's PostgreSQL has its programs. Raises LoadError."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise LoadError("no pgbench under /usr/lib/postgresql: is Debian's postgresql installed?")
    return found[-1].parent


def measure(row: Row, prefix: Sequence[str], address: str, port: int, seconds: float) -> Sample:
    """Runs a row of the load generator; `prefix` is the command that puts it where it belongs, the program last.

    Raises LoadError when the generator counted an error.
    """
    done, cpu = _run(row, [*prefix, *row.words, address, str(port), str(seconds)], seconds)
    try:
        found = answer(done.stdout)
    except LoadError as error:
        raise LoadError(f"{row.name}: {done.stderr or error}") from None
    if done.returncode != 0 or found["errors"]:
        raise LoadError(f"{row.name}: {found['errors']} errors, the last: {found['error']}")
    return sample(row, found, cpu)


def answer(said: str) -> dict[str, Any]:
    """What the generator said. Raises LoadError where that is nothing."""
    try:
        return dict(json.loads(said))
    except json.JSONDecodeError:
        raise LoadError(f"the load said {said[:200]!r}") from None


def sample(row: Row, found: dict[str, Any], cpu: Cpu) -> Sample:
    """From what the generator said, and CPU seconds of the whole run. Raises LoadError."""
    amount, total = ("bytes", "total_bytes") if row.bulk else ("ops", "total_ops")
    if not found[amount]:
        raise LoadError(f"{row.name}: nothing was done in {found['seconds']} s")
    rate = found[amount] / found["seconds"]
    return Sample(
        rate=rate,
        p50_ns=found["p50_ns"],
        p99_ns=found["p99_ns"],
        cpu=cpu.over(found[total]),
        total_ops=found["total_ops"],
        total_bytes=found["total_bytes"],
        saturated=row.kind == "open" and rate < CARRIED * float(row.words[1]),
    )


def http(row: Row, enter: Sequence[str], address: str, port: int, seconds: float) -> Sample:
    """wrk, one thread, connections kept. Raises LoadError."""
    wrk = ["wrk", "-t1", f"-c{row.connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    done, cpu = _run(row, [*enter, *wrk, f"http://{f'[{address}]' if ':' in address else address}:{port}/"], seconds)
    return parse_wrk(row, done.stdout, cpu)


def parse_wrk(row: Row, text: str, cpu: Cpu) -> Sample:
    """What wrk 4.1 prints. Raises LoadError."""
    total = re.search(r"(\d+) requests in ([\d.]+)(s|m),", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    shares = dict(re.findall(r"^\s+(\d+)%\s+([\d.]+(?:us|ms|s))$", text, re.MULTILINE))
    if not total or not rate or not int(total[1]):
        raise LoadError(f"{row.name}: {text}")
    wrong = re.search(r"(Socket errors|Non-2xx).*", text)
    if wrong:
        raise LoadError(f"{row.name}: {wrong[0]}")
    ops = int(total[1])
    return Sample(float(rate[1]), _ns(shares["50"]), _ns(shares["99"]), cpu.over(ops), ops, ops * BODY)


def _ns(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 1e3, "ms": 1e6, "s": 1e9}[unit]


def postgres(row: Row, enter: Sequence[str], address: str, port: int, seconds: float) -> Sample:
    """pgbench, select only, prepared statements, connections kept. Raises LoadError."""
    words = [str(pg_bin() / "pgbench"), "-S", "-M", "prepared", "-n", "-c", str(row.connections), "-j", "1"]
    words += ["-T", str(max(1, round(seconds))), "-h", address, "-p", str(port), "-U", "bench"]
    with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as folder:
        done, cpu = _run(row, [*enter, *words, "-l", f"--log-prefix={folder}/log", "bench"], seconds)
        if done.returncode != 0:
            raise LoadError(f"{row.name}: {done.stderr}")
        return parse_pgbench(row, done.stdout, "".join(path.read_text() for path in Path(folder).iterdir()), cpu)


def parse_pgbench(row: Row, text: str, log: str, cpu: Cpu) -> Sample:
    """What pgbench 15 prints, and its log (a line per transaction, microseconds third). Raises LoadError."""
    ops = re.search(r"number of transactions actually processed: (\d+)", text)
    failed = re.search(r"number of failed transactions: (\d+)", text)
    rate = re.search(r"tps = ([\d.]+) \(without", text)
    took = sorted(int(line.split()[2]) for line in log.splitlines())
    if not ops or not int(ops[1]) or not rate or not took or (failed and int(failed[1])):
        raise LoadError(f"{row.name}: {text}")
    n = int(ops[1])
    p50, p99 = (took[int(share * (len(took) - 1))] * 1e3 for share in (0.5, 0.99))
    return Sample(float(rate[1]), p50, p99, cpu.over(n), n, n * QUERY)


def perform(row: Row, enter: Sequence[str], address: str, port: int, seconds: float) -> Sample:
    """A run of any row; `enter` is the command that goes into the client's namespace. Raises LoadError."""
    if row.kind == "wrk":
        return http(row, enter, address, port, seconds)
    if row.kind == "pgbench":
        return postgres(row, enter, address, port, seconds)
    return measure(row, [*enter, str(build())], address, port, seconds)


def _run(row: Row, command: list[str], seconds: float) -> tuple["subprocess.CompletedProcess[str]", Cpu]:
    before = worked()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{row.name}: did not end 60 s after its time") from None
    return done, worked() - before
