"""`python -m tests.bench compare OLD NEW`: what changed between two runs beyond noise.

The rule: a figure changed when the ranges of the two runs (smallest to largest of the rounds) do not overlap and the
medians differ by at least LEAST. With five rounds on each side, ranges that do not overlap come by chance once in 126
times for a figure that did not change; among a hundred figures one may do so, hence the second condition, and hence:
look twice at a figure that changed alone. Single figures that were measured once in a run have no range: of them only
the verdict is compared. Of sidestep and its rivals the shares of the plain network are compared, so
that the machine's mood is in both; rates of the plain network tell whether it was the same machine at all.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.results import FAST, OURS
from tests.bench.verdicts import lines as verdicts

LEAST = 0.05
MINE = (OURS, FAST)
ROUNDS = 3
_BETTER = {
    "rate": 1,
    "share": 1,
    "p50_us": -1,
    "p99_us": -1,
    "cpu": -1,
    "p50_ratio": -1,
    "p99_ratio": -1,
    "cpu_ratio": -1,
}
_BARE = ("rate", "p50_us", "p99_us", "cpu")
_AGAINST = ("share", "p50_ratio", "p99_ratio", "cpu_ratio")


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in two runs: medians, and whether the new one is better (1), worse (-1) or neither (0)."""

    place: str
    row: str
    target: str
    of: str
    old: float
    new: float
    sign: int

    def line(self) -> str:
        """For people."""
        word = {1: "better", -1: "worse", 0: "same"}[self.sign]
        moved = f"{(self.new / self.old - 1) * 100:+.0f} %" if self.old else "from nothing"
        what = f"{word:7}{self.place:7} {self.row:42} {self.target if self.place else '':9} {self.of:10}"
        return f"{what} {self.old:>10.4g} -> {self.new:<10.4g} {moved}"


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """1 where the new spread lies above the old one beyond noise, -1 below, 0 otherwise."""
    apart = abs(new["median"] - old["median"]) >= LEAST * abs(old["median"])
    if apart and new["min"] > old["max"]:
        return 1
    return -1 if apart and new["max"] < old["min"] else 0


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Every figure that is in both reports."""
    before = {(row["place"], row["row"]): row["targets"] for row in old["rows"]}
    for row in new["rows"]:
        for target, entry in row["targets"].items():
            earlier = before.get((row["place"], row["row"]), {}).get(target)
            if earlier is None:
                continue
            for of in _BARE if target == "plain" else _AGAINST:
                if of in entry and of in earlier:
                    sign = moved(earlier[of], entry[of]) * _BETTER[of]
                    medians = earlier[of]["median"], entry[of]["median"]
                    yield Change(row["place"], row["row"], target, of, *medians, sign)


def singles(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Single figures with at least ROUNDS values in both reports."""
    before = {each["what"]: each["value"] for each in old["figures"]}
    for each in new["figures"]:
        was, now = before.get(each["what"]), each["value"]
        if was and now and min(len(was["all"]), len(now["all"])) >= ROUNDS:
            sign = moved(was, now) * each["better"]
            yield Change("", each["what"], OURS, each["unit"], was["median"], now["median"], sign)


def verdict_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Figures of the issues whose verdict is another one now."""
    before = {_asked(each): each["verdict"] for each in verdicts(old)}
    found = []
    for each in verdicts(new):
        was = before.get(_asked(each), each["verdict"])
        if was != each["verdict"]:
            found.append(f"verdict {each['place']:7}{each['what']} ({each['of']}): {was} -> {each['verdict']}")
    return found


def _asked(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["issue"], line["place"], line["what"], line["of"]


def missing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Cases that one of the reports has and the other has not."""
    cases = [
        {(row["place"], row["row"], target) for row in report["rows"] for target in row["targets"]}
        for report in (old, new)
    ]
    words = ("gone", "new")
    return [
        f"{word:7}{place:7} {row:42} {target}"
        for word, only in zip(words, (cases[0] - cases[1], cases[1] - cases[0]), strict=True)
        for place, row, target in sorted(only)
    ]


def memory(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Processes whose memory before the load differs by more than LEAST."""
    found = []
    for target, processes in new["memory"]["idle"].items():
        for process, mib in processes.items():
            was = old["memory"]["idle"].get(target, {}).get(process)
            if was and abs(mib - was) > LEAST * was:
                found.append(f"memory {target}: {process}: {was:.1f} -> {mib:.1f} MiB")
    return found


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what the two machines, or the two settings, differ."""
    skip = {"load_before"}
    found = []
    for part in ("machine", "settings"):
        for key in sorted(old[part].keys() | new[part].keys()):
            if key not in skip and old[part].get(key) != new[part].get(key):
                found.append(f"{key}: {old[part].get(key)} -> {new[part].get(key)}")
    return found


def compare(old_path: Path, new_path: Path) -> int:
    """Prints what changed. Returns 1 when something of sidestep is worse, 2 when that cannot be told, else 0."""
    old, new = (json.loads(path.read_text()) for path in (old_path, new_path))
    if old["format"] != new["format"]:
        print(f"reports of two formats: {old['format']} and {new['format']}")
        return 2
    for text in unlike(old, new):
        print(f"differs: {text}")
    if min(old["settings"]["rounds"], new["settings"]["rounds"]) < ROUNDS:
        print(f"fewer than {ROUNDS} rounds: their ranges say nothing about noise")
        return 2
    found = [*changes(old, new), *singles(old, new)]
    plain = [change for change in found if change.target == "plain" and change.sign]
    if plain:
        print(f"the plain network itself changed in {len(plain)} figures: another machine, or another mood of it")
    for change in sorted(
        (change for change in found if change.sign), key=lambda change: (change.target not in MINE, change.sign)
    ):
        print(change.line())
    for text in [*verdict_changes(old, new), *missing(old, new), *memory(old, new)]:
        print(text)
    same = sum(not change.sign for change in found)
    print(f"{same} of {len(found)} figures did not change beyond noise")
    return 1 if any(change.sign < 0 and change.target in MINE for change in found) else 0
