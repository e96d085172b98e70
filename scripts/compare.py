"""Compares the runs in a folder: a table of test accuracies, and a figure of the learning curves.

    python scripts/compare.py runs/demo [--figure FILE]

One row and one curve a run (a config with all its seeds). Nothing is trained: all comes from the run records.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from nobackprop.records import Record


def read(folder: Path) -> list[Record]:
    """All records below a folder. Raises FileNotFoundError where there is none."""
    records = [Record.read(path) for path in sorted(folder.glob("*/seed*/record.json"))]
    if not records:
        raise FileNotFoundError(f"no run records in {folder}/*/seed*/: train something with paths.runs={folder} first")
    return records


def labels(records: list[Record]) -> dict[str, str]:
    """A label for each run, by signature: its name, with the signature where two runs share one."""
    names = {r.signature: r.name for r in records}
    shared = pd.Series(list(names.values())).duplicated(keep=False)
    return {s: f"{name} {s}" if twice else name for (s, name), twice in zip(names.items(), shared, strict=True)}


def table(records: list[Record]) -> Table:
    """Test accuracy (mean and standard deviation over the seeds) and wall time of each run, best first."""
    runs = pd.DataFrame(
        [
            {"run": r.signature, "test": (r.test or {}).get("accuracy"), "wall": r.wall_s / r.stacked, "seed": r.seed}
            for r in records
        ]
    ).astype({"test": float})
    rows = runs.groupby("run").agg(
        mean=("test", "mean"), std=("test", "std"), tested=("test", "count"), seeds=("seed", "size"), wall=("wall", "sum")
    )
    result = Table(title="test accuracy of the weights that were best on validation")
    for column in ("run", "seeds", "test accuracy", "wall time"):
        result.add_column(column, justify="left" if column == "run" else "right")
    names = labels(records)
    for signature, row in rows.sort_values("mean", ascending=False).iterrows():
        spread = "" if pd.isna(row["std"]) else f" ± {row['std']:.2%}"
        lost = row["seeds"] - row["tested"]
        accuracy = "-" if pd.isna(row["mean"]) else f"{row['mean']:.2%}{spread}"
        diverged = f" ({lost:.0f} diverged)" if lost else ""
        result.add_row(names[str(signature)], f"{row['seeds']:.0f}", accuracy + diverged, f"{row['wall']:.1f} s")
    return result


def figure(records: list[Record], path: Path) -> None:
    """Validation accuracy against epochs: the mean over seeds, and a band from the lowest seed to the highest."""
    mpl.use("agg")
    epochs = pd.DataFrame(
        [{"run": r.signature, "epoch": e["epoch"], "accuracy": e["val/accuracy"]} for r in records for e in r.epochs]
    )
    names = labels(records)
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for signature, run in epochs.groupby("run"):
        seeds = run.groupby("epoch")["accuracy"]
        (line,) = ax.plot(seeds.mean().index, seeds.mean(), label=names[str(signature)])
        ax.fill_between(seeds.mean().index, seeds.min(), seeds.max(), color=line.get_color(), alpha=0.15, linewidth=0)
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
        records = read(options.runs)
    except (FileNotFoundError, ValueError) as e:
        parser.exit(1, f"compare.py: {e}\n")
    path = options.figure or options.runs / "learning_curves.png"
    console = Console()
    console.print(table(records))
    figure(records, path)
    console.print(f"learning curves: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
