"""The report's shape: JSON that can be written and read back, Markdown and SVG that say what is in it."""

import json
import xml.etree.ElementTree as xml
from typing import Any

import pytest

from tests.bench.__main__ import arguments
from tests.bench.load import Sample
from tests.bench.machine import Cpu
from tests.bench.plot import svg
from tests.bench.report import markdown, number, problems, table, verdict_line
from tests.bench.results import Result, spread
from tests.bench.rows import FIXED, ROWS
from tests.bench.targets import NAMES, accelerates
from tests.bench.verdicts import SINGLES, Single, lines, missed


def sample(rate: float, p99: float = 90_000, saturated: bool = False) -> Sample:
    return Sample(rate, 40_000, p99, Cpu(1e-6, 2e-6, 3e-6), 1000, 64_000, saturated)


def made() -> dict[str, Any]:
    peak = Result(
        "across", ROWS[1], {"plain": [sample(1000), sample(1100)], "sidestep": [sample(400), sample(440)]},
        {"envoy": "envoy, across: it broke"},
    )  # fmt: skip
    fixed = Result("across", FIXED[1], {"plain": [sample(500)], "sidestep": [sample(400, 1e9, True)]})
    bulk = Result("local", ROWS[3], {"plain": [sample(3e9)], "sidestep": [sample(6e8)]})
    return {
        "format": 3,
        "time": "2026-01-01T00:00:00Z",
        "machine": {
            "cpu": "a CPU", "cpus": 2, "memory_gib": 8, "kernel": "6.18", "openssl": "OpenSSL 3", "load_before": 0.1,
            "congestion_control": "cubic",
        },
        "settings": {"rounds": 2, "seconds": 2.0, "quick": False},
        "targets": {"plain": "nothing", "sidestep": "the mesh", "envoy": "a pair"},
        "rows": [each.record() for each in (peak, fixed, bulk)],
        "figures": [
            SINGLES["memory"].record([51.0]), SINGLES["enrol"].record([1.1, 1.3, 1.2]), SINGLES["start"].record(None),
        ],
        "fleet": {
            "pods": 20, "rate": 4000.0, "less": {"mesh": 94.6},
            "kinds": {
                "mesh": {
                    "services": 500,
                    "targets": {
                        "envoy": {
                            "memory_mib": 1074.0, "own_mib": 1090.0, "carried": 4000.0, "cpu_us": spread([380.0]),
                            "p50_us": spread([80.0]), "p99_us": spread([900.0]),
                            "cpu_split": {"user": 1.0, "system": 2.0, "softirq": 3.0},
                        }
                    },
                }
            },
        },
        "memory": {"idle": {"sidestep": {"agent, node1": 40.0}}, "after": {"sidestep": {"agent, node1": 41.0}}},
        "idle": [{"target": "sidestep", "place": "across", "connections": 1000, "kib_each": {"engine, node1": 9.9}}],
        "broken": [],
    }  # fmt: skip


def test_the_record_survives_json_and_has_every_sample() -> None:
    record = json.loads(json.dumps(made()))["rows"][0]
    assert record["targets"]["sidestep"]["share"] == {"median": 0.4, "min": 0.4, "max": 0.4, "all": [0.4, 0.4]}
    assert record["targets"]["plain"]["rate"]["all"] == [1000.0, 1100.0]
    assert record["targets"]["plain"]["cpu_split"] == {"user": 1.0, "system": 2.0, "softirq": 3.0}
    assert record["cpu_unit"] == "us/operation"
    assert record["aborted"] == {"envoy": "envoy, across: it broke"}


def test_markdown_says_it() -> None:
    text = markdown(json.loads(json.dumps(made())), "bench.svg")
    assert "2 x a CPU, 8 GiB, Linux 6.18, OpenSSL 3, congestion control cubic" in text
    assert "![shares of no mesh](bench.svg)" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["", "plain", "sidestep", "envoy"] in rows
    assert [ROWS[1].name, "1 050 /s", "0.4 (0.4 to 0.4)", ""] in rows
    assert [ROWS[1].name, "5", "share", "0.4", "", "at least 0.3", "0.4", "stretch"] in rows
    assert [ROWS[1].name, "5", "times Envoy", "", "", "more than 1", "", "NOT measured"] in rows
    assert [FIXED[1].name, "5", "p99", "11 111", "", "at most 2.3", "2", "NOT reached: saturated"] in rows
    assert [f"{ROWS[3].name}, one node", "5", "share", "0.2", "", "at least 0.95", "", "NOT reached"] in rows
    assert [SINGLES["memory"].what, "5", "MiB", "51", "", "at most 75", "", "reached"] in rows
    assert [SINGLES["enrol"].what, "1.2 (1.1 to 1.3)", "s"] in rows
    assert "4 of 8 figures are reached (2 stretch, 2 reached, 1 NOT reached, 1 NOT reached: saturated, 2 NOT" in text
    assert "Knowing the whole mesh, 500 services of 3 pods: 94.6 % less memory" in text
    assert ["envoy", "1 074", "1 090", "4 000", "380: 1 + 2 + 3", "80", "900"] in rows
    assert "3 000 MB/s" in text.partition("## On one node")[2]
    assert "- aborted: envoy, across: it broke" in text
    assert problems(made()) == ["aborted: envoy, across: it broke"]


