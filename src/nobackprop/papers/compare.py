"""Compares the runs in a folder, or in several: a table of test accuracies, and a figure of the learning curves.

    python scripts/compare.py runs/demo [--against bp] [--figure FILE]

Each run (a config with all its seeds) has a row, with mean and standard deviation over seeds, and a curve. If runs
differ in more than the rule, a sentence says in what. With `--against` the table has the difference to a rule's run and
its 95 % interval. It is paired over the seeds that both have, since the same seed means the same split, batch order and
initial W. Nothing is trained. All numbers come from the run records.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any
from warnings import warn

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from nobackprop.mistakes import Missing, Mistake
from nobackprop.papers.colours import colour
from nobackprop.records.gathering import collect, learning_curves
from nobackprop.records.identity import rule_name
from nobackprop.records.literal import literal, plain
from nobackprop.records.record import Record, mean_and_deviation, tested

Runs = Mapping[str, Sequence[Record]]


def read(*folders: Path) -> Runs:
    """All records below these folders, by run. Raises Missing where a folder is not there, or none has a record."""
    found = collect(folders)
    for problem in found.unreadable + found.conflicts:
        warn(plain(problem), stacklevel=2)
    runs = defaultdict(list)
    for record in found.records.values():
        runs[record.run].append(record)
    if not runs:
        there = ", ".join(map(str, folders))
        raise Missing(f"no run records in {there}/*/seed*/: train something with paths.runs={folders[0]} first")
    return runs


def settings(config: Mapping[str, Any], *parents: str) -> Iterator[tuple[str, str]]:
    """The keys of a config, such as `optimizer.lr`, and their values as text."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from settings(value, *parents, name)
        else:
            yield ".".join([*parents, name]), str(value)


