"""The benchmark's arithmetic: spreads, shares of rounds, verdicts, what is aborted, open loops' rates."""

from collections.abc import Sequence

import pytest

from tests.bench.load import LoadError, Sample
from tests.bench.machine import TICK, Cpu, parse_smaps, parse_stat
from tests.bench.results import Result, collect, spread
from tests.bench.rows import ALL, FIXED, PEAK, PLACES, ROWS, Aim, Row, aims


def sample(rate: float, p50: float = 10_000, p99: float = 50_000, cpu: float = 1e-5, saturated: bool = False) -> Sample:
    return Sample(rate, p50, p99, Cpu(cpu / 2, cpu / 4, cpu / 4), 1000, 64_000, saturated)


def test_the_split_of_cpu_time() -> None:
    cpu = parse_stat("cpu  100 20 50 9000 700 3 40 99 11 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert cpu == Cpu(120 / TICK, 50 / TICK, 43 / TICK)
    assert cpu.all == pytest.approx(213 / TICK)
    assert (cpu - Cpu(20 / TICK, 0, 3 / TICK)).over(100) == Cpu(1 / TICK, 0.5 / TICK, 0.4 / TICK)


def test_memory_as_on_a_machine_of_their_own() -> None:
    def smaps(private: int, shared: int, heap: int) -> str:
        return (
            f"55d0-55d1 r-xp 00000000 fd:01 77 /usr/bin/python3\nSize: 9 kB\nShared_Clean: {shared} kB\n"
            "Shared_Dirty: 0 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 0 kB\nPrivate_Hugetlb: 0 kB\nVmFlags: rd ex\n"
            f"55d2-55d3 rw-p 00002000 fd:01 77 /usr/bin/python3\nShared_Clean: 24 kB\nPrivate_Dirty: {private} kB\n"
            f"7ffe-7fff rw-p 00000000 00:00 0\nShared_Clean: 0 kB\nPrivate_Dirty: {heap} kB\n"
        )

    # Private memory adds up; of the file that both map, the larger part counts once.
    assert parse_smaps([smaps(100, 1000, 924), smaps(24, 3000, 976)]) == (100 + 924 + 24 + 976 + 3024) / 1024
    assert parse_smaps([smaps(0, 1000, 0)]) == 1


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
        (Aim("share", 0.3), 0.9, None, "reached"),
        (Aim("p50", 2.3, 2.0), 2.0, None, "stretch"),
        (Aim("p50", 2.3, 2.0), 2.3, None, "reached"),
        (Aim("p50", 2.3, 2.0), 2.4, None, "short"),
        (Aim("p50", 2.3, 2.0), 2.4, 2.05, "floor"),
        (Aim("p50", 2.3, 2.0), 2.5, 2.05, "short"),
    ],
)
def test_verdicts(aim: Aim, value: float, floor: float | None, verdict: str) -> None:
    assert aim.verdict(value, floor) == verdict


def test_every_row_of_the_issues_tables_has_its_figures() -> None:
    first = {row.name: [aim.of for aim in aims("across", row) if aim.issue == 3] for row in ALL}
    assert [*first.values()] == [["p50"], *[["share"]] * 6, *[[]] * 4]
    speed = {
        place: [[(aim.of, aim.reach, aim.stretch) for aim in aims(place, row) if aim.issue == 5] for row in ALL]
        for place in PLACES
    }
    assert speed["across"] == [
        [("p50", 2.3, 2.0)],
        [("share", 0.3, 0.4), ("cpu", 3.2, 2.5)],
        [("share", 0.2, 0.25)],
        [("share", 0.28, 0.35), ("cpu", 4.3, 3.5)],
        [("share", 0.22, 0.28), ("cpu", 4.3, 3.5)],
        [("share", 0.35, 0.45)],
        [("share", 0.45, 0.5)],
        [],
        [("p99", 2.3, 2.0)],
        [],
        [],
    ]
    assert [[reach for _, reach, _ in row] for row in speed["local"]] == [
        [1.1], [0.92], [0.95], [0.95], [0.95], [0.9], [0.9], [], [1.4], [], [],
    ]  # fmt: skip
    assert len({row.name for row in ALL}) == len(ALL)


def test_a_share_is_the_median_of_the_rounds_own_shares() -> None:
    # The plain network's rate halves in the second round: the median of all samples would say 0.3, the rounds say 0.4.
    result = Result("across", ROWS[1], {"plain": [sample(100), sample(50), sample(100)]})
    result.samples["sidestep"] = [sample(40), sample(20), sample(30)]
    assert result.ratios("share", "sidestep") == [0.4, 0.4, 0.3]
    assert result.ratio("share", "sidestep") == 0.4
    assert result.ratio("share", "envoy") is None


def verdicts(result: Result) -> list[tuple[int, str, str]]:
    return [(each["issue"], each["of"], each["verdict"]) for each in result.judged()]


def test_figures_are_judged() -> None:
    slow = Result("across", ROWS[1], {"plain": [sample(100)], "sidestep": [sample(20)], "floor": [sample(22)]})
    first, share, _ = slow.judged()
    assert verdicts(slow) == [(3, "share", "short"), (5, "share", "floor"), (5, "cpu", "stretch")]
    assert (share["value"], share["floor"]) == (0.2, 0.22)
    assert first["floor"] is None  # the floor excuses nothing that the first path asks for
    # On one node there are no targets of the first path, and the floor is no excuse.
    assert verdicts(Result("local", ROWS[1], slow.samples)) == [(5, "share", "short")]


