"""What a machine lacks is said in one line, before anything is touched: `sidestep check` and the agent."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sidestep.cli.nodes import Node, NodeError
from tests.harness.lab import everything_of

SIDESTEP = [sys.executable, "-m", "sidestep"]

# Answers EINVAL to bpf(BPF_PROG_LOAD) of one program type, or of one program. A filter cannot read the attributes: they
# are behind a pointer. bpf(2) goes through a user notification, and the launcher looks at them itself.
LAUNCHER = """
import ctypes, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
NR_BPF, NR_SECCOMP = 321, 317
class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]
def install():
    codes = ((0x20, 0, 0, 0), (0x15, 0, 1, NR_BPF), (0x06, 0, 0, 0x7fc00000), (0x06, 0, 0, 0x7fff0000))
    lines = (Filter * 4)(*(Filter(*code) for code in codes))
    libc.prctl(38, 1, 0, 0, 0)
    fd = libc.syscall(NR_SECCOMP, 1, 8, ctypes.byref(Program(4, lines)))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd
REFUSED = sys.argv[1]
here, there = __import__("socket").socketpair()
import array, socket
pid = os.fork()
if pid == 0:
    libc.prctl(1, 15, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with this one
    fd = install()
    there.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)
    os.execv(sys.argv[2], sys.argv[2:])
_, anc, _, _ = here.recvmsg(1, 64)
listener = array.array("i", anc[0][2])[0]
def supervise():
    import fcntl, select
    while True:
        note = bytearray(80)
        try: fcntl.ioctl(listener, 0xc0502100, note)
        except OSError: return
        ident, who = struct.unpack_from("<QI", note)
        number, _, _, command, attributes, size = struct.unpack_from("<iIQQQQ", note, 16)
        refuse = False
        if command == 5:
            with open(f"/proc/{who}/mem", "rb", 0) as memory:
                memory.seek(attributes)
                kind, name = struct.unpack("<I44x16s", memory.read(64))
                refuse = REFUSED in (str(kind), name.rstrip(bytes(1)).decode())
        answer = bytearray(struct.pack("<QqiI", ident, 0, -22 if refuse else 0, 0 if refuse else 1))
        try: fcntl.ioctl(listener, 0xc0182101, answer)
        except OSError: pass
threading.Thread(target=supervise, daemon=True).start()
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
SCHED_CLS, SK_LOOKUP, TRACING = 3, 30, 26


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Name of each requirement, and its level."""
    assert done.stdout, done.stderr
    return {item["name"]: item["level"] for item in json.loads(done.stdout)}


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def test_this_machine_will_do() -> None:
    done = run(*SIDESTEP, "check", "--json")
    assert [name for name, level in findings(done).items() if level == "fail"] == []
    assert done.returncode == 0
    assert "ok" in run(*SIDESTEP, "check").stdout


@pytest.mark.parametrize("kind", [SCHED_CLS, SK_LOOKUP, TRACING])
def test_a_kernel_without_a_program_type(kind: int) -> None:
    done = run(sys.executable, "-c", LAUNCHER, str(kind), *SIDESTEP, "check", "--json")
    failed = [name for name, level in findings(done).items() if level == "fail"]
    assert done.returncode == 1
    assert failed
    assert all(name.startswith("BPF") for name in failed)
    text = run(sys.executable, "-c", LAUNCHER, str(kind), *SIDESTEP, "check").stdout
    assert any(line.startswith("FAIL") and "Invalid argument" in line for line in text.splitlines()), text


def test_a_kernel_without_what_native_flows_need() -> None:
    """It will do; what it cannot is said."""
    assert findings(run(*SIDESTEP, "check", "--json"))["native flows"] == "ok"
    done = run(sys.executable, "-c", LAUNCHER, "flows", *SIDESTEP, "check", "--json")
    found = findings(done)
    assert found.pop("native flows") == "warn"
    assert [name for name, level in found.items() if level == "fail"] == []
    assert done.returncode == 0


def test_without_bpffs() -> None:
    done = run("unshare", "-m", "sh", "-c", 'umount -l /sys/fs/bpf && exec "$@"', "sh", *SIDESTEP, "check", "--json")
    assert findings(done)["bpffs"] == "fail"
    assert done.returncode == 1


def test_without_a_capability() -> None:
    done = run("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--", *SIDESTEP, "check", "--json")
    assert findings(done)["privileges"] == "fail"
    assert done.returncode == 1


def test_without_root() -> None:
    done = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *SIDESTEP, "check", "--json")
    assert findings(done)["privileges"] == "fail"
    assert done.returncode == 1


HIDE = """
for place in /usr/sbin /usr/lib/cni; do mount --bind "$1" $place || exit 9; done
shift
PATH=/nowhere exec "$@"
"""


def test_without_tools(tmp_path: Path) -> None:
    """Only the lab needs them: a warning that names each, and no failure."""

    def tools(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
        assert done.stdout, done.stderr
        return dict(next(item for item in json.loads(done.stdout) if item["name"] == "lab tools"))

    assert tools(run(*SIDESTEP, "check", "--json"))["level"] == "ok"
    done = run("unshare", "-m", "sh", "-c", HIDE, "sh", str(tmp_path), *SIDESTEP, "check", "--json")
    found = tools(done)
    assert found["level"] == "warn"
    missing = found["found"].removeprefix("missing ").split(", ")
    assert sorted(word.split(" ")[0] for word in missing) == [
        "bridge", "dnsmasq", "host-local", "ip", "loopback", "nft", "ptp",
    ]  # fmt: skip
    assert "make setup" in found["advice"]
    assert [name for name, level in findings(done).items() if level == "fail"] == []
    assert done.returncode == 0


def agent(tmp_path: Path, *more: str) -> list[str]:
    """An agent's command line that is right but for what the test changes."""
    kubeconfig = tmp_path / "kubeconfig"
    user = {"name": "x", "user": {"token": "t"}}
    cluster = {"name": "x", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "x", "context": {"user": "x", "cluster": "x"}}
    kubeconfig.write_text(json.dumps({"users": [user], "clusters": [cluster], "contexts": [context]}))
    return [
        *SIDESTEP, "agent", "--node", "n", "--node-ip", "127.0.0.1", "--engine-socket", str(tmp_path / "engine.sock"),
        "--run-dir", str(tmp_path / "run"), "--kubeconfig", str(kubeconfig),
        "--state-file", str(tmp_path / "state.yaml"), *more,
    ]  # fmt: skip


