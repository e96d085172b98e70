"""The launcher that submits a sweep's jobs to SLURM.

Hydra's own plugin for submitit blocks until all jobs are over, repeats finished jobs after a crash, and writes no
checkpoint on preemption. Its jobs run the code as it is when they start, which may have been edited since. So this
launcher does these things itself, and submitit does the rest.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from math import ceil
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console

from nobackprop.mistakes import Mistake
from nobackprop.places import PACKAGE
from nobackprop.records.files import write_atomically
from nobackprop.records.provenance import source_state
from nobackprop.sweeps.jobs import Job, Outcome, Say, attempt, note
from nobackprop.sweeps.local import beside_others, room


@dataclass(frozen=True)
class Cluster:
    """SLURM jobs by submitit or, with `executor="local"`, processes by submitit that behave like them.

    A job has `hours`. A run that takes longer, or is preempted, writes a checkpoint and goes back into the queue.
    `parallel` is how many jobs run at once. Without `wait` the command ends when all jobs are submitted to SLURM. The
    jobs run from a copy of this program's source as it is now.
    """

    executor: Literal["slurm", "local"]
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    hours: PositiveFloat = 24
    cpus: PositiveInt = 1
    gpus: NonNegativeInt = 0
    memory_gb: PositiveFloat = 4
    parallel: PositiveInt = 256
    wait: bool = True
    options: dict[str, Any] | None = None  # any other options of sbatch

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = self.parallel if self.executor == "slurm" else min(self.parallel, room(jobs))
        return max(1, min(most, len(jobs)))

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        if not jobs:
            return
        queued = _queued_jobs() if self.executor == "slurm" else set()
        submitted = {i: _submitted_as(job) for i, job in jobs.items()}
        for i, name in submitted.items():
            if name in queued:
                yield i, Outcome("queued", f"as job {name} of an earlier sweep")
        waiting, running = deque(i for i in jobs if submitted[i] not in queued), {}
        runs = Path(next(iter(jobs.values())).settings.paths.runs)
        executor = self._executor(runs) if waiting else None
        most = self.at_once(list(jobs.values())) if self.executor == "local" else len(jobs)
        while waiting or running:
            if batch := [waiting.popleft() for _ in range(min(most - len(running), len(waiting)))]:
                assert executor is not None
                ready = [beside_others(jobs[i]) if self.executor == "local" else jobs[i] for i in batch]
                try:
                    handles = executor.map_array(ClusterTask(sys.argv), ready)
                except RuntimeError as e:  # what sbatch says
                    raise Mistake(f"launcher: {e}") from None
                for i, handle in zip(batch, handles, strict=True):
                    write_atomically(jobs[i].file("job"), handle.job_id.encode())
                    say(i, f"is submitted as job {handle.job_id}")
                    running[i] = Submitted(handle, self.executor == "slurm")
            if not self.wait and self.executor == "slurm":
                yield from ((i, Outcome("queued", f"as job {s.handle.job_id}")) for i, s in running.items())
                return
            try:
                over = [i for i, s in running.items() if s.over()]
                time.sleep(0.5)
            except KeyboardInterrupt:
                if self.executor == "local":
                    raise
                goes_on = "which goes on (scancel ends it)"
                yield from ((i, Outcome("queued", f"as job {s.handle.job_id}, {goes_on}")) for i, s in running.items())
                raise
            for i in over:
                yield i, running.pop(i).outcome()

    def _executor(self, runs: Path) -> Any:
        try:
            import submitit
        except ImportError:
            raise Mistake("launcher=slurm needs submitit: pip install submitit") from None
        folder = runs.absolute() / ".submitit" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        source = snapshot(folder / "source")
        try:
            executor = submitit.AutoExecutor(folder / "%j", cluster=self.executor, **{_TIMEOUTS[self.executor]: 1000})
        except RuntimeError as e:
            raise Mistake(f"launcher=slurm: {e}") from None
        executor.update_parameters(
            name="nobackprop",
            timeout_min=ceil(60 * self.hours),
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
            slurm_setup=[f"export PYTHONPATH={shlex.quote(path)}"],
            slurm_additional_parameters={k: v for k, v in chosen.items() if v is not None} | (self.options or {}),
        )
        return executor


_TIMEOUTS = {"slurm": "slurm_max_num_timeout", "local": "local_max_num_timeout"}


class ClusterTask:
    """The function that a cluster's job calls. Called again after a time-out or preemption, it finds the checkpoint."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self, job: Job) -> Outcome:
        sys.argv = self.argv  # the command, for the record
        outcome = attempt(job, Console(), wait_for_others=True)
        note(job, outcome)  # the sweep may have ended already
        return outcome

    def checkpoint(self, job: Job) -> Any:
        """Puts the same back into the queue. submitit calls it after StopSignals has written a checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


class Submitted:
    """A cluster's job that is waited for. It is over when there is a result, or when it has gone without one."""

    POLL_S = 10.0
    queued: tuple[float, set[str] | None] = (0.0, set())  # one look shows all jobs; None: it failed

    def __init__(self, handle: Any, slurm: bool) -> None:
        self.handle, self.slurm = handle, slurm
        self.seen = time.monotonic()

    def over(self) -> bool:
        if self.handle.paths.result_pickle.exists():
            return True
        if not self.slurm:
            return self.handle.done()
        # Not every cluster has accounting. Without it SLURM tells which jobs there are, but not how a job ended.
        now = time.monotonic()
        if now - Submitted.queued[0] > self.POLL_S:
            try:
                Submitted.queued = now, _queued_jobs()
            except Mistake:  # the controller is busy or away for a while, not the job
                Submitted.queued = now, None
        names = Submitted.queued[1]
        if names is None or self.handle.job_id in names:
            self.seen = now
        return now - self.seen > 2 * self.POLL_S

    def outcome(self) -> Outcome:
        if self.handle.paths.result_pickle.exists():
            try:
                return self.handle.result()
            except Exception as e:
                return Outcome.failure(e)
        log = self.handle.paths.stderr
        return Outcome.failure(
            f"job {self.handle.job_id} ended without a result (killed? out of memory?); its log: {log}"
        )


def _queued_jobs() -> set[str]:
    """The user's SLURM jobs that run or wait, such as 12 or 12_3. Raises Mistake where SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise Mistake("launcher=slurm: there is no SLURM here, no command squeue; try launcher=processes") from None
    except subprocess.SubprocessError as e:
        told = (getattr(e, "stderr", None) or str(e)).strip()
        raise Mistake(f"launcher=slurm: squeue does not answer ({told}): try again later") from None
    return set(shown.split())


def _submitted_as(job: Job) -> str | None:
    """The cluster's name of the last job that was submitted for these seeds of this run."""
    with suppress(FileNotFoundError):
        return job.file("job").read_text(errors="replace")
    return None


def snapshot(folder: Path) -> Path:
    """Copies the package, as it is in the working tree, into a folder, and gives the entry for PYTHONPATH.

    The copy's records name the commit of the original and whether it was changed.
    """
    copytree(PACKAGE, folder / PACKAGE.name, ignore=ignore_patterns("__pycache__"))
    commit, dirty = source_state()
    write_atomically(folder / PACKAGE.name / "source.json", json.dumps({"commit": commit, "dirty": dirty}).encode())
    return folder
