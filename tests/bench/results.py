"""What was measured of a row, and what it is worth: medians, spreads, shares of the plain network, figures reached.

Rounds are interleaved: in each one every target runs every row once, so whatever else the machine does meets them all.
A share is that of one round; what is reported is the median of the rounds' shares, with the smallest and the largest.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.bench.load import LoadError, Sample
from tests.bench.rows import AIMS, PEAK, PLACES, Aim, Row

BARE = "plain"
OURS = "sidestep"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum, maximum, and the values as they came; for the JSON file."""
    return {
        "median": _short(statistics.median(values)),
        "min": _short(min(values)),
        "max": _short(max(values)),
        "all": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    """Five digits that count."""
    return float(f"{value:.5g}")


@dataclass(frozen=True, slots=True)
class Result:
    """A row at a place: samples by target, one of each round; a target that was aborted has a reason instead."""

    place: str
    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    aborted: dict[str, str] = field(default_factory=dict)

    def ratios(self, of: str, target: str) -> list[float]:
        """Of each round: share (of the rate), p50, p99 or cpu of a target over those of the plain network; empty where
        there is none."""
        pairs = list(zip(self.samples.get(BARE, ()), self.samples.get(target, ()), strict=False))
        read = _MEASURES[of]
        return [read(ours) / read(bare) for bare, ours in pairs if read(bare) > 0 and read(ours) > 0]

    def ratio(self, of: str, target: str) -> float | None:
        """Median of `ratios`."""
        found = self.ratios(of, target)
        return statistics.median(found) if found else None

    def missed(self) -> list[str]:
        """Targets of the first path that sidestep did not reach across nodes."""
        found = []
        share, p50 = self.ratio("share", OURS), self.ratio("p50", OURS)
        if self.place == "across" and self.row.share is not None and share is not None and share < self.row.share:
            found.append(f"{self.row.name}: {share:.3f} of no mesh, not {self.row.share}")
        if self.place == "across" and self.row.p50 is not None and p50 is not None and p50 > self.row.p50:
            found.append(f"{self.row.name}: p50 is {p50:.2f} times that of no mesh, not {self.row.p50}")
        return found

    def judged(self) -> list[dict[str, Any]]:
        """The figures that are asked for in this row, what sidestep has, what the floor has, and the verdict."""
        found = []
        for aim in AIMS.get((self.place, self.row.name), ()):
            value = self.ratio(aim.of, OURS)
            if value is not None and not self.saturated(BARE):
                excuse = self.place == "across" and not self.saturated("floor")
                floor = self.ratio(aim.of, "floor") if excuse else None
                found.append(_judgement(aim, value, floor, self.saturated(OURS)))
        return found

    def saturated(self, target: str) -> bool:
        """Whether a target did not carry the row's rate in half of the rounds or more."""
        samples = self.samples.get(target, [])
        return bool(samples) and sum(each.saturated for each in samples) * 2 >= len(samples)

    def ahead(self) -> bool | None:
        """Whether sidestep is ahead of the Envoy pair: by rate, or by p99 at a fixed rate. None where not both ran, or
        not at one rate."""
        if self.row.kind == "open" and not self.row.of:
            return None
        of, sign = ("p99", -1) if self.row.kind == "open" else ("share", 1)
        ours, theirs = self.ratio(of, OURS), self.ratio(of, "envoy")
        return None if ours is None or theirs is None else sign * ours > sign * theirs

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        unit, cpu_scale = ("bytes/s", 1e9) if self.row.bulk else ("operations/s", 1e6)
        targets = {}
        for name, samples in self.samples.items():
            if not samples:
                continue
            targets[name] = entry = {
                "rate": spread([each.rate for each in samples]),
                "cpu": spread([each.cpu_s * cpu_scale for each in samples]),
                "cpu_split": {
                    part: _short(statistics.median(getattr(each.cpu, part) for each in samples) * cpu_scale)
                    for part in ("user", "system", "softirq")
                },
                "saturated": self.saturated(name),
            }
            for key in ("p50", "p99"):
                values = [getattr(each, f"{key}_ns") / 1e3 for each in samples]
                if any(values):
                    entry[f"{key}_us"] = spread(values)
            for of in _MEASURES:
                ratios = self.ratios(of, name)
                if name != BARE and ratios and not (of == "share" and self.row.kind == "open"):  # its rate is given
                    entry["share" if of == "share" else f"{of}_ratio"] = spread(ratios)
        return {
            "place": self.place,
            "row": self.row.name,
            "kind": self.row.kind,
            "unit": unit,
            "cpu_unit": "s/GB" if self.row.bulk else "us/operation",
            "targets": targets,
            "aborted": self.aborted,
            "least_share": self.row.share if self.place == "across" else None,
            "most_p50": self.row.p50 if self.place == "across" else None,
            "missed": self.missed(),
            "aims": self.judged(),
            "ahead_of_envoy": self.ahead(),
        }


_MEASURES: dict[str, Callable[[Sample], float]] = {
    "share": lambda sample: sample.rate,
    "p50": lambda sample: sample.p50_ns,
    "p99": lambda sample: sample.p99_ns,
    "cpu": lambda sample: sample.cpu_s,
}


def _judgement(aim: Aim, value: float, floor: float | None, saturated: bool) -> dict[str, Any]:
    return {
        "of": aim.of,
        "reach": aim.reach,
        "stretch": aim.stretch,
        "value": _short(value),
        "floor": None if floor is None else _short(floor),
        "verdict": "saturated" if saturated else aim.verdict(value, floor),
    }


class Runs(Protocol):
    """What a target must be able to do here (tests/bench/targets.py)."""

    name: str
    places: tuple[str, ...]

    def case(self, row: Row, place: str, seconds: float) -> Sample:
        """One run. Raises LoadError."""
        ...


class Progress(Protocol):
    """Is told what runs now."""

    def __call__(self, text: str) -> None: ...


def collect(
    targets: Sequence[Runs], rows: Sequence[Row], places: Sequence[str], rounds: int, seconds: float, tell: Progress
) -> list[Result]:
    """Every row at every place with every target, in turns; a case that was aborted once is not run again. Every second
    round goes through the targets backwards, so that none always follows the same one."""
    results = [Result(place, row) for place in PLACES if place in places for row in rows]
    for number in range(rounds):
        peaks: dict[tuple[str, str], float] = {}
        for result in results:
            order = [target for target in targets if result.place in target.places]
            for target in order if number % 2 == 0 else reversed(order):
                if target.name in result.aborted:
                    continue
                tell(f"round {number + 1}/{rounds}: {result.place}, {result.row.name}, {target.name}")
                try:
                    sample = target.case(_due(result, target.name, peaks), result.place, seconds)
                except LoadError as error:
                    result.aborted[target.name] = str(error)
                    result.samples.pop(target.name, None)
                    continue
                result.samples.setdefault(target.name, []).append(sample)
                if result.row is PEAK:
                    peaks[result.place, target.name] = sample.rate
    return results


def _due(result: Result, target: str, peaks: Mapping[tuple[str, str], float]) -> Row:
    """The row with its rate. Raises LoadError where the peak that it is a fraction of was not measured."""
    if result.row.kind != "open":
        return result.row
    peak = peaks.get((result.place, result.row.of or target))
    if peak is None:
        raise LoadError(f"{target}, {result.place}: {result.row.name}: there is no peak rate in this round")
    return result.row.at(peak)