def test_the_agent_without_bpffs(tmp_path: Path) -> None:
    done = run(*agent(tmp_path, "--bpf-dir", str(tmp_path / "bpf")))
    assert done.returncode == 1
    assert "bpffs" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_the_agent_with_a_port_taken(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 15021))
        taken.listen()
        done = run(*agent(tmp_path, "--bpf-dir", "/sys/fs/bpf/t-check"))
    assert done.returncode == 1
    assert "15021" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_the_agent_without_root(tmp_path: Path) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    done = run(*nobody, *agent(tmp_path, "--bpf-dir", "/sys/fs/bpf/t-check"))
    assert done.returncode == 1
    assert "root" in done.stderr
    assert "Traceback" not in done.stderr


# -- what starts something says it first, and starts nothing -----------------------------------------------------------
def without(*capabilities: str) -> list[str]:
    dropped = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", "--"]


def refusing(kind: int) -> list[str]:
    return [sys.executable, "-c", LAUNCHER, str(kind)]


NO_BPFFS = ["unshare", "-m", "sh", "-c", 'umount -l /sys/fs/bpf && exec "$@"', "sh"]
LACKING = [
    pytest.param(refusing(SCHED_CLS), "tc egress", id="sched_cls"),
    pytest.param(refusing(SK_LOOKUP), "sk_lookup", id="sk_lookup"),
    pytest.param(refusing(TRACING), "iterator", id="iterator"),
    pytest.param(NO_BPFFS, "mount -t bpf", id="bpffs"),
    pytest.param(without("net_admin"), "CAP_NET_ADMIN", id="net_admin"),
    pytest.param(without("sys_admin", "bpf"), "CAP_", id="sys_admin"),
]


@pytest.mark.parametrize(("prefix", "says"), [*LACKING, pytest.param(without("bpf"), "CAP_BPF", id="bpf")])
def test_lab_up_on_a_machine_that_lacks_something(prefix: list[str], says: str) -> None:
    name = f"q{os.getpid() % 10000}"
    done = run(*prefix, *SIDESTEP, "lab", "up", "--name", name, "--nodes", "1")
    assert done.returncode == 1
    assert done.stdout == ""  # not even begun
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert everything_of(name) == []


@pytest.mark.parametrize("missing", ["net_admin", "sys_admin"])
def test_a_plain_lab_needs_what_makes_its_nodes(missing: str) -> None:
    name = f"q{os.getpid() % 10000}"
    done = run(*without(missing), *SIDESTEP, "lab", "up", "--name", name, "--nodes", "1", "--plain")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"CAP_{missing.upper()}" in done.stderr
    assert everything_of(name) == []


@pytest.mark.parametrize(("prefix", "says"), LACKING)
def test_the_agent_on_a_machine_that_lacks_something(tmp_path: Path, prefix: list[str], says: str) -> None:
    pins = Path(f"/sys/fs/bpf/t-check-{os.getpid()}")
    command = agent(tmp_path, "--bpf-dir", str(pins))
    files = sorted(tmp_path.iterdir())
    done = run(*prefix, *command)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == files  # no run directory, no socket
    assert not pins.exists()


@pytest.mark.parametrize("lacks", [False, True])
def test_an_agent_that_cannot_have_native_flows(tmp_path: Path, lacks: bool) -> None:
    """It works without them and says so."""
    pins = Path(f"/sys/fs/bpf/t-check-{os.getpid()}")
    alone = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    prefix = [sys.executable, "-c", LAUNCHER, "flows"] if lacks else []
    (tmp_path / "state.yaml").write_text("{}")
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*alone, *prefix, *agent(tmp_path, "--bpf-dir", str(pins), "--same-node", "native")], stderr=out
        )
    try:
        node = Node(tmp_path / "run" / "agent.sock")
        status: dict[str, Any] = {}
        deadline = time.monotonic() + 60
        while not status:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            with suppress(NodeError):
                status = node.ask("/status")
            time.sleep(0.05)
        lines = [line for line in log.read_text().splitlines() if "native_unavailable" in line]
        assert status["settings"]["same_node"] == ("direct" if lacks else "native")
        assert ("iterator" in status["no_native"]) is lacks
        assert len(lines) == lacks and all("level=WARN" in line for line in lines)
    finally:
        process.terminate()
        process.wait(20)
        subprocess.run(["rm", "-rf", str(pins)], check=True)
