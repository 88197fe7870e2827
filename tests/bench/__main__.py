"""`make bench`: the same work in a lab with the mesh and in one without, side by side, in turns.

Two labs of two nodes. On node1 ten pods: the client, a server for the paths that stay on the node, eight that sleep; on
node2 the other server. Every round runs each row plain, then meshed; a row's figures are medians over the rounds, its
share the median of the rounds' own shares. CPU is what the whole machine worked, from /proc/stat.

A case is aborted, and the status is 1, when the load counted an error, or when the link's byte counters or the engines'
metrics do not show the path that the case is about. A missed target is named, and the status is 1 too.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench.load import ROOT, ROWS, LoadError, Row, Sample, build, measure
from tests.harness.lab import LABEL, Lab, eventually
from tests.harness.netns import inside, run

PORT = 7100
METRICS = 15020
SLEEPERS = 8
STALLED = 8
STALLED_SHARE = 0.5
MEMORY_MIB = 80
PLACES = (("across", "server"), ("local", "near"))


def manifests(program: Path, mode: str) -> list[dict[str, Any]]:
    """The namespace, labelled `mode`, and its pods. A lab without the mesh does not care for the label."""
    servers = {"near": "node1", "server": "node2"}
    places = {"client": "node1", **servers, **{f"sleeper{n}": "node1" for n in range(SLEEPERS)}}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench", "labels": {LABEL: mode}}}
    ]
    for name, node in places.items():
        metadata = {"name": name, "namespace": "bench"}
        command = [str(program), "serve", str(PORT)] if name in servers else ["sleep", "infinity"]
        container: dict[str, Any] = {"name": "main", "image": "host", "command": command}
        spec = {"nodeName": node, "serviceAccountName": name, "terminationGracePeriodSeconds": 1}
        objects.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        objects.append(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, "containers": [container]}}
        )
    return objects


@dataclass(frozen=True, slots=True)
class Counters:
    """What the mesh and the link have counted so far; bytes in both directions of node1's link."""

    link_bytes: int
    tls: float  # connections with mutual TLS, as both nodes' engines report them
    local: float  # connections that stayed on the node


class Side:
    """One of the two labs, up, with what the measurements need of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        status = lab.status()
        self.nodes = {node["name"]: node for node in status["nodes"]}
        pods = {pod["name"]: pod for pod in status["pods"] if pod["namespace"] == "bench"}
        self.addresses = {name: pod["ips"][0] for name, pod in pods.items()}
        state = Path(self.nodes["node1"]["run_dir"]).parent
        self.client = str(state / "netns" / pods["client"]["uid"])
        run("nsenter", f"--net={self.client}", "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")

    def counters(self) -> Counters:
        """Reads link and engines."""
        link = inside(self.nodes["node1"]["netns"], self._link_bytes)
        if self.lab.plain:
            return Counters(link, 0, 0)
        texts = [inside(node["netns"], _metrics) for node in self.nodes.values()]
        return Counters(
            link,
            sum(_sum(text, "istio_tcp_connections_opened_total", 'security_policy="mutual_tls"') for text in texts),
            sum(_sum(text, "sidestep_same_node_connections_total", "") for text in texts),
        )

    def _link_bytes(self) -> int:
        interface = self.nodes["node1"]["link"]["interface"]
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == interface:
                fields = rest.split()
                return int(fields[0]) + int(fields[8])
        raise LoadError(f"no {interface} on node1")

    def case(self, row: Row, place: str, server: str, seconds: float) -> Sample:
        """One run. Raises LoadError when it had an error or did not go the way it should."""
        before = self.counters()
        prefix = ["nsenter", f"--net={self.client}", "--", str(build())]
        sample = measure(row, prefix, self.addresses[server], PORT, seconds)
        after = self.counters()
        wrong = self._wrong(row, place, sample, before, after)
        if wrong:
            raise LoadError(f"{'plain' if self.lab.plain else 'mesh'}, {place}: {row.name}: {wrong}")
        return sample

    def _wrong(self, row: Row, place: str, sample: Sample, before: Counters, after: Counters) -> str:
        """In which way the counters contradict the path; "" when they do not."""
        crossed = after.link_bytes - before.link_bytes
        carried = sample.total_bytes if row.bulk else 2 * sample.total_bytes
        if place == "across" and crossed < carried:
            return f"{crossed} bytes crossed the link, and the applications sent {carried}"
        if place == "local" and crossed > carried / 2 + 1_000_000:
            return f"{crossed} bytes crossed the link, and nothing should"
        if self.lab.plain:
            return ""
        connections = sample.total_ops if row.words[0] == "crr" else int(row.words[-1])
        tls, local = after.tls - before.tls, after.local - before.local
        if place == "across" and (tls < 2 * connections or local):
            return f"{connections} connections, {tls:.0f} ends with mutual TLS, {local:.0f} local ones"
        if place == "local" and (local < connections or tls):
            return f"{connections} connections, {tls:.0f} ends with mutual TLS, {local:.0f} local ones"
        return ""

    def memory_mib(self) -> dict[str, float]:
        """PSS of node1's agent and engine (smaps_rollup, proc(5)), with the engine's supervisor."""
        found = {}
        for name in ("agent", "engine"):
            process = self.nodes["node1"]["processes"][name]
            found[name] = sum(_pss_kib(process[key]) for key in ("pid", "supervisor") if key in process) / 1024
        return found


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise LoadError(f"no Pss of process {pid}")


def _metrics() -> str:
    connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=20)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200:
        raise LoadError(f"the agent's metrics: status {answer.status}")
    return text


def _sum(text: str, name: str, label: str) -> float:
    """A family's samples whose labels contain `label`, added up."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")) and label in line)
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextlib.contextmanager
def labs(folder: Path, mode: str) -> Iterator[tuple[Side, Side]]:
    """The plain and the meshed lab, both with every pod ready; with mode `ambient` every pod of the latter enrolled."""
    manifest = folder / "bench.yaml"
    manifest.write_text(yaml.safe_dump_all(manifests(build(), mode)))
    number = os.getpid() % 10000
    pair = (Lab(f"bp{number}", plain=True), Lab(f"bm{number}"))
    with contextlib.ExitStack() as stack:
        for lab in pair:
            stack.callback(lab.down)
            lab.up(manifest)
        pods = {item["metadata"]["name"] for item in pair[1].pods("bench")} if mode == "ambient" else set()
        eventually("every pod enrolled", lambda: pair[1].enrolled("bench") == pods)
        plain, mesh = Side(pair[0]), Side(pair[1])
        yield plain, mesh


