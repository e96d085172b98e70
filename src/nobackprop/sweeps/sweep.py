"""Many runs as one sweep: recorded runs are skipped, interrupted ones go on, and failed ones are tried again.

A launcher (jobs.py) trains the runs. Several sweeps may run at once, here or on other machines that share the folder.
No seed is trained twice.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import SIGINT
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from nobackprop.mistakes import Mistake, about_files
from nobackprop.records.literal import literal
from nobackprop.records.provenance import other_code
from nobackprop.records.record import Record, mean_and_deviation, tested
from nobackprop.sweeps.jobs import Job, Launcher, Outcome, note
from nobackprop.training import locks
from nobackprop.training.config import Settings
from nobackprop.training.run import left_off, recorded
from nobackprop.training.stopping import Stopped


@dataclass(frozen=True)
class Earlier:
    """What earlier commands have left of a job's run."""

    settings: Settings
    records: Sequence[Record]
    missing: int  # seeds
    before: str  # in words, on an earlier attempt


def look(job: Job) -> Earlier:
    """Raises Mistake for a config that can't work and for damaged records, OSError for a folder it can't write to."""
    run = job.run
    run.settings.check_writable()
    done = recorded(run)
    missing = [seed for seed in run.settings.seeds if seed not in done]
    before = ""
    if (error := job.file("error")).exists():
        told = error.read_text(errors="replace").strip().splitlines() or [""]
        before = f"failed before ({told[-1]}), is tried again"
    if steps := left_off(run, missing, run.source.checksum).values():
        before = f"was interrupted, goes on from step {max(steps)}"
    return Earlier(run.settings, [done[seed] for seed in run.settings.seeds if seed in done], len(missing), before)


def run(jobs: Sequence[Job], launcher: Launcher, console: Console, dry_run: bool = False) -> list[Outcome]:
    """Runs all jobs and gives their outcomes. It prints a line for each event, and a table at the end.

    Raises Stopped when the user stops it, after it has shown the outcomes so far.
    """
    outcomes: dict[int, Outcome] = {}
    found: dict[int, Earlier] = {}

    def say(i: int, text: str, style: str | None = None) -> None:
        line = f"{i + 1}/{len(jobs)} {jobs[i].label}: {text}"
        console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)

    for i, job in enumerate(jobs):
        try:
            with about_files(job.config):
                found[i] = look(job)
        except Exception as e:
            outcomes[i] = Outcome.failure(e)
            say(i, f"failed: {outcomes[i].details}", "red")
            continue
        if not found[i].missing:
            if not dry_run:
                locks.tidy(found[i].settings.folder)
            outcomes[i] = Outcome("recorded", records=found[i].records)
            other = other_code(found[i].records)
            say(i, f"is recorded already{f', by {other}' if other else ''}")

    def starting(i: int, text: str) -> None:
        say(i, f"{text}; {found[i].before}" if found[i].before else text)

    left = {i: job for i, job in enumerate(jobs) if i not in outcomes}
    if dry_run:
        _show_plan(jobs, {i: found[i] for i in left}, launcher, console)
        return [outcomes.get(i, Outcome("queued")) for i in range(len(jobs))]
    start, to_run = time.monotonic(), len(left)
    try:
        for wait_for_others in (False, True):  # runs that another process trains come last
            for i, outcome in launcher.run(left, starting, console, wait_for_others):
                outcomes[i] = outcome
                note(jobs[i], outcome)
                over = sum(found[k].missing > 0 for k in outcomes if k in found)  # busy ones, too, since little is left
                rest = (time.monotonic() - start) / over * (to_run - over)
                ahead = f"; about {_duration(rest)} for the other {to_run - over}" if over < to_run else ""
                text = {
                    "finished": f"finished, {mean_and_deviation(tested(outcome.records))} on the test images",
                    "failed": f"failed: {outcome.details}",
                    "busy": f"comes back to it at the end, since {outcome.reason}",
                }.get(outcome.state, f"{outcome.state} {outcome.reason}")
                say(i, text + ahead, {"failed": "red", "finished": "green"}.get(outcome.state))
            left = {i: jobs[i] for i, outcome in outcomes.items() if outcome.state == "busy"}
            if not left:
                break
    except (KeyboardInterrupt, Stopped) as e:
        console.print(table(jobs, [outcomes.get(i, Outcome("stopped")) for i in range(len(jobs))]))
        console.print("stopped; the same command goes on from here", highlight=False)
        raise e if isinstance(e, Stopped) else Stopped(SIGINT) from None
    result = [outcomes[i] for i in range(len(jobs))]
    if len(jobs) > 1:
        console.print(table(jobs, result))
    return result