def differing(texts: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The keys in which configs differ, with the value in each, or a dash where a config lacks the key."""
    keys = dict.fromkeys(key for text in texts for key in text)
    columns = {key: [text.get(key, "-") for text in texts] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def labels(runs: Runs) -> dict[str, str]:
    """The label of each run: its name and, if others share the name, the settings in which they differ."""
    by_name = defaultdict(list)
    for run, records in runs.items():
        by_name[records[0].name].append(run)
    found = {}
    for name, same in by_name.items():
        differ = differing([dict(settings(runs[run][0].config)) for run in same])
        for i, run in enumerate(same):
            found[run] = " ".join([name, *(f"{key}={values[i]}" for key, values in differ.items())])
    return found


def only_run_of(rule: str, runs: Runs) -> Sequence[Record]:
    """The records of a rule's run. Raises Mistake where not exactly one run has this rule."""
    rules = {run: rule_name(records[0].config["rule"]) for run, records in runs.items()}
    found = [run for run, name in rules.items() if name == rule]
    if len(found) != 1:
        known = ", ".join(sorted(set(rules.values())))
        raise Mistake(
            f"--against {rule}: {len(found)} runs here have this rule, one is needed; rules here: {known}. "
            "Where one rule has several runs, give each setting a folder of its own (paths.runs)"
        )
    return runs[found[0]]


def paired(records: Sequence[Record], others: Sequence[Record]) -> str:
    """The mean difference in points over the seeds that both have, and half the width of its 95 % interval."""
    from nobackprop.papers.claims import interval  # here, since SciPy takes a second to import

    a, b = ({r.seed: r.test["accuracy"] for r in each if r.test} for each in (records, others))
    x = [100 * (a[seed] - b[seed]) for seed in a.keys() & b.keys()]
    if records is others or not x:
        return "-"
    return f"{mean(x):+.2f}" + (f" ± {interval(x)[1] - mean(x):.2f}" if len(x) > 1 else "")


def differences(runs: Runs) -> str:
    """A sentence on what runs differ in besides the rule; empty if only the rule differs."""
    texts = [dict(settings(records[0].config)) for records in runs.values()]
    for text, records in zip(texts, runs.values(), strict=True):
        text["seeds"] = ",".join(str(seed) for seed in sorted(r.seed for r in records))
    several = {key: values for key, values in differing(texts).items() if not key.startswith("rule.")}
    differ = [f"{key} ({'; '.join(dict.fromkeys(values))})" for key, values in several.items()]
    return f"not only the rule differs: {', '.join(differ)}" if differ else ""


def table(runs: Runs, against: str | None = None) -> Table:
    """Test accuracy (mean and standard deviation over the seeds) and seconds of all seeds of each run, best first.

    It has the difference to the run of the rule `against`. Raises Mistake where not exactly one run has that rule.
    """
    difference = [] if against is None else [f"ahead of {against}"]
    caption = "± standard deviation over seeds; seconds are of all seeds"
    caption += f"; {difference[0]}: in points, ± 95 % interval" if difference else ""
    result = Table(title="test accuracy of the weights that were best on validation", caption=caption)
    for column in ("run", "seeds", "test accuracy", *difference, "seconds"):
        result.add_column(column, justify="left" if column == "run" else "right")
    accuracies = {run: tested(records) for run, records in runs.items()}
    names = labels(runs)
    other = [] if against is None else [only_run_of(against, runs)]
    for run in sorted(runs, key=lambda run: mean(accuracies[run] or [-1]), reverse=True):
        lost = sum(r.diverged_epoch is not None for r in runs[run])
        cell = mean_and_deviation(accuracies[run]) + (f" ({lost} diverged)" if lost else "")
        spent = f"{sum(r.seconds for r in runs[run]):.1f}"
        further = [paired(runs[run], records) for records in other]
        result.add_row(literal(names[run]), str(len(runs[run])), cell, *further, spent)
    return result


AS_THEY_ARE: Any = {"text.parse_math": False}  # names


class Curves(Figure):
    """A figure that a notebook shows even without pyplot."""

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        with mpl.rc_context(AS_THEY_ARE):  # for the numbers on the axes, which are drawn now
            super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def _paints(rules: Mapping[str, str]) -> dict[str, str | None]:
    """A colour for each run: its rule's, where each rule has one run."""
    if len(set(rules.values())) < len(rules):
        return dict.fromkeys(rules)
    return {run: colour(rule) for run, rule in rules.items()}


def error_curves(records: Sequence[Record]) -> np.ndarray:
    """Validation errors in percent, (epochs, seeds), for a logarithmic axis: an error of 0 becomes 0.01."""
    return np.maximum(100 - 100 * learning_curves(records), 0.01)


def curves(runs: Runs) -> Curves:
    """Validation error against epochs, and beside it the test accuracy of each run, the best first, in the same colour.

    A curve is the mean over seeds, in a band from the lowest seed to the highest. A small dot is a seed, and the large
    one is their mean.
    """
    names = labels(runs)
    best_first = sorted(runs, key=lambda run: mean(tested(runs[run]) or [-1]), reverse=True)
    paints = _paints({run: rule_name(runs[run][0].config["rule"]) for run in best_first})
    with mpl.rc_context(AS_THEY_ARE):
        # The axes have no room for long names by themselves.
        beside = 0.6 + 0.075 * min(max(len(plain(name)) for name in names.values()), 60)
        canvas = Curves(figsize=(8 + beside, max(3.6, 0.8 + 0.26 * len(runs))), layout="constrained")
        left, right = canvas.subplots(1, 2, width_ratios=(5, 3))
        for place, run in enumerate(best_first):
            errors = error_curves(runs[run])
            epochs = np.arange(1, len(errors) + 1)
            (line,) = left.plot(epochs, errors.mean(axis=1), color=paints[run])
            left.fill_between(epochs, errors.min(axis=1), errors.max(axis=1), color=line.get_color(), alpha=0.15, lw=0)
            reached = [100 * accuracy for accuracy in tested(runs[run])]
            right.plot(reached, [place] * len(reached), "o", color=line.get_color(), alpha=0.4, markersize=4)
            right.plot([mean(reached)] if reached else [], [place] if reached else [], "o", color=line.get_color())
        means = np.concatenate([line.get_ydata() for line in left.lines])
        means = means[np.isfinite(means)] if np.isfinite(means).any() else np.array([100.0])  # NaN where all diverged
        limits = means.min() / 1.3, means.max() * 1.15
        left.set(xlabel="epoch", ylabel="validation error, %", yscale="log", ylim=limits)
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_title("mean over seeds; band: lowest to highest", fontsize=9)
        right.set_title("each seed, and their mean", fontsize=9)
        right.set(xlabel="test accuracy, %", ylim=(len(runs) - 0.5, -0.5))
        right.yaxis.tick_right()
        right.set_yticks(range(len(runs)), [plain(names[run]) for run in best_first])
        for tick, line in zip(right.get_yticklabels(), left.lines, strict=True):
            tick.set_color(line.get_color())
        for ax in (left, right):
            ax.grid(alpha=0.3)
    return canvas


def figure(runs: Runs, path: Path) -> None:
    """Writes the `curves`. Raises Mistake where the path's ending names no format, or the file can't be written."""
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise Mistake(f"{path}: a figure is written as one of {', '.join(f'.{name}' for name in formats)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        curves(runs).savefig(path, dpi=150)
    except OSError as e:
        raise Mistake(f"{path} can't be written ({e.strerror}): --figure FILE writes the figure elsewhere") from e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="a folder of runs, as given to paths.runs=, or a file of records"
    )
    parser.add_argument("--against", metavar="RULE", help="add the difference to this rule's run, paired over seeds")
    parser.add_argument("--figure", type=Path, help="where to write the figure (default: learning_curves.png there)")
    options = parser.parse_args()
    try:
        runs = read(*options.runs)
        shown = table(runs, options.against)
        folder = first if (first := options.runs[0]).is_dir() else first.parent
        path = options.figure or folder / "learning_curves.png"
        console = Console()
        console.print(shown)
        if differ := differences(runs):
            console.print(literal(differ), soft_wrap=True)
        figure(runs, path)
    except (Mistake, OSError) as e:
        parser.exit(1, f"{parser.prog}: {e}\n")
    console.print(literal(f"learning curves: {path}"), soft_wrap=True)
