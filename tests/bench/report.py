"""The report as Markdown, from what is in the JSON file alone: for the terminal and for docs/benchmarks.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench.rows import OF_FLOOR
from tests.bench.verdicts import lines as verdicts
from tests.bench.verdicts import missed

Record = Mapping[str, Any]
PLACES = {"across": "Across nodes", "local": "On one node"}
VERDICTS = {
    "stretch": "stretch",
    "reached": "reached",
    "floor": f"reached ({OF_FLOOR} of the floor)",
    "short": "NOT reached",
    "saturated": "NOT reached: saturated",
    "unmeasured": "NOT measured",
}
ASKED = (
    "Of rows: sidestep's, against the plain network; on one node with acceleration where that ran. Across nodes a "
    f"share is also reached at {OF_FLOOR} of the floor's in the same run, what is at most so much at the floor's "
    f"divided by {OF_FLOOR}. `p99 at half of the peak rate` is at half of each target's own peak: half of the plain "
    "network's is more than a proxy carries at all. Single figures: the median, with the smallest and the largest; "
    "where the bound is for every case, the worst is judged."
)
QUICK = " (**quick: it judges nothing, and large meshes and many connections are a twentieth of what is said**)"
KINDS = {"bare": "knowing one destination", "mesh": "knowing the whole mesh"}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, the first to the left; "" without lines."""
    if not lines:
        return ""
    widths = [max(2, *(len(line[i]) for line in (head, *lines))) for i in range(len(head))]

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


def _value(line: Record) -> str:
    """Of a verdict: a number, a spread, or nothing."""
    value = line["value"]
    if value is None:
        return ""
    return ranged(value) if isinstance(value, Mapping) else number(value)


def _verdicts(report: Record) -> str:
    found = [
        [
            f"{each['what']}{', one node' if each['place'] == 'local' else ''}",
            str(each["issue"]),
            each["of"],
            _value(each),
            "" if each["floor"] is None else number(each["floor"]),
            each["wanted"],
            "" if each["stretch"] is None else f"{each['stretch']:g}",
            VERDICTS[each["verdict"]],
        ]
        for each in verdicts(report)
    ]
    return table(["", "issue", "of", "measured", "floor", "wanted", "stretch", "verdict"], found)


def verdict_line(each: Record) -> str:
    """A verdict for the terminal, in one line."""
    where = f"{each['place']}: " if each["place"] else ""
    value = _value(each) or "not measured"
    return f"{where}{each['what']}: {each['of']} {value}, wanted {each['wanted']} ({VERDICTS[each['verdict']]})"


def _told(report: Record) -> str:
    """Single figures that nobody asks for."""
    found = [
        [each["what"], ranged(each["value"]), each["unit"]]
        for each in report["figures"]
        if not each["verdict"] and each["value"]
    ]
    return table(["", "measured", ""], found)


def _fleet(kind: Record) -> str:
    found = []
    for name, entry in kind["targets"].items():
        parts = " + ".join(number(entry["cpu_split"][part]) for part in ("user", "system", "softirq"))
        cpu = f"{ranged(entry['cpu_us'])}: {parts}"
        times = number(entry["p50_us"]["median"]), number(entry["p99_us"]["median"])
        found.append(
            [name, number(entry["memory_mib"]), number(entry["own_mib"]), number(entry["carried"]), cpu, *times]
        )
    return table(
        [
            "",
            "memory of node1's proxies, MiB",
            "as on a machine of its own",
            "requests/s",
            "CPU us a request",
            "p50 us",
            "worst pod's p99 us",
        ],
        found,
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
    """What was aborted, with the reason."""
    return [
        *(f"aborted: {reason}" for row in report["rows"] for reason in row["aborted"].values()),
        *(f"aborted: {reason}" for reason in report["broken"]),
    ]


def _summary(report: Record) -> str:
    found, bad = verdicts(report), missed(report)
    if not found:
        return ""
    counts = ", ".join(
        f"{number} {word}"
        for verdict, word in VERDICTS.items()
        if (number := sum(each["verdict"] == verdict for each in found))
    )
    return f"{len(found) - len(bad)} of {len(found)} figures are reached ({counts})."


def markdown(report: Record, plot: str = "") -> str:
    """The whole report. `plot`: the name of the SVG file to show, "" for none."""
    machine, settings = report["machine"], report["settings"]
    out = [
        "# Benchmarks",
        "Written by `make bench BENCH_ARGS=--write-docs`; do not edit. How it is measured: tests/bench/__main__.py.",
        f"{report['time']}, {settings['rounds']} interleaved rounds of {settings['seconds']:g} s"
        + (QUICK if settings["quick"] else "")
        + f". Machine: {machine['cpus']} x {machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"{machine['openssl']}, congestion control {machine['congestion_control']}, "
        f"load before the run {machine['load_before']:.2f}.",
        _summary(report),
        "\n".join(f"- **{name}**: {about}" for name, about in report["targets"].items()),
        "Shares, and what follows `x`, are of the plain network in the same round: the median of the rounds, with the "
        "smallest and the largest. CPU is what the whole machine worked for one operation or GB, load and server "
        "included: user + system + softirq. `saturated`: a fixed rate that was not carried, so its latency has no "
        "bound. Memory is PSS, which takes off what other processes here share, those of the labs' other nodes too; "
        "`as on a machine of its own` takes nothing off for them.",
    ]
    if plot:
        out.append(f"![shares of no mesh]({plot})")
    if table_of := _verdicts(report):
        out += [
            "## Figures that are asked for",
            ASKED,
            table_of,
        ]
    for place, title in PLACES.items():
        names = _names(report, place)
        if not names:
            continue
        out += [
            f"## {title}",
            "Rates: the plain network's, and the share of it.",
            _matrix(report, place, names, _share),
        ]
        out += ["Median latency, us:", _matrix(report, place, names, _latency("p50"))]
        out += ["p99, us:", _matrix(report, place, names, _latency("p99"))]
        out += ["CPU, us an operation or s/GB:", _matrix(report, place, names, _cpu)]
    if told := _told(report):
        out += ["## Other single figures", told]
    if report["fleet"]:
        fleet = report["fleet"]
        out.append(f"## {fleet['pods']} pods on a node: a sidecar each, or one node proxy")
        out.append(
            f"64 B round trips across nodes, {number(fleet['rate'])} a second of all pods together. First sidecars and "
            "agent know one destination, which no real mesh is content with, then the mesh that there is by default."
        )
        for kind, each in fleet["kinds"].items():
            known = f", {each['services']} services of 3 pods" if each["services"] else ""
            out += [f"{KINDS[kind]}{known}: {fleet['less'][kind]:.1f} % less memory".capitalize(), _fleet(each)]
    out += ["## Memory", _memory(report["memory"]), _idle(report["idle"])]
    if found := problems(report):
        out += ["## Problems", "\n".join(f"- {text}" for text in found)]
    return "\n\n".join(part.rstrip("\n") for part in out if part) + "\n"
