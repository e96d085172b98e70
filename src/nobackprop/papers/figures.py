"""Figures of a paper's results, as SVG. The same records give the same bytes.

A rule has the same colour in every figure, and each line has its name beside it. Text, axes and backprop are drawn in
the colour of the page's text, so a figure suits a light page and a dark one.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression

from nobackprop.papers.colours import INK, colour
from nobackprop.papers.compare import error_curves
from nobackprop.papers.results import ANGLE, Findings, Found, Row, Table, described, rules_run

STYLE: Any = {
    "svg.hashsalt": "nobackprop",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "lines.linewidth": 1.5,
}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
ALONE = (  # of a figure outside of our pages
    "<style>svg{color:#1f2328;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)
NAME, LINE = 0.07, 0.155  # inches: the width of a letter of a name, and the height of a line of names


def within_a_page(svg: bytes) -> str:
    """A figure as an element of a page. It takes the colours of the page."""
    text = svg.decode().replace(ALONE, "")
    return text[text.index("<svg") :]


def figures(found: Findings) -> dict[str, bytes]:
    """Every figure that there is data for.

    Their names: `<table>_error` or `_accuracy`, `_rules`, `_cost`, `_curves`, `_time` and `_angles`.
    """
    made: dict[str, bytes] = {}
    for table in found.layout.tables:
        rows = [row for row in found.tables[table.name] if row.run]
        if not rows:
            continue
        kinds: dict[str, Callable[[], Canvas]] = {}
        if table.against and len({row.labels[table.against] for row in rows}) > 1:
            kinds[table.drawn] = partial(_against, table, rows)
        if table.by_rule:
            kinds["rules"] = partial(_by_rule, found, rows)
            if priced := [row for row in rows if found.costs_of(row)]:
                kinds["cost"] = partial(_cost, found, priced)
        for kind, line, x in (("curves", _curve, "epoch"), ("time", _time, "seconds of training")):
            kinds[kind] = partial(_panels, rows, line, x)
        if measured := [(row, rule, c) for row in rows for rule, c in row.cells.items() if rule != "bp" and c.layers]:
            kinds["angles"] = partial(_angles, measured)
        for kind, draw in kinds.items():
            made[f"{table.name}_{kind}"] = _svg(draw)
    return made


def _svg(draw: Callable[[], Canvas]) -> bytes:
    with mpl.rc_context(STYLE):
        canvas, file = draw(), io.BytesIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<[^>]*>", _rounded, file.getvalue().decode())
    svg = re.sub(r' id="[a-z][\w.]*_\d+"', "", svg)  # numbers of parts, which two figures on one page would share
    svg = re.sub(r'<g id="rule:(\w+)">', r'<g class="rule-\1">', svg).replace(INK, "currentColor")
    return re.sub(r"(<svg[^>]*>)", rf"\1{ALONE}", svg, count=1).encode()


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its numbers to hundredths of a point."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0])


def _axes(
    number: int,
    x: str,
    y: str,
    names: Sequence[str] = (),
    wide: float = 2.5,
    height: float = 1.7,
    left: float = 0.65,
    columns: int | None = None,
    apart: float = 0.45,
) -> tuple[Canvas, list[Any]]:
    """Panels in a grid, with a common label for each axis and room for names at the right. Sizes are in inches."""
    beside = 0.2 + NAME * max(map(len, names), default=0)
    between = (beside + apart, 0.6)
    height = max(height, LINE * len(names))
    columns = min(number, columns or max(1, int((10.7 - left) / (wide + between[0]))))
    lines = ceil(number / columns)
    below, above = 0.55, 0.45
    width = left + columns * wide + (columns - 1) * between[0] + beside
    tall = below + lines * height + (lines - 1) * between[1] + above
    canvas = Canvas(figsize=(width, tall))
    axes = canvas.subplots(lines, columns, squeeze=False).flatten()
    # By hand, since matplotlib's own layouts draw everything several times.
    canvas.subplots_adjust(
        left=left / width,
        right=1 - beside / width,
        bottom=below / tall,
        top=1 - above / tall,
        wspace=between[0] / wide,
        hspace=between[1] / height,
    )
    canvas.text((left + width - beside) / 2 / width, 0.1 / tall, x, ha="center", va="bottom")
    canvas.text(0.08 / width, (below + tall - above) / 2 / tall, y, ha="left", va="center", rotation=90)
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number]:
        ax.locator_params("x", nbins=5, integer=True)
        ax.locator_params("y", nbins=4)
    return canvas, list(axes[:number])


STEPS = [(1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 2, 3, 4, 5, 6, 8), tuple(n / 10 for n in range(10, 100, 2))]


def _logarithmic(ax: Any, which: str) -> None:
    """A logarithmic axis, "x" or "y", with at most five round numbers, and only those that do not overlap."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    low, high = axis.get_view_interval()
    low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
    for steps in STEPS:
        places = [m * 10.0**e for e in range(-5, 7) for m in steps if low <= m * 10.0**e <= high]
        if 3 <= len(places) <= 5:
            break
    places = places[:: ceil(len(places) / 5)]
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_view_interval(low, high, ignore=True)


