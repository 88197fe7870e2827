"""The shares as a picture: SVG, written as text. A bar for each target in each row, a thin line from the smallest to
the largest of the rounds, a tick where the figure is that is to be reached.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

COLOURS = {"floor": "#9aa5b1", "sidestep": "#1f6feb", "native": "#0a3069", "envoy": "#d29922", "peer": "#8957e5"}
OTHER = "#57ab5a"
LEFT, WIDTH, BAR, GAP, TOP = 340, 560, 12, 14, 64
FULL = 1.1  # the largest share that is drawn


def _x(share: float) -> float:
    return LEFT + min(max(share, 0), FULL) / FULL * WIDTH


def svg(report: Mapping[str, Any]) -> str:
    """The picture."""
    body: list[str] = []
    y = TOP
    names = [name for name in report["targets"] if name != "plain"]
    for number, name in enumerate(names):
        x = LEFT + number * 120
        body.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{COLOURS.get(name, OTHER)}"/>')
        body.append(f'<text x="{x + 18}" y="44">{name}</text>')
    for row in report["rows"]:
        bars = [(name, row["targets"][name]["share"]) for name in names if "share" in row["targets"].get(name, {})]
        if not bars or row["kind"] == "open":
            continue
        label = f"{row['row']}{'' if row['place'] == 'across' else ', one node'}"
        body.append(
            f'<text x="{LEFT - 10}" y="{y + len(bars) * BAR / 2 + 4:g}" text-anchor="end">{escape(label)}</text>'
        )
        for name, share in bars:
            end, middle, colour = _x(share["median"]), y + BAR / 2 - 1, COLOURS.get(name, OTHER)
            body.append(
                f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{colour}">'
                f"<title>{name}: {share['median']:.3f} ({share['min']:.3f} to {share['max']:.3f})</title></rect>"
            )
            body.append(f'<path d="M{_x(share["min"]):.1f} {middle:g}H{_x(share["max"]):.1f}" stroke="#24292f"/>')
            body.append(
                f'<text x="{_x(max(share["median"], share["max"])) + 5:.1f}" y="{y + 9}">{share["median"]:.2f}</text>'
            )
            y += BAR
        for aim in row["aims"]:
            if aim["of"] == "share":
                tick, tall = _x(aim["reach"]), len(bars) * BAR
                body.append(f'<path d="M{tick:.1f} {y - tall - 3}v{tall + 4}" stroke="#1a7f37" stroke-width="2"/>')
        y += GAP
    grid = [
        f'<path d="M{_x(at / 4):.1f} {TOP - 8}V{y}" stroke="#d0d7de"/>'
        f'<text x="{_x(at / 4):.1f}" y="{y + 14}" text-anchor="middle">{at / 4:g}</text>'
        for at in range(5)
    ]
    width, height = LEFT + WIDTH + 60, y + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            '<text x="10" y="20" font-size="14">Share of the plain network (green: to be reached)</text>',
            *grid,
            *body,
            "</svg>\n",
        ]
    )