def table(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> Table:
    """A table of what became of each job, with the reasons of failures."""
    counts = defaultdict(int)
    for outcome in outcomes:
        counts[outcome.state] += 1
    result = Table(title=", ".join(f"{n} {state}" for state, n in counts.items()))
    for column in ("run", "", "seeds", "test accuracy", "seconds"):
        result.add_column(column, justify="right" if column in ("seeds", "seconds") else "left")
    for job, o in zip(jobs, outcomes, strict=True):
        accuracy = mean_and_deviation(tested(o.records)) if o.records else o.reason
        seconds = f"{sum(r.seconds for r in o.records):.0f}" if o.records else ""
        result.add_row(literal(job.label), o.state, str(len(o.records) or ""), literal(accuracy), seconds)
    return result


def _show_plan(jobs: Sequence[Job], found: Mapping[int, Earlier], launcher: Launcher, console: Console) -> None:
    """Prints what would run, and about how long it would take by earlier records in the same folder."""
    speeds, unreadable = _speeds(Path(folder) for folder in {f.settings.paths.runs for f in found.values()})
    shown, known, unknown = Table(title="dry run"), 0.0, 0
    for column in ("run", "seeds", "", "estimate"):
        shown.add_column(column)
    for i, f in found.items():
        seconds = _estimate(f.settings, speeds)
        known += (seconds or 0) * f.missing
        unknown += seconds is None
        estimate = "unknown" if seconds is None else _duration(seconds * f.missing)
        known_and_not = f"{len(f.records)} recorded, {f.missing} to run"
        shown.add_row(literal(jobs[i].label), known_and_not, literal(f.before), estimate)
    if found:
        console.print(shown)
    for problem in unreadable:
        console.print(literal(f"no estimate is made from what is damaged: {problem}"), soft_wrap=True)
    n = launcher.at_once([jobs[i] for i in found])
    text = f"{len(found)} of {len(jobs)} would run, {n} at once"
    if unknown < len(found):
        text += f": roughly {_duration(known / n)} by earlier records, with one seed of a run after another"
    if unknown:
        text += f"; no record tells for {unknown} of them"
    console.print(text, highlight=False, soft_wrap=True)


def _kind(name: str, config: Mapping[str, Any]) -> str:
    """Runs of one kind take equally long for an epoch."""
    return json.dumps([name, config["arch"], config["batch_size"], config["dataset"]["classes"]])


def _speeds(folders: Iterable[Path]) -> tuple[dict[str, list[tuple[float, float]]], list[str]]:
    """Seconds of an epoch and of a step in earlier records, by kind and by name of the run.

    It also gives sentences that name the records that can't be read.
    """
    speeds, unreadable = defaultdict(list), []
    for path in (path for folder in folders for path in folder.glob("*/seed*/record.json")):
        try:
            r = Record.read(path)
        except (Mistake, OSError) as e:
            unreadable.append(str(e))
            continue
        per_epoch = r.data.train // r.config["batch_size"]
        if r.steps < per_epoch:  # it was cut short, and took most of its time to start
            continue
        step = r.seconds / r.steps
        epoch = step * per_epoch
        for key in (_kind(r.name, r.config), r.name):
            speeds[key].append((epoch, step))
    return speeds, unreadable


def _estimate(s: Settings, speeds: Mapping[str, list[tuple[float, float]]]) -> float | None:
    """Seconds of one seed."""
    if not (known := speeds.get(_kind(s.name, s.identity())) or speeds.get(s.name)):
        return None
    epoch, step = (mean(column) for column in zip(*known, strict=True))
    return min(s.max_epochs * epoch, step * s.max_steps if s.max_steps else float("inf"))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
