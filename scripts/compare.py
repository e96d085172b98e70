"""Compares the runs in a folder: a table of test accuracies, and a figure of the learning curves.

    python scripts/compare.py runs/demo [--figure FILE]

One row and one curve a run (a config with all its seeds). Nothing is trained: all comes from the run records.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean
from warnings import warn

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from nobackprop.collecting import Collected, collect
from nobackprop.records import Record, mean_and_deviation, tested


def read(folder: Path) -> dict[str, list[Record]]:
    """All records below a folder, by run. Raises FileNotFoundError where there is none."""
    found = collect([folder]) if folder.exists() else Collected()
    for problem in found.unreadable + found.conflicts:
        warn(problem, stacklevel=2)
    runs = defaultdict(list)
    for record in found.records.values():
        runs[f"{record.name}-{record.signature}"].append(record)
    if not runs:
        raise FileNotFoundError(f"no run records in {folder}/*/seed*/: train something with paths.runs={folder} first")
    return runs


def labels(runs: dict[str, list[Record]]) -> dict[str, str]:
    """What to call each run: its name, and where others share it the settings in which they differ."""
    by_name = defaultdict(list)
    for run in runs:
        by_name[run.rsplit("-", 1)[0]].append(run)
    found = {}
    for name, same in by_name.items():
        configs = pd.json_normalize([runs[run][0].config for run in same]).astype(str)
        differ = configs.columns[configs.nunique() > 1]
        for run, (_, config) in zip(same, configs.iterrows(), strict=True):
            found[run] = " ".join([name, *(f"{key}={config[key]}" for key in differ)])
    return found


def table(runs: dict[str, list[Record]]) -> Table:
    """Test accuracy (mean and standard deviation over the seeds) and wall time of each run, best first."""
    result = Table(title="test accuracy of the weights that were best on validation")
    for column in ("run", "seeds", "test accuracy", "wall time"):
        result.add_column(column, justify="left" if column == "run" else "right")
    accuracies = {run: tested(records) for run, records in runs.items()}
    names = labels(runs)
    for run in sorted(runs, key=lambda run: mean(accuracies[run] or [-1]), reverse=True):
        lost = sum(r.diverged_epoch is not None for r in runs[run])
        cell = mean_and_deviation(accuracies[run]) + (f" ({lost} diverged)" if lost else "")
        wall = sum(r.wall_s / r.stacked for r in runs[run])
        result.add_row(names[run], str(len(runs[run])), cell, f"{wall:.1f} s")
    return result


def figure(runs: dict[str, list[Record]], path: Path) -> None:
    """Validation accuracy against epochs: the mean over seeds, and a band from the lowest seed to the highest."""
    mpl.use("agg")
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = labels(runs)
    for run, records in runs.items():
        curves = pd.DataFrame({r.seed: {e["epoch"]: e["val/accuracy"] for e in r.epochs} for r in records})
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
    parser.add_argument("runs", type=Path, help="a folder of runs, as given to nobackprop with paths.runs=")
    parser.add_argument("--figure", type=Path, help="where to write the figure (default: learning_curves.png in RUNS)")
    options = parser.parse_args()
    try:
        runs = read(options.runs)
    except (FileNotFoundError, ValueError) as e:
        parser.exit(1, f"compare.py: {e}\n")
    path = options.figure or options.runs / "learning_curves.png"
    console = Console()
    console.print(table(runs))
    figure(runs, path)
    console.print(f"learning curves: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
