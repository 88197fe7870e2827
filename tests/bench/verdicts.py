"""The verdicts: one for each figure that the issues ask for, whatever part of the benchmark measured it.

Figures of rows belong to rows (tests/bench/rows.py); the single ones are all here. A verdict is `stretch`, `reached`,
`floor` (reached by the floor's clause), `short`, `saturated` or `unmeasured`; the last three are misses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.results import spread

GOOD = ("stretch", "reached", "floor")
STALLED, IDLE = 8, 1000  # readers that do not read; open connections that do nothing
WORKLOADS, POLICIES = 100_000, 1000  # of the large mesh
FLEET = 20  # pods, with a sidecar each or with one node proxy


@dataclass(frozen=True, slots=True)
class Single:
    """A single figure. `limit`: at most that, or at least where `least`; None: nobody asks for it, it is told all the
    same. `worst`: every round is to keep it, not the median of them."""

    what: str
    unit: str = ""
    limit: float | None = None
    issue: int = 5
    least: bool = False
    worst: bool = False

    def wanted(self) -> str:
        """For people."""
        return "" if self.limit is None else f"{'at least' if self.least else 'at most'} {self.limit:g}"

    def verdict(self, found: Mapping[str, Any] | None) -> str:
        """Of a spread, None where it could not be had; "" where nothing is asked for."""
        if self.limit is None:
            return ""
        if found is None:
            return "unmeasured"
        value = found["median"] if not self.worst else found["min" if self.least else "max"]
        return "reached" if (value >= self.limit if self.least else value <= self.limit) else "short"

    def record(self, values: Sequence[float] | None) -> dict[str, Any]:
        """For the JSON file."""
        found = spread(values) if values else None
        return {
            "what": self.what,
            "unit": self.unit,
            "issue": self.issue,
            "value": found,
            "wanted": self.wanted(),
            "better": 1 if self.least else -1,
            "verdict": self.verdict(found),
        }


_LARGE = f"{WORKLOADS:,} workloads and {POLICIES:,} policies".replace(",", " ")
_OWN = "as on a machine of its own"  # nothing is taken off for what other nodes' processes here map too
_CHANGE = "a change of policy in force at 1 000 policies and 10 000 open connections"
SINGLES: dict[str, Single] = {
    "stalled": Single(
        f"bulk beside {STALLED} readers that do not read, of alone", limit=0.5, issue=3, least=True
    ),
    "killed_ends": Single("engine killed: until both ends of a stream know", "s", 1, 3, worst=True),
    "killed_back": Single("engine killed: until a new connection is answered", "s", 2, 3, worst=True),
    "memory_first": Single("memory of agent and engine, 10 pods", "MiB", 80, 3),
    "decide_1": Single("a decision, 1 policy that selects", "us", 2, 4),
    "decide_100": Single("a decision, 100 policies of which 5 select", "us", 2, 4),
    "decide_10000": Single("a decision, 10 000 policies of which 5 select", "us", 2, 4),
    "decide_flat": Single("a decision among 10 000 policies, times that among 100", "", 2, 4),
    "change_0": Single(f"{_CHANGE}, none denied", "ms", 100, 4, worst=True),
    "change_1000": Single(f"{_CHANGE}, 1 000 denied", "ms", 100, 4, worst=True),
    "change_9000": Single(f"{_CHANGE}, 9 000 denied", "ms", 100, 4, worst=True),
    "push_full": Single(f"{_LARGE}: a full push in force after receipt", "s", 3, 4, worst=True),
    "push_one": Single(f"{_LARGE}: an incremental push in force after receipt", "ms", 20, 4, worst=True),
    "push_wait_full": Single(
        f"{_LARGE}: what a full push adds to the longest wait of a new connection", "ms", 5, 4
    ),
    "push_wait_one": Single(
        f"{_LARGE}: what incremental pushes add to the longest wait of a new connection", "ms", 5, 4
    ),
    "push_wait_none": Single("the longest wait of a new connection without a push", "ms"),
    "memory_large": Single(f"{_LARGE}: memory of agent and engine", "MiB", 150, 4, worst=True),
    "memory_large_own": Single(f"{_LARGE}: memory of both {_OWN}", "MiB"),
    "memory": Single("memory of agent and engine, 10 pods", "MiB", 75),
    "idle": Single(f"engine's memory for each of {IDLE} open connections that do nothing", "KiB", 24),
    "start": Single(f"{_LARGE}: from the start of agent and engine to the first enrolled pod", "s", 1),
    "fleet_bare": Single(
        f"less memory than {FLEET} Envoy sidecars that know one destination", "%", 95, least=True
    ),
    "fleet_mesh": Single(
        f"less memory than {FLEET} Envoy sidecars that know the whole mesh", "%", 95, least=True
    ),
    "cut": Single("a policy that denies 1 000 open native flows: until the last has ended", "ms", 100, worst=True),
    "memory_own": Single(f"memory of agent and engine, 10 pods, {_OWN}", "MiB"),
    "enrol": Single("enrolment of a namespace of 11 pods", "s"),
    "release": Single("release of a namespace of 11 pods", "s"),
    "start_full": Single(f"{_LARGE}: from the start of the agent until all is in force", "s"),
}  # fmt: skip


def lines(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every verdict of a report: issue, place, what, value, floor, reach, stretch, verdict; numbers as they are, None
    where there is none."""
    found = []
    for row in report["rows"]:
        for aim in row["aims"]:
            found.append(
                {
                    "issue": aim["issue"],
                    "place": row["place"],
                    "what": row["row"],
                    "of": aim["of"],
                    "value": aim["value"],
                    "floor": aim["floor"],
                    "wanted": f"{'at least' if aim['of'] == 'share' else 'at most'} {aim['reach']:g}",
                    "stretch": aim["stretch"],
                    "verdict": aim["verdict"],
                }
            )
    for row in report["rows"]:
        ahead = row["ahead_of_envoy"]
        if ahead is not None:
            found.append(
                {
                    "issue": 5,
                    "place": row["place"],
                    "what": row["row"],
                    "of": "times Envoy" if ahead["of"] == "share" else f"times Envoy, {ahead['of']}",
                    "value": ahead["value"],
                    "floor": None,
                    "wanted": "more than 1",
                    "stretch": None,
                    "verdict": ahead["verdict"],
                }
            )
    for each in report["figures"]:
        if each["verdict"]:
            found.append(
                {
                    "issue": each["issue"],
                    "place": "",
                    "what": each["what"],
                    "of": each["unit"],
                    "value": each["value"],
                    "floor": None,
                    "wanted": each["wanted"],
                    "stretch": None,
                    "verdict": each["verdict"],
                }
            )
    return found


def missed(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that are not good."""
    return [line for line in lines(report) if line["verdict"] not in GOOD]
