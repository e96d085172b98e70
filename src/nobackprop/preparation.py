"""Makes a composed config into objects, checked against each other, before any data is loaded."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from nobackprop import hardware
from nobackprop.checkpoints import CheckpointFolder
from nobackprop.data import Source
from nobackprop.initializers import Initializer, from_string, initial_weights
from nobackprop.losses import Loss
from nobackprop.mistakes import Mistake
from nobackprop.network import Network
from nobackprop.parallel import DataParallel, environment, to_start
from nobackprop.rule import Batch, Rule
from nobackprop.settings import Component, Settings, build

# Lightning's lines about devices and products, and a warning of its own under recent torch, are no news to a user.
for name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message="The `srun` command is available")

RECOMPUTE_FROM = 2**29  # bytes of activations


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
    logger: Callable[..., Any] | None
    diagnostics: list[Callback]
    source: Source
    strategy: Strategy  # which device this process has, and of how many it is one

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def device(self) -> torch.device:
        return self.strategy.root_device

    @property
    def rank(self) -> int:
        """Which process of a data-parallel run this is; rank 0 alone writes and prints."""
        return self.strategy.global_rank if isinstance(self.strategy, DataParallel) else 0

    def seed_folder(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"


def prepare(cfg: DictConfig) -> Run:
    """Makes a composed config into objects. Raises Mistake, in a sentence for the user, for whatever can't work."""
    s = Settings.of(cfg)
    source = build(s.dataset.source, "dataset.source")
    if s.dataset.classes is not None and not 2 <= s.dataset.classes <= source.num_classes:
        raise Mistake(
            f"dataset.classes is {s.dataset.classes}: {source.name} has {source.num_classes} classes, "
            f"so 2 to {source.num_classes}, or null for all of them"
        )
    if s.dataset.crop >= min(source.shape[1:]):
        raise Mistake(
            f"dataset.crop is {s.dataset.crop}: images are shifted by up to as many pixels, so write fewer than the "
            f"{min(source.shape[1:])} that they have"
        )
    rule = build(s.rule, "rule")
    loss = build(s.loss, "loss", s.dataset.classes or source.num_classes)
    net = build(s.arch, "arch", source.shape, loss.outputs)
    kept = 2 * 4 * s.batch_size * sum(net.units(l) for l in range(net.L))  # bytes of z and h
    net = replace(net, recompute=kept >= RECOMPUTE_FROM if s.recompute is None else s.recompute)
    run = Run(
        settings=s,
        rule=rule,
        loss=loss,
        net=net,
        forward=_initializer(s.init.forward, "init.forward"),
        backward=_initializer(s.init.backward, "init.backward"),
        optimizer=build(s.optimizer, "optimizer"),
        schedule=build(s.schedule, "schedule") if s.schedule else None,
        logger=build(s.logger, "logger") if s.logger else None,
        diagnostics=[build(s.diagnostics, "diagnostics")] if s.diagnostics else [],
        source=source,
        strategy=trainer(s, logger=False).strategy,
    )
    _check_processes(run)
    if s.compile and not hardware.can_compile(run.device):
        raise Mistake("compile is true, but there is no C++ compiler (on a GPU: no Triton); use compile=false")
    _try_step(run)
    return run


def _initializer(spec: Component | str | float, key: str) -> Initializer:
    if isinstance(spec, dict):
        return build(spec, key)
    try:
        return from_string(spec)
    except Mistake as e:
        raise Mistake(f"{key}: {e}") from None


def _check_processes(run: Run) -> None:
    """Raises Mistake where a data-parallel run can't be divided, or its processes are not those it needs."""
    s, strategy = run.settings, run.strategy
    if not isinstance(strategy, DataParallel):
        return
    devices = strategy.num_processes * strategy.num_nodes
    if s.batch_size % devices:
        raise Mistake(f"batch_size is {s.batch_size}: write a multiple of {devices}, the number of devices")
    if s.stack:
        raise Mistake("stack=true: with trainer=ddp seeds are trained one after another; leave stack out")
    assert strategy.cluster_environment is not None
    if not to_start(strategy):
        strategy.cluster_environment.validate_settings(strategy.num_processes, strategy.num_nodes)
    elif strategy.num_nodes > 1:
        raise Mistake(
            f"trainer.num_nodes is {strategy.num_nodes}, but this is one process: start one a device on every machine, "
            "with srun (--nodes, --ntasks-per-node) or torchrun (--nnodes, --nproc-per-node)"
        )


def _try_step(run: Run) -> None:
    """One step on two blank images: finds what does not go together before any data is loaded."""
    try:
        w = initial_weights(run.net, run.rule, run.forward, run.backward, 0)
        x, y = torch.zeros(2, *run.net.in_shape), torch.zeros(2, run.loss.outputs)
        noise = {name: torch.zeros(shape) for name, shape in run.rule.noise(run.net, len(x)).items()}
        grads, _ = run.rule.all_grads(run.net, w, Batch(x, y, run.loss, noise))
    except (RuntimeError, ArithmeticError, MemoryError) as e:
        told = str(e).splitlines() or [type(e).__name__]  # a MemoryError may say nothing
        raise Mistake(f"arch, init or rule: {told[0]}") from e
    if unknown := grads.keys() - w.keys():
        raise Mistake(f"rule {type(run.rule).__name__} gives gradients of {sorted(unknown)}, which are no weights")
    weights = [torch.nn.Parameter(t, requires_grad=False) for t in w.values()]
    try:
        optimizer = run.optimizer(weights)
        for p in weights:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise Mistake(f"optimizer: {e}") from None
    try:
        if run.schedule is not None:
            with warnings.catch_warnings(action="ignore"):  # that no optimizer step came before
                schedule = run.schedule(optimizer)
                if wrong := [epoch for epoch in getattr(schedule, "milestones", ()) if not isinstance(epoch, int)]:
                    raise Mistake(f"milestones are numbers of epochs, as in [50,75]; got {wrong}")
                for _ in range(min(run.settings.max_epochs, 1000)):
                    schedule.step()
                    if (rate := optimizer.param_groups[0]["lr"]) < 0:
                        raise Mistake(f"the rate becomes {rate}: it must not be below 0")
    except (TypeError, ValueError, ArithmeticError) as e:
        raise Mistake(f"schedule: {e}") from None


def trainer(settings: Settings, **options: Any) -> Trainer:
    """Lightning's Trainer, without its bar, summary and sanity check. Raises Mistake for a device it can't use."""
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options |= settings.trainer.model_dump()
    parallel = settings.trainer.strategy == "ddp"
    options["plugins"] = [CheckpointFolder(), environment(parallel)]
    if parallel:
        options["strategy"] = DataParallel()
    try:
        return Trainer(**options)
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as e:
        raise Mistake(f"trainer: {e}") from None
