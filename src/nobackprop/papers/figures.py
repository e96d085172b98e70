"""Figures of a paper's results, as SVG: the same records give the same bytes."""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure as Canvas

from nobackprop.papers.results import ANGLE, Findings, Found, Row, Table, described, rules_run
from nobackprop.records.gathering import learning_curves

# A rule has the same colour in every figure; the first seven are Okabe & Ito's, which the colour-blind can tell apart.
COLOURS = {
    "bp": "#000000",
    "fa": "#E69F00",
    "dfa": "#56B4E9",
    "lra_e": "#D55E00",
    "lra_e_plain": "#F2A46B",
    "mdfa": "#009E73",
    "dtp": "#CC79A7",
    "equilibrium_propagation": "#0072B2",
    "predictive_coding": "#C9B800",
    "usf": "#8C6D1F",
    "brsf": "#7F7F7F",
    "frsf": "#A020F0",
    "kolen_pollack": "#7A0019",
    "weight_mirror": "#7FC97F",
    "drtp": "#F781BF",
    "pepita": "#1B4F72",
    "forward_forward": "#A65628",
    "dfa_two_pass": "#00CED1",
}
OTHER = "#B0B0B0"  # a rule that has no colour yet
STYLE: Any = {
    "svg.hashsalt": "nobackprop",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.5,
}


def figures(found: Findings) -> dict[str, bytes]:
    """Every figure there is something to draw for.

    Their names: `<table>_error` or `_accuracy`, `_rules`, `_curves`, `_time` and `_angles`.
    """
    made: dict[str, bytes] = {}
    colour = defaultdict(lambda: OTHER, COLOURS)
    for table in found.layout.tables:
        rows = [row for row in found.tables[table.name] if row.run]
        if not rows:
            continue
        kinds: dict[str, Callable[[], Canvas]] = {}
        if table.against and len({row.labels[table.against] for row in rows}) > 1:
            kinds[table.drawn] = partial(_against, table, rows, colour)
        for kind, line, x in (("curves", _curve, "epoch"), ("time", _time, "seconds of training")):
            kinds[kind] = partial(_panels, table, rows, colour, line, x, "validation accuracy, %")
        if table.by_rule:
            kinds["rules"] = partial(_by_rule, found, rows, colour)
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
    return re.sub(r'<g id="rule:(\w+)">', r'<g class="rule-\1">', svg).encode()


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its numbers to hundredths of a point."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0])


def _axes(
    number: int,
    columns: int,
    x: str,
    y: str,
    legend: Sequence[str],
    height: float = 1.5,
    left: float = 0.65,
    between: tuple[float, float] = (0.4, 0.5),
) -> tuple[Canvas, list[Any]]:
    """Panels in a grid with a common name for each axis and room for a legend of these names. Sizes are in inches."""
    columns = min(number, columns)
    lines = ceil(number / columns)
    right, below, wide = 0.15, 0.5, 2.2
    width = left + columns * wide + (columns - 1) * between[0] + right
    above = 0.45 + 0.2 * ceil(len(legend) / _across(width, legend)) if legend else 0.3
    tall = below + lines * height + (lines - 1) * between[1] + above
    canvas = Canvas(figsize=(width, tall))
    axes = canvas.subplots(lines, columns, squeeze=False).flatten()
    # By hand, since matplotlib's own layouts draw everything several times.
    canvas.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=below / tall,
        top=1 - above / tall,
        wspace=between[0] / wide,
        hspace=between[1] / height,
    )
    canvas.text((left + width - right) / 2 / width, 0.1 / tall, x, ha="center", va="bottom")
    canvas.text(0.1 / width, (below + tall - above) / 2 / tall, y, ha="left", va="center", rotation=90)
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number]:
        ax.locator_params("x", nbins=4, integer=True)
        ax.locator_params("y", nbins=4)
    return canvas, list(axes[:number])


def _legend(canvas: Canvas, axes: Sequence[Any]) -> None:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    canvas.legend(
        handles.values(),
        handles,
        loc="upper center",
        ncols=_across(canvas.get_figwidth(), list(handles)),
        frameon=False,
    )


def _across(width: float, names: Sequence[str]) -> int:
    """How many names of a legend go side by side in so many inches."""
    return max(2, int(width / (0.45 + 0.075 * max(map(len, names)))))


def _panels(
    table: Table, rows: Sequence[Row], colour: dict[str, str], line: Callable[..., None], x: str, y: str
) -> Canvas:
    """One panel a row of the table, one line a rule; those along `against` stand beside each other."""
    choices = len({row.labels[table.against] for row in rows}) if table.against else 0
    columns = choices if 2 < choices < 6 else 4
    canvas, axes = _axes(len(rows), columns, x, y, rules_run(rows))
    for ax, row in zip(axes, rows, strict=True):
        for rule, cell in row.cells.items():
            if cell.records:
                line(ax, cell, colour[rule], rule)
        ax.set_title(described(row.labels))
    _legend(canvas, axes)
    return canvas


def _curve(ax: Any, cell: Found, colour: str, label: str) -> None:
    """The mean over seeds, and a band from the lowest seed to the highest."""
    values = 100 * learning_curves(cell.records)
    epochs = np.arange(1, len(values) + 1)
    ax.plot(epochs, values.mean(axis=1), color=colour, label=label, gid=f"rule:{label}")
    if values.shape[1] > 1:
        low, high = values.min(axis=1), values.max(axis=1)
        ax.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0, gid=f"rule:{label}")


def _time(ax: Any, cell: Found, colour: str, label: str) -> None:
    """Against the wall time of the fastest seed, taken to be the same for each of its epochs."""
    values = 100 * learning_curves(cell.records)
    epochs = np.arange(1, len(values) + 1)
    ax.set_xscale("log")
    ax.plot(cell.seconds * epochs, values.mean(axis=1), color=colour, label=label, gid=f"rule:{label}")


