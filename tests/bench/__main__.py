"""`make bench`: the same work with the mesh, without it, through a floor and through rivals, side by side, in turns.

    python -m tests.bench                     everything: about twenty minutes
    python -m tests.bench --quick             one short round: does everything work? It judges nothing
    python -m tests.bench floor               the floor against the plain network alone
    python -m tests.bench compare OLD NEW     what changed between two JSON files beyond noise (tests/bench/compare.py)

Two labs of two nodes, one without the mesh. Every round runs each row with each target; a row's figures are medians
over the rounds, its shares medians of the rounds' own shares. CPU is what the whole machine worked, from /proc/stat.

A case is aborted, and the status is 1, when the load counted an error, or when the link's byte counters or the target's
own do not show the path that the case is about. A missed target of the first path is named, and the status is 1 too;
the figures that the issue of speed asks for are printed beside what there is.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench import figures, machine, policies, report
from tests.bench.compare import compare
from tests.bench.fleet import LESS, PODS, fleet
from tests.bench.load import ROOT, LoadError
from tests.bench.peer import CONTRACT
from tests.bench.plot import svg
from tests.bench.results import OURS, Result, collect
from tests.bench.rows import ALL, PEAK, PLACES, Row
from tests.bench.scale import scale
from tests.bench.side import SLEEPERS
from tests.bench.targets import NAMES, Target, targets

MEMORY_MIB, MEMORY_MIB_AIM = 80, 75  # the first path's, which decides; the issue of speed's
DOCS = ROOT / "docs"


def chosen(words: str, known: Sequence[str], what: str) -> list[str]:
    """Names out of a list with commas. Raises argparse.ArgumentTypeError."""
    found = words.split(",")
    for word in found:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is no {what}: {', '.join(known)}")
    return found


def variant(text: str) -> tuple[str, list[str]]:
    """NAME=OPTIONS. Raises argparse.ArgumentTypeError."""
    name, _, options = text.partition("=")
    if not name.isalnum() or name in NAMES or not options:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=OPTIONS with a name of its own")
    return name, shlex.split(options)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        epilog=CONTRACT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each case, at least 3 for a judgement (default: 5)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--control", action="store_true", help="with no pod in the mesh: sidestep's cases must be aborted"
    )
    parser.add_argument(
        "--targets",
        type=lambda text: chosen(text, NAMES, "target"),
        default=list(NAMES[:-1]),
        metavar="NAMES",
        help=f"which, with commas; `plain` is always there (default: {','.join(NAMES[:-1])})",
    )
    parser.add_argument(
        "--variant",
        type=variant,
        action="append",
        default=[],
        metavar="NAME=OPTIONS",
        help="also sidestep with options of `lab up`, in a lab of its own: --variant mtls=--agent-arg=--same-node=mtls",
    )
    parser.add_argument("--peer", default="", metavar="COMMAND", help="another proxy, see below")
    parser.add_argument(
        "--places",
        type=lambda text: chosen(text, PLACES, "place"),
        default=list(PLACES),
        metavar="PLACES",
        help="across,local",
    )
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="only rows whose name contains this, and no single figures"
    )
    parser.add_argument(
        "--json", type=Path, default=ROOT / "results/bench.json", help="where the figures go; .md and .svg beside it"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="also into docs/benchmarks.md and docs/benchmarks.svg"
    )
    options = parser.parse_args(words)
    if options.peer:
        options.targets.append("peer")
    elif "peer" in options.targets:
        parser.error("target peer needs --peer COMMAND")
    if options.write_docs and (options.quick or options.rows or options.control):
        parser.error("a partial run is nothing for docs/: no --write-docs with --quick, --rows or --control")
    options.targets = sorted({"plain", *options.targets}, key=NAMES.index)
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    return options


def tell(text: str) -> None:
    """What runs now, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:100.100}", end="", file=sys.stderr)