def _around(ax: Any, margin: float) -> None:
    """Sets the limits of a logarithmic y axis by the lines, not by their bands."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    values = values[np.isfinite(values)]
    if len(values):
        ax.set_ylim(values.min() / margin, values.max() * margin)


def _names(ax: Any, ends: Sequence[tuple[str, tuple[float, float], Any]]) -> None:
    """Puts names beside a panel, each as near to the height of its line's end as the others allow."""
    to_panel = ax.transData + ax.transAxes.inverted()
    placed = [(to_panel.transform(at), name, paint) for name, at, paint in ends if np.isfinite(at).all()]
    placed.sort(key=lambda end: end[0][1])
    if not placed:  # or all diverged
        return
    gap = LINE / (ax.get_position().height * ax.figure.get_figheight())
    order = np.arange(len(placed))
    lowest = isotonic_regression([at[1] for at, *_ in placed] - gap * order).x
    heights = np.clip(lowest, 0, max(0, 1 - gap * order[-1])) + gap * order
    for (at, name, paint), y in zip(placed, heights, strict=True):
        leader = Line2D((at[0], 1.03), (at[1], y), color=paint, linewidth=0.6, alpha=0.6, transform=ax.transAxes)
        ax.add_artist(leader).set_clip_on(False)
        ax.text(1.04, y, name, color=paint, fontsize=8, ha="left", va="center", transform=ax.transAxes)


def _panels(rows: Sequence[Row], line: Callable[..., tuple[float, float]], x: str) -> Canvas:
    """One panel for each row of the table, one line for each rule, with its name at its end."""
    canvas, axes = _axes(len(rows), x, "validation error, %", rules_run(rows))
    for ax, row in zip(axes, rows, strict=True):
        ends = [(rule, line(ax, c, colour(rule), rule), colour(rule)) for rule, c in row.cells.items() if c.records]
        _around(ax, 1.15)
        _logarithmic(ax, "y")
        if line is _time:
            _logarithmic(ax, "x")
        _names(ax, ends)
        ax.set_title(described(row.labels), loc="left")
    return canvas


def _curve(ax: Any, cell: Found, paint: str, name: str) -> tuple[float, float]:
    """Draws the mean over seeds, and a band from the lowest seed to the highest. Gives the line's end."""
    errors = error_curves(cell.records)
    epochs = np.arange(1, len(errors) + 1)
    means = errors.mean(axis=1)
    ax.plot(epochs, means, color=paint, gid=f"rule:{name}")
    if errors.shape[1] > 1:
        low, high = errors.min(axis=1), errors.max(axis=1)
        ax.fill_between(epochs, low, high, color=paint, alpha=0.15, linewidth=0, gid=f"rule:{name}")
    return float(epochs[-1]), float(means[-1])


