"""Runs one config: loads the data, trains every seed that has no record yet, and writes the records."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from nobackprop import checkpoints, hardware, records
from nobackprop.batches import EvalBatches, Task, TrainBatches, batches_per_epoch, task
from nobackprop.callbacks import EpochLog, ProgressBar, ResumePoint, Screen
from nobackprop.data import Dataset
from nobackprop.initializers import initial_weights
from nobackprop.layers import Conv
from nobackprop.learner import Learner
from nobackprop.mistakes import Mistake
from nobackprop.parallel import DataParallel, SameWeights, connect, start, to_start
from nobackprop.pixels import Pixels
from nobackprop.preparation import Run, prepare, trainer
from nobackprop.records import Record
from nobackprop.settings import digest
from nobackprop.stopping import Stopped, StopSignals
from nobackprop.trained import save
from nobackprop.workers import side_by_side, workers

# Mini-batches from which compiling, half a minute once, is repaid: it saves 0.3 ms each on a small net, 3 ms on a
# convolutional one.
COMPILE_FROM = {False: 100_000, True: 10_000}
ABOUT = "about.json"  # beside checkpoints: whose they are


class Busy(Exception):
    """Another process is training these seeds."""


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


def train(cfg: DictConfig, console: Console | None = None, wait_for_others: bool = True) -> list[Record]:
    """Trains every seed of a composed config that has no record yet; gives the records of all its seeds.

    Seeds that another process is training are left to it: in the end their records are waited for, or, without
    `wait_for_others`, Busy is raised. Raises Mistake for a config that can't work, before any data is loaded, and
    Missing or Mistake for data that is missing or damaged.
    """
    console = console or Console()
    run = prepare(cfg)
    s = run.settings
    _start_computing(run)
    done = run.strategy.broadcast(recorded(run))  # one view of the folder for all processes
    missing = [seed for seed in s.seeds if seed not in done]
    _check_data(run, done.values(), run.source.checksum)
    if done:
        text = f"{s.name}: {len(done)} of {len(s.seeds)} seeds are recorded already in {run.folder}"
        if other := records.other_code(done.values()):
            text += f", trained by {other} (another paths.runs trains them again)"
        if run.diagnostics:
            text += ", and stay without diagnostics if they were trained without: use another paths.runs to have them"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if missing:
        parallel, stack = isinstance(run.strategy, DataParallel), stacks(run)
        if stack and len(missing) > 1 and not keeps_seeds_apart(run.optimizer):
            raise Mistake(
                f"optimizer {s.optimizer['_target_']} mixes the seeds of a stack or can't step without autograd: "
                "choose an elementwise optimizer (sgd, adam, adamw, rmsprop), or train one seed at a time: stack=false"
            )
        dataset = run.source.load()
        _check_data(run, done.values(), dataset.fingerprint)
        tasks = _tasks(run, dataset, missing)
        for t in tasks:
            batches_per_epoch(t, s.batch_size)  # refuses too large ones here, not in the processes of ddp
        # Processes that are still to be started are started once, for all seeds.
        groups = [tasks]
        if not to_start(run.strategy):
            groups = divide(tasks, s.batch_size, stack, left_off(run, missing, dataset.fingerprint))
        jobs = _jobs(run, groups)
        count = workers(len(jobs), s.threads, s.workers) if run.device.type == "cpu" and not parallel else 1

        def attempt(job: tuple[Sequence[Task], str], screen: Screen) -> dict[int, Record] | None:
            with suppress(Busy):
                return _fit_unless_busy(run, dataset, *job, screen)

        busy = []
        with Screen(console) as screen:
            for (group, title), trained in side_by_side(attempt, jobs, count, screen):
                screen.finish(title)
                if trained is None:
                    busy.append((group, title))
                else:
                    done |= trained
            if busy and not wait_for_others:
                raise Busy(f"another process is training {', '.join(_names(group) for group, _ in busy)}")
            for group, title in busy:
                screen.print(f"{s.name}: waiting for another process that trains {_names(group)}")
                done |= _fit_unless_busy(run, dataset, group, title, screen, wait=True)
                screen.finish(title)
    return [done[seed] for seed in s.seeds]


def _start_computing(run: Run) -> None:
    """What a process needs once before it trains."""
    records.source_state()  # of the code that was imported: a commit may come while it trains
    torch.set_num_threads(run.settings.threads)
    hardware.prepare(run.device)
    connect(run.strategy)


def _train_as_rank(settings: dict[str, Any], quiet: bool) -> None:
    """What each process of a data-parallel run does; the one that started it has the seeds' locks."""
    run = prepare(OmegaConf.create(settings))
    _start_computing(run)
    dataset = run.source.load()
    with Screen(Console(quiet=quiet or run.rank > 0)) as screen:
        for group, title in _jobs(run, [[t] for t in _tasks(run, dataset, run.settings.seeds)]):
            _fit(run, dataset, group, title, screen)
            screen.finish(title)


