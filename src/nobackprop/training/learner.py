"""The LightningModule that trains any rule on any net, for one seed or several at once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nobackprop.core.losses import Loss
from nobackprop.core.network import Network
from nobackprop.core.optimizers import Prepared
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Phase, Rule, apart
from nobackprop.core.updates import UPDATES
from nobackprop.data.batches import EvalBatches, TrainBatches
from nobackprop.data.pixels import Pixels
from nobackprop.mistakes import Mistake
from nobackprop.training import kernels
from nobackprop.training.ddp import mean_over_processes
from nobackprop.training.hardware import first_line, too_little_memory
from nobackprop.training.metrics import Scores
from nobackprop.training.replay import Replay


@dataclass
class Progress:
    """What a seed has reached; kept in checkpoints, written into its record."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best_accuracy: float = -1.0
    diverged_epoch: int | None = None
    stopped: bool = False
    test: dict[str, float] | None = None


class Learner(LightningModule):
    """Trains the weights of S seeds, stacked on a leading axis, without autograd.

    A stack of one calls the rule directly, a larger one under `torch.func.vmap`. Of each seed the weights with the best
    validation accuracy are kept, and tested at the end. A seed that diverges (NaN or infinite loss) or whose patience
    is over counts as stopped, and the others go on. `weights` are those that each seed starts from, by its number;
    `batches`, `validation` and `test` make the data loaders. With `replay` a step's kernels are noted once and called
    again from then on (`Replay`): the same numbers, to the bit, in less time. `compile` has torch.compile make the
    rule's gradients: the same but for rounding. As one of several processes (`rank` of `ranks`) it sees its part of
    each mini-batch, and steps with the mean gradient of all.
    """

    def __init__(
        self,
        net: Network,
        rule: Rule,
        loss: Loss,
        weights: Mapping[int, Mapping[str, Tensor]],
        *,
        batches: Callable[..., TrainBatches],
        validation: Callable[..., EvalBatches],
        test: Callable[..., EvalBatches],
        pixels: Pixels,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        schedule_interval: Literal["epoch", "step"] = "epoch",
        update: str = "mean",
        l2: float = 0.0,
        patience: int | None = None,
        replay: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.rule, self.loss, self.pixels = net, rule, loss, pixels
        self.batches, self.validation, self.test = batches, validation, test
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.schedule_interval = schedule_interval
        self.update, self.l2, self.patience = UPDATES[update], l2, patience
        self.replay, self.compiled = replay, compile
        self.kernels: bool | Literal["in part"] = kernels.used()  # in part: a checkpoint was trained with others
        self.seeds, self.alone = tuple(weights), len(weights) == 1
        names = next(iter(weights.values()))
        self.w = nn.ParameterDict({n: _fixed(_laid_out([w[n] for w in weights.values()])) for n in names})
        self.best = nn.ParameterDict({name: _fixed(p.clone()) for name, p in self.w.items()})
        self.train_scores, self.eval_scores = Scores(loss, len(weights)), Scores(loss, len(weights))
        self.other_scores: dict[str, Scores] = {}  # of the rule's other answers
        self.extra_scores: list[dict[str, float]] = [{} for _ in self.seeds]  # a callback's, for this epoch
        self.rank, self.ranks = 0, 1
        self.steps = 0  # mini-batches trained so far: the truth for data order, logs and records
        self.spent_s, self.started = 0.0, time.monotonic()
        self.progress = [Progress() for _ in self.seeds]

    def setup(self, stage: str) -> None:
        self.rank, self.ranks = self.trainer.global_rank, self.trainer.world_size

    def teardown(self, stage: str) -> None:
        if stage == "fit":  # Lightning's trainer holds this for longer, and what steps keep is large
            self.optimizer.zero_grad()
            self.gradients, self.given, self.kept_input, self.move_weights = [], {}, None, self.optimizer.step

    def configure_optimizers(self) -> Any:
        # Called when the weights are on their device. Lightning's wrapper of an optimizer would cost time at each step.
        self.optimizer = self.make_optimizer(list(self.w.values()))
        self.ours = self.optimizer if isinstance(self.optimizer, Prepared) else None
        self.weights, self.stack = dict(self.w), self._without_axis(self.w)
        self.phases = [self._phase(phase) for phase in self.rule.phases()]
        if self.compiled:
            torch.compiler.reset()  # else it gives up at the ninth net of a process, and computes as written
            self.phases = [torch.compile(phase, dynamic=False) for phase in self.phases]
        made = [partial(self._gradients, i) for i in range(len(self.phases))]
        self.gradients = [Replay(each) for each in made] if self.replay else made
        self.given: Mapping[str, Tensor] = {}  # the gradients that the optimizer has
        self.kept_input: Tensor | None = None  # where a replay reads its input, (S, N, *in_shape)
        self.noisy = bool(self.rule.noise(self.net, 1) | self.net.noise(1))
        self.constrain = None
        if type(self.rule).constrain is not Rule.constrain:
            self.constrain = self._over_seeds(partial(self.rule.constrain, self.net))
        self.schedule = None if self.make_schedule is None else self.make_schedule(self.optimizer)
        return [self.optimizer], [] if self.schedule is None else [self.schedule]

    def train_dataloader(self) -> TrainBatches:
        return self.batches(position=lambda: self.steps, device=self.device, rank=self.rank, ranks=self.ranks)

    def val_dataloader(self) -> EvalBatches:
        return self.validation(device=self.device, rank=self.rank, ranks=self.ranks)

    def test_dataloader(self) -> EvalBatches:
        return self.test(device=self.device, rank=self.rank, ranks=self.ranks)

    def inputs(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """The net's input for pixels (S, N, C, H, W); written into `out` if that is given."""
        if out is not None:
            return self.pixels(pixels, out=out)
        out = torch.empty_like(pixels, dtype=self.w["W1"].dtype)
        if out.device.type == "cpu" and self.net.layers[0].spatial:
            # Convolutions on a CPU are up to five times as fast with the channels last in memory.
            out = torch.empty_like(out.flatten(0, 1), memory_format=torch.channels_last).unflatten(0, out.shape[:2])
        return self.pixels(pixels, out=out)

    # Training

    def step(self, x: Tensor, y: Tensor) -> Tensor | None:
        """One step of all seeds from inputs x (S, N, *in_shape) and targets y (S, N, outputs); gives the rule's logits.

        None where the rule has none at hand.
        """
        noise, logits = self._noise(x) if self.noisy else {}, []
        if self.alone:
            x, y, noise = x[0], y[0], self._without_axis(noise)
        for gradients in self.gradients:
            given, logits = gradients(x, y, noise)
            # Else a replay has put new numbers into the tensors that the optimizer has. Lightning takes these away
            # before it validates, and an optimizer that is not ours may do so at any step.
            if given is not self.given or self.weights[self.sample].grad is None or self.ours is None:
                self._give(given, gradients)
            if len(self.gradients) > 1:  # the phases after this one get what it leaves
                noise = {**noise, **apart(given, self.weights)[1]}
            self.move_weights()
            if self.constrain is not None:
                for name, projected in self.constrain(self.stack).items():
                    self.stack[name].copy_(projected)
        if self.schedule is not None and self.schedule_interval == "step":
            self.schedule.step()
        object.__setattr__(self, "steps", self.steps + 1)  # Module's own would take as long as a kernel
        if len(self.gradients) > 1:  # a later phase may hand on what an earlier one's replay will write again
            logits = [z.clone() for z in logits]
        return next((z.unsqueeze(0) if self.alone else z for z in logits), None)

    def _give(self, grads: Mapping[str, Tensor], source: object) -> None:
        """Gives the optimizer gradients, by name; weights without one it leaves alone, weight decay included."""
        seen: set[int] = set()
        for name, p in self.weights.items():
            g = grads.get(name)
            if g is not None and self.ours is None:  # which may write into gradients, and two weights may share one
                g = g.clone() if g.data_ptr() in seen else g
                seen.add(g.data_ptr())
            p.grad = g
        self.given, self.move_weights = grads, self.optimizer.step
        self.sample = next(iter(grads), next(iter(self.weights)))
        if isinstance(source, Replay) and source.replays and len(self.gradients) == 1:
            self.kept_input = source.x.unsqueeze(0) if self.alone else source.x
            if self.ours is not None:
                self.move_weights = self.ours.prepared()

    def _gradients(
        self, phase: int, x: Tensor, y: Tensor, noise: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the optimizer gets in a phase, by name, with the axis of seeds; and the logits in a list.

        What the phase leaves for those after it stands beside the gradients.
        """
        self.given = {}
        for p in self.weights.values():
            p.grad = None  # frees the memory
        given, logits = self.phases[phase](self.stack, x, y, noise)
        grads, left = apart(given, self.weights)
        if self.ranks > 1:
            grads = mean_over_processes(grads, self.trainer.strategy, self.w["W1"].dtype)
        samples = y.shape[-2] * self.ranks
        return {name: self._as_update(name, g, samples) for name, g in grads.items()} | left, logits

    def _as_update(self, name: str, g: Tensor, samples: int) -> Tensor:
        """The gradient of one weight as the optimizer gets it."""
        p = self.weights[name]
        g = _like(self.stack[name], g).as_strided(p.shape, p.stride())  # with the axis of seeds
        g = self.update(g, samples)
        if (gain := self.rule.gain(name)) != 1:
            g = g * gain
        return g.add(p, alpha=self.l2) if self.l2 else g

    def _phase(self, phase: Phase) -> Callable[..., tuple[dict[str, Tensor], list[Tensor]]]:
        """A phase of the rule, of `stack`, x, y and noise: directly for one seed, under vmap for several.

        The logits come in a list, since vmap takes no None: an empty one where there are none.
        """
        net, loss = self.net, self.loss

        def outputs(
            w: Mapping[str, Tensor], x: Tensor, y: Tensor, noise: Mapping[str, Tensor]
        ) -> tuple[dict[str, Tensor], list[Tensor]]:
            grads, logits = phase(net.with_noise(noise), w, Batch(x, y, loss, noise))
            return grads, [] if logits is None else [logits]

        return self._over_seeds(outputs)

    def _over_seeds(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of one seed, for tensors without an axis of seeds where there is one, under vmap where more."""
        return function if self.alone else torch.func.vmap(function)

    def _without_axis(self, tensors: Mapping[str, Tensor] | nn.ParameterDict) -> dict[str, Tensor]:
        """Of one seed: no axis of seeds. Of several: as they are."""
        return {name: t[0] if self.alone else t for name, t in tensors.items()}

    def _noise(self, x: Tensor) -> dict[str, Tensor]:
        """What rule and net ask for at this step, (S, ...) by name: each seed's is a function of seed, name and step.

        It is drawn for the whole mini-batch; of what each sample has of its own this process takes its samples'.
        """
        n = x.shape[1]
        own, whole = (self.rule.noise(self.net, m) | self.net.noise(m) for m in (n, n * self.ranks))
        drawn = [normal(whole, seed, "noise", self.steps) for seed in self.seeds]
        noise = {name: torch.stack([each[name] for each in drawn]).to(x) for name in whole}
        return {name: t if own[name] == whole[name] else t.narrow(1, self.rank * n, n) for name, t in noise.items()}

    @torch.no_grad()
    def training_step(self, chunk: tuple[Tensor, Tensor], index: int) -> None:
        """Trains on k mini-batches: pixels (k, S, N, C, H, W), labels (k, S, N)."""
        pixels, labels = chunk
        y = self.loss.target(labels.flatten(), self.w["W1"].dtype).unflatten(0, labels.shape)
        try:
            steps = [self.step(self.inputs(p, self.kept_input), t) for p, t in zip(pixels, y, strict=True)]
        except (RuntimeError, MemoryError) as e:
            if not too_little_memory(e):
                raise
            stacked = f"; stack=false trains the {len(self.seeds)} seeds one after another" * (not self.alone)
            raise Mistake(
                f"a step on {labels.shape[2]} images takes more memory than there is ({first_line(e)}): use a smaller "
                f"batch_size or arch, or recompute=true{stacked}"
            ) from e
        if logits := [z for z in steps if z is not None]:
            self.train_scores.update(torch.cat(logits, 1), labels.transpose(0, 1).flatten(1))

    def on_train_start(self) -> None:
        self.started = time.monotonic()
        for p in self.weights.values():  # a checkpoint may be older than the way in which weights are laid out
            state = self.optimizer.state.get(p, {})
            state |= {n: _like(p, t) for n, t in state.items() if isinstance(t, Tensor) and t.shape == p.shape}
        if self.rank > 0:  # a checkpoint has the sums of all processes, and rank 0 goes on with them
            self.train_scores.reset()

    @property
    def wall_s(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.spent_s + time.monotonic() - self.started

    def on_train_epoch_start(self) -> None:
        assert isinstance(self.trainer.train_dataloader, TrainBatches)
        if self.steps % self.trainer.train_dataloader.per_epoch == 0:  # else: resumed in mid-epoch, sums restored
            self.train_scores.reset()

    def on_train_epoch_end(self) -> None:
        if self.schedule is not None and self.schedule_interval == "epoch":
            self.schedule.step()

    # Evaluation

    def evaluate(self, weights: nn.ParameterDict, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Adds a batch, pixels (S, M, C, H, W), labels and mask (S, M), to the evaluation's scores."""
        pixels, labels, mask = batch
        x = self.inputs(pixels)
        inputs = self._without_axis(weights), x[0] if self.alone else x
        logits = self._over_seeds(partial(self.rule.logits, self.net))(*inputs)
        self.eval_scores.update(logits.unsqueeze(0) if self.alone else logits, labels, mask)
        for name, other in self._over_seeds(partial(self.rule.other_logits, self.net))(*inputs).items():
            scores = self.other_scores.setdefault(name, Scores(self.loss, len(self.seeds)).to(self.device))
            scores.update(other.unsqueeze(0) if self.alone else other, labels, mask)

    def _others(self, prefix: str) -> list[dict[str, float]]:
        """The accuracies of the rule's other answers, a dict a seed; the scores start anew."""
        found = {f"{prefix}accuracy_{name}": scores.compute()["accuracy"] for name, scores in self.other_scores.items()}
        self.other_scores.clear()
        return per_seed(found) if found else [{} for _ in self.seeds]

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        self.evaluate(self.w, batch)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        self.evaluate(self.best, batch)

    def on_validation_epoch_start(self) -> None:
        self.eval_scores.reset()
        for extra in self.extra_scores:
            extra.clear()

    def on_test_epoch_start(self) -> None:
        self.eval_scores.reset()

    def on_validation_epoch_end(self) -> None:
        # a rule may have no logits of training images
        train = per_seed(self.train_scores.compute()) if self.train_scores.count.any() else [{} for _ in self.seeds]
        val = per_seed(self.eval_scores.compute())
        for extra, others in zip(self.extra_scores, self._others("val/"), strict=True):
            extra |= others
        improved = [self._advance(p, train[s], val[s], self.extra_scores[s]) for s, p in enumerate(self.progress)]
        if any(improved):
            mask = torch.tensor(improved, device=self.device)
            for name, p in self.w.items():
                self.best[name].copy_(torch.where(mask.view(-1, *[1] * (p.ndim - 1)), p, self.best[name]))
        self.trainer.should_stop |= all(p.stopped for p in self.progress)

    def on_test_epoch_end(self) -> None:
        every = zip(self.progress, per_seed(self.eval_scores.compute()), self._others(""), strict=True)
        for p, scores, others in every:
            p.test = scores | others if p.best_epoch is not None else None

    def _advance(self, p: Progress, train: dict[str, float], val: dict[str, float], extra: dict[str, float]) -> bool:
        """Notes a finished epoch of one seed; whether its weights are now its best."""
        if p.stopped:
            return False
        epoch = len(p.epochs) + 1
        finite = isfinite(train.get("loss", 0)) and isfinite(val["loss"])
        scores = {f"train/{k}": v for k, v in train.items()} | {f"val/{k}": v for k, v in val.items()} | extra
        scores = {k: v if isfinite(v) else None for k, v in scores.items()}
        p.epochs.append({"epoch": epoch, "step": self.steps, **scores})
        if not finite:
            p.diverged_epoch, p.stopped = epoch, True
            return False
        if improved := val["accuracy"] > p.best_accuracy:
            p.best_epoch, p.best_accuracy = epoch, val["accuracy"]
        p.stopped = self.patience is not None and epoch - (p.best_epoch or 0) >= self.patience
        return improved

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with self.train_scores.sync_context():
            checkpoint["state_dict"] |= self.train_scores.state_dict(prefix="train_scores.")
        checkpoint["steps"] = self.steps
        checkpoint["wall_s"] = self.wall_s
        checkpoint |= {"compiled": self.compiled, "kernels": self.kernels}
        checkpoint["progress"] = [vars(p) for p in self.progress]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]
        self.spent_s = checkpoint["wall_s"]
        if checkpoint.get("kernels", False) != self.kernels:
            self.kernels = "in part"
        self.progress = [Progress(**p) for p in checkpoint["progress"]]


def per_seed(scores: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Vectors over the seeds, by name, as one dict of numbers a seed."""
    rows = zip(*(torch.atleast_1d(v).tolist() for v in scores.values()), strict=True)  # torchmetrics drops an axis of 1
    return [dict(zip(scores, row, strict=True)) for row in rows]


def _laid_out(each: list[Tensor]) -> Tensor:
    """The weights of all seeds as a stack. Matrices have a column's numbers side by side in memory.

    So a product with W^T, the forward pass, takes three quarters of the time.
    """
    stack = torch.stack(each)
    return stack.mT.contiguous().mT if stack.ndim == 3 else stack


def _like(p: Tensor, t: Tensor) -> Tensor:
    """The numbers of t in the type of p, laid out in memory like p, as fused optimizers take them to be.

    Mixed precision computes in a shorter type, and convolutions may give kernels with the channels last.
    """
    return t if (t.dtype, t.stride()) == (p.dtype, p.stride()) else torch.empty_like(p).copy_(t)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
