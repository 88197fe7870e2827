"""What was measured of a row, and what it is worth: medians, spreads, shares of the plain network, figures reached.

Rounds are interleaved: in each one every target runs every row once, so whatever else the machine does meets them all.
A share is that of one round; what is reported is the median of the rounds' shares, with the smallest and the largest.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.bench.load import LoadError, Sample
from tests.bench.rows import PEAK, PLACES, Aim, Row, aims

BARE = "plain"
OURS = "sidestep"
FAST = "native"  # ours with the acceleration of one node
RIVAL = "envoy"


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

    def ours(self) -> str:
        """The target that is judged: on one node the accelerated one where it ran."""
        ran = self.samples.keys() | self.aborted.keys()
        return FAST if self.place == "local" and FAST in ran else OURS

    def judged(self) -> list[dict[str, Any]]:
        """The figures that are asked for in this row, what ours has, what the floor has, and the verdict: that of
        `Aim`, `saturated` where the rate was not carried, `unmeasured` where there is nothing to judge."""
        name, found = self.ours(), []
        if name not in self.samples and name not in self.aborted:
            return []
        for aim in aims(self.place, self.row):
            value = None if self.saturated(BARE) else self.ratio(aim.of, name)
            excuse = self.place == "across" and aim.issue != 3 and not self.saturated("floor")
            found.append(_judgement(aim, value, self.ratio(aim.of, "floor") if excuse else None, self.saturated(name)))
        return found

    def saturated(self, target: str) -> bool:
        """Whether a target did not carry the row's rate in half of the rounds or more."""
        samples = self.samples.get(target, [])
        return bool(samples) and sum(each.saturated for each in samples) * 2 >= len(samples)

    def ahead(self) -> dict[str, Any] | None:
        """Whether sidestep is ahead of the Envoy pair across nodes: by rate, or by p99 at a fixed rate that is the same
        for both. `value` is how many times it is ahead; None in its place where one of the two was aborted. None
        altogether where they do not run, or not at one rate."""
        ran = self.samples.keys() | self.aborted.keys()
        if self.place != "across" or (self.row.kind == "open" and not self.row.of) or not {OURS, RIVAL} <= ran:
            return None
        of = "p99" if self.row.kind == "open" else "share"
        ours, theirs = self.ratios(of, OURS), self.ratios(of, RIVAL)
        if not ours or not theirs:
            return {"of": of, "value": None, "verdict": "unmeasured"}
        pairs = zip(ours, theirs, strict=False)
        value = statistics.median(b / a if of == "p99" else a / b for a, b in pairs)
        return {"of": of, "value": _short(value), "verdict": "reached" if value > 1 else "short"}

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
            "judged": self.ours(),
            "aims": self.judged(),
            "ahead_of_envoy": self.ahead(),
        }


_MEASURES: dict[str, Callable[[Sample], float]] = {
    "share": lambda sample: sample.rate,
    "p50": lambda sample: sample.p50_ns,
    "p99": lambda sample: sample.p99_ns,
    "cpu": lambda sample: sample.cpu_s,
}


def _judgement(aim: Aim, value: float | None, floor: float | None, saturated: bool) -> dict[str, Any]:
    verdict = "unmeasured" if value is None else "saturated" if saturated else aim.verdict(value, floor)
    return {
        "issue": aim.issue,
        "of": aim.of,
        "reach": aim.reach,
        "stretch": aim.stretch,
        "value": None if value is None else _short(value),
        "floor": None if floor is None else _short(floor),
        "verdict": verdict,
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
                except Exception as error:  # whatever it is: the other cases go on
                    known = isinstance(error, LoadError)
                    result.aborted[target.name] = str(error) if known else f"{target.name}: {error!r}"
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