def _time(ax: Any, cell: Found, paint: str, name: str) -> tuple[float, float]:
    """Draws a curve against the wall time of the fastest seed, shared equally among epochs. Gives the line's end."""
    means = error_curves(cell.records).mean(axis=1)
    seconds = cell.seconds * np.arange(1, len(means) + 1)
    ax.plot(seconds, means, color=paint, gid=f"rule:{name}")
    return float(seconds[-1]), float(means[-1])


def _against(table: Table, rows: Sequence[Row]) -> Canvas:
    """Draws `drawn` against an axis of the table, with 95 % intervals: a panel for each choice on the other axes."""
    x = table.against
    assert x is not None
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(choice for axis, choice in row.labels.items() if axis != x), []).append(row)
    canvas, axes = _axes(len(groups), x.replace("_", " "), f"test {table.drawn}, %", rules_run(rows), height=2.1)
    ticks = list(dict.fromkeys(row.labels[x] for row in rows))
    for ax, (group, members) in zip(axes, groups.items(), strict=True):
        rules = list(dict.fromkeys(rule for row in members for rule, c in row.cells.items() if c.mean is not None))
        ends = []
        for i, rule in enumerate(rules):
            cells = [(row.labels[x], row.cells[rule]) for row in members if rule in row.cells]
            points = [(ticks.index(at), cell) for at, cell in cells if cell.mean is not None]
            shift = 0.06 * (i - (len(rules) - 1) / 2)  # so that intervals of several rules stay apart
            at = [place + shift for place, _ in points]
            accuracies = [100 * (cell.mean or 0) for _, cell in points]
            values = accuracies if table.drawn == "accuracy" else [100 - accuracy for accuracy in accuracies]
            half = [50 * (cell.interval[1] - cell.interval[0]) if cell.interval else 0 for _, cell in points]
            _points(ax, rule, at, values, yerr=half)
            ends.append((rule, (at[-1], values[-1]), colour(rule)))
        ax.set_xticks(range(len(ticks)), ticks)
        if table.drawn == "error":
            ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        _names(ax, ends)
        ax.set_title(", ".join(choice.replace("_", " ") for choice in group), loc="left")
    return canvas


def _points(ax: Any, rule: str, x: Any, y: Any, **bars: Any) -> None:
    """Draws the points of a rule with error bars."""
    line, caps, lines = ax.errorbar(x, y, color=colour(rule), **{"marker": "o", "markersize": 4, "capsize": 2} | bars)
    for artist in (line, *caps, *lines):
        artist.set_gid(f"rule:{rule}")


Value = tuple[float, float]  # and half its interval, or 0