def _tasks(run: Run, dataset: Dataset, seeds: Iterable[int]) -> list[Task]:
    choice = {k: getattr(run.settings.dataset, k) for k in ("classes", "classes_seed", "validation", "split")}
    return [task(dataset, seed, **choice) for seed in seeds]


def _jobs(run: Run, groups: Sequence[Sequence[Task]]) -> list[tuple[Sequence[Task], str]]:
    """Each group of seeds with its title."""
    titles = [f"{run.settings.name} {_names(group)} ({i + 1}/{len(groups)})" for i, group in enumerate(groups)]
    return list(zip(groups, titles, strict=True))


def _check_data(run: Run, done: Iterable[Record], fingerprint: str | None) -> None:
    """Raises Mistake where seeds of this run are recorded on other images: they can't be one result."""
    for record in done:
        if fingerprint is not None and record.data.fingerprint != fingerprint:
            raise Mistake(
                f"seed {record.seed} is recorded in {run.folder} with other images of {record.data.name} (fingerprint "
                f"{record.data.fingerprint}, now {fingerprint}): use another paths.runs, or the images of then"
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


def left_off(run: Run, missing: Iterable[int], fingerprint: str | None) -> dict[tuple[int, ...], Path]:
    """The groups of missing seeds that training can go on with, and the folders of their checkpoints.

    The fingerprint is that of the images; None: of any.
    """
    found = {}
    for path in sorted(run.folder.glob(f"checkpoints/*_{fingerprint or '*'}/{ABOUT}")):
        try:
            seeds = json.loads(path.read_text())["seeds"]
        except FileNotFoundError:  # another process has just recorded them
            continue
        if set(seeds) <= set(missing) and (len(seeds) == 1 or stacks(run)):
            found[tuple(seeds)] = path.parent
    return found


def _names(group: Sequence[Task]) -> str:
    return f"seed {','.join(str(t.seed) for t in group)}"


def _fit_unless_busy(
    run: Run, dataset: Dataset, tasks: Sequence[Task], title: str, screen: Screen, wait: bool = False
) -> dict[int, Record]:
    """Trains those of a group of seeds that were not recorded meanwhile, while no other process can.

    Raises Busy where another one is training one of them, or waits for it. Of the processes of a data-parallel run one
    alone takes the locks. The system drops a dead process's locks.
    """
    with ExitStack() as locks:
        while not run.strategy.broadcast(run.rank > 0 or _lock(run, tasks, locks)):
            if not wait:
                raise Busy
            time.sleep(0.5)
        done = run.strategy.broadcast(recorded(run))
        left = [t for t in tasks if t.seed not in done]
        if left and (processes := to_start(run.strategy)):
            settings = run.settings.model_dump() | {"seeds": [t.seed for t in left]}
            start(_train_as_rank, processes, settings, screen.bars.console.quiet)
            done = recorded(run)
        elif left:
            done |= {record.seed: record for record in _fit(run, dataset, left, title, screen)}
        return {t.seed: done[t.seed] for t in tasks}


def _lock(run: Run, tasks: Sequence[Task], locks: ExitStack) -> bool:
    """Takes the locks of all these seeds, and tidies up behind a process that was killed; False: it could take none."""
    with ExitStack() as taken:
        for t in tasks:
            run.seed_folder(t.seed).mkdir(parents=True, exist_ok=True)
            try:
                taken.enter_context(FileLock(run.seed_folder(t.seed) / ".lock", blocking=False))
            except Timeout:
                return False
        for t in tasks:
            for unfinished in run.seed_folder(t.seed).glob(".*.[0-9]*"):
                unfinished.unlink()  # a process was killed while it wrote this
        locks.push(taken.pop_all())
    return True


def _learner(run: Run, dataset: Dataset, tasks: Sequence[Task], steps: int) -> Learner:
    """What trains a group of seeds, for that many mini-batches, from their initial weights."""
    s = run.settings
    relabels = [t.relabel for t in tasks]
    return Learner(
        run.net,
        run.rule,
        run.loss,
        {t.seed: initial_weights(run.net, run.rule, run.forward, run.backward, t.seed) for t in tasks},
        batches=partial(
            TrainBatches, dataset, tasks, s.batch_size, max_steps=s.max_steps, flip=s.dataset.flip, crop=s.dataset.crop
        ),
        validation=partial(EvalBatches, dataset.validation, [t.validation for t in tasks], relabels),
        test=partial(EvalBatches, dataset.test, [t.test for t in tasks], relabels),
        pixels=dataset.normalized if s.dataset.normalize else Pixels(),
        optimizer=run.optimizer,
        schedule=run.schedule,
        update=s.update,
        l2=s.l2,
        patience=s.patience,
        compile=s.compile if s.compile is not None else _repaid(run, steps),
    )


def _fit(run: Run, dataset: Dataset, tasks: Sequence[Task], title: str, screen: Screen) -> list[Record]:
    """Trains a group of seeds, from its last checkpoint if there is one, and writes their weights and records."""
    s = run.settings
    seeds = [t.seed for t in tasks]
    per_epoch = batches_per_epoch(tasks[0], s.batch_size)
    steps = min(s.max_epochs * per_epoch, s.max_steps or s.max_epochs * per_epoch)
    learner = _learner(run, dataset, tasks, steps)
    folder = run.folder / "checkpoints" / f"{digest({'seeds': seeds})}_{dataset.fingerprint}"
    commit, before = records.source_state()[0], None
    if run.rank == 0:
        if (about := folder / ABOUT).exists():
            before = json.loads(about.read_text())["commit"]
        records.write_atomically(about, json.dumps({"seeds": seeds, "commit": commit}).encode())
    loggers = []
    with StopSignals() as signals:
        try:
            if run.logger is not None and run.rank == 0:
                loggers += [run.logger(run.folder, seed, s.model_dump()) for seed in seeds]
            fitting = trainer(
                s,
                max_epochs=-(-steps // per_epoch),
                logger=loggers or False,
                callbacks=[
                    ProgressBar(title, screen),
                    EpochLog(),
                    ResumePoint(folder, s.checkpoint_minutes, signals),
                    SameWeights(seeds, dataset.fingerprint),
                    *run.diagnostics,
                ],
            )
            if resumed := run.strategy.broadcast(checkpoints.newest(folder) if run.rank == 0 else None):
                other = before not in (None, commit)
                so_far = f", trained so far by commit {before}, from here by {commit}" if other else ""
                screen.print(f"{title}: goes on from step {checkpoints.step(resumed)}{so_far}")
            try:
                fitting.fit(learner, ckpt_path=resumed, weights_only=True)
            except RuntimeError as e:
                if "loading state_dict" not in str(e):
                    raise
                raise Mistake(
                    f"{resumed} is another version's, with other weights: delete {folder} to start from the beginning"
                ) from e
            wall = learner.wall_s
            fitting.test(learner, verbose=False)
            finished = [_record(run, dataset, t, learner, i, wall) for i, t in enumerate(tasks)]
            for logger, record in zip(loggers, finished, strict=bool(loggers)):
                reached = {f"test/{name}": value for name, value in (record.test or {}).items()}
                logger.experiment.summary.update(reached | {"val/best_accuracy": record.validation})
        except Stopped:
            last = checkpoints.newest(folder)
            there = f"goes on from step {checkpoints.step(last)}" if last else "starts it again"
            screen.print(f"{title}: stopped; the same command {there}")
            raise
        finally:
            for logger in loggers:
                logger.experiment.finish(exit_code=int(sys.exc_info()[0] is not None))
        if run.rank == 0:
            _write(run, tasks, learner, finished)
            rmtree(folder, ignore_errors=True)
        finished = run.strategy.broadcast(finished)  # also: all processes wait until they are written
        signals.check()
    return finished


def _write(run: Run, tasks: Sequence[Task], learner: Learner, finished: Sequence[Record]) -> None:
    """Writes the best weights and, last, since a seed with a record is complete, the record of each seed."""
    for i, (t, record) in enumerate(zip(tasks, finished, strict=True)):
        if record.best_epoch is not None:
            weights = {name: p[i].cpu() for name, p in learner.best.items()}
            path = run.seed_folder(t.seed) / "best.pt"
            save(path, run.net, run.rule, weights, run.loss, learner.pixels, t.classes)
    for t, record in zip(tasks, finished, strict=True):
        record.write(run.seed_folder(t.seed) / "record.json")


def _repaid(run: Run, steps: int) -> bool:
    convolutional = any(isinstance(layer, Conv) for layer in run.net.layers)
    return steps >= COMPILE_FROM[convolutional] and hardware.can_compile(run.device)


def _record(run: Run, dataset: Dataset, t: Task, learner: Learner, i: int, wall: float) -> Record:
    progress = learner.progress[i]
    commit, dirty = records.source_state()
    return Record(
        signature=run.settings.signature,
        seed=t.seed,
        name=run.settings.name,
        config=run.settings.identity(),
        command=records.command(),
        commit=commit,
        dirty=dirty,
        versions=records.versions(),
        data=records.Data(
            name=dataset.name,
            fingerprint=dataset.fingerprint,
            classes=list(t.classes),
            train=len(t.train),
            validation=len(t.validation),
            test=len(t.test),
        ),
        machine=records.machine(learner.device, learner.compiled, learner.ranks),
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
    table = Table(title=f"{seeds[0].name}  {seeds[0].signature}")
    for column in ("seed", "best epoch", "validation", "test", "wall time"):
        table.add_column(column, justify="right")
    for r in seeds:
        best = f"{r.best['val/accuracy']:.2%}" if r.best else "-"
        test = "-" if r.test is None else f"{r.test['accuracy']:.2%}"
        note = f" (diverged in {r.diverged_epoch})" if r.diverged_epoch else ""
        table.add_row(str(r.seed), f"{r.best_epoch or '-'}{note}", best, test, f"{r.wall_s:.1f} s")
    if len(accuracies := records.tested(seeds)) > 1:
        table.add_section()
        table.add_row("mean", "", "", records.mean_and_deviation(accuracies), "")
    return table
