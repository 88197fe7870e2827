"""The benchmark's arithmetic: spreads, shares of rounds, verdicts, what is aborted, open loops' rates."""

from collections.abc import Sequence

import pytest

from tests.bench.load import LoadError, Sample
from tests.bench.machine import TICK, Cpu, parse_stat
from tests.bench.results import Result, collect, spread
from tests.bench.rows import AIMS, ALL, FIXED, PEAK, PLACES, ROWS, Aim, Row


def sample(rate: float, p50: float = 10_000, p99: float = 50_000, cpu: float = 1e-5, saturated: bool = False) -> Sample:
    return Sample(rate, p50, p99, Cpu(cpu / 2, cpu / 4, cpu / 4), 1000, 64_000, saturated)


def test_the_split_of_cpu_time() -> None:
    cpu = parse_stat("cpu  100 20 50 9000 700 3 40 99 11 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert cpu == Cpu(120 / TICK, 50 / TICK, 43 / TICK)
    assert cpu.all == pytest.approx(213 / TICK)
    assert (cpu - Cpu(20 / TICK, 0, 3 / TICK)).over(100) == Cpu(1 / TICK, 0.5 / TICK, 0.4 / TICK)


def test_spread() -> None:
    assert spread([3, 1, 2.0000001]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("aim", "value", "floor", "verdict"),
    [
        (Aim("share", 0.3, 0.4), 0.4, None, "stretch"),
        (Aim("share", 0.3, 0.4), 0.39, None, "reached"),
        (Aim("share", 0.3, 0.4), 0.29, None, "short"),
        (Aim("share", 0.3, 0.4), 0.29, 0.34, "floor"),
        (Aim("share", 0.3, 0.4), 0.28, 0.34, "short"),
        (Aim("p50", 2.3, 2.0), 2.0, None, "stretch"),
        (Aim("p50", 2.3, 2.0), 2.3, None, "reached"),
        (Aim("p50", 2.3, 2.0), 2.4, None, "short"),
        (Aim("p50", 2.3, 2.0), 2.4, 2.05, "floor"),
        (Aim("p50", 2.3, 2.0), 2.5, 2.05, "short"),
    ],
)
def test_verdicts(aim: Aim, value: float, floor: float | None, verdict: str) -> None:
    assert aim.verdict(value, floor) == verdict


def test_every_figure_belongs_to_a_row() -> None:
    assert {name for _, name in AIMS} <= {row.name for row in ALL}
    assert {place for place, _ in AIMS} == set(PLACES)
    assert len({row.name for row in ALL}) == len(ALL)


def test_a_share_is_the_median_of_the_rounds_own_shares() -> None:
    # The plain network's rate halves in the second round: the median of all samples would say 0.3, the rounds say 0.4.
    result = Result("across", ROWS[1], {"plain": [sample(100), sample(50), sample(100)]})
    result.samples["sidestep"] = [sample(40), sample(20), sample(30)]
    assert result.ratios("share", "sidestep") == [0.4, 0.4, 0.3]
    assert result.ratio("share", "sidestep") == 0.4
    assert result.ratio("share", "envoy") is None


def test_missed_targets_and_figures() -> None:
    slow = Result("across", ROWS[1], {"plain": [sample(100)], "sidestep": [sample(20)], "floor": [sample(22)]})
    assert slow.missed() == [f"{ROWS[1].name}: 0.200 of no mesh, not 0.21"]
    share, cpu = slow.judged()
    assert (share["verdict"], share["value"], share["floor"]) == ("floor", 0.2, 0.22)
    assert (cpu["of"], cpu["verdict"]) == ("cpu", "stretch")
    # On one node there are no targets that decide, and the floor is no excuse.
    near = Result("local", ROWS[1], slow.samples)
    assert near.missed() == []
    assert [each["verdict"] for each in near.judged()] == ["short"]


def test_a_rate_that_was_not_carried_reaches_nothing() -> None:
    row = FIXED[1]
    carried = Result("across", row, {"plain": [sample(50)], "sidestep": [sample(50)]})
    assert [each["verdict"] for each in carried.judged()] == ["stretch"]
    saturated = Result("across", row, {"plain": [sample(50)], "sidestep": [sample(30, saturated=True)]})
    assert [each["verdict"] for each in saturated.judged()] == ["saturated"]
    assert saturated.record()["targets"]["sidestep"]["saturated"]
    # A floor that did not carry it either is no excuse.
    slow = {"plain": [sample(50)], "sidestep": [sample(50, p99=200_000)], "floor": [sample(30, p99=1e9)]}
    assert [each["verdict"] for each in Result("across", row, slow).judged()] == ["floor"]
    slow["floor"] = [sample(30, p99=1e9, saturated=True)]
    assert [each["verdict"] for each in Result("across", row, slow).judged()] == ["short"]
    # Where the plain network itself does not carry it there is nothing to hold it against.
    assert Result("across", row, {"plain": [sample(30, saturated=True)], "sidestep": [sample(50)]}).judged() == []


@pytest.mark.parametrize(
    ("row", "ours", "theirs", "ahead"),
    [
        (ROWS[0], sample(50), sample(40), True),
        (ROWS[0], sample(40), sample(50), False),
        (FIXED[1], sample(50, p99=90_000), sample(50, p99=80_000), False),
        (FIXED[1], sample(50, p99=70_000), sample(50, p99=80_000), True),
        (FIXED[2], sample(50), sample(40), None),  # each at a rate of its own
    ],
)
def test_ahead_of_envoy(row: Row, ours: Sample, theirs: Sample, ahead: bool | None) -> None:
    result = Result("across", row, {"plain": [sample(100)], "sidestep": [ours], "envoy": [theirs]})
    assert result.ahead() is ahead
    assert result.record()["ahead_of_envoy"] is ahead


class Scripted:
    """Stands for a target: it does what it is told, and notes what it was asked for."""

    def __init__(self, name: str, rate: float, places: Sequence[str] = PLACES, fails: str = "") -> None:
        self.name, self.rate, self.places, self.fails = name, rate, tuple(places), fails
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def case(self, row: Row, place: str, seconds: float) -> Sample:
        """As its rate says."""
        self.asked.append((place, row.words))
        if row.name == self.fails:
            raise LoadError("it broke")
        return sample(self.rate)


def test_rounds_are_interleaved_and_open_loops_follow_the_peak_of_their_round() -> None:
    order: list[str] = []
    targets = [Scripted("plain", 1000), Scripted("sidestep", 300), Scripted("floor", 400, ["across"])]
    rows = [PEAK, FIXED[1], FIXED[2]]
    results = collect(targets, rows, PLACES, 2, 1, lambda text: order.append(text.rsplit(", ", 1)[1]))
    assert order[:3] == ["plain", "sidestep", "floor"]
    assert order[len(order) // 2 :][:3] == ["floor", "sidestep", "plain"]
    assert [len(result.samples["plain"]) for result in results] == [2] * 6
    assert "floor" not in results[3].samples
    plain, mesh, _ = targets
    assert plain.asked[1:3] == [("across", ("open", "500.0", "64", "16")), ("across", ("open", "500.0", "64", "16"))]
    assert mesh.asked[1:3] == [("across", ("open", "500.0", "64", "16")), ("across", ("open", "150.0", "64", "16"))]


def test_what_was_aborted_is_not_run_again_and_leaves_no_figures() -> None:
    broken = Scripted("sidestep", 300, ["across"], fails=PEAK.name)
    targets = [Scripted("plain", 1000), broken]
    first, second = collect(targets, [PEAK, FIXED[2]], ["across"], 3, 1, lambda text: None)
    assert first.aborted == {"sidestep": "it broke"}
    assert len([words for _, words in broken.asked if words == PEAK.words]) == 1
    assert list(first.record()["targets"]) == ["plain"]
    # Its open loop has no peak to be a fraction of: aborted as well, and not run at some other rate.
    assert "no peak rate" in second.aborted["sidestep"]
    assert len(second.samples["plain"]) == 3


def test_an_open_loop_takes_its_rate_from_a_peak() -> None:
    assert FIXED[0].at(80_000).words == ("open", "10000.0", "64", "16")
    assert ROWS[3].at(80_000) is ROWS[3]
