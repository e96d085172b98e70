"""Many runs as one sweep: what is recorded is skipped, what was interrupted goes on, what failed is tried again.

A launcher, one of the dataclasses below (conf/launcher), says where the runs are trained. Several sweeps may run at
once, here or on other machines with the same folder: no seed is trained twice.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from shutil import copyfile
from signal import SIGINT, SIGTERM, Signals
from statistics import mean
from threading import Thread
from typing import Any, Literal, Protocol

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from nobackprop import checkpoints
from nobackprop.hardware import cores
from nobackprop.preparation import prepare
from nobackprop.records import Record, mean_and_deviation, source_state, tested, write_atomically
from nobackprop.settings import Settings, build, digest
from nobackprop.stopping import Stopped
from nobackprop.train import Busy, left_off, recorded, train


@dataclass(frozen=True)
class Job:
    """One config of a sweep, and what it is called there."""

    label: str
    config: DictConfig


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `reason` is one line, `details` all there is to say about a failure."""

    state: Literal["finished", "recorded", "failed", "stopped", "busy", "queued"]
    reason: str = ""
    details: str = ""
    records: Sequence[Record] = ()

    @property
    def objective(self) -> float | None:
        """The mean over the seeds of the best validation accuracy, 0 for one that diverged; None without records."""
        return mean(r.validation for r in self.records) if self.records else None


class Launcher(Protocol):
    """Where the jobs of a sweep are trained, and how many at a time."""

    def at_once(self, jobs: Sequence[Job]) -> int: ...

    def run(self, jobs: Mapping[int, Job], say: "Say", console: Console, wait: bool) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each job, when it is known; `say` tells the user that a job starts, `console` its progress.

        Without `wait`, a job of which another process trains a seed is busy.
        """
        ...


Say = Callable[[int, str], None]


# One job


def attempt(job: Job, console: Console, wait: bool) -> Outcome:
    """Trains a job. Whatever goes wrong is an outcome, too."""
    try:
        records = train(job.config, console, wait)
    except Busy as e:
        return Outcome("busy", str(e))
    except Exception as e:
        return _failed(e)
    return Outcome("finished", records=records)


def _failed(error: Exception | str) -> Outcome:
    text = details = str(error)
    if isinstance(error, Exception) and not isinstance(error, (ValueError, FileNotFoundError)):
        text, details = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    return Outcome("failed", (text.splitlines() or [""])[0], details)


def _file_on(job: Job, name: str) -> Path:
    """A file in the run's folder on these seeds alone: jobs of other seeds have the same folder."""
    s = Settings.of(job.config)
    return s.folder / f"{name}_{digest({'seeds': s.seeds})}.txt"


def _note(job: Job, outcome: Outcome) -> None:
    """Leaves the reason of a failure in the run's folder, so that the next attempt can say what it repeats."""
    path = _file_on(job, "error")
    if outcome.state == "finished":
        path.unlink(missing_ok=True)
    elif outcome.state == "failed":
        with suppress(OSError):  # a full disk
            write_atomically(path, outcome.details.encode())


@dataclass(frozen=True)
class Found:
    """What there is of a job's run before it starts."""

    settings: Settings
    records: Sequence[Record]
    missing: int  # seeds
    before: str  # what there is to say of an earlier attempt


def look(job: Job) -> Found:
    """Raises ValueError for a config that can't work and for damaged records."""
    run = prepare(job.config)
    done = recorded(run)
    missing = [seed for seed in run.settings.seeds if seed not in done]
    before = ""
    if (error := _file_on(job, "error")).exists():
        before = f"failed before ({(error.read_text().strip().splitlines() or [''])[-1]}), is tried again"
    folders = left_off(run, missing, run.source.checksum).values()
    if steps := [checkpoints.step(path) for folder in folders for path in folder.glob("*.ckpt")]:
        before = f"was interrupted, goes on from step {max(steps)}"
    return Found(run.settings, [done[seed] for seed in run.settings.seeds if seed in done], len(missing), before)


# Sweeps


