"""The report's shape: JSON that can be written and read back, Markdown and SVG that say what is in it."""

import json
import xml.etree.ElementTree as xml
from typing import Any

import pytest

from tests.bench.__main__ import arguments, figure
from tests.bench.load import Sample
from tests.bench.machine import Cpu
from tests.bench.plot import svg
from tests.bench.report import markdown, number, problems, table
from tests.bench.results import Result
from tests.bench.rows import FIXED, ROWS


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
        "format": 2,
        "time": "2026-01-01T00:00:00Z",
        "machine": {
            "cpu": "a CPU", "cpus": 2, "memory_gib": 8, "kernel": "6.18", "openssl": "OpenSSL 3", "load_before": 0.1,
            "congestion_control": "cubic",
        },
        "settings": {"rounds": 2, "seconds": 2.0, "quick": False},
        "targets": {"plain": "nothing", "sidestep": "the mesh", "envoy": "a pair"},
        "rows": [each.record() for each in (peak, fixed, bulk)],
        "figures": [figure("memory, MiB", "51.0", "at most 80", True), figure("enrolment, s", "1.1")],
        "fleet": {},
        "memory": {"idle": {"sidestep": {"agent, node1": 40.0}}, "after": {"sidestep": {"agent, node1": 41.0}}},
        "idle": [{"target": "sidestep", "place": "across", "connections": 1000, "kib_each": {"engine, node1": 9.9}}],
        "broken": [],
        "missed": ["something"],
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
    across, _, local = text.partition("## On one node")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in across.splitlines() if "|" in line]
    assert ["", "plain", "sidestep", "envoy"] in rows
    assert [ROWS[1].name, "1 050 /s", "0.4 (0.4 to 0.4)", ""] in rows
    assert [ROWS[1].name, "share", "0.4", "", "at least 0.3", "0.4", "stretch"] in rows
    assert [FIXED[1].name, "p99", "11 111", "", "at most 2.3", "2", "NOT reached: saturated"] in rows
    assert "3 000 MB/s" in local
    assert "| memory, MiB  |     51.0 | at most 80 | reached |" in local
    assert "- aborted: envoy, across: it broke" in local
    assert "- missed: something" in local
    assert problems(made()) == ["aborted: envoy, across: it broke", "missed: something"]


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
    assert arguments([]).targets == ["plain", "floor", "sidestep", "envoy"]
    assert arguments(["--targets", "envoy"]).targets == ["plain", "envoy"]
    assert arguments(["--peer", "x"]).targets == ["plain", "floor", "sidestep", "envoy", "peer"]
    assert arguments(["--variant", "off=--agent-arg=--x=y --z"]).variant == [("off", ["--agent-arg=--x=y", "--z"])]
    for wrong in (
        ["--targets", "nobody"],
        ["--targets", "peer"],
        ["--variant", "plain=x"],
        ["--places", "moon"],
        ["--quick", "--write-docs"],
    ):
        with pytest.raises(SystemExit):
            arguments(wrong)
