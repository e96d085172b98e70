"""Runs one config: loads the data, trains every seed that has no record yet, and writes the records."""

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from nobackprop.data.batches import EvalBatches, Task, TrainBatches, batches_per_epoch, task
from nobackprop.data.sources import Dataset
from nobackprop.mistakes import Mistake, Notice
from nobackprop.records import files, machine, provenance
from nobackprop.records.literal import literal
from nobackprop.records.record import EDITS, Data, Record, mean_and_deviation, tested
from nobackprop.training import checkpoints, hardware, kept, kernels, locks
from nobackprop.training.build import Run, check, configure, trainer, try_schedule
from nobackprop.training.checkpoints import About, ResumePoint
from nobackprop.training.config import Settings
from nobackprop.training.ddp import DataParallel, SameWeights, connect, start, to_start
from nobackprop.training.learner import Learner
from nobackprop.training.loggers import EpochLog, SeedLog
from nobackprop.training.processes import side_by_side, workers
from nobackprop.training.saved import save
from nobackprop.training.screens import ProgressBar, Screen
from nobackprop.training.stopping import Stopped, StopSignals

REPLAY_FROM = 200  # mini-batches: to note and check a step's kernels takes as long as replaying saves in about 100
TELL_AGAIN_S = 600.0  # what a run waits for


class Busy(Exception):
    """Another process is training some of these seeds. The message says which process."""


class Group(NamedTuple):
    """Seeds that are trained together, and what they are called on the screen."""

    tasks: Sequence[Task]
    title: str

    def __str__(self) -> str:
        return self.title


def keeps_seeds_apart(make_optimizer: Callable[..., Optimizer]) -> bool:
    """Whether stacked seeds stay independent under this optimizer: one seed's gradient must not move another seed."""

    def other_seed(gradient: float) -> Tensor:
        p = torch.nn.Parameter(torch.ones(2, 3, 3), requires_grad=False)
        optimizer = make_optimizer([p])
        for _ in range(2):
            p.grad = torch.stack([torch.eye(3), gradient * torch.eye(3)])
            optimizer.step()
        return p[0].clone()

    try:
        return torch.equal(other_seed(0.0), other_seed(100.0))
    except (TypeError, ValueError, RuntimeError):  # needs a closure, or matrices only
        return False