def run(jobs: Sequence[Job], launcher: Launcher, console: Console, dry_run: bool = False) -> list[Outcome]:
    """Runs all jobs; gives their outcomes. A line for each event, and a table at the end.

    Raises Stopped where the user stops it; the outcomes so far are shown then.
    """
    outcomes: dict[int, Outcome] = {}
    found: dict[int, Found] = {}

    def say(i: int, text: str, style: str | None = None) -> None:
        line = f"{i + 1}/{len(jobs)} {jobs[i].label}: {text}"
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    for i, job in enumerate(jobs):
        try:
            found[i] = look(job)
        except Exception as e:
            outcomes[i] = _failed(e)
            say(i, f"failed: {outcomes[i].details}", "red")
            continue
        if not found[i].missing:
            outcomes[i] = Outcome("recorded", records=found[i].records)
            say(i, "is recorded already")

    def starting(i: int, text: str) -> None:
        say(i, f"{text}; {found[i].before}" if found[i].before else text)

    left = {i: job for i, job in enumerate(jobs) if i not in outcomes}
    if dry_run:
        _show_plan(jobs, {i: found[i] for i in left}, launcher, console)
        return [outcomes.get(i, Outcome("queued")) for i in range(len(jobs))]
    start, to_run = time.monotonic(), len(left)
    try:
        for wait in (False, True):  # what another process trains comes last
            for i, outcome in launcher.run(left, starting, console, wait):
                outcomes[i] = outcome
                _note(jobs[i], outcome)
                over = sum(outcomes[k].state != "busy" for k in found if k in outcomes and found[k].missing)
                rest = (time.monotonic() - start) / max(over, 1) * (to_run - over)
                ahead = f"; about {_duration(rest)} for the other {to_run - over}" if over < to_run else ""
                text = {
                    "finished": f"finished, {mean_and_deviation(tested(outcome.records))} on the test images",
                    "failed": f"failed: {outcome.details}",
                    "busy": f"{outcome.reason}: comes back to it at the end",
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
    """What became of each job; of those that failed the reason."""
    counts = defaultdict(int)
    for outcome in outcomes:
        counts[outcome.state] += 1
    result = Table(title=", ".join(f"{n} {state}" for state, n in counts.items()))
    for column in ("run", "", "seeds", "test accuracy", "seconds"):
        result.add_column(column, justify="right" if column in ("seeds", "seconds") else "left")
    for job, o in zip(jobs, outcomes, strict=True):
        accuracy = mean_and_deviation(tested(o.records)) if o.records else o.reason
        seconds = f"{sum(r.wall_s / r.stacked for r in o.records):.0f}" if o.records else ""
        result.add_row(job.label, o.state, str(len(o.records) or ""), accuracy, seconds)
    return result


def _show_plan(jobs: Sequence[Job], found: Mapping[int, Found], launcher: Launcher, console: Console) -> None:
    """What would run, and about how long it would take by earlier records in the same folder."""
    speeds = _speeds(Path(folder) for folder in {f.settings.paths.runs for f in found.values()})
    shown, known, unknown = Table(title="dry run"), 0.0, 0
    for column in ("run", "seeds", "", "estimate"):
        shown.add_column(column)
    for i, f in found.items():
        seconds = _estimate(f.settings, speeds)
        known += (seconds or 0) * f.missing
        unknown += seconds is None
        estimate = "unknown" if seconds is None else _duration(seconds * f.missing)
        shown.add_row(jobs[i].label, f"{len(f.records)} recorded, {f.missing} to run", f.before, estimate)
    console.print(shown)
    n = launcher.at_once([jobs[i] for i in found]) if found else 1
    text = f"{len(found)} of {len(jobs)} would run, {n} at once"
    if unknown < len(found):
        text += f": about {_duration(known / n)} by earlier records"
    if unknown:
        text += f"; no record tells for {unknown} of them"
    console.print(text, highlight=False, soft_wrap=True)


def _kind(name: str, config: Mapping[str, Any]) -> str:
    """Runs of one kind take equally long for an epoch."""
    return json.dumps([name, config["arch"], config["batch_size"], config["dataset"]["classes"]])


def _speeds(folders: Iterable[Path]) -> dict[str, list[tuple[float, float]]]:
    """Seconds of an epoch and of a step that records tell of, by kind and by name of the run."""
    speeds = defaultdict(list)
    for path in (path for folder in folders for path in folder.glob("*/seed*/record.json")):
        with suppress(ValueError):
            r = Record.read(path)
            seconds = r.wall_s / r.stacked
            for key in (_kind(r.name, r.config), r.name):
                speeds[key].append((seconds / len(r.epochs), seconds / max(r.steps, 1)))
    return speeds


def _estimate(s: Settings, speeds: Mapping[str, list[tuple[float, float]]]) -> float | None:
    """Seconds of one seed."""
    if not (known := speeds.get(_kind(s.name, s.identity())) or speeds.get(s.name)):
        return None
    epoch, step = (mean(column) for column in zip(*known, strict=True))
    return min(s.max_epochs * epoch, step * s.max_steps if s.max_steps else float("inf"))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# Launchers


@dataclass(frozen=True)
class Basic:
    """One job after another, in this process."""

    def at_once(self, jobs: Sequence[Job]) -> int:
        return 1

    def run(self, jobs: Mapping[int, Job], say: Say, console: Console, wait: bool) -> Iterator[tuple[int, Outcome]]:
        for i, job in jobs.items():
            say(i, "starts")
            yield i, attempt(job, console, wait)


@dataclass(frozen=True)
class Joblib:
    """A process for each job, `workers` at a time: by default, and at most, what the granted cores have threads for.

    joblib's own pool is not used, since one process that dies takes all others of the pool with it.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}: 1 or more, or null for as many as there are cores")

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = _room(jobs)
        return min(self.workers or most, most, len(jobs))

    def run(self, jobs: Mapping[int, Job], say: Say, console: Console, wait: bool) -> Iterator[tuple[int, Outcome]]:
        context = get_context("forkserver")  # so that torch and Lightning are imported once
        context.set_forkserver_preload([__name__])
        waiting = deque(jobs)
        running: dict[Any, tuple[int, Any]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once(list(jobs.values())):
                    i = waiting.popleft()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(_beside_others(jobs[i]), wait, sender))
                    say(i, "starts")
                    process.start()
                    sender.close()
                    running[receiver] = i, process
                ready = connection.wait(list(running))
                for receiver in [r for r in running if r in ready]:
                    i, process = running[receiver]
                    try:
                        outcome = receiver.recv()
                        process.join()
                    except (EOFError, OSError):
                        process.join()
                        outcome = _died(process.exitcode)
                    del running[receiver]
                    if outcome.state == "stopped":
                        raise KeyboardInterrupt
                    yield i, outcome
        finally:  # all at an end, or the user stopped the sweep: let the others write their checkpoints
            for _, process in running.values():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, SIGTERM)
            for _, process in running.values():
                process.join()


def _room(jobs: Sequence[Job]) -> int:
    """How many of these jobs the granted cores have threads for."""
    return max(1, cores() // max(job.config.threads * (job.config.workers or 1) for job in jobs))


def _beside_others(job: Job) -> Job:
    """A job that shares this machine's cores with others: its seeds stay in one process unless `workers` is given."""
    return replace(job, config=OmegaConf.merge(job.config, {"workers": job.config.workers or 1}))


def _work(job: Job, wait: bool, sender: connection.Connection) -> None:
    """What a worker process does. It ends, after a checkpoint, when the process that started it is gone."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), SIGTERM)

    Thread(target=follow, daemon=True).start()
    sender.send(attempt(job, Console(quiet=True), wait))


def _died(status: int | None) -> Outcome:
    """The outcome of a process that told none."""
    if status in (128 + SIGINT, 128 + SIGTERM):
        return Outcome("stopped")
    how = f"was killed by {Signals(-status).name}" if status is not None and status < 0 else f"ended with {status}"
    return _failed(f"its process {how}" + (" (out of memory?)" if status == -9 else ""))


@dataclass(frozen=True)
class Cluster:
    """SLURM jobs by submitit, or (`executor="local"`) processes of its that behave like them.

    A job has `hours`; a run that takes longer writes a checkpoint and goes back into the queue, and so does one that is
    preempted. `parallel` is how many run at once. Without `wait` the command ends when all are submitted. The jobs run
    from a copy of this program's source as it is now.
    """

    executor: Literal["slurm", "local"]
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    hours: float = 24
    cpus: int = 1
    gpus: int = 0
    memory_gb: float = 4
    parallel: int = 256
    wait: bool = True
    options: dict[str, Any] = field(default_factory=dict)  # any other of sbatch's

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = self.parallel if self.executor == "slurm" else min(self.parallel, _room(jobs))
        return max(1, min(most, len(jobs)))

    def run(self, jobs: Mapping[int, Job], say: Say, console: Console, wait: bool) -> Iterator[tuple[int, Outcome]]:
        if not jobs:
            return
        queued = _queued_jobs() if self.executor == "slurm" else set()
        submitted = {i: _submitted_as(job) for i, job in jobs.items()}
        for i, name in submitted.items():
            if name in queued:
                yield i, Outcome("queued", f"as job {name} of an earlier sweep")
        waiting, running = deque(i for i in jobs if submitted[i] not in queued), {}
        executor = self._executor(Path(next(iter(jobs.values())).config.paths.runs)) if waiting else None
        while waiting or running:
            room = len(waiting)
            if self.executor == "local":
                room = self.at_once(list(jobs.values())) - len(running)
            if batch := [waiting.popleft() for _ in range(min(room, len(waiting)))]:
                assert executor is not None
                ready = [_beside_others(jobs[i]) if self.executor == "local" else jobs[i] for i in batch]
                for i, handle in zip(batch, executor.map_array(Task(sys.argv), ready), strict=True):
                    write_atomically(_file_on(jobs[i], "job"), handle.job_id.encode())
                    say(i, f"is submitted as job {handle.job_id}")
                    running[i] = Submitted(handle, self.executor == "slurm")
            if not self.wait:
                yield from ((i, Outcome("queued", f"as job {s.handle.job_id}")) for i, s in running.items())
                return
            for i in [i for i, s in running.items() if s.over()]:
                yield i, running.pop(i).outcome(jobs[i])
            time.sleep(0.5)

    def _executor(self, runs: Path) -> Any:
        try:
            import submitit
        except ImportError:
            raise ValueError("launcher=slurm needs submitit: pip install submitit") from None
        folder = runs.absolute() / ".submitit" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        source = snapshot(folder / "source")
        try:
            executor = submitit.AutoExecutor(folder / "%j", cluster=self.executor, **{_TIMEOUTS[self.executor]: 1000})
        except RuntimeError as e:
            raise ValueError(f"launcher=slurm: {e}") from None
        executor.update_parameters(
            name="nobackprop",
            timeout_min=round(60 * self.hours),
            cpus_per_task=self.cpus,
            gpus_per_node=self.gpus,
            mem_gb=self.memory_gb,
        )
        path = f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        if self.executor == "local":
            os.environ["PYTHONPATH"] = path  # which a local job inherits
            return executor
        chosen = {"partition": self.partition, "account": self.account, "qos": self.qos}
        executor.update_parameters(
            slurm_array_parallelism=self.parallel,
            slurm_setup=[f"export PYTHONPATH='{path}'"],
            slurm_additional_parameters={k: v for k, v in chosen.items() if v is not None} | self.options,
        )
        return executor


_TIMEOUTS = {"slurm": "slurm_max_num_timeout", "local": "local_max_num_timeout"}


class Task:
    """What a cluster's job calls; called again after a time-out or preemption, it finds the run's checkpoint."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self, job: Job) -> Outcome:
        sys.argv = self.argv  # the command, for the record
        outcome = attempt(job, Console(), wait=True)
        _note(job, outcome)  # the sweep may no longer be there to do it
        return outcome

    def checkpoint(self, job: Job) -> Any:
        """What to put back into the queue: the same. (submitit calls it, and StopSignals have written a checkpoint.)"""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


class Submitted:
    """A cluster's job that is waited for. It is over when there is a result, or when it is gone without one."""

    POLL_S = 10.0
    queued: tuple[float, set[str] | None] = (0.0, set())  # one look tells of all jobs; None: the look failed

    def __init__(self, handle: Any, slurm: bool) -> None:
        self.handle, self.slurm = handle, slurm
        self.seen = time.monotonic()

    def over(self) -> bool:
        if self.handle.paths.result_pickle.exists():
            return True
        if not self.slurm:
            return self.handle.done()
        # Without accounting, which not every cluster has, SLURM does not tell how a job ended, but which there are.
        now = time.monotonic()
        if now - Submitted.queued[0] > self.POLL_S:
            try:
                Submitted.queued = now, _queued_jobs()
            except ValueError:  # the controller is busy or away for a while; the job is not
                Submitted.queued = now, None
        names = Submitted.queued[1]
        if names is None or self.handle.job_id in names:
            self.seen = now
        return now - self.seen > 2 * self.POLL_S

    def outcome(self, job: Job) -> Outcome:
        if self.handle.paths.result_pickle.exists():
            try:
                return self.handle.result()
            except Exception as e:
                return _failed(e)
        log = self.handle.paths.stderr
        return _failed(f"job {self.handle.job_id} ended without a result (killed? out of memory?); its log: {log}")


def _queued_jobs() -> set[str]:
    """The user's SLURM jobs that run or wait, as 12 or 12_3. Raises ValueError where SLURM does not tell."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise ValueError("launcher=slurm: there is no SLURM here, no command squeue; try launcher=joblib") from None
    except subprocess.SubprocessError as e:
        told = (getattr(e, "stderr", None) or str(e)).strip()
        raise ValueError(f"launcher=slurm: squeue does not answer ({told}): try again later") from None
    return set(shown.split())


def _submitted_as(job: Job) -> str | None:
    """The cluster's name of the job that was submitted last for these seeds of this run."""
    with suppress(FileNotFoundError):
        return _file_on(job, "job").read_text()
    return None


def snapshot(folder: Path) -> Path:
    """Copies the package, as it is in the working tree, into a folder; gives what to put on PYTHONPATH.

    The copy's records name the commit of the original and whether it was changed.
    """
    package = Path(__file__).parent
    for path in package.rglob("*.py"):
        target = folder / package.name / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        copyfile(path, target)
    commit, dirty = source_state()
    write_atomically(folder / package.name / "source.json", json.dumps({"commit": commit, "dirty": dirty}).encode())
    return folder


def launcher_of(config: DictConfig) -> Launcher:
    """The launcher that a config names. Raises ValueError where its keys don't fit."""
    node: Any = OmegaConf.to_container(config.launcher, resolve=True)
    return build(node, "launcher")
