"""The shares as a picture: SVG, written as text. A bar for each target in each row, a thin line from the smallest to
the largest of the rounds, ticks where the figures are: the one to be reached, and behind it the one that is hoped for.
"""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

COLOURS = {"floor": "#9aa5b1", "sidestep": "#1f6feb", "native": "#0b3d91", "envoy": "#d29922", "peer": "#8957e5"}
OTHER = "#57ab5a"
TITLES = {"across": "Across nodes", "local": "On one node"}
LEFT, WIDTH, RIGHT = 330, 560, 80
BAR, GAP, TOP = 12, 10, 78
FULL = 1.1  # the largest share that is drawn


_REACH = 'stroke="#1a7f37" stroke-width="2"'
_STRETCH = 'stroke="#1a7f37" stroke-width="2" stroke-dasharray="2 2"'


_HALO = {"paint_order": "stroke", "stroke": "#ffffff", "stroke_width": "3"}  # a number may lie over a tick


def _x(share: float) -> float:
    return LEFT + min(max(share, 0), FULL) / FULL * WIDTH


def _text(x: float, y: float, text: str, **style: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


def _legend(names: list[str]) -> Iterator[str]:
    x = LEFT
    for name in names:
        yield f'<rect x="{x}" y="38" width="12" height="12" fill="{COLOURS.get(name, OTHER)}"/>'
        yield _text(x + 17, 48, name)
        x += 34 + 7 * len(name)
    for word, style in (("to be reached", _REACH), ("hoped for", _STRETCH)):
        yield f'<path d="M{x + 4} 36v16" {style}/>'
        yield _text(x + 12, 48, word)
        x += 30 + 6 * len(word)


def _row(row: Mapping[str, Any], bars: list[tuple[str, Any]], y: int) -> Iterator[str]:
    """One row whose bars begin at `y`."""
    tall = len(bars) * BAR
    yield _text(LEFT - 10, y + tall / 2 + 3, row["row"], text_anchor="end")
    numbers = []
    for number, (name, share) in enumerate(bars):
        at, end, colour = y + number * BAR, _x(share["median"]), COLOURS.get(name, OTHER)
        yield (
            f'<rect x="{LEFT}" y="{at}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{colour}">'
            f"<title>{name}: {share['median']:.3f} ({share['min']:.3f} to {share['max']:.3f})</title></rect>"
        )
        yield f'<path d="M{_x(share["min"]):.1f} {at + BAR / 2 - 1:g}H{_x(share["max"]):.1f}" stroke="#24292f"/>'
        beyond = "" if share["median"] <= FULL else " (beyond)"
        x = round(_x(max(share["median"], share["max"])) + 6, 1)
        numbers.append(_text(x, at + 9, f"{share['median']:.2f}{beyond}", **_HALO))
    for aim in row["aims"]:
        if aim["of"] == "share" and aim["issue"] != 3:  # those of the first path are weaker
            for figure, style in ((aim["stretch"], _STRETCH), (aim["reach"], _REACH)):
                if figure is not None:
                    yield f'<path d="M{_x(figure):.1f} {y - 3}v{tall + 4}" {style}/>'
    yield from numbers


def svg(report: Mapping[str, Any]) -> str:
    """The picture."""
    names = [name for name in report["targets"] if name != "plain"]
    body: list[str] = []
    y = TOP
    for place, title in TITLES.items():
        begun = False
        for row in report["rows"]:
            bars = [(name, row["targets"][name]["share"]) for name in names if "share" in row["targets"].get(name, {})]
            if row["place"] != place or not bars or row["kind"] == "open":
                continue
            if not begun:
                body.append(_text(10, y + 9, title, font_size="13", font_weight="bold"))
                y, begun = y + 22, True
            body += _row(row, bars, y)
            y += len(bars) * BAR + GAP
        y += GAP if begun else 0
    grid = [
        f'<path d="M{_x(at / 4):.1f} {TOP - 12}V{y}" stroke="#d0d7de"/>'
        + _text(round(_x(at / 4), 1), y + 14, f"{at / 4:g}", text_anchor="middle")
        for at in range(5)
    ]
    machine = report["machine"]
    about = f"{report['time'][:10]}, {machine['cpus']} x {machine['cpu']}, Linux {machine['kernel']}"
    width, height = LEFT + WIDTH + RIGHT, y + 26
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="11" fill="#24292f">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            _text(10, 20, "Share of the plain network's rate", font_size="14", font_weight="bold"),
            _text(width - 10, 20, about, text_anchor="end", fill="#57606a"),
            *_legend(names),
            *grid,
            *body,
            "</svg>\n",
        ]
    )
