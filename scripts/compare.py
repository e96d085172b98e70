"""Compares the runs in a folder: a table of test accuracies, and a figure of the learning curves.

    python scripts/compare.py runs/demo [--against bp] [--figure FILE]

One row and one curve a run (a config with all its seeds): mean and standard deviation over seeds; and in a sentence in
what else than the rule runs differ. With `--against` the table has the difference to a rule's run, with its 95 %
interval, paired over the seeds that both have: the same seed is the same split, batch order and initial W. Nothing is
trained: all comes from the run records.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from warnings import warn

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from nobackprop.claims import interval
from nobackprop.collecting import Collected, collect, learning_curves
from nobackprop.mistakes import Missing, Mistake
from nobackprop.records import Record, mean_and_deviation, tested
from nobackprop.settings import rule_name


def read(folder: Path) -> dict[str, list[Record]]:
    """All records below a folder, by run. Raises Missing where there is none."""
    found = collect([folder]) if folder.exists() else Collected()
    for problem in found.unreadable + found.conflicts:
        warn(problem, stacklevel=2)
    runs = defaultdict(list)
    for record in found.records.values():
        runs[record.run].append(record)
    if not runs:
        raise Missing(f"no run records in {folder}/*/seed*/: train something with paths.runs={folder} first")
    return runs


def settings(runs: Iterable[list[Record]]) -> pd.DataFrame:
    """The config of each run as text, a column a key; a dash where a run has no such key."""
    return pd.DataFrame([pd.json_normalize(records[0].config).iloc[0].map(str) for records in runs]).fillna("-")


def labels(runs: dict[str, list[Record]]) -> dict[str, str]:
    """What to call each run: its name, and where others share it the settings in which they differ."""
    by_name = defaultdict(list)
    for run, records in runs.items():
        by_name[records[0].name].append(run)
    found = {}
    for name, same in by_name.items():
        configs = settings(runs[run] for run in same)
        differ = configs.columns[configs.nunique() > 1]
        for run, (_, config) in zip(same, configs.iterrows(), strict=True):
            found[run] = " ".join([name, *(f"{key}={config[key]}" for key in differ)])
    return found


def only_run_of(rule: str, runs: dict[str, list[Record]]) -> list[Record]:
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


def paired(records: list[Record], others: list[Record]) -> str:
    """Mean difference in points over the seeds that both have, and half the width of its 95 % interval."""
    a, b = ({r.seed: r.test["accuracy"] for r in each if r.test} for each in (records, others))
    x = [100 * (a[seed] - b[seed]) for seed in a.keys() & b.keys()]
    if records is others or not x:
        return "-"
    return f"{mean(x):+.2f}" + (f" ± {interval(x)[1] - mean(x):.2f}" if len(x) > 1 else "")


def differences(runs: dict[str, list[Record]]) -> str:
    """In what else than the rule runs differ, in a sentence; empty where in nothing."""
    configs = settings(runs.values())
    configs["seeds"] = [",".join(str(seed) for seed in sorted(r.seed for r in records)) for records in runs.values()]
    several = configs.columns[configs.nunique() > 1]
    differ = [f"{key} ({'; '.join(configs[key].unique())})" for key in several if not key.startswith("rule.")]
    return f"not only the rule differs: {', '.join(differ)}" if differ else ""


def table(runs: dict[str, list[Record]], against: str | None = None) -> Table:
    """Test accuracy (mean and standard deviation over the seeds) and seconds of all seeds of each run, best first.

    With the difference to the run of the rule `against`. Raises Mistake where not exactly one run has that rule.
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
        result.add_row(names[run], str(len(runs[run])), cell, *(paired(runs[run], records) for records in other), spent)
    return result


def figure(runs: dict[str, list[Record]], path: Path) -> None:
    """Validation accuracy against epochs: the mean over seeds, and a band from the lowest seed to the highest."""
    mpl.use("agg")
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = labels(runs)
    for run, records in runs.items():
        curves = learning_curves(records)
        (line,) = ax.plot(curves.index, curves.mean(axis=1), label=names[run])
        band = curves.min(axis=1), curves.max(axis=1)
        ax.fill_between(curves.index, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(xlabel="epoch", ylabel="validation accuracy", title="mean over seeds; band: lowest to highest seed")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(alpha=0.3)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder of runs, as given to paths.runs=, or a file of records")
    parser.add_argument("--against", metavar="RULE", help="add the difference to this rule's run, paired over seeds")
    parser.add_argument("--figure", type=Path, help="where to write the figure (default: learning_curves.png there)")
    options = parser.parse_args()
    try:
        runs = read(options.runs)
        shown = table(runs, options.against)
        folder = options.runs if options.runs.is_dir() else options.runs.parent
        path = options.figure or folder / "learning_curves.png"
        console = Console()
        console.print(shown)
        if differ := differences(runs):
            console.print(differ, highlight=False, soft_wrap=True)
        figure(runs, path)
    except (OSError, ValueError) as e:
        parser.exit(1, f"compare.py: {e}\n")
    console.print(f"learning curves: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
