"""`python -m tests.bench.micro`: the engine and the capture alone, against the same namespaces without them.

Two nodes of tests/harness/cluster.py, no lab, no agent: minutes become seconds. Plain and mesh take turns within each
row, so that what else the machine does meets both; shares are medians of the rounds' own shares. What policy costs
comes last (tests/bench/policies.py), or alone: `--only policies`.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench import policies
from tests.bench.load import ROOT, ROWS, LoadError, Row, Sample, build, measure, process_s
from tests.bench.report import ranged
from tests.bench.verdicts import SINGLES
from tests.harness.cluster import Nodes, Pod
from tests.harness.netns import run

PORT = 7100


def inside(pod: Pod) -> list[str]:
    """The command that runs the load in a pod."""
    return ["nsenter", f"--net={pod.path}", "--", str(build())]


@contextlib.contextmanager
def serving(pod: Pod) -> Iterator[None]:
    """The load's server in a pod."""
    process = subprocess.Popen([*inside(pod), "serve", str(PORT)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "listening\n":
            raise LoadError(f"no server in {pod.name}")
        yield
    finally:
        process.kill()
        process.wait()


class Engines:
    """What both engines say and pay."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def cpu_s(self) -> float:
        """CPU seconds of both so far."""
        return sum(process_s(engine.process.pid) for engine in self._nodes.engines if engine is not None)

    def counter(self, name: str) -> float:
        """A counter, summed over label sets and engines."""
        total = 0.0
        for client in self._nodes.clients:
            if client is not None:
                for line in client.metrics().splitlines():
                    if line.startswith((f"{name} ", f"{name}{{")):
                        total += float(line.rsplit(" ", 1)[1])
        return total


def meshed(
    row: Row, engines: Engines, client: Pod, address: str, seconds: float, local: bool, native: bool
) -> tuple[Sample, float]:
    """A run that must have gone the way it claims. Returns it and the engines' CPU seconds per operation or byte."""
    through = "sidestep_same_node_connections_total"
    name = through if local and not native else "istio_tcp_connections_opened_total"
    carried = engines.counter(through)
    before, worked = engines.counter(name), engines.cpu_s()
    sample = measure(row, inside(client), address, PORT, seconds)
    worked = engines.cpu_s() - worked
    grown = engines.counter(name) - before
    conns = sample.total_ops if row.words[0] == "crr" else int(row.words[-1])
    expected = conns if local and not native else 2 * conns  # source's and destination's view
    if native and engines.counter(through) - carried > 16:
        raise LoadError(f"{row.name}: the engine carried {engines.counter(through) - carried:.0f} connections")
    if grown < expected - 64:  # those of the last moment may not be counted yet
        raise LoadError(f"{row.name}: {name} grew by {grown:.0f}, not {expected}: this was not the mesh")
    return sample, worked / (sample.total_bytes if row.bulk else sample.total_ops)


def main() -> None:
    """Prints a line per row; the last lines are where the JSON went."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.micro", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--same-node", choices=("direct", "native", "mtls"), default="direct", help="on one node")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--only", choices=("across", "local", "policies"), help="only across nodes, on one node, policy"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "results/micro.json")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    if options.only != "policies":
        results += rows(options)
    if options.only in (None, "policies"):
        for key, values in {**policies.decided(), **policies.changed()}.items():
            single = SINGLES[key].record(values)
            print(f"{single['what']}: {ranged(single['value'])} {single['unit']} ({single['wanted']})", flush=True)
            results.append(single)
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1))


def rows(options: argparse.Namespace) -> list[dict[str, object]]:
    """Every row, plain and through the mesh."""
    results = []
    with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as name:
        places = {"client": 0, "server": 1, "near": 0}
        mesh = Nodes(Path(name), places, workers=options.workers, same_node=options.same_node)
        plain = Nodes(Path(name), {f"p{pod}": node for pod, node in places.items()}, engines=(False, False))
        plain.router = f"{mesh.router}-p"
        with mesh, plain, contextlib.ExitStack() as stack:
            mesh.publish()
            for pods in (mesh, plain):
                for pod in pods.pods.values():
                    stack.enter_context(serving(pod) if not pod.name.endswith("client") else contextlib.nullcontext())
                    run("nsenter", f"--net={pod.path}", "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
            engines = Engines(mesh)
            print(
                f"{'':52}{'plain':>12}{'mesh':>12}{'share':>7}{'target':>7}{'p50':>6}{'target':>7}"
                f"{'CPU plain':>11}{'CPU mesh':>10}{'engines':>9}"
            )
            for place, server in (("across", "server"), ("local", "near")):
                if options.only in (None, place):
                    for row in ROWS:
                        if options.rows in row.name:
                            results.append(one(row, place, server, mesh, plain, engines, options))
    return results


def one(
    row: Row, place: str, server: str, mesh: Nodes, plain: Nodes, engines: Engines, options: argparse.Namespace
) -> dict[str, object]:
    """One row: rounds, a printed line, the record."""
    bare, covered, own = [], [], []
    target, other = plain[f"p{server}"].address(), mesh[server].address()
    for _ in range(options.rounds):
        bare.append(measure(row, inside(plain["pclient"]), target, PORT, options.seconds))
        local = place == "local" and options.same_node != "mtls"
        native = local and options.same_node == "native"
        sample, worked = meshed(row, engines, mesh["client"], other, options.seconds, local, native)
        covered.append(sample)
        own.append(worked)
    share = statistics.median(b.rate / a.rate for a, b in zip(bare, covered, strict=True))
    p50 = statistics.median(b.p50_ns / a.p50_ns if a.p50_ns else 0 for a, b in zip(bare, covered, strict=True))
    rates = [statistics.median(s.rate for s in samples) for samples in (bare, covered)]
    # microseconds per operation, or seconds per GB
    scale = 1e9 if row.bulk else 1e6
    cpu = [statistics.median(s.cpu_s for s in samples) * scale for samples in (bare, covered)]
    engine = statistics.median(own) * scale
    unit = (1e6, "MB/s", "s/GB") if row.bulk else (1, "/s", "us")
    aims = (row.share, row.p50) if place == "across" else (None, None)
    print(
        f"{place + ': ' + row.name:52}{rates[0] / unit[0]:>8.0f}{unit[1]:>4}{rates[1] / unit[0]:>8.0f}{unit[1]:>4}"
        f"{share:>7.3f}{aims[0] or '':>7}{p50:>6.2f}{aims[1] or '':>7}"
        f"{cpu[0]:>11.2f}{cpu[1]:>10.2f}{engine:>9.2f} {unit[2]}",
        flush=True,
    )
    return {
        "place": place,
        "row": row.name,
        "plain": rates[0],
        "mesh": rates[1],
        "share": share,
        "p50_ratio": p50,
        "cpu_plain": cpu[0],
        "cpu_mesh": cpu[1],
        "cpu_engines": engine,
        "cpu_unit": unit[2],
    }


if __name__ == "__main__":
    main()