@contextlib.contextmanager
def noting(broken: list[str], what: str) -> Iterator[None]:
    """A single figure that cannot be had is a problem of the report, not the end of it."""
    tell(what)
    try:
        yield
    except (LoadError, AssertionError, OSError, subprocess.SubprocessError) as error:
        broken.append(f"{what}: {error}")


def figure(what: str, value: str, wanted: str = "", ok: bool | None = None) -> dict[str, Any]:
    """A line of the table of single figures."""
    return {"what": what, "value": value, "wanted": wanted, "ok": ok}


class Run:
    """One run of the benchmark: what it finds on the way, and at last the report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: list[Result] = []
        self.memory: dict[str, Any] = {"idle": {}, "after": {}}
        self.idle: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.fleet: dict[str, Any] = {}
        self.broken: list[str] = []
        self.missed: list[str] = []
        self.about: dict[str, str] = {}

    def measure(self) -> None:
        """Everything. Labs come up and go down on the way."""
        options = self.options
        with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as name:
            folder = Path(name)
            with targets(
                folder, options.targets, options.peer, dict(options.variant), enrol=not options.control
            ) as found:
                self.about = {target.name: target.about for target in found}
                self.memory["idle"] = figures.memory(found)
                if not options.rows:
                    self._idle([target for target in found if not (options.control and target.name == OURS)])
                self.results = collect(found, self._rows(), options.places, options.rounds, options.seconds, tell)
                self.memory["after"] = figures.memory(found)
                if not options.rows:
                    self._singles(found)
            if not options.rows and not options.control and {"sidestep", "envoy"} <= set(options.targets):
                self._fleet(folder)
            if not options.rows and not options.control and OURS in options.targets:
                self._scale(folder)
                self._policies()
        tell("")

    def _rows(self) -> list[Row]:
        rows = [row for row in ALL if self.options.rows in row.name]
        if any(row.kind == "open" for row in rows) and PEAK not in rows:
            rows.insert(0, PEAK)
        return rows

    def _singles(self, found: Sequence[Target]) -> None:
        rounds, seconds = self.options.rounds, self.options.seconds
        ours = next((target for target in found if target.name == OURS), None)
        if ours is not None and not self.options.control:
            with noting(self.broken, f"bulk beside {figures.STALLED} readers that do not read"):
                share = figures.stalled(ours, min(rounds, 3), seconds)
                self._wanted(
                    f"bulk beside {figures.STALLED} readers that do not read, of alone", f"{share:.2f}",
                    f"at least {figures.STALLED_SHARE}", share >= figures.STALLED_SHARE, decides=True,
                )  # fmt: skip
            total = sum(self.memory["idle"][OURS][name] for name in ("agent, node1", "engine, node1"))
            what = f"memory of agent and engine with {SLEEPERS + 2} pods, MiB"
            self._wanted(what, f"{total:.1f}", f"at most {MEMORY_MIB}", total <= MEMORY_MIB, decides=True)
            self._wanted(what, f"{total:.1f}", f"under {MEMORY_MIB_AIM}", total < MEMORY_MIB_AIM)
        if ours is not None and not self.options.control:
            with noting(self.broken, "enrolment of a namespace"):
                took = figures.enrolment(ours.side, min(rounds, 3))
                for key, what in (("enrol_s", "enrolment"), ("release_s", "release")):
                    self.figures.append(
                        figure(f"{what} of a namespace of {took['pods']} pods, s", report.ranged(took[key]))
                    )

    def _idle(self, found: Sequence[Target]) -> None:
        with noting(self.broken, f"{figures.IDLE} idle connections"):
            self.idle = figures.idle(found)
            worst = figures.idle_worst(self.idle)
            if worst is not None:
                what = f"engine's memory for each of {figures.IDLE} open connections that do nothing, KiB"
                self._wanted(what, f"{worst:.1f}", f"at most {figures.IDLE_KIB}", worst <= figures.IDLE_KIB)

    def _fleet(self, folder: Path) -> None:
        with noting(self.broken, f"{PODS} pods on a node"):
            self.fleet = fleet(folder, min(self.options.rounds, 3), max(1.0, self.options.seconds))
            what = f"less memory than {PODS} Envoy sidecars"
            self._wanted(what, f"{self.fleet['less']:.1%}", f"at least {LESS:.0%}", self.fleet["less"] >= LESS)

    def _scale(self, folder: Path) -> None:
        with noting(self.broken, "a hundred thousand workloads"):
            self.figures += scale(folder, quick=self.options.quick)

    def _policies(self) -> None:
        with noting(self.broken, "what policy costs"):
            for each in policies.decisions():
                what = f"one decision with {each['policies']} policies, of which {each['select']} select, us"
                self._wanted(
                    what, f"{each['us']:.2f}", f"at most {policies.DECISION_US}", each["us"] <= policies.DECISION_US
                )
            for each in policies.alone():
                what = (
                    f"a change of policy in force with {each['policies']} policies and {each['connections']} open "
                    f"connections, {each['denied']} of them denied by it, ms"
                )
                self._wanted(
                    what, f"{each['ms']:.0f}", f"at most {policies.CHANGE_MS}", each["ms"] <= policies.CHANGE_MS
                )

    def _wanted(self, what: str, value: str, wanted: str, ok: bool, decides: bool = False) -> None:
        self.figures.append(figure(what, value, wanted, ok))
        if decides and not ok:
            self.missed.append(f"{what}: {value}, not {wanted}")

    def report(self, described: dict[str, Any]) -> dict[str, Any]:
        """For the JSON file."""
        missed = [text for result in self.results for text in result.missed()] + self.missed
        return {
            "format": 2,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": described,
            "settings": {key: getattr(self.options, key) for key in ("rounds", "seconds", "quick")},
            "targets": self.about,
            "rows": [result.record() for result in self.results],
            "figures": self.figures,
            "fleet": self.fleet,
            "memory": self.memory,
            "idle": self.idle,
            "broken": self.broken,
            "missed": missed,
        }


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """JSON, Markdown and the plot beside each other; with --write-docs the latter two into docs/ as well."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    places = [options.json.with_suffix("")]
    if options.write_docs:
        places.append(DOCS / "benchmarks")
    for place in places:
        place.with_suffix(".svg").write_text(svg(found))
        place.with_suffix(".md").write_text(report.markdown(found, f"{place.name}.svg"))