def train(run: Run, console: Console | None = None, wait_for_others: bool = True) -> list[Record]:
    """Trains every seed of a run that has no record yet; gives the records of all its seeds.

    Seeds that another process is training are left to it: in the end their records are waited for, or, without
    `wait_for_others`, Busy is raised. Raises Mistake for a run that can't work, before any data is loaded, and Missing
    or Mistake for data that is missing or damaged.
    """
    console = console or Console()
    check(run)
    s = run.settings
    _start_computing(run)
    done = run.strategy.broadcast(recorded(run))  # one view of the folder for all processes
    missing = [seed for seed in s.seeds if seed not in done]
    _check_data(run, done.values(), run.source.checksum)
    if run.rank == 0:
        locks.tidy(run.folder)
    if done:
        text = f"{s.name}: {len(done)} of {len(s.seeds)} seeds are recorded already in {run.folder}"
        if other := provenance.other_code(done.values()):
            text += f", trained by {other} (another paths.runs trains them again)"
        if run.diagnostics:
            text += ", and stay without diagnostics if they were trained without: use another paths.runs to have them"
        console.print(literal(text), soft_wrap=True)
    if missing:
        parallel, stack = isinstance(run.strategy, DataParallel), stacks(run)
        if stack and len(missing) > 1 and not keeps_seeds_apart(run.optimizer):
            raise Mistake(
                f"optimizer {s.optimizer['_target_']} mixes the seeds of a stack or can't step without autograd: "
                "choose an elementwise optimizer (sgd, adam, adamw, rmsprop), or train one seed at a time: stack=false"
            )
        if s.compile:
            hardware.check_compiler(run.device)
        dataset = _images(run)
        _check_data(run, done.values(), dataset.fingerprint)
        tasks = _tasks(run, dataset, missing)
        for per_epoch in {batches_per_epoch(t, s.batch_size) for t in tasks}:  # which refuses too large batches
            steps = _steps(s, per_epoch)
            rates = try_schedule(run, steps, epochs=-(-steps // per_epoch))
            if len(rates) > 1 and len({*rates}) == 1:
                told = (
                    f"the schedule leaves the rate at {rates[0]} for all of these {len(rates)} {s.schedule_interval}s"
                )
                warnings.warn(told, Notice, stacklevel=2)
        # Processes that are still to be started are started once, for all seeds.
        together = [tasks]
        if not to_start(run.strategy):
            together = divide(tasks, s.batch_size, stack, left_off(run, missing, dataset.fingerprint))
        if run.rank == 0:
            kept.write(s)
        groups = _groups(run, together)
        count = workers(len(groups), s.threads, s.workers) if run.device.type == "cpu" and not parallel else 1

        def attempt(group: Group, screen: Screen) -> dict[int, Record] | Busy:
            try:
                return _fit_unless_busy(run, dataset, group, screen)
            except Busy as e:
                return e

        busy = []
        with Screen(console) as screen:
            for group, trained in side_by_side(attempt, groups, count, screen):
                screen.finish(group.title)
                if isinstance(trained, Busy):
                    busy.append((group, trained))
                else:
                    done |= trained
            if busy and not wait_for_others:
                raise Busy("; ".join(str(told) for _, told in busy))
            for group, _ in busy:
                done |= _fit_unless_busy(run, dataset, group, screen, wait=True)
                screen.finish(group.title)
    return [done[seed] for seed in s.seeds]


def _start_computing(run: Run) -> None:
    """What a process needs once before it trains."""
    provenance.code_of(run.settings.identity())  # as it was imported: a commit or an edit may come while it trains
    torch.set_num_threads(run.settings.threads)
    hardware.prepare(run.device, run.settings.kernels)
    connect(run.strategy)


def _train_as_rank(settings: Settings, quiet: bool) -> None:
    """What each process of a data-parallel run does; the one that started it has the seeds' locks."""
    run = configure(settings)
    check(run)
    _start_computing(run)
    dataset = _images(run)
    with Screen(Console(quiet=quiet or run.rank > 0)) as screen:
        for group in _groups(run, [[t] for t in _tasks(run, dataset, run.settings.seeds)]):
            _fit(run, dataset, group, screen)
            screen.finish(group.title)


def _images(run: Run) -> Dataset:
    """The data set of a run, marked where `dataset.validation` has it select on the images that it reports on."""
    dataset = run.source.load()
    return dataset.selecting_on_test if run.settings.dataset.validation == "test" else dataset


def _tasks(run: Run, dataset: Dataset, seeds: Iterable[int]) -> list[Task]:
    choice = {k: getattr(run.settings.dataset, k) for k in ("classes", "classes_seed", "validation", "split")}
    return [task(dataset, seed, **choice) for seed in seeds]


def _groups(run: Run, together: Sequence[Sequence[Task]]) -> list[Group]:
    groups = []
    for i, tasks in enumerate(together):
        seeds = ",".join(str(t.seed) for t in tasks)
        groups.append(Group(tasks, f"{run.settings.name} seed {seeds} ({i + 1}/{len(together)})"))
    return groups


def _check_data(run: Run, done: Iterable[Record], fingerprint: str | None) -> None:
    """Raises Mistake where seeds of this run are recorded on other images: they can't be one result."""
    for each in done:
        if fingerprint is not None and each.data.fingerprint != fingerprint:
            raise Mistake(
                f"seed {each.seed} is recorded in {run.folder} with other images of {run.settings.dataset.name} "
                f"(fingerprint {each.data.fingerprint}, now {fingerprint}): use another paths.runs, or the images of "
                "then"
            )


def recorded(run: Run) -> dict[int, Record]:
    """The records there are of this run's seeds, by seed. Raises Mistake for a damaged or misplaced one."""
    paths = {seed: run.seed_folder(seed) / "record.json" for seed in run.settings.seeds}
    found = {seed: Record.read(path) for seed, path in paths.items() if path.exists()}
    for seed, record in found.items():
        if (record.seed, record.signature) != (seed, run.settings.signature):
            raise Mistake(
                f"{paths[seed]} is the record of seed {record.seed} of {record.run}: "
                "it was put in the wrong folder; move it away"
            )
    return found


def stacks(run: Run) -> bool:
    """Whether seeds are trained as one stack of tensors."""
    if run.settings.stack is None:
        return run.device.type != "cpu" and not isinstance(run.strategy, DataParallel)
    return run.settings.stack


def divide(
    tasks: Sequence[Task], batch_size: int, stack: bool, interrupted: Iterable[Sequence[int]] = ()
) -> list[list[Task]]:
    """The seeds to train together: each alone, or stacked where they have equally many mini-batches an epoch.

    Of a stack that was `interrupted` all seeds stay together, and no other joins them: its checkpoint fits no others.
    """
    if not stack:
        return [[t] for t in tasks]
    left = {t.seed: t for t in tasks}
    groups = [[left.pop(seed) for seed in seeds] for seeds in interrupted if left.keys() >= set(seeds)]
    together = defaultdict(list)
    for t in left.values():
        together[batches_per_epoch(t, batch_size)].append(t)
    return [*groups, *together.values()]


def left_off(run: Run, missing: Iterable[int], fingerprint: str | None) -> dict[tuple[int, ...], int]:
    """The groups of missing seeds that training can go on with, and from which step.

    The fingerprint is that of the images; None: of any.
    """
    return {
        tuple(about.seeds): checkpoints.step(path)
        for path, about in checkpoints.interrupted(run.folder)
        if fingerprint in (None, about.fingerprint)
        if set(about.seeds) <= set(missing) and (len(about.seeds) == 1 or stacks(run))
    }


def _fit_unless_busy(run: Run, dataset: Dataset, group: Group, screen: Screen, wait: bool = False) -> dict[int, Record]:
    """Trains those of a group of seeds that were not recorded meanwhile, while no other process can.

    Raises Busy where another one is training one of them; with `wait`, waits for it, and says so now and then. Of the
    processes of a data-parallel run one alone takes the locks.
    """
    seeds, tell = [t.seed for t in group.tasks], time.monotonic()
    with ExitStack() as held:
        while other := run.strategy.broadcast("" if run.rank > 0 else locks.take(run.folder, seeds, held)):
            if not wait:
                raise Busy(other)
            if time.monotonic() >= tell:
                screen.print(f"{group.title}: waits: {other}")
                tell += TELL_AGAIN_S
            time.sleep(0.5)
        done = run.strategy.broadcast(recorded(run))
        left = [t for t in group.tasks if t.seed not in done]
        if left and (processes := to_start(run.strategy)):
            settings = run.settings.model_copy(update={"seeds": [t.seed for t in left]})
            start(_train_as_rank, processes, settings, screen.bars.console.quiet)
            done = recorded(run)
        elif left:
            done |= {record.seed: record for record in _fit(run, dataset, Group(left, group.title), screen)}
        return {seed: done[seed] for seed in seeds}


def _steps(s: Settings, per_epoch: int) -> int:
    """How many mini-batches a run has, if nothing ends it early."""
    return min(s.max_epochs * per_epoch, s.max_steps or s.max_epochs * per_epoch)


def _learner(run: Run, dataset: Dataset, tasks: Sequence[Task], steps: int) -> Learner:
    """What trains a group of seeds, for that many mini-batches, from their initial weights."""
    s = run.settings
    relabels = [t.relabel for t in tasks]
    return Learner(
        run.net,
        run.rule,
        run.loss,
        {t.seed: run.weights(t.seed) for t in tasks},
        batches=partial(
            TrainBatches, dataset, tasks, s.batch_size, max_steps=s.max_steps, flip=s.dataset.flip, crop=s.dataset.crop
        ),
        validation=partial(EvalBatches, dataset.validation, [t.validation for t in tasks], relabels),
        test=partial(EvalBatches, dataset.test, [t.test for t in tasks], relabels),
        pixels=dataset.normalized if s.dataset.normalize else dataset.plain,
        optimizer=run.optimizer,
        schedule=run.schedule_over(steps),
        schedule_interval=s.schedule_interval,
        update=s.update,
        l2=s.l2,
        patience=s.patience,
        replay=_replays(run, steps),
        compile=s.compile,
    )


def _fit(run: Run, dataset: Dataset, group: Group, screen: Screen) -> list[Record]:
    """Trains a group of seeds, from its last checkpoint if there is one, and writes their weights and records."""
    s, (tasks, title) = run.settings, group
    seeds = [t.seed for t in tasks]
    per_epoch = batches_per_epoch(tasks[0], s.batch_size)
    steps = _steps(s, per_epoch)
    make = partial(_learner, run, dataset, tasks, steps)
    now = provenance.code_of(s.identity())
    about = About(run=run.folder.name, seeds=seeds, fingerprint=dataset.fingerprint, commits=[now])
    folder = about.folder(run.folder)
    loggers: list[SeedLog] = []
    with StopSignals() as signals:
        try:
            learner, checkpoint, before = _resumed(run, make, folder, about) if run.rank == 0 else (make(), None, [])
            if checkpoint := run.strategy.broadcast(checkpoint):
                screen.print(f"{title}: goes on from step {checkpoints.step(checkpoint)}{_by(before, about.commits)}")
                both = before if before[-1:] == about.commits else before + about.commits
                about = about.model_copy(update={"commits": both})
            if run.logger is not None and run.rank == 0:
                loggers += [run.logger.open(run.folder, seed, s.model_dump()) for seed in seeds]
            fitting = trainer(
                s,
                max_epochs=-(-steps // per_epoch),
                logger=loggers or False,
                callbacks=[
                    ProgressBar(title, screen),
                    EpochLog(),
                    ResumePoint(folder, about, s.checkpoint_minutes, signals),
                    SameWeights(seeds, dataset.fingerprint),
                    *run.diagnostics,
                ],
            )
            fitting.fit(learner, ckpt_path=checkpoint, weights_only=True)
            wall = learner.wall_s
            fitting.test(learner, verbose=False)
            finished = [_record(run, dataset, t, learner, i, wall, about) for i, t in enumerate(tasks)]
            for logger, record in zip(loggers, finished, strict=bool(loggers)):
                reached = {f"test/{name}": value for name, value in (record.test or {}).items()}
                logger.result(reached | {"val/best_accuracy": record.validation}, record.steps)
        except Stopped:
            written = checkpoints.files(folder)
            there = f"goes on from step {checkpoints.step(written[-1])}" if written else "starts it again"
            screen.print(f"{title}: stopped; the same command {there}")
            raise
        finally:
            for logger in loggers:
                logger.close(failed=sys.exc_info()[0] is not None)
        if run.rank == 0:
            _write(run, tasks, learner, finished)
            checkpoints.remove(folder)
        finished = run.strategy.broadcast(finished)  # also: all processes wait until they are written
        signals.check()
    return finished


def _resumed(
    run: Run, make: Callable[[], Learner], folder: Path, about: About
) -> tuple[Learner, Path | None, list[str]]:
    """A new learner, the last checkpoint that it can go on from, if any, and the commits that have trained that."""
    files.remove_unfinished(folder, alone=True)
    for path, content in checkpoints.usable(folder, about):
        learner = make()
        if content.get("compiled", False) != learner.compiled:  # of those of before some did not say
            was, now = (str(each).lower() for each in (not learner.compiled, learner.compiled))
            raise Mistake(
                f"{path} was trained with compile={was}, and this command says compile={now}, which rounds in another "
                f"way: go on with compile={was}, or remove {folder} to start these seeds again"
            )
        other = run.device.type == "cpu" and content.get("kernels", False) == (not kernels.used())
        if other and run.settings.kernels is None:
            was, now = (str(each).lower() for each in (not kernels.used(), kernels.used()))
            raise Mistake(
                f"{path} was trained with kernels={was}, and here kernels={now} is the default, which rounds in "
                f"another way: say kernels={was} to go on exactly, or kernels={now} to go on all the same"
            )
        try:  # as Lightning will do again
            learner.on_load_checkpoint(content)
            learner.load_state_dict(content["state_dict"])
            learner.configure_optimizers()
            learner.optimizer.load_state_dict(content["optimizer_states"][0])
        except Exception as e:  # whatever another version's content leads to
            why = (str(e).splitlines() or [""])[-1].strip()
            checkpoints.put_aside(path, f"{path} does not fit this version of the code ({type(e).__name__}: {why})")
            continue
        return learner, path, content["about"]["commits"]
    return make(), None, []


def _by(before: Sequence[str], now: Sequence[str]) -> str:
    """Which code has trained so far, where it was not certainly the same."""
    if [*before] == [*now] and EDITS not in now[0]:
        return ""
    return f", trained so far by commit {', '.join(before)}, from here by {now[0]}"


def _write(run: Run, tasks: Sequence[Task], learner: Learner, finished: Sequence[Record]) -> None:
    """Writes the best weights and, last, since a seed with a record is complete, the record of each seed."""
    path = run.folder
    try:
        for i, (t, record) in enumerate(zip(tasks, finished, strict=True)):
            if record.best_epoch is not None:
                weights = {name: p[i].cpu() for name, p in learner.best.items()}
                path = run.seed_folder(t.seed) / "best.pt"
                save(path, run.net, run.rule, weights, run.loss, learner.pixels, t.classes)
        for t, record in zip(tasks, finished, strict=True):
            path = run.seed_folder(t.seed) / "record.json"
            record.write(path)
    except OSError as e:
        raise OSError(e.errno, f"{path} could not be written when the run was over ({e.strerror or e})") from e


def _replays(run: Run, steps: int) -> bool:
    """Whether a step's kernels are noted and replayed: on a CPU, where that is repaid and takes no more memory.

    The numbers are the same to the bit. Processes that step together exchange gradients in mid-step, and autocast
    would change what is replayed.
    """
    s = run.settings
    simple = run.device.type == "cpu" and not run.parallel and s.trainer.precision != "bf16-mixed" and not s.compile
    return simple and not run.net.recompute and steps >= REPLAY_FROM


def _record(run: Run, dataset: Dataset, t: Task, learner: Learner, i: int, wall: float, about: About) -> Record:
    progress = learner.progress[i]
    commit, dirty = provenance.source_state()
    return Record(
        signature=run.settings.signature,
        seed=t.seed,
        name=run.settings.name,
        config=run.settings.identity(),
        command=provenance.command(),
        commit=commit,
        dirty=dirty,
        commits=about.commits,
        versions=provenance.versions(),
        data=Data(
            name=dataset.name,
            fingerprint=dataset.fingerprint,
            classes=list(t.classes),
            train=len(t.train),
            validation=len(t.validation),
            test=len(t.test),
        ),
        machine=machine.machine(learner.device, learner.compiled, learner.ranks, learner.kernels),
        precision=run.settings.trainer.precision,
        stacked=len(learner.seeds),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(wall, 3),
        steps=int(progress.epochs[-1]["step"]),
        epochs=progress.epochs,
        best_epoch=progress.best_epoch,
        diverged_epoch=progress.diverged_epoch,
        test=progress.test,
    )


def summary(seeds: Sequence[Record]) -> Table:
    """A table of the seeds of one run and their mean."""
    table = Table(title=literal(f"{seeds[0].name}  {seeds[0].signature}"))
    for column in ("seed", "best epoch", "validation", "test", "wall time"):
        table.add_column(column, justify="right")
    for r in seeds:
        best = f"{r.best['val/accuracy']:.2%}" if r.best else "-"
        test = "-" if r.test is None else f"{r.test['accuracy']:.2%}"
        note = f" (diverged in {r.diverged_epoch})" if r.diverged_epoch else ""
        table.add_row(str(r.seed), f"{r.best_epoch or '-'}{note}", best, test, f"{r.wall_s:.1f} s")
    if len(accuracies := tested(seeds)) > 1:
        table.add_section()
        table.add_row("mean", "", "", mean_and_deviation(accuracies), "")
    return table
