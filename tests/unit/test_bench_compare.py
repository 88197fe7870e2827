"""Comparing two reports: what moved beyond noise, in which direction, and what cannot be compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.compare import changes, compare, memory, missing, moved, singles, unlike, verdict_changes
from tests.bench.results import spread
from tests.bench.verdicts import Single
from tests.harness.lab import ROOT


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([10, 11, 12], [13, 14, 15], 1),
        ([10, 11, 12], [7, 8, 9], -1),
        ([10, 11, 12], [12, 14, 15], 0),  # the ranges touch
        ([10, 11, 12], [5, 8, 10], 0),
        ([100, 100.5, 101], [101.5, 102, 103], 0),  # apart, and by less than LEAST
        ([10, 10, 10], [10, 10, 10], 0),
    ],
)
def test_beyond_noise(old: list[float], new: list[float], expected: int) -> None:
    assert moved(spread(old), spread(new)) == expected


def report(share: list[float], p50: list[float], plain: list[float], kernel: str = "6.1") -> dict[str, Any]:
    ours = {"share": spread(share), "p50_ratio": spread(p50), "rate": spread([1, 1, 1])}
    return {
        "format": 3,
        "figures": [],
        "machine": {"kernel": kernel, "load_before": share[0]},
        "memory": {"idle": {"sidestep": {"engine": 10.0}}},
        "settings": {"rounds": 3, "seconds": 2, "quick": False},
        "rows": [
            {
                "place": "across",
                "row": "r",
                "targets": {"plain": {"rate": spread(plain)}, "sidestep": ours},
                "aims": [],
                "ahead_of_envoy": None,
            }
        ],
    }


OLD = report([0.2, 0.21, 0.22], [3.0, 3.1, 3.2], [100, 101, 102])


def test_more_is_better_of_shares_and_less_of_latencies() -> None:
    found = {change.of: change for change in changes(OLD, report([0.3, 0.31, 0.32], [4, 4.1, 4.2], [100, 101, 102]))}
    assert {of: change.sign for of, change in found.items()} == {"rate": 0, "share": 1, "p50_ratio": -1}
    assert found["rate"].target == "plain"
    assert found["share"].line().split()[:4] == ["better", "across", "r", "sidestep"]
    assert found["share"].line().endswith("+48 %")


def test_status_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def against(new: dict[str, Any]) -> int:
        paths = tmp_path / "old.json", tmp_path / "new.json"
        for path, content in zip(paths, (OLD, new), strict=True):
            path.write_text(json.dumps(content))
        return compare(*paths)

    assert against(OLD) == 0
    assert capsys.readouterr().out == "3 of 3 figures did not change beyond noise\n"
    assert against(report([0.1, 0.11, 0.12], [3.0, 3.1, 3.2], [50, 51, 52], kernel="6.18")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "differs: kernel: 6.1 -> 6.18"
    assert lines[1].startswith("the plain network itself changed in 1 figures")
    assert lines[2].startswith("worse  across  r")
    assert lines[3].split()[3] == "plain"
    assert against({**OLD, "format": 2}) == 2
    assert capsys.readouterr().out == "reports of two formats: 3 and 2\n"
    few = report([0.1, 0.11], [3.0, 3.1], [50, 51])
    few["settings"]["rounds"] = 2
    assert against(few) == 2


def test_cases_that_only_one_report_has() -> None:
    new = report([0.2, 0.21, 0.22], [3, 3.1, 3.2], [1, 1, 1])
    new["rows"][0]["targets"]["envoy"] = new["rows"][0]["targets"].pop("sidestep")
    assert [text.split() for text in missing(OLD, new)] == [
        ["gone", "across", "r", "sidestep"],
        ["new", "across", "r", "envoy"],
    ]
    assert unlike(OLD, new) == []


@pytest.mark.parametrize(("mib", "expected"), [(10.4, []), (12.0, ["memory sidestep: engine: 10.0 -> 12.0 MiB"])])
def test_memory(mib: float, expected: list[str]) -> None:
    assert memory(OLD, {"memory": {"idle": {"sidestep": {"engine": mib}, "envoy": {"envoy": 40.0}}}}) == expected


def test_single_figures_and_verdicts() -> None:
    wait, share = Single("a wait", "s", limit=2), Single("a share", limit=0.5, least=True)
    start = Single("a start", "s", limit=1)
    old = {**OLD, "figures": [wait.record([1, 1, 1]), share.record([0.6, 0.6, 0.6]), start.record([0.9])]}
    new = {**OLD, "figures": [wait.record([3, 3, 3]), share.record([0.7, 0.7, 0.7]), start.record(None)]}
    found = list(singles(old, new))
    assert [(change.row, change.sign) for change in found] == [("a wait", -1), ("a share", 1)]
    assert found[0].line().split() == ["worse", "a", "wait", "s", "1", "->", "3", "+200", "%"]
    assert verdict_changes(old, new) == [
        "verdict        a wait (s): reached -> short",
        "verdict        a start (s): reached -> unmeasured",
    ]
    assert verdict_changes(new, new) == []


def test_what_is_no_report_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no JSON")
    for path in (tmp_path / "missing", text):
        words = [sys.executable, "-m", "tests.bench", "compare", str(path), str(path)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