def bench(options: argparse.Namespace) -> int:
    """Returns the status: 1 when a case was aborted or a target missed (a quick run misses none: it judges nothing)."""
    described = machine.describe()
    started = time.monotonic()
    print(f"bench: labs come up for {', '.join(options.targets)}", file=sys.stderr)
    run = Run(options)
    with noting(run.broken, "the run ended before its time"):  # what was found until then is worth keeping
        run.measure()
    found = run.report(described)
    write(found, options)
    print(report.markdown(found))
    print(f"figures: {options.json}, after {time.monotonic() - started:.0f} s")
    aborted = [text for text in report.problems(found) if text.startswith("aborted")]
    if aborted:
        print(f"{len(aborted)} cases were aborted", file=sys.stderr)
    if found["missed"] and not options.quick:
        print("missed: " + "; ".join(found["missed"]), file=sys.stderr)
    return 1 if aborted or (found["missed"] and not options.quick) else 0


def main(words: Sequence[str]) -> int:
    """The command line; returns the status."""
    verbs: dict[str, Callable[[], int]] = {
        "compare": lambda: _compare(words[1:]),
        "floor": lambda: bench(arguments(["--targets", "plain,floor", "--places", "across", *words[1:]])),
    }
    return verbs[words[0]]() if words and words[0] in verbs else bench(arguments(words))


def _compare(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench compare", description=compare.__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(words)
    return compare(options.old, options.new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
