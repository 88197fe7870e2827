"""The machine that the figures belong to: what it is, what its CPUs have worked, what a process has of its memory."""

import os
import platform
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds, or a share of them: `user` with nice, `softirq` with hard interrupts."""

    user: float = 0
    system: float = 0
    softirq: float = 0

    @property
    def all(self) -> float:
        """Everything that was worked."""
        return self.user + self.system + self.softirq

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(self.user - other.user, self.system - other.system, self.softirq - other.softirq)

    def over(self, amount: float) -> "Cpu":
        """For one of `amount`."""
        return Cpu(self.user / amount, self.system / amount, self.softirq / amount)


def parse_stat(text: str) -> Cpu:
    """The first line of /proc/stat (proc_stat(5)): idle, iowait and steal are no work, guest time is in user."""
    user, nice, system, _, _, irq, softirq = (int(word) for word in text.split("\n", 1)[0].split()[1:8])
    return Cpu((user + nice) / TICK, system / TICK, (irq + softirq) / TICK)


def worked() -> Cpu:
    """CPU seconds that all CPUs have worked since boot."""
    return parse_stat(Path("/proc/stat").read_text())


def process_s(pid: int) -> float:
    """CPU seconds of one process, all its threads (proc_pid_stat(5), utime and stime)."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / TICK


def pss_mib(*pids: int) -> float:
    """Proportional set size, added up (smaps_rollup, proc(5)): a page of three processes counts a third in each."""
    found = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found / 1024


def node_mib(*pids: int) -> float:
    """The PSS that these processes would have on a machine of their own: what others here map of the same files takes
    nothing off it. Their private memory, and of each shared file what that one has that has most of it."""
    return parse_smaps([Path(f"/proc/{pid}/smaps").read_text() for pid in pids])


def parse_smaps(texts: Sequence[str]) -> float:
    """MiB of processes that share memory only with each other, of their smaps (proc_pid_smaps(5))."""
    private = 0
    shared: dict[str, int] = {}
    for text in texts:
        mine: dict[str, int] = {}
        where = ""
        for line in text.splitlines():
            word, *rest = line.split()
            if not word.endswith(":"):  # a mapping begins: range, rights, offset, device, inode, path
                where = f"{rest[2]} {rest[3]}"
            elif word.startswith("Private_") and word != "Private_Hugetlb:":
                private += int(rest[0])
            elif word in ("Shared_Clean:", "Shared_Dirty:"):
                mine[where] = mine.get(where, 0) + int(rest[0])
        for where, kib in mine.items():
            shared[where] = max(shared.get(where, 0), kib)
    return (private + sum(shared.values())) / 1024


def session(leader: int) -> list[int]:
    """The processes of a session (proc_pid_stat(5), field 6)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def _said(*words: str) -> str:
    """First line of what a program says of its version; "" where it is not there."""
    if not shutil.which(words[0]):
        return ""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    return (done.stdout + done.stderr).strip().split("\n")[0]


def _aes_gcm() -> str:
    import sidestep._tunnel as _tunnel  # built by then

    return str(_tunnel.ffi.string(_tunnel.lib.tunnel_aes_gcm()).decode())


def describe() -> dict[str, Any]:
    """For the report. The engine uses the same libssl as this Python."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 1024 / 1024, 1),
        "kernel": platform.release(),
        "openssl": f"{ssl.OPENSSL_VERSION}, AES-GCM of the engine by {_aes_gcm()}",
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "load_before": os.getloadavg()[0],
        "nginx": _said("/usr/sbin/nginx", "-v"),
        "wrk": _said("wrk", "-v"),
    }