def _against(table: Table, rows: Sequence[Row], colour: dict[str, str]) -> Canvas:
    """What is `drawn` against an axis of the table, with 95 % intervals: one panel for each choice of the others."""
    x = table.against
    assert x is not None
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(choice for axis, choice in row.labels.items() if axis != x), []).append(row)
    canvas, axes = _axes(len(groups), 4, x.replace("_", " "), f"test {table.drawn}, %", rules_run(rows), height=2)
    ticks = list(dict.fromkeys(row.labels[x] for row in rows))
    for ax, (group, members) in zip(axes, groups.items(), strict=True):
        rules = list(
            dict.fromkeys(rule for row in members for rule, cell in row.cells.items() if cell.mean is not None)
        )
        for i, rule in enumerate(rules):
            cells = [(row.labels[x], row.cells[rule]) for row in members if rule in row.cells]
            points = [(ticks.index(at), cell) for at, cell in cells if cell.mean is not None]
            shift = 0.06 * (i - (len(rules) - 1) / 2)  # so that intervals of several rules stay apart
            at = [place + shift for place, _ in points]
            accuracies = [100 * (cell.mean or 0) for _, cell in points]
            values = accuracies if table.drawn == "accuracy" else [100 - accuracy for accuracy in accuracies]
            half = [50 * (cell.interval[1] - cell.interval[0]) if cell.interval else 0 for _, cell in points]
            _points(ax, rule, colour[rule], at, values, yerr=half, label=rule)
        ax.set_xticks(range(len(ticks)), ticks)
        if table.drawn == "error":
            ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.set_title(", ".join(choice.replace("_", " ") for choice in group))
    _legend(canvas, axes)
    return canvas


def _points(ax: Any, rule: str, colour: str, x: Any, y: Any, **bars: Any) -> None:
    """A rule's points with error bars, which its box in the report hides."""
    line, caps, lines = ax.errorbar(x, y, color=colour, marker="o", markersize=4, capsize=2, **bars)
    for artist in (line, *caps, *lines):
        artist.set_gid(f"rule:{rule}")


def _by_rule(found: Findings, rows: Sequence[Row], colour: dict[str, str]) -> Canvas:
    """A line for each rule: test error and angle to the gradient in each row, and what a step costs."""
    rules = rules_run(rows)
    panels: list[tuple[str, Mapping[str, tuple[float, float]]]] = []  # values and half the interval, by rule
    for row in rows:
        name, costs = described(row.labels), found.costs_of(row)
        cells = {rule: cell for rule, cell in row.cells.items() if cell.mean is not None}
        half = {rule: (c.interval[1] - c.interval[0]) / 2 if c.interval else 0 for rule, c in cells.items()}
        errors = {rule: (100 - 100 * (c.mean or 0), 100 * half[rule]) for rule, c in cells.items()}
        panels.append((f"{name}: test error, %", errors))
        angles = {rule: (c.angle, 0) for rule, c in cells.items() if c.angle is not None}
        panels.append((f"{name}: angle, degrees", angles))
        panels.append((f"{name}: time of a step, of bp's", {rule: (1 / c.speed, 0) for rule, c in costs.items()}))
        panels.append((f"{name}: memory of a step, of bp's", {rule: (c.memory, 0) for rule, c in costs.items()}))
    left = 0.25 + 0.08 * max(map(len, rules))
    canvas, axes = _axes(len(panels), 2, "", "", (), height=0.19 * len(rules) + 0.2, left=left)
    for i, (ax, (name, values)) in enumerate(zip(axes, panels, strict=True)):
        for place, rule in enumerate(rules):
            if value := values.get(rule):
                _points(ax, rule, colour[rule], value[0], place, xerr=value[1] or None)
        ax.set_yticks(range(len(rules)), rules if i % 2 == 0 else [])
        ax.set_ylim(len(rules) - 0.5, -0.5)
        ax.set_title(name)
        if not name.endswith("degrees"):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    return canvas


def _angles(measured: Sequence[tuple[Row, str, Found]]) -> Canvas:
    """The angle of each layer's update to backpropagation's gradient: one panel a cell, a darker line the deeper."""
    columns = min(5, max(Counter(id(row) for row, _, _ in measured).values()))
    deepest = max(cell.layers[-1] for _, _, cell in measured)
    layers = [f"layer {l}" for l in range(1, deepest + 1)]
    canvas, axes = _axes(len(measured), columns, "epoch", "angle to the gradient, degrees", layers, between=(0.4, 0.65))
    shades = mpl.colormaps["viridis"](np.linspace(0.9, 0.0, deepest))
    for ax, (row, rule, cell) in zip(axes, measured, strict=True):
        seeds = set()
        for l in cell.layers:
            by_seed = {r.seed: {e["epoch"]: e.get(f"{ANGLE}{l}") for e in r.epochs} for r in cell.all_seeds}
            angles = pd.DataFrame(by_seed, dtype=float).dropna(axis=1, how="all")
            seeds.add(angles.shape[1])
            ax.plot(angles.index, angles.mean(axis=1), color=shades[l - 1], label=f"layer {l}", linewidth=1.1)
        ax.axhline(90, color="#888888", linestyle=":", linewidth=1)
        ax.set_ylim(0, max(100, ax.get_ylim()[1]))
        ax.set_yticks([0, 30, 60, 90])
        n = " to ".join(str(count) for count in sorted({min(seeds), max(seeds)}))  # layers may differ
        ax.set_title(f"{rule}, n = {n}\n{described(row.labels)}", fontsize=8)
    _legend(canvas, axes)
    return canvas