@dataclass(frozen=True, slots=True)
class Result:
    """A row at a place: the samples of both sides, or why there are none."""

    place: str
    row: Row
    plain: list[Sample]
    mesh: list[Sample]
    aborted: str

    def share(self) -> float:
        """Of the rate without a mesh."""
        return statistics.median(b.rate / a.rate for a, b in zip(self.plain, self.mesh, strict=True))

    def p50(self) -> float:
        """Median latency, times that without a mesh; 0 for bulk."""
        pairs = zip(self.plain, self.mesh, strict=True)
        return 0 if self.row.bulk else statistics.median(b.p50_ns / a.p50_ns for a, b in pairs)

    def missed(self) -> list[str]:
        """Targets that were not reached; the issue has them for the way across nodes."""
        found = []
        if self.place == "across" and not self.aborted:
            if self.row.share is not None and self.share() < self.row.share:
                found.append(f"{self.row.name}: {self.share():.3f} of no mesh, not {self.row.share}")
            if self.row.p50 is not None and self.p50() > self.row.p50:
                found.append(f"{self.row.name}: p50 is {self.p50():.2f} times that of no mesh, not {self.row.p50}")
        return found

    def record(self) -> dict[str, Any]:
        """For the JSON file: medians, and every sample's rate."""
        record: dict[str, Any] = {"place": self.place, "row": self.row.name, "aborted": self.aborted}
        if self.aborted:
            return record
        for name, samples in (("plain", self.plain), ("mesh", self.mesh)):
            record[name] = {
                "rates": [round(s.rate, 1) for s in samples],
                "unit": "bytes/s" if self.row.bulk else "operations/s",
                "p50_us": statistics.median(s.p50_ns for s in samples) / 1e3,
                "p99_us": statistics.median(s.p99_ns for s in samples) / 1e3,
                "cpu": statistics.median(s.cpu_s for s in samples) * (1e9 if self.row.bulk else 1e6),
                "cpu_unit": "s/GB" if self.row.bulk else "us/operation",
            }
        return {
            **record,
            "share": round(self.share(), 4),
            "share_target": self.row.share,
            "p50_ratio": round(self.p50(), 3),
            "p50_target": self.row.p50,
            "missed": self.missed(),
        }

    def line(self) -> str:
        """For people."""
        if self.aborted:
            return f"{self.place:7}{self.row.name:36}  aborted: {self.aborted}"
        unit, scale, cpu = ("MB/s", 1e6, 1e9) if self.row.bulk else ("/s", 1, 1e6)
        rates = [statistics.median(s.rate for s in side) / scale for side in (self.plain, self.mesh)]
        costs = [statistics.median(s.cpu_s for s in side) * cpu for side in (self.plain, self.mesh)]
        aims = (self.row.share, self.row.p50) if self.place == "across" else (None, None)
        latency = f"{self.p50():7.2f}" if self.p50() else f"{'':7}"
        words = [
            f"{self.place:7}{self.row.name:36}",
            f"{rates[0]:9.0f} {rates[1]:9.0f} {unit:5}",
            f"{self.share():6.3f}{aims[0] or '':>7}{latency}{aims[1] or '':>7}",
            f"{costs[0]:10.2f}{costs[1]:10.2f} {'s/GB' if self.row.bulk else 'us'}",
            "  MISSED" if self.missed() else "",
        ]
        return "".join(words)


