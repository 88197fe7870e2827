"""The report as Markdown, from what is in the JSON file alone: for the terminal and for docs/benchmarks.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench.rows import OF_FLOOR

Record = Mapping[str, Any]
PLACES = {"across": "Across nodes", "local": "On one node"}
VERDICTS = {
    "stretch": "stretch",
    "reached": "reached",
    "floor": f"reached ({OF_FLOOR} of the floor)",
    "short": "NOT reached",
    "saturated": "NOT reached: saturated",
}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, the first to the left; "" without lines."""
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def one(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([one(head), one(rule), *(one(line) for line in lines)]) + "\n"


def number(value: float) -> str:
    """Three digits that count, no exponent."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 100 else f"{value:.3g}"


def ranged(spread: Record, scale: float = 1) -> str:
    """Median, and smallest to largest."""
    median, least, most = (number(spread[key] / scale) for key in ("median", "min", "max"))
    return median if len(spread["all"]) == 1 else f"{median} ({least} to {most})"


def _rate(entry: Record, row: Record) -> str:
    if row["unit"] == "bytes/s":
        return f"{number(entry['rate']['median'] / 1e6)} MB/s"
    return f"{number(entry['rate']['median'])} /s"


def _names(report: Record, place: str) -> list[str]:
    ran = {name for row in report["rows"] if row["place"] == place for name in (*row["targets"], *row["aborted"])}
    return [name for name in report["targets"] if name in ran]


def _matrix(report: Record, place: str, names: Sequence[str], cell: Callable[[Record, Record, str], str]) -> str:
    """Rows by targets; a row without any cell is left out."""
    lines = []
    for row in report["rows"]:
        if row["place"] == place:
            cells = [cell(row["targets"][name], row, name) if name in row["targets"] else "" for name in names]
            if any(cells):
                lines.append([row["row"], *cells])
    return table(["", *names], lines)


def _share(entry: Record, row: Record, name: str) -> str:
    if row["kind"] == "open":  # the rate was given
        return ""
    if name == "plain":
        return _rate(entry, row)
    return ranged(entry["share"]) if "share" in entry else ""


def _latency(key: str) -> Callable[[Record, Record, str], str]:
    def cell(entry: Record, row: Record, name: str) -> str:
        if f"{key}_us" not in entry:
            return ""
        times = f", x {number(entry[f'{key}_ratio']['median'])}" if f"{key}_ratio" in entry else ""
        rate = f" at {_rate(entry, row)}" if row["kind"] == "open" else ""
        return number(entry[f"{key}_us"]["median"]) + times + rate + (" saturated" if entry["saturated"] else "")

    return cell


def _cpu(entry: Record, row: Record, name: str) -> str:
    parts = " + ".join(number(entry["cpu_split"][part]) for part in ("user", "system", "softirq"))
    unit = " s/GB" if row["cpu_unit"] == "s/GB" else ""
    times = f", x {number(entry['cpu_ratio']['median'])}" if "cpu_ratio" in entry else ""
    return f"{number(entry['cpu']['median'])}{unit} ({parts}){times}"


def _aims(report: Record, place: str) -> str:
    lines = []
    for row in report["rows"]:
        if row["place"] != place:
            continue
        for aim in row["aims"]:
            word = "at least" if aim["of"] == "share" else "at most"
            floor = "" if aim["floor"] is None else number(aim["floor"])
            wanted = f"{word} {aim['reach']:g}", f"{aim['stretch']:g}"
            lines.append([row["row"], aim["of"], number(aim["value"]), floor, *wanted, VERDICTS[aim["verdict"]]])
    return table(["", "of no mesh", "sidestep", "floor", "reach", "stretch", "verdict"], lines)


def _figures(report: Record) -> str:
    lines = [
        [each["what"], each["value"], each["wanted"], {True: "reached", False: "NOT reached", None: ""}[each["ok"]]]
        for each in report["figures"]
    ]
    return table(["", "measured", "wanted", ""], lines)


def _fleet(fleet: Record) -> str:
    lines = []
    for name, entry in fleet["targets"].items():
        parts = " + ".join(number(entry["cpu_split"][part]) for part in ("user", "system", "softirq"))
        cpu = f"{ranged(entry['cpu_us'])}: {parts}"
        times = number(entry["p50_us"]["median"]), number(entry["p99_us"]["median"])
        lines.append([name, number(entry["memory_mib"]), number(entry["carried"]), cpu, *times])
    return table(
        ["", "memory of node1's proxies, MiB", "requests/s", "CPU us a request", "p50 us", "worst pod's p99 us"], lines
    )


def _memory(memory: Record) -> str:
    lines = [
        [f"{target}: {process}", *(number(memory[when].get(target, {}).get(process, 0)) for when in ("idle", "after"))]
        for target, processes in memory["idle"].items()
        for process in processes
    ]
    return table(["PSS, MiB", "idle", "after the load"], lines)


def _idle(idle: Sequence[Record]) -> str:
    lines = [
        [f"{each['target']}, {each['place']}", process, number(kib)]
        for each in idle
        for process, kib in each["kib_each"].items()
    ]
    return table(["open connections that do nothing", "process", "KiB each"], lines)


def problems(report: Record) -> list[str]:
    """What was aborted, and which targets of the first path were missed."""
    found = [f"aborted: {reason}" for row in report["rows"] for reason in row["aborted"].values()]
    found += [f"aborted: {reason}" for reason in report["broken"]]
    return found + [f"missed: {text}" for text in report["missed"]]


def markdown(report: Record, plot: str = "") -> str:
    """The whole report. `plot`: the name of the SVG file to show, "" for none."""
    machine, settings = report["machine"], report["settings"]
    out = [
        "# Benchmarks",
        "Written by `python -m tests.bench --write-docs`; do not edit. How it is measured: tests/bench/__main__.py.",
        f"{report['time']}, {settings['rounds']} interleaved rounds of {settings['seconds']:g} s"
        + (" (**quick: it judges nothing**)" if settings["quick"] else "")
        + f". Machine: {machine['cpus']} x {machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"{machine['openssl']}, congestion control {machine['congestion_control']}, "
        f"load before the run {machine['load_before']:.2f}.",
        "\n".join(f"- **{name}**: {about}" for name, about in report["targets"].items()),
        "Shares, and what follows `x`, are of the plain network in the same round: the median of the rounds, with the "
        "smallest and the largest. CPU is what the whole machine worked for one operation or GB, load and server "
        "included: user + system + softirq. `saturated`: a fixed rate that was not carried, so its latency has no "
        "bound.",
    ]
    if plot:
        out.append(f"![shares of no mesh]({plot})")
    for place, title in PLACES.items():
        names = _names(report, place)
        if not names:
            continue
        out += [
            f"## {title}",
            "Rates: the plain network's, and the share of it.",
            _matrix(report, place, names, _share),
        ]
        if aims := _aims(report, place):
            out += ["What is asked for, and what there is:", aims]
        out += ["Median latency, us:", _matrix(report, place, names, _latency("p50"))]
        out += ["p99, us:", _matrix(report, place, names, _latency("p99"))]
        out += ["CPU, us an operation or s/GB:", _matrix(report, place, names, _cpu)]
    behind = [f"{row['row']}" for row in report["rows"] if row["ahead_of_envoy"] is False]
    if any(row["ahead_of_envoy"] is not None for row in report["rows"]):
        out.append(
            f"Behind the pair of Envoys in: {'; '.join(behind)}."
            if behind
            else "Ahead of the pair of Envoys in every row."
        )
    if report["figures"]:
        out += ["## Single figures", _figures(report)]
    if report["fleet"]:
        fleet = report["fleet"]
        out += [
            f"## {fleet['pods']} pods on a node: a sidecar each, or one node proxy",
            f"64 B round trips across nodes, {fleet['rate']:g} a second of all pods together.",
            _fleet(fleet),
        ]
    out += ["## Memory", _memory(report["memory"]), _idle(report["idle"])]
    if found := problems(report):
        out += ["## Problems", "\n".join(f"- {text}" for text in found)]
    return "\n\n".join(part.rstrip("\n") for part in out if part) + "\n"
