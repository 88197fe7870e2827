"""`make bench`: the same work with the mesh, without it, through a floor and through rivals, side by side, in turns.

    python -m tests.bench                     everything: under twenty minutes
    python -m tests.bench --quick             one short round: does everything work? It judges nothing
    python -m tests.bench --only large,fleet  only these parts
    python -m tests.bench floor               the floor against the plain network alone
    python -m tests.bench compare OLD NEW     what changed between two JSON files beyond noise (tests/bench/compare.py)

Labs of two nodes, one without the mesh. Every round runs each row with each target; a row's figures are medians over
the rounds, its shares medians of the rounds' own shares. CPU is what the whole machine worked, from /proc/stat.

A case is aborted, and the status is 1, when the load counted an error, or when the link's byte counters or the target's
own do not show the path that the case is about. Every figure that the issues ask for has a verdict
(tests/bench/verdicts.py); the status is 1 when one is missed or could not be measured. "p99 at half of the peak rate"
is taken at half of each target's own peak: half of the plain network's is more than any proxy carries at all.
"""

import argparse
import contextlib
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench import faults, figures, fleet, large, machine, policies, report
from tests.bench.compare import ROUNDS, compare
from tests.bench.load import ROOT
from tests.bench.peer import CONTRACT
from tests.bench.plot import svg
from tests.bench.results import FAST, OURS, RIVAL, Result, collect
from tests.bench.rows import ALL, PEAK, PLACES, Row
from tests.bench.targets import NAMES, Target, accelerates, targets
from tests.bench.verdicts import SINGLES, missed

DOCS = ROOT / "docs"
USUAL = tuple(name for name in NAMES if name != "peer" and (name != FAST or accelerates()))
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The rows; single figures of the same labs (idle and stalled connections, enrolment, killed engines); the rest, each in
# surroundings of its own.
PARTS = ("rows", "singles", "fleet", "large", "policies")


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
    parser.add_argument("--seconds", type=float, default=1.5, help="of each run (default: 1.5)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument(
        "--control", action="store_true", help="with no pod in the mesh: sidestep's cases must be aborted"
    )
    parser.add_argument(
        "--targets",
        type=lambda text: chosen(text, NAMES, "target"),
        default=list(USUAL),
        metavar="NAMES",
        help=f"which, with commas; `plain` is always there (default: {','.join(USUAL)})",
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
        "--rows", default="", metavar="TEXT", help="only rows whose name contains this, and nothing else"
    )
    parser.add_argument(
        "--only",
        type=lambda text: chosen(text, PARTS, "part"),
        default=list(PARTS),
        metavar="PARTS",
        help=f"only these parts, with commas: {','.join(PARTS)}",
    )
    parser.add_argument(
        "--json", type=Path, default=ROOT / "results/bench.json", help="where the figures go; .md and .svg beside it"
    )
    parser.add_argument("--write-docs", action="store_true", help="also into docs/benchmarks.md, .svg and .json")
    options = parser.parse_args(words)
    if options.peer:
        options.targets.append("peer")
    elif "peer" in options.targets:
        parser.error("target peer needs --peer COMMAND")
    if options.rows:
        options.only = ["rows"]
    whole = set(options.targets) >= set(USUAL) and options.only == list(PARTS) and options.rounds >= ROUNDS
    if options.write_docs and (options.quick or options.control or not whole):
        parser.error(
            "only a whole run is for docs/: --write-docs goes with no other choice than more targets or rounds"
        )
    options.targets = sorted({"plain", *options.targets}, key=NAMES.index)
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    return options


class Progress:
    """Says what runs now: on a terminal over the last line, else a line for each step, of the rows for each round; and
    how long all has taken."""

    def __init__(self) -> None:
        self._started, self._part = time.monotonic(), ""

    def __call__(self, text: str) -> None:
        """`text`: what runs now; a round, a colon, the case."""
        part = text.partition(":")[0] if text.startswith("round") else text
        took = f"{time.monotonic() - self._started:5.0f} s"
        if sys.stderr.isatty():
            print(f"\r{took}  {text:100.100}", end="", file=sys.stderr, flush=True)
        elif part != self._part:
            print(f"{took}  {part}", file=sys.stderr, flush=True)
        self._part = part

    def over(self) -> float:
        """The end of it. Returns seconds."""
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return time.monotonic() - self._started


