"""Runs a paper's experiments: every cell of its grid, papers/<paper>/grid.yaml, or a part of it.

    python scripts/reproduce.py lra_e --seeds 3 --epochs 10
    python scripts/reproduce.py mdfa --only net=mlp_mnist classes=2,3 --dry-run
    python scripts/reproduce.py mdfa --only net=mlp_cifar10 --set dataset=cifar10_jpeg --jobs 4

Cells that are recorded already are not run again. A cell that fails does not end the others. Cells whose settings were
not searched yet (scripts/tune.py) are named and passed over. `--set` takes further overrides for every cell, as the
command `nobackprop` takes them. `--set launcher=slurm launcher.partition=...` submits the cells to a cluster. The
command ends with a table of all cells. The exit status is 1 if a cell failed or the command has a mistake.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from nobackprop.composing import check, home
from nobackprop.mistakes import answering
from nobackprop.papers.grid import Cell, cells, select


def run(chosen: Sequence[Cell], further: Sequence[str], console: Console, dry: bool) -> bool:
    """Runs cells as a sweep, with the launcher that `further` names. Gives whether all went well.

    Cells whose tuned settings were not searched yet are passed over. Raises Missing if this leaves no cell.
    """
    from nobackprop.sweeps import sweep  # torch takes seconds to import
    from nobackprop.sweeps.jobs import Job, launcher_of

    ready = [cell for cell in chosen if cell.tuned is None or cell.tuned.exists()] or chosen
    if left := [str(cell) for cell in chosen if cell not in ready]:
        text = f"passed over until scripts/tune.py has searched their settings, {len(left)} cells: {'; '.join(left)}"
        console.print(text, highlight=False, soft_wrap=True)
    jobs = [Job(str(cell), cell.config(further)) for cell in ready]
    outcomes = sweep.run(jobs, launcher_of(jobs[0].config), console, dry)
    return all(outcome.state != "failed" for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", help="a folder of papers/ that has a grid.yaml")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="AXIS=CHOICE,...", help="a part of the grid"
    )
    parser.add_argument("--seeds", help="how many, or a list such as [0,4,7]")
    parser.add_argument("--epochs", type=int, help="instead of the paper's")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides for every cell"
    )
    parser.add_argument("--jobs", type=int, help="cells at a time, side by side in so many processes")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and about how long it would take")
    options = parser.parse_args()
    further = [home(text) for text in options.set]
    further += [] if options.seeds is None else [f"seeds={options.seeds}"]
    further += [] if options.epochs is None else [f"max_epochs={options.epochs}"]
    further += [] if options.jobs is None else ["launcher=processes", f"launcher.workers={options.jobs}"]
    with answering(parser.prog):
        check(further)
        chosen = select(list(cells(options.paper)), options.only)
        well = run(chosen, further, Console(), options.dry_run)
    parser.exit(0 if well else 1)
