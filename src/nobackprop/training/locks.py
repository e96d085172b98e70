"""A lock on each seed, so that no two processes train it. It also removes what killed processes left behind."""

import os
import platform
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from nobackprop.records.files import remove_unfinished, unfinished
from nobackprop.training import checkpoints

LOCK, HOLDER = ".lock", ".holder"  # both are in a seed's folder; the second names the process that has the lock


def take(run: Path, seeds: Iterable[int], held: ExitStack) -> str:
    """Takes the locks of seeds in a run's folder until `held` closes, and removes what a killed process left there.

    It returns an empty text. If another process has one of the locks, it takes none and returns a text that names that
    process. The system drops the locks of a dead process. In a shared folder, those of a machine that is gone may stay.
    """
    folders = [run / f"seed{seed}" for seed in seeds]
    with ExitStack() as taken:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                taken.enter_context(FileLock(folder / LOCK, blocking=False))
            except Timeout:
                return f"{_who(folder)}; if it is no more, delete {folder / LOCK}"
        for folder in folders:
            remove_unfinished(folder, alone=True)
            taken.callback((folder / HOLDER).unlink, missing_ok=True)
            with suppress(OSError):  # a full disk
                (folder / HOLDER).write_text(f"process {os.getpid()} on {platform.node()}")
        held.push(taken.pop_all())
    return ""


def _who(folder: Path) -> str:
    """The process that trains a seed, and for how long it has done so, as it has noted in the folder."""
    seed = folder.name.replace("seed", "seed ")
    with suppress(OSError):
        who, since = (folder / HOLDER).read_text(errors="replace"), (folder / HOLDER).stat().st_mtime
        if re.fullmatch(r"process \d+ on \S+", who):
            return f"{who} has been training {seed} for {timedelta(seconds=max(0, round(time.time() - since)))} hours"
    return f"another process is training {seed}"


def tidy(run: Path) -> None:
    """Removes what killed processes left in a run's folder: unfinished files, and checkpoints of recorded seeds."""
    with suppress(OSError):  # the folder may be read-only
        remove_unfinished(run)
        recorded = {int(p.parent.name[4:]) for p in run.glob("seed*/record.json") if p.parent.name[4:].isdecimal()}
        for path, about in checkpoints.interrupted(run):
            if set(about.seeds) <= recorded:
                with ExitStack() as held:
                    if not take(run, about.seeds, held):
                        checkpoints.remove(path.parent)
        for seed in recorded:
            if unfinished(run / f"seed{seed}") or (run / f"seed{seed}" / HOLDER).exists():
                with ExitStack() as held:
                    take(run, [seed], held)
        for folder in (*run.glob("checkpoints/*"), run / "checkpoints"):
            with suppress(OSError):  # it is not empty
                folder.rmdir()