class Run:
    """One run of the benchmark: what it finds on the way, and at last the report."""

    def __init__(self, options: argparse.Namespace, tell: Progress) -> None:
        self.options = options
        self.tell = tell
        self.results: list[Result] = []
        self.memory: dict[str, Any] = {"idle": {}, "after": {}}
        self.node: dict[str, float] = {}
        self.idle: list[dict[str, Any]] = []
        self.singles: dict[str, list[float] | None] = {}
        self.fleet: dict[str, Any] = {}
        self.broken: list[str] = []
        self.about: dict[str, str] = {}

    def measure(self) -> None:
        """Everything. Labs come up and go down on the way."""
        options = self.options
        rounds, seconds = min(options.rounds, 3), options.seconds
        with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as name:
            folder = Path(name)
            if {"rows", "singles"} & set(options.only):
                with (
                    self.noting(f"labs come up: {', '.join(options.targets)}"),
                    targets(
                        folder, options.targets, options.peer, dict(options.variant), enrol=not options.control
                    ) as found,
                ):
                    self._labs(found)
            if options.control or OURS not in options.targets:
                return
            if "fleet" in options.only and RIVAL in options.targets:
                with self.noting("fleet", "fleet_bare", "fleet_mesh"):
                    self.fleet = fleet.fleet(folder, rounds, max(1.0, seconds), options.quick, self.tell)
                    for kind, less in self.fleet["less"].items():
                        self.singles[f"fleet_{kind}"] = [less]
            if "large" in options.only:
                with self.noting("large mesh", *large.KEYS):
                    self.singles |= large.large(folder, rounds, options.quick, self.tell)
            if "policies" in options.only:
                with self.noting("policies: decisions", *policies.DECISIONS):
                    self.singles |= policies.decided()
                if FAST in options.targets:
                    with self.noting("policies: native flows", "cut"):
                        self.singles["cut"] = policies.cut(rounds)
                with self.noting("policies: changes", *policies.CHANGES):
                    self.singles |= policies.changed(
                        rounds, policies.CONNECTIONS // 20 if options.quick else policies.CONNECTIONS
                    )

    def _labs(self, found: Sequence[Target]) -> None:
        options = self.options
        self.about = {target.name: target.about for target in found}
        self.memory["idle"] = figures.memory(found)
        self.node = figures.node(found)
        singles = "singles" in options.only and not options.control
        ours = [target for target in found if target.name in (OURS, FAST)]
        if singles:
            with self.noting(f"{figures.IDLE} idle connections", "idle"):
                self.idle = figures.idle(found)
                if ours:
                    self.singles["idle"] = [figures.idle_worst(self.idle)]
        if "rows" in options.only:
            self.results = collect(found, self._rows(), options.places, options.rounds, options.seconds, self.tell)
        self.memory["after"] = figures.memory(found)
        if singles:
            for target in ours:
                self._singles(target)

    def _rows(self) -> list[Row]:
        rows = [row for row in ALL if self.options.rows in row.name]
        if any(row.kind == "open" for row in rows) and PEAK not in rows:
            rows.insert(0, PEAK)
        return rows

    def _singles(self, target: Target) -> None:
        """Of a lab of ours that is up; memory is that of the lab that has more."""
        rounds, seconds = min(self.options.rounds, 3), self.options.seconds
        total = sum(self.memory["idle"][target.name][name] for name in ("agent, node1", "engine, node1"))
        for key, mib in (("memory_first", total), ("memory", total), ("memory_own", self.node[target.name])):
            self.singles[key] = [max([mib, *(self.singles.get(key) or [])])]
        if target.name == FAST:
            return
        with self.noting(f"bulk beside {figures.STALLED} readers that do not read", "stalled"):
            self.singles["stalled"] = figures.stalled(target, rounds, seconds)
        with self.noting("enrolment of a namespace", "enrol", "release"):
            self.singles |= figures.enrolment(target.side, rounds)
        with self.noting("engines killed", *faults.KEYS):
            self.singles |= faults.killed(target.side, rounds)

    @contextlib.contextmanager
    def noting(self, what: str, *keys: str) -> Iterator[None]:
        """A part that cannot be measured is a problem of the report, not the end of it: its figures are
        `unmeasured`."""
        self.tell(what)
        try:
            yield
        except Exception as error:  # whatever it is: a quarter of an hour's figures are not lost for it
            self.broken.append(f"{what}: {type(error).__name__}: {error}")
            for key in keys:
                self.singles.setdefault(key, None)

    def report(self, described: dict[str, Any]) -> dict[str, Any]:
        """For the JSON file."""
        found = {
            "format": 3,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": described,
            "settings": {key: getattr(self.options, key) for key in ("rounds", "seconds", "quick")},
            "targets": self.about,
            "rows": [result.record() for result in self.results],
            "figures": [each.record(self.singles[key]) for key, each in SINGLES.items() if key in self.singles],
            "fleet": self.fleet,
            "memory": self.memory,
            "idle": self.idle,
            "broken": self.broken,
        }
        return found


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """JSON, Markdown and the plot beside each other; with --write-docs into docs/ as well."""
    places = [options.json.with_suffix("")]
    if options.write_docs:
        places.append(DOCS / "benchmarks")
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        place.with_suffix(".svg").write_text(svg(found))
        place.with_suffix(".md").write_text(report.markdown(found, f"{place.name}.svg"))


def bench(options: argparse.Namespace) -> int:
    """Returns the status: 1 when a case was aborted or a figure missed (a run that is quick or has too few rounds
    misses none: it judges nothing)."""
    described = machine.describe()
    tell = Progress()
    run = Run(options, tell)
    with run.noting("begin"):  # what was found until it broke is worth keeping
        run.measure()
    took = tell.over()
    found = run.report(described)
    write(found, options)
    print(report.markdown(found))
    print(f"figures: {options.json}, after {took:.0f} s")
    aborted = report.problems(found)
    short = missed(found) if not options.quick and options.rounds >= ROUNDS else []
    if aborted:
        print(f"aborted: {len(aborted)}, see Problems", file=sys.stderr)
    if short:
        print("missed:", *(f"  {report.verdict_line(each)}" for each in short), sep="\n", file=sys.stderr)
    return 1 if aborted or short else 0


def main(words: Sequence[str]) -> int:
    """The command line; returns the status."""
    verbs: dict[str, Callable[[], int]] = {
        "compare": lambda: _compare(words[1:]),
        "floor": lambda: bench(
            arguments(["--targets", "plain,floor", "--places", "across", "--only", "rows", *words[1:]])
        ),
    }
    for number in ENDINGS:  # every lab that is up goes down
        signal.signal(number, _interrupt)
    return verbs[words[0]]() if words and words[0] in verbs else bench(arguments(words))


def _interrupt(number: int, frame: object) -> None:
    for each in ENDINGS:  # what goes down now is not interrupted a second time
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _compare(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench compare", description=compare.__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(words)
    try:
        return compare(options.old, options.new)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench: compare needs two reports (the JSON of a run): {error!r}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted: the labs are gone, nothing is written", file=sys.stderr)
        sys.exit(130)