def _by_rule(found: Findings, rows: Sequence[Row]) -> Canvas:
    """A line for each rule, with the error in each row, and the angle, time and memory in all rows.

    The best rule of the row with the most rules comes first.
    """
    in_order = max(rows, key=lambda row: sum(cell.mean is not None for cell in row.cells.values())).cells
    rules = sorted(rules_run(rows), key=lambda rule: -(in_order[rule].mean or 0) if rule in in_order else 1)
    first, *_ = names = [described(row.labels) for row in rows]
    panels: list[tuple[str, Sequence[Mapping[str, Value]]]] = []  # a title, and for each row the values by rule
    for row, name in zip(rows, names, strict=True):
        tested = {rule: cell for rule, cell in row.cells.items() if cell.mean is not None}
        errors: dict[str, Value] = {
            rule: (100 - 100 * (c.mean or 0), 50 * (c.interval[1] - c.interval[0]) if c.interval else 0)
            for rule, c in tested.items()
        }
        panels.append((f"{name}: test error, %", [errors]))
    angles = [{rule: (c.angle, 0) for rule, c in row.cells.items() if c.angle is not None} for row in rows]
    costs = [found.costs_of(row) for row in rows]
    panels.append(("angle, degrees", angles))
    panels.append(("time (bp = 1)", [{rule: (1 / c.speed, 0) for rule, c in cost.items()} for cost in costs]))
    panels.append(("memory (bp = 1)", [{r: (c.memory, 0) for r, c in cost.items()} for cost in costs]))
    panels = [(title, values) for title, values in panels if any(values)]
    left = 0.25 + NAME * max(map(len, rules))
    canvas, axes = _axes(len(panels), "", "", (), 1.4, 0.21 * len(rules) + 0.2, left, len(panels), 0.3)
    for ax, (title, values) in zip(axes, panels, strict=True):
        for i, each in enumerate(values):
            fill = {} if i == 0 else {"markerfacecolor": "none"}
            for place, rule in enumerate(rules):
                if value := each.get(rule):
                    _points(ax, rule, value[0], place, xerr=value[1] or None, **fill)
        ax.set_yticks(range(len(rules)), rules if ax is axes[0] else [])
        ax.set_ylim(len(rules) - 0.5, -0.5)
        ax.set_title(title if len(title) <= 24 else title.replace(": ", "\n"), loc="left")  # else it meets the next
        if "angle" in title:
            ax.set_xticks([0, 30, 60, 90])
        else:
            _logarithmic(ax, "x")
    for tick, rule in zip(axes[0].get_yticklabels(), rules, strict=True):
        tick.set_color(colour(rule))
    if len(rows) > 1:
        told = f"angle, time and memory: filled circles {first}, open circles {', '.join(names[1:])}"
        canvas.text(0.99, 0.01, told, ha="right", va="bottom", fontsize=8)
    return canvas


def _cost(found: Findings, rows: Sequence[Row]) -> Canvas:
    """Test error against the time of a training step. The best rules are at the bottom left."""
    rules = rules_run(rows)
    canvas, axes = _axes(len(rows), "time of a step, default settings (bp = 1)", "test error, %", rules, height=3)
    for ax, row in zip(axes, rows, strict=True):
        ends = []
        for rule, cost in found.costs_of(row).items():
            if (cell := row.cells.get(rule)) and cell.mean is not None:
                at = 1 / cost.speed, 100 - 100 * cell.mean
                _points(ax, rule, *at)
                ends.append((rule, at, colour(rule)))
        _logarithmic(ax, "x")
        _logarithmic(ax, "y")
        _names(ax, ends)
        ax.set_title(described(row.labels), loc="left")
    return canvas


def _angles(measured: Sequence[tuple[Row, str, Found]]) -> Canvas:
    """Angles of layers' updates to backprop's gradient: a panel for each cell, darker lines for deeper layers."""
    deepest = max(cell.layers[-1] for _, _, cell in measured)
    canvas, axes = _axes(
        len(measured), "epoch", "angle to the gradient, degrees; each line has the number of its layer", ["9"], wide=1.8
    )
    shades = mpl.colormaps["viridis"](np.linspace(0.85, 0.25, deepest))
    for ax, (row, rule, cell) in zip(axes, measured, strict=True):
        seeds, ends = set(), []
        for l in cell.layers:
            by_seed = {r.seed: {e["epoch"]: e.get(f"{ANGLE}{l}") for e in r.epochs} for r in cell.all_seeds}
            angles = pd.DataFrame(by_seed, dtype=float).dropna(axis=1, how="all")
            seeds.add(angles.shape[1])
            means = angles.mean(axis=1)
            ax.plot(angles.index, means, color=shades[l - 1], linewidth=1.1)
            ends.append((str(l), (float(angles.index[-1]), float(means.iloc[-1])), shades[l - 1]))
        ax.axhline(90, color="#888888", linestyle=":", linewidth=1)
        ax.set_ylim(0, max(100, ax.get_ylim()[1]))
        ax.set_yticks([0, 30, 60, 90])
        _names(ax, ends)
        n = " to ".join(str(count) for count in sorted({min(seeds), max(seeds)}))  # layers may differ
        ax.set_title(f"{rule}, {n} seeds\n{described(row.labels)}", fontsize=8, loc="left")
    return canvas