def test_on_one_node_the_accelerated_target_is_judged_where_it_ran() -> None:
    both = {"plain": [sample(100)], "sidestep": [sample(40)], "native": [sample(95)]}
    near = Result("local", ROWS[1], dict(both))
    assert (near.ours(), verdicts(near)) == ("native", [(5, "share", "reached")])
    assert Result("across", ROWS[1], dict(both)).ours() == "sidestep"
    del both["native"]
    # One that was aborted is not excused by the one without acceleration.
    broken = Result("local", ROWS[1], dict(both), {"native": "it broke"})
    assert verdicts(broken) == [(5, "share", "unmeasured")]
    without = Result("local", ROWS[1], dict(both))
    assert (without.ours(), verdicts(without)) == ("sidestep", [(5, "share", "short")])


def test_what_did_not_run_is_not_judged_and_what_broke_is() -> None:
    assert Result("across", ROWS[1], {"plain": [sample(100)], "floor": [sample(50)]}).judged() == []
    broken = Result("across", ROWS[1], {"plain": [sample(100)]}, {"sidestep": "it broke"})
    assert {verdict for _, _, verdict in verdicts(broken)} == {"unmeasured"}
    assert len(verdicts(broken)) == 3


def test_a_rate_that_was_not_carried_reaches_nothing() -> None:
    row = FIXED[1]
    carried = Result("across", row, {"plain": [sample(50)], "sidestep": [sample(50)]})
    assert verdicts(carried) == [(5, "p99", "stretch")]
    saturated = Result("across", row, {"plain": [sample(50)], "sidestep": [sample(30, saturated=True)]})
    assert verdicts(saturated) == [(5, "p99", "saturated")]
    assert saturated.record()["targets"]["sidestep"]["saturated"]
    # A floor that did not carry it either is no excuse.
    slow = {"plain": [sample(50)], "sidestep": [sample(50, p99=200_000)], "floor": [sample(30, p99=1e9)]}
    assert verdicts(Result("across", row, slow)) == [(5, "p99", "floor")]
    slow["floor"] = [sample(30, p99=1e9, saturated=True)]
    assert verdicts(Result("across", row, slow)) == [(5, "p99", "short")]
    # Where the plain network itself does not carry it there is nothing to hold it against.
    bare = Result("across", row, {"plain": [sample(30, saturated=True)], "sidestep": [sample(50)]})
    assert verdicts(bare) == [(5, "p99", "unmeasured")]


@pytest.mark.parametrize(
    ("row", "ours", "theirs", "ahead"),
    [
        (ROWS[0], [sample(50)], [sample(40)], (1.25, "reached")),
        (ROWS[0], [sample(40)], [sample(50)], (0.8, "short")),
        (ROWS[0], [sample(40)], [sample(40)], (1.0, "short")),
        (ROWS[0], [sample(40)], [], (None, "unmeasured")),
        (FIXED[0], [sample(50, p99=90_000)], [sample(50, p99=72_000)], (0.8, "short")),
        (FIXED[0], [sample(50, p99=60_000)], [sample(50, p99=90_000)], (1.5, "reached")),
    ],
)
def test_ahead_of_envoy(row: Row, ours: list[Sample], theirs: list[Sample], ahead: tuple[float | None, str]) -> None:
    aborted = {} if theirs else {"envoy": "it broke"}
    samples = {"plain": [sample(100)], "sidestep": ours, **({"envoy": theirs} if theirs else {})}
    found = Result("across", row, samples, aborted).record()["ahead_of_envoy"]
    assert (found["value"], found["verdict"]) == ahead


def test_who_is_ahead_is_asked_only_where_both_do_the_same() -> None:
    both = {"plain": [sample(100)], "sidestep": [sample(50)], "envoy": [sample(40)]}
    assert Result("across", ROWS[0], both).ahead()
    assert Result("across", FIXED[1], both).ahead() is None  # each at a rate of its own
    assert Result("local", ROWS[0], both).ahead() is None
    assert Result("across", ROWS[0], {"plain": [sample(100)], "sidestep": [sample(50)]}).ahead() is None


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
    rows = [PEAK, FIXED[0], FIXED[1]]
    results = collect(targets, rows, PLACES, 2, 1, lambda text: order.append(text.rsplit(", ", 1)[1]))
    assert order[:3] == ["plain", "sidestep", "floor"]
    assert order[len(order) // 2 :][:3] == ["floor", "sidestep", "plain"]
    assert [len(result.samples["plain"]) for result in results] == [2] * 6
    assert "floor" not in results[3].samples
    plain, mesh, _ = targets
    assert plain.asked[1:3] == [("across", ("open", "125.0", "64", "16")), ("across", ("open", "500.0", "64", "16"))]
    assert mesh.asked[1:3] == [("across", ("open", "125.0", "64", "16")), ("across", ("open", "150.0", "64", "16"))]


def test_what_was_aborted_is_not_run_again_and_leaves_no_figures() -> None:
    broken = Scripted("sidestep", 300, ["across"], fails=PEAK.name)
    targets = [Scripted("plain", 1000), broken]
    first, second = collect(targets, [PEAK, FIXED[1]], ["across"], 3, 1, lambda text: None)
    assert first.aborted == {"sidestep": "it broke"}
    assert len([words for _, words in broken.asked if words == PEAK.words]) == 1
    assert list(first.record()["targets"]) == ["plain"]
    # Its open loop has no peak to be a fraction of: aborted as well, and not run at some other rate.
    assert "no peak rate" in second.aborted["sidestep"]
    assert len(second.samples["plain"]) == 3


def test_an_open_loop_takes_its_rate_from_a_peak() -> None:
    assert FIXED[0].at(80_000).words == ("open", "10000.0", "64", "16")
    assert ROWS[3].at(80_000) is ROWS[3]