def test_every_figure_that_is_missed_is_told() -> None:
    found = missed(made())
    assert [(each["what"], each["verdict"]) for each in found] == [
        (FIXED[1].name, "saturated"),
        (ROWS[3].name, "short"),
        (ROWS[1].name, "unmeasured"),
        (SINGLES["start"].what, "unmeasured"),
    ]
    assert verdict_line(found[0]) == (
        f"across: {FIXED[1].name}: p99 11 111, wanted at most 2.3 (NOT reached: saturated)"
    )
    assert verdict_line(found[3]) == f"{SINGLES['start'].what}: s not measured, wanted at most 1 (NOT measured)"
    assert len(lines(made())) == 8


@pytest.mark.parametrize(
    ("single", "values", "verdict"),
    [
        (Single("x", limit=10), [9, 10, 99], "reached"),
        (Single("x", limit=10), [9, 11, 12], "short"),
        (Single("x", limit=10, worst=True), [9, 10, 99], "short"),
        (Single("x", limit=10, worst=True), [9, 9, 10], "reached"),
        (Single("x", limit=10, least=True), [9, 10, 11], "reached"),
        (Single("x", limit=10, least=True, worst=True), [9, 10, 11], "short"),
        (Single("x"), [1], ""),
        (Single("x", limit=10), None, "unmeasured"),
        (Single("x"), None, ""),
    ],
)
def test_single_figures(single: Single, values: list[float] | None, verdict: str) -> None:
    assert single.record(values)["verdict"] == verdict


def test_tables_are_aligned() -> None:
    assert table(["", "a"], [["row", "1"], ["r", "100"]]).splitlines() == [
        "|     |   a |",
        "| :-- | --: |",
        "| row |   1 |",
        "| r   | 100 |",
    ]
    assert table(["", "a"], []) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (12.34, "12.3"), (99.96, "100"), (1234567, "1 234 567")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_the_plot_is_a_picture_of_the_shares() -> None:
    root = xml.fromstring(svg(made()))
    space = "{http://www.w3.org/2000/svg}"
    titles = [each.text for each in root.iter(f"{space}title")]
    assert titles == ["sidestep: 0.400 (0.400 to 0.400)", "sidestep: 0.200 (0.200 to 0.200)"]
    bars = [each for each in root.iter(f"{space}rect") if len(each)]
    assert float(bars[0].attrib["width"]) == pytest.approx(2 * float(bars[1].attrib["width"]), abs=0.2)


def test_the_command_line() -> None:
    usual = [name for name in NAMES if name != "peer" and (name != "native" or accelerates())]
    assert arguments([]).targets == usual
    assert arguments(["--targets", "envoy"]).targets == ["plain", "envoy"]
    assert arguments(["--peer", "x"]).targets == [*usual, "peer"]
    assert arguments(["--variant", "off=--agent-arg=--x=y --z"]).variant == [("off", ["--agent-arg=--x=y", "--z"])]
    assert arguments(["--rows", "bulk"]).only == ["rows"]
    assert arguments(["--write-docs", "--peer", "x", "--rounds", "7"]).write_docs
    for wrong in (
        ["--targets", "nobody"],
        ["--targets", "peer"],
        ["--variant", "plain=x"],
        ["--places", "moon"],
        ["--quick", "--write-docs"],
        ["--rows", "bulk", "--write-docs"],
        ["--only", "rows", "--write-docs"],
        ["--targets", "plain", "--write-docs"],
        ["--rounds", "2", "--write-docs"],
        ["--only", "nothing"],
    ):
        with pytest.raises(SystemExit):
            arguments(wrong)
