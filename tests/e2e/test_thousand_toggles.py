"""One idle pod joins and leaves the mesh a thousand times: the kernel, the agent and the engine are what they were.

A lab of its own, whose agent lets a released pod go at once. The state after 50 rounds is the base, for by then every
cache and pool is there; both processes may grow by less than 2 MiB from it. With acceleration, which has more maps and
the same steps, 300 rounds must do.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep.cli.nodes import find
from sidestep.kube.client import KubeClient
from tests.e2e.conftest import pod
from tests.harness.lab import ANNOTATION, LABEL, Lab, eventually

FIRST, ROUNDS, GROWTH_KIB, GUARD_S = 50, {"direct": 1000, "native": 300}, 2048, 1200.0
NAMESPACE, POD = "/api/v1/namespaces/idle", "/api/v1/namespaces/idle/pods/one"


@pytest.fixture
def lab(tmp_path: Path, same_node: str) -> Iterator[Lab]:
    manifest = tmp_path / "idle.yaml"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "idle"}}
    manifest.write_text(yaml.safe_dump_all([namespace, *pod("one", "node1", ["sleep", "infinity"], namespace="idle")]))
    lab = Lab(f"t{os.getpid() % 10000}", nodes=1)
    try:
        lab.up(manifest, options=["--same-node", same_node, "--agent-arg=--drain-quiet-s=0"])
        yield lab
    finally:
        lab.down()


async def toggle(lab: Lab, rounds: int) -> None:
    """In and out, each until the agent says so."""
    agent = find(lab.name)[0]

    def modes() -> list[str]:
        return [each["mode"] for each in agent.ask("/pods") if each["namespace"] == "idle"]

    async with KubeClient.from_config(lab.command("kubeconfig").stdout.strip()) as client:
        for _ in range(rounds):
            await client.patch(NAMESPACE, {"metadata": {"labels": {LABEL: "ambient"}}})
            while modes() != ["strict"] or not ((await client.get(POD))["metadata"].get("annotations") or {}).get(
                ANNOTATION
            ):
                await asyncio.sleep(0.005)
            await client.patch(NAMESPACE, {"metadata": {"labels": {LABEL: None}}})
            while modes() != ["none"]:
                await asyncio.sleep(0.005)


def shown(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def held(pid: int) -> dict[str, int]:
    """The descriptors of a process by kind: bpf-prog, bpf-map, socket and so on."""
    found: dict[str, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            kind = os.readlink(fd).removeprefix("anon_inode:").partition(":")[0]
            kind = "file" if kind.startswith("/") else kind
            found[kind] = found.get(kind, 0) + 1
    return found


def left(lab: Lab, pids: dict[str, int]) -> dict[str, Any]:
    """All that a toggle makes and has to take away. A program or a map lives by a descriptor, a pin, a filter or a
    link: each is looked for.
    """
    netns = lab.netns("idle/one")
    enter = ["nsenter", f"--net={netns}"]
    inode = os.stat(netns).st_ino
    found: dict[str, Any] = {f"fds of {name}": held(pid) for name, pid in pids.items()}
    found["links"] = [
        each for each in json.loads(shown("bpftool", "-j", "link", "show")) if each.get("netns_ino") == inode
    ]
    found["pins"] = sorted(str(path) for path in Path(lab.status()["nodes"][0]["bpf_dir"]).glob("v*/*"))
    for family in ("-4", "-6"):
        found[f"rules {family}"] = shown(*enter, "ip", family, "rule")
        found[f"routes {family}"] = shown(*enter, "ip", family, "route", "show", "table", "all")
    found["filters"] = [
        shown(*enter, "tc", "filter", "show", "dev", device, way)
        for device, way in (("eth0", "egress"), ("eth0", "ingress"), ("lo", "egress"), ("lo", "ingress"))
    ]
    found["sockets"] = shown(*enter, "ss", "-Htan")
    return found


def more(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is there afterwards and was not before. Fewer descriptors are no leak: an idle connection may have ended."""
    found: dict[str, Any] = {}
    for what, now in after.items():
        if what.startswith("fds"):
            grown = {kind: (before[what].get(kind, 0), n) for kind, n in now.items() if n > before[what].get(kind, 0)}
            if grown:
                found[what] = grown
        elif now != before[what]:
            found[what] = (before[what], now)
    return found


def own_kib(pid: int) -> int:
    """The memory that a process has made itself. Not its PSS: that grows when another who shares a library ends."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise AssertionError(f"no memory of {pid}")


@pytest.mark.slow
@pytest.mark.timeout(GUARD_S + 60)
def test_a_thousand_toggles_leave_nothing(lab: Lab, same_node: str) -> None:
    rounds = ROUNDS[same_node] - FIRST
    processes = lab.status()["nodes"][0]["processes"]
    pids = {name: processes[name]["pid"] for name in ("agent", "engine")}

    def run(times: int) -> float:
        started = time.monotonic()
        asyncio.run(asyncio.wait_for(toggle(lab, times), GUARD_S))
        return (time.monotonic() - started) / times * 1000

    run(FIRST)
    looks = [left(lab, pids)]

    def settled() -> bool:
        looks.append(left(lab, pids))
        return looks[-1] == looks[-2]

    eventually("the first rounds are settled", settled)
    lab.enrol("idle")
    during = left(lab, pids)  # the looks see what a pod in the mesh has
    seen = more(looks[-1], during)
    assert seen.keys() >= {"fds of agent", "fds of engine", "links", "pins", "filters", "sockets"}, seen
    run(1)
    eventually("and it goes away", lambda: not more(looks[-1], left(lab, pids)))
    before, memory = looks[-1], {name: own_kib(pid) for name, pid in pids.items()}
    took_ms = run(rounds)
    last: list[dict[str, Any]] = []

    def gone() -> bool:
        last.append(more(before, left(lab, pids)))
        return not last[-1]

    try:
        eventually("what is left is what was there", gone)
    finally:
        print(f"left over: {last[-1]}")
    grown = {name: own_kib(pid) - memory[name] for name, pid in pids.items()}
    print(f"one toggle: {took_ms:.0f} ms; own memory in KiB after {FIRST} rounds {memory}, grown since by {grown}")
    now = lab.status()["nodes"][0]["processes"]
    assert {name: now[name]["pid"] for name in pids} == pids  # nobody was restarted meanwhile
    assert all(each < GROWTH_KIB for each in grown.values()), grown
