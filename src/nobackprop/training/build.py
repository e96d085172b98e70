"""Makes a composed config into objects, checked against each other, before any data is loaded.

Lightning takes a second to import, so it is imported after all that can be checked without.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nobackprop.core.initializers import Initializer, from_string, initial_weights
from nobackprop.core.losses import Loss
from nobackprop.core.maps import Shape
from nobackprop.core.modules import from_torch
from nobackprop.core.network import Network
from nobackprop.core.rule import Batch, Rule
from nobackprop.data.sources import Source
from nobackprop.mistakes import Mistake, at
from nobackprop.records.identity import digest
from nobackprop.training import hardware
from nobackprop.training.config import Component, Settings, build, told_once
from nobackprop.training.replay import alike

if TYPE_CHECKING:
    from pytorch_lightning import Callback, Trainer
    from pytorch_lightning.strategies import Strategy

    from nobackprop.training.loggers import Logging

# Warnings of Lightning's own that are no news to a user: under recent torch, and on a cluster's machine.
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message="The `srun` command is available")

RECOMPUTE_FROM = 2**29  # bytes of activations


T = TypeVar("T")
_tried: dict[
    str, dict[str, Shape]
] = {}  # the weights' shapes of steps that went well in this process, by what they depend on


@dataclass(frozen=True)
class Run:
    """A config made into objects, all checked against each other; no data is loaded yet."""

    settings: Settings
    rule: Rule
    loss: Loss
    net: Network
    forward: Initializer
    backward: Initializer
    optimizer: Callable[..., Optimizer]
    schedule: Callable[..., Any] | None
    source: Source

    @cached_property
    def logger(self) -> "Logging | None":
        if not self.settings.logger:
            return None
        from nobackprop.training.loggers import Logging

        return _made(Logging, self.settings.logger, "logger")

    @cached_property
    def diagnostics(self) -> "list[Callback]":
        if not self.settings.diagnostics:
            return []
        from pytorch_lightning import Callback

        return [_made(Callback, self.settings.diagnostics, "diagnostics")]

    @cached_property
    def strategy(self) -> "Strategy":
        """Lightning's: which device this process has, and of how many it is one."""
        if not self.parallel and not hardware.on_gpu(self.settings.trainer.accelerator):
            from pytorch_lightning.strategies import SingleDeviceStrategy

            return SingleDeviceStrategy()  # the CPU; a Trainer takes 10 ms to be made
        return trainer(self.settings, logger=False).strategy

    @property
    def parallel(self) -> bool:
        """Whether several processes train each seed."""
        return self.settings.trainer.strategy == "ddp"

    @property
    def device(self) -> torch.device:
        return self.strategy.root_device if hardware.on_gpu(self.settings.trainer.accelerator) else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return torch.float64 if self.settings.trainer.precision == "64-true" else torch.float32

    def weights(self, seed: int) -> dict[str, Tensor]:
        """The weights that a seed starts from, on the CPU.

        They have their type at once, since Lightning would make them double only after it has loaded a checkpoint.
        """
        start = initial_weights(self.net, self.rule, self.forward, self.backward, seed)
        return {name: t.to(self.dtype) for name, t in start.items()}

    @property
    def rank(self) -> int:
        """Which process of a data-parallel run this is; rank 0 alone writes and prints."""
        return self.strategy.global_rank if self.parallel else 0  # pyright: ignore[reportAttributeAccessIssue]

    def schedule_over(self, steps: int) -> Callable[..., Any] | None:
        """Makes the schedule of a run of so many mini-batches: its T_max if it steps after each and has no other."""
        if self.schedule is not None and self.settings.schedule_interval == "step":
            takes = signature(self.schedule).parameters
            if "T_max" in takes and takes["T_max"].default is Parameter.empty:
                return partial(self.schedule, T_max=steps)
        return self.schedule

    @property
    def folder(self) -> Path:
        return self.settings.folder

    def seed_folder(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"


def configure(s: Settings) -> Run:
    """Makes settings into objects, without Lightning. Raises Mistake, in a sentence, for whatever can't work."""
    with told_once(s.trainer.strategy):
        source = _made(Source, s.dataset.source, "dataset.source")
        if s.dataset.classes is not None and not 2 <= s.dataset.classes <= source.num_classes:
            raise Mistake(
                f"dataset.classes is {s.dataset.classes}: {source.name} has {source.num_classes} classes, "
                f"so 2 to {source.num_classes}, or null for all of them"
            )
        if s.dataset.classes_seed is not None and s.dataset.classes is None:
            raise Mistake(
                f"dataset.classes_seed is {s.dataset.classes_seed}, and dataset.classes is null, all of them: say how "
                "many are drawn, or leave the seed out"
            )
        if s.threads > 1 and (s.workers or 1) > 1:
            raise Mistake(
                f"threads is {s.threads} and workers is {s.workers}: seeds side by side have one thread each, so leave "
                "one of the two out"
            )
        if s.dataset.crop >= min(source.shape[1:]):
            raise Mistake(
                f"dataset.crop is {s.dataset.crop}: images are shifted by up to as many pixels, so write fewer than "
                f"the {min(source.shape[1:])} that they have"
            )
        rule = _made(Rule, s.rule, "rule")
        loss = _made(Loss, s.loss, "loss", s.dataset.classes or source.num_classes)
        net = _net(s.arch, source.shape, loss.outputs)
        rule.check(net)
        kept = 2 * 4 * s.batch_size * sum(net.units(l) for l in range(net.L))  # bytes of z and h
        schedule = {key: value for key, value in s.schedule.items() if key != "interval"}  # which the learner gets
        run = Run(
            settings=s,
            rule=rule,
            loss=loss,
            net=replace(net, recompute=kept >= RECOMPUTE_FROM if s.recompute is None else s.recompute),
            forward=_initializer(s.init.forward, "init.forward"),
            backward=_initializer(s.init.backward, "init.backward"),
            optimizer=build(s.optimizer, "optimizer"),
            schedule=build(schedule, "schedule") if schedule else None,
            source=source,
        )
        gpu, devices = hardware.on_gpu(s.trainer.accelerator), s.trainer.devices
        if not gpu and isinstance(devices, list):
            raise Mistake(
                f"trainer.devices is {devices}, a list of GPUs, and this run computes on the CPU: write how many "
                "processes (trainer=ddp), or 1"
            )
        if run.parallel or not gpu:  # else on the GPU, which Lightning knows
            _try_step(run, torch.device("cpu"))
    return run


def check(run: Run) -> None:
    """Raises Mistake for what of a run only Lightning can tell can't work: its devices, processes, logger, diagnostics.

    Of the processes of a data-parallel run that all find the same mistake the first raises it; the others end.
    """
    if run.parallel:
        with told_once(run.settings.trainer.strategy):
            _check_processes(run)
    if run.device.type != "cpu":
        hardware.check_gpu(run.device)
        if not run.parallel:
            _try_step(run, run.device)
    _ = run.logger, run.diagnostics


def prepare(cfg: DictConfig) -> Run:
    """Makes a composed config into objects. Raises Mistake, in a sentence for the user, for whatever can't work."""
    run = configure(Settings.of(cfg))
    check(run)
    return run


def _made(kind: type[T], node: Component, key: str, *args: Any) -> T:
    """What a config node makes. Raises Mistake where that is of another kind."""
    return _checked(kind, build(node, key, *args), node, key)


def _checked(kind: type[T], made: Any, node: Component, key: str, other: str = "") -> T:
    if not isinstance(made, kind):
        raise Mistake(
            f"{key}: _target_ {node['_target_']!r} makes an object of type {type(made).__name__}, and a "
            f"{kind.__module__}.{kind.__name__}{other} is needed"
        )
    return made


def _net(node: Component, in_shape: Shape, outputs: int) -> Network:
    """The net that `arch` makes, or of a torch module that it makes, without its weights: `init` says how they start.

    Raises Mistake for a module that can't be a net, with the place, and for another number of outputs.
    """
    made = build(node, "arch", in_shape, outputs)
    if isinstance(made, nn.Module):
        with at("arch"):
            made, _ = from_torch(made, in_shape)
    net = _checked(Network, made, node, "arch", other=" or a torch.nn.Sequential")
    if net.units(net.L) != outputs:
        raise Mistake(f"arch: {node['_target_']} makes a net of {net.units(net.L)} outputs, and {outputs} are needed")
    return net


def _initializer(spec: Component | str | float, key: str) -> Initializer:
    if isinstance(spec, dict):
        return _made(Initializer, spec, key)
    try:
        return from_string(spec)
    except Mistake as e:
        raise Mistake(f"{key}: {e}") from None


def _check_processes(run: Run) -> None:
    """Raises Mistake where a data-parallel run can't be divided, or its processes are not those it needs."""
    from nobackprop.training.ddp import DataParallel, to_start

    s, strategy = run.settings, run.strategy
    assert isinstance(strategy, DataParallel)
    devices = strategy.num_processes * strategy.num_nodes
    if s.batch_size % devices:
        raise Mistake(f"batch_size is {s.batch_size}: write a multiple of {devices}, the number of devices")
    if s.stack:
        raise Mistake("stack=true: with trainer=ddp seeds are trained one after another; leave stack out")
    assert strategy.cluster_environment is not None
    if not to_start(strategy):
        try:
            strategy.cluster_environment.validate_settings(strategy.num_processes, strategy.num_nodes)
        except ValueError as e:
            raise Mistake(f"trainer: {e}") from None
    elif strategy.num_nodes > 1:
        raise Mistake(
            f"trainer.num_nodes is {strategy.num_nodes}, but this is one process: start one a device on every machine, "
            "with srun (--nodes, --ntasks-per-node) or torchrun (--nnodes, --nproc-per-node)"
        )


def _try_step(run: Run, device: torch.device) -> None:
    """A step on two random images, in all its phases: finds what does not go together before data is loaded.

    What the step depends on is tried once a process. Raises Mistake for what torch's own optimizers and schedules
    refuse, for a rule that is not the same at every step, and for want of memory; an exception of a rule, or of a part
    that is the user's own, is a fault in it and passes through.
    """
    s = run.settings
    parts = {"rule": s.rule, "arch": s.arch, "init": s.init.model_dump(), "loss": s.loss, "classes": run.loss.classes}
    where = {"precision": s.trainer.precision, "device": str(device)}
    key = digest({**parts, **where, "images": list(run.source.shape), "recompute": run.net.recompute})
    if key not in _tried:
        _tried[key] = _try_rule(run, device)
    shapes = _tried[key]
    length = {"epochs": s.max_epochs, "steps": s.max_steps}
    key = digest({"optimizer": s.optimizer, "schedule": s.schedule, **length, **where, "shapes": shapes})
    if key not in _tried:
        _try_optimizer(run, list(shapes.values()), device)
        _tried[key] = {}


def _try_rule(run: Run, device: torch.device) -> dict[str, Shape]:
    """The shapes of the weights, with which the rule has made the same step twice."""
    net, rule, numbers = run.net, run.rule, torch.Generator().manual_seed(0)
    try:
        w = {name: t.to(device) for name, t in run.weights(0).items()}
        x = torch.rand(2, *net.in_shape, generator=numbers).to(device, run.dtype)
        y = run.loss.target(torch.tensor([0, 1], device=device), run.dtype)
        shapes = rule.noise(net, len(x)) | net.noise(len(x))
        noise = {name: torch.randn(shape, generator=numbers).to(x) for name, shape in shapes.items()}
        inputs = {**w, "the images": x, "the targets": y}
        before, given, states = {name: t.clone() for name, t in inputs.items()}, [], []
        for _ in range(2):
            with torch.no_grad(), _precision(run, device):
                given.append(rule.all_grads(net.with_noise(noise), w, Batch(x, y, run.loss, noise))[0])
            states.append(repr(vars(rule)))
    except (RuntimeError, MemoryError) as e:
        if not hardware.too_little_memory(e):
            raise
        raise Mistake(f"arch: this net takes more memory than there is: {hardware.first_line(e)}") from e
    name, (once, again) = type(rule).__name__, given
    if changed := [of for of, t in inputs.items() if not torch.equal(t, before[of])]:
        raise Mistake(f"rule {name} changes {changed[0]} in place: it gives gradients, and changes nothing")
    if states[0] != states[1]:
        raise Mistake(
            f"rule {name} changes an attribute of its own at each step: it must be the same at every step. What "
            "changes is a weight of its own (`feedback`), and random numbers come from `noise`"
        )
    if differ := [of for of, g in once.items() if not alike(g, again[of])]:
        raise Mistake(
            f"rule {name} gives two different gradients of {differ[0]} for the same step: random numbers come from "
            "`noise`, and nothing else may change between steps"
        )
    return {name: tuple(t.shape) for name, t in w.items()}


def _precision(run: Run, device: torch.device) -> AbstractContextManager[Any]:
    """As Lightning's plugin for this precision."""
    if run.settings.trainer.precision == "bf16-mixed":
        return torch.autocast(device.type, torch.bfloat16)
    return _as_default(run.dtype)


@contextmanager
def _as_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _try_optimizer(run: Run, shapes: list[Shape], device: torch.device) -> None:
    """A step of the optimizer, on small weights with as many axes, and the rates of the steps that are sure to come.

    As in training, the first axis is that of the seeds.
    """
    s = run.settings
    small = [torch.zeros(1, *(min(n, 2) for n in shape), dtype=run.dtype, device=device) for shape in shapes]
    params = [torch.nn.Parameter(t, requires_grad=False) for t in small]
    optimizer = _asked(s.optimizer, "optimizer", run.optimizer, params)
    if not isinstance(optimizer, Optimizer):
        raise Mistake(f"optimizer: {s.optimizer['_target_']} is no torch.optim.Optimizer")
    for p in params:
        p.grad = torch.zeros_like(p)
    _asked(s.optimizer, "optimizer", optimizer.step)
    try_schedule(run, steps=s.max_steps or 1, epochs=1 if s.max_steps else s.max_epochs)


def try_schedule(run: Run, steps: int, epochs: int) -> list[float]:
    """All rates of a run of so many mini-batches and epochs; none without a schedule.

    Raises Mistake for a schedule that torch refuses, that ends before the run does, or whose rate falls below 0.
    """
    s = run.settings
    make_schedule = run.schedule_over(steps)
    if make_schedule is None:
        return []
    optimizer, rates = run.optimizer([torch.nn.Parameter(torch.zeros(1, 2, 2), requires_grad=False)]), []
    with warnings.catch_warnings(action="ignore"):  # that no optimizer step came before
        schedule = _asked(s.schedule, "schedule", make_schedule, optimizer)
        if not isinstance(schedule, LRScheduler):
            raise Mistake(f"schedule: {s.schedule['_target_']} is no torch.optim.lr_scheduler.LRScheduler")
        if wrong := [number for number in getattr(schedule, "milestones", ()) if not isinstance(number, int)]:
            raise Mistake(f"schedule: milestones are numbers of {s.schedule_interval}s, as in [50,75]; got {wrong}")
        for _ in range(epochs if s.schedule_interval == "epoch" else steps):
            rates.append(optimizer.param_groups[0]["lr"])
            _asked(s.schedule, "schedule", schedule.step)
            if (rate := optimizer.param_groups[0]["lr"]) < 0:
                raise Mistake(f"schedule: the rate becomes {rate}: it must not be below 0")
    return rates


def _asked(node: Component, key: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of what the node makes. Raises Mistake where a value is missing, or torch's code refuses one.

    Code of the user's own says Mistake itself, if it wants to; its other exceptions are faults and pass through.
    """
    try:
        signature(function).bind(*args)
    except TypeError as e:
        raise Mistake(f"{key}: {node['_target_']}: {e}") from None
    try:
        return function(*args)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        if isinstance(e, ZeroDivisionError) and (zeros := [name for name, value in node.items() if value == 0]):
            raise Mistake(f"{key}: {node['_target_']} divides by a value of 0: {', '.join(zeros)}") from e
        if isinstance(e, Mistake) or node["_target_"].startswith("torch."):
            raise Mistake(f"{key}: {e}") from e
        raise


def trainer(settings: Settings, **options: Any) -> "Trainer":
    """Lightning's Trainer, without its bar, summary and sanity check. Raises Mistake for a device it can't use."""
    from pytorch_lightning import Trainer
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from nobackprop.training.checkpoints import CheckpointFolder
    from nobackprop.training.ddp import DataParallel, environment

    for name in ("pytorch_lightning", "lightning_fabric"):  # their lines about devices and products are no news
        logging.getLogger(name).setLevel(logging.WARNING)
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options |= settings.trainer.model_dump()
    options["accelerator"] = "cuda" if hardware.on_gpu(settings.trainer.accelerator) else "cpu"
    parallel = settings.trainer.strategy == "ddp"
    options["plugins"] = [CheckpointFolder(), environment(parallel)]
    if parallel:
        options["strategy"] = DataParallel()
    try:
        return Trainer(**options)
    except (ValueError, RuntimeError, MisconfigurationException) as e:
        raise Mistake(f"trainer: {e}") from None