def collect(plain: Side, mesh: Side, rounds: int, seconds: float) -> list[Result]:
    """Every row at both places, in turns; a case that was aborted once is not run again."""
    results = [Result(place, row, [], [], "") for place, _ in PLACES for row in ROWS]
    servers = dict(PLACES)
    for number in range(rounds):
        for at, result in enumerate(results):
            if result.aborted:
                continue
            if sys.stderr.isatty():
                print(f"\rround {number + 1}/{rounds}: {result.place}, {result.row.name:40}", end="", file=sys.stderr)
            try:
                bare = plain.case(result.row, result.place, servers[result.place], seconds)
                covered = mesh.case(result.row, result.place, servers[result.place], seconds)
            except LoadError as error:
                results[at] = Result(result.place, result.row, [], [], str(error))
            else:
                result.plain.append(bare)
                result.mesh.append(covered)
    if sys.stderr.isatty():
        print(f"\r{'':80}\r", end="", file=sys.stderr)
    return results


def stalled(mesh: Side, rounds: int, seconds: float) -> float:
    """Rate of one bulk connection beside STALLED readers that do not read, as a share of its rate alone (median).

    Raises LoadError when a run had an error, or when the readers were not full in time.
    """
    row = next(row for row in ROWS if row.words == ("bulk", "1"))
    stall = ["nsenter", f"--net={mesh.client}", "--", str(build()), "stall", str(STALLED), mesh.addresses["server"]]
    shares = []
    for _ in range(rounds):
        alone = mesh.case(row, "across", "server", seconds)
        process = subprocess.Popen([*stall, str(PORT), str(seconds + 30)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "full\n":
                raise LoadError("readers that do not read: their connections did not fill up")
            beside = mesh.case(row, "across", "server", seconds)
            if process.poll() is not None:
                raise LoadError("readers that do not read: their connections ended")
        finally:
            process.kill()
            process.wait()
        shares.append(beside.rate / alone.rate)
    return statistics.median(shares)


def main() -> int:
    """Returns the status: 1 when a case was aborted or a target missed (a quick run misses none: it judges nothing)."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case, at least 3 for a judgement")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--quick", action="store_true", help="one short round: does everything work?")
    parser.add_argument("--control", action="store_true", help="with no pod in the mesh: its cases must be aborted")
    parser.add_argument("--json", type=Path, default=ROOT / "results/bench.json", help="where the figures go")
    options = parser.parse_args()
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    print("bench: two labs come up", file=sys.stderr)
    mode = "none" if options.control else "ambient"
    with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as folder, labs(Path(folder), mode) as (plain, mesh):
        idle = mesh.memory_mib()
        results = collect(plain, mesh, rounds, seconds)
        loaded = mesh.memory_mib()
        beside, broken = 0.0, ""
        try:
            beside = stalled(mesh, rounds, seconds)
        except LoadError as error:
            broken = str(error)
    print(
        f"{'':7}{'':36}{'no mesh':>9} {'mesh':>9} {'':5}{'share':>6}{'least':>7}{'p50 x':>7}{'most':>7}"
        f"{'CPU none':>10}{'CPU mesh':>10}"
    )
    for result in results:
        print(result.line())
    print(
        f"bulk beside {STALLED} readers that do not read: {broken or f'{beside:.2f} of alone'} (least {STALLED_SHARE})"
    )
    total = idle["agent"] + idle["engine"]
    print(
        f"memory of node1 with {SLEEPERS + 2} pods: agent {idle['agent']:.1f} MiB, engine {idle['engine']:.1f} MiB, "
        f"together {total:.1f} (at most {MEMORY_MIB}); after the load {loaded['agent']:.1f} and {loaded['engine']:.1f}"
    )
    missed = [text for result in results for text in result.missed()]
    if total > MEMORY_MIB:
        missed.append(f"agent and engine together have {total:.1f} MiB, not {MEMORY_MIB}")
    if beside < STALLED_SHARE and not broken:
        missed.append(f"bulk beside readers that do not read: {beside:.2f} of alone, not {STALLED_SHARE}")
    aborted = [result for result in results if result.aborted]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "rounds": rounds,
        "seconds": seconds,
        "memory_mib": {"idle": idle, "after": loaded, "target": MEMORY_MIB},
        "beside_stalled": {"share": round(beside, 3), "target": STALLED_SHARE, "aborted": broken},
        "missed": missed,
        "rows": [result.record() for result in results],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"figures: {options.json}")
    if aborted or broken:
        print(f"{len(aborted) + bool(broken)} cases were aborted", file=sys.stderr)
    if missed and not options.quick:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return 1 if aborted or broken or (missed and not options.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
