"""Diagnostics of a net as it trains: angles to the gradient, saturation, norms. They are off unless asked for.

They stand outside the rules and know one of them, backpropagation, the measure of the others. A rule itself says what
its own weights stand in for (`Rule.stand_ins`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from nobackprop.core.network import Network, Weights
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.training.learner import Learner

SATURATED = 0.05  # a unit is saturated where its activation's derivative is smaller
ROUNDING = 1e-6  # a cosine above minus this may be zero but for rounding
CHUNK = 10_000_000  # about how many numbers the gradients of single samples may take at once


class Diagnostics(Callback):
    """Adds what `diagnose` finds to each epoch's entry of each seed. It does not change training by a single bit.

    The images are the first `samples` of the seed's validation images, or all of them if there are fewer.
    """

    def __init__(self, samples: int) -> None:
        if samples < 1:
            raise Mistake(f"diagnostics.samples is {samples}: it must be 1 or more")
        self.samples = samples

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen: list[list[Tensor]] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        own = -(-self.samples // trainer.world_size)  # each process evaluates every world_size-th image
        if (missing := own - sum(mask.shape[1] for _, _, mask in self.seen)) > 0:
            self.seen.append([t[:, :missing] for t in batch])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        seen = [torch.cat(parts, 1) for parts in zip(*self.seen, strict=True)]
        if trainer.world_size > 1:
            seen = [torch.stack(gather_all_tensors(t), 2).flatten(1, 2)[:, : self.samples] for t in seen]
        pixels, labels, masks = seen
        for s, mask in enumerate(masks):
            if not pl_module.progress[s].stopped:
                w = {name: p[s] for name, p in pl_module.w.items()}
                x = pl_module.pixels(pixels[s, mask], w["W1"].dtype)
                y = pl_module.loss.target(labels[s, mask], x.dtype)
                shapes = pl_module.rule.noise(pl_module.net, len(x))
                drawn = normal(shapes, pl_module.seeds[s], "diagnostics", pl_module.steps)
                noise = {name: t.to(x) for name, t in drawn.items()}
                batch = Batch(x, y, pl_module.loss, noise)
                as_trained = trainer.precision_plugin.forward_context()
                pl_module.extra_scores[s] |= diagnose(pl_module.net, pl_module.rule, w, batch, as_trained)


def diagnose(
    net: Network, rule: Rule, w: Weights, batch: Batch, as_trained: AbstractContextManager[Any] | None = None
) -> dict[str, float]:
    """What one seed's weights do on a batch of images, by name. It is empty where the logits are not finite.

    The batch holds the noise that the rule asks for. A rule with phases computes all of them at these weights, and of
    each weight the last gradient is measured.

    | name | what | where |
    | --- | --- | --- |
    | `norm/W{l}` | Frobenius norm of the weights | every layer |
    | `norm/update_W{l}` | Frobenius norm of the rule's gradient | the rule gives one |
    | `angle/update_W{l}` | from the rule's gradient to that of the loss | and f has a derivative |
    | `angle/feedback_W{l}` | from the rule's own weight of layer l to what it stands in for | see below |
    | `saturation/h{l}` | share of units, over all images, where abs(df) < 0.05 | hidden, f has a derivative |
    | `opposed/W{l}` | share of images whose own update of W and b opposes their own gradient | one output unit |

    What the rule itself measures is added. Angles are in degrees, and an angle with a zero vector is left out. The loss
    is that of the rule's prediction. For most rules this is the forward pass, and its gradient is backpropagation's.
    For the others it is their own answer, with all steps that lead to it, such as states that come to rest.

    The feedback angle needs a weight that stands in for another. Feedback alignment and its subclasses say which matrix
    replaces W. For DFA and its subclasses, B stands in for the product of the weights above its layer, where those
    layers are dense. For other rules, own weights (`E3`, ...) that are all shaped like W stand in for the W of their
    layer. An update opposes a gradient where their inner product is negative.

    The rule's gradients are computed within `as_trained`, such as torch's autocast, and that of the loss outside of it.
    """
    with as_trained or nullcontext():
        update, logits = rule.all_grads(net, w, batch)
    if not logits.isfinite().all():
        return {}
    found = {f"norm/W{l}": w[f"W{l}"].norm() for l in range(1, net.L + 1)}
    found |= {f"norm/update_{name}": g.norm() for name, g in update.items() if name.startswith("W")}
    stand_ins = rule.stand_ins(net, w, batch)
    found |= {f"angle/feedback_W{l}": angle(own, W) for l, (own, W) in stand_ins.items()}
    found |= rule.measured(net, w, batch)
    if net.differentiable:
        gradient = loss_gradient(net, rule, w, batch)
        found |= {f"angle/update_{name}": angle(g, gradient[name]) for name, g in update.items() if name[0] == "W"}
        z, h = net.forward(w, batch.x)
        for l in range(1, net.L):
            found[f"saturation/h{l}"] = (net.df(l, z[l], h[l]).abs() < SATURATED).float().mean()
        if net.units(net.L) == 1:
            found |= _opposed(net, rule, w, batch)
    return {name: float(value) for name, value in found.items() if not value.isnan()}


def angle(u: Tensor, v: Tensor) -> Tensor:
    """The angle between two tensors in degrees, by Kahan's formula, exact for small angles; NaN where one is zero."""
    u, v = u / u.norm(), v / v.norm()
    return torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm()))


def loss_gradient(net: Network, rule: Rule, w: Weights, batch: Batch) -> dict[str, Tensor]:
    """The gradient of the mean loss of the rule's prediction by W and b, in the type of the weights."""
    if type(rule).logits is Rule.logits:
        return BP().grads(net, w, batch)[0]

    def loss(own: dict[str, Tensor]) -> Tensor:
        return batch.loss.value(rule.logits(net, {**w, **own}, batch.x), batch.y).mean()

    return torch.func.grad(loss)({name: t for name, t in w.items() if name[0] in "Wb"})


def _opposed(net: Network, rule: Rule, w: Weights, batch: Batch) -> dict[str, Tensor]:
    alone = rule.noise(net, 1)
    own = {name: 0 if t.shape != alone[name] else None for name, t in batch.noise.items()}  # the samples' axis, if any

    def of_one_sample(x: Tensor, y: Tensor, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = {name: t if own[name] is None else t.unsqueeze(0) for name, t in noise.items()}
        single = Batch(x.unsqueeze(0), y.unsqueeze(0), batch.loss, noise)
        update, gradient = rule.all_grads(net, w, single)[0], loss_gradient(net, rule, w, single)
        found = {}
        for l in range(1, net.L + 1):
            if names := [name for name in (f"W{l}", f"b{l}") if name in update]:
                u, g = (torch.cat([grads[name].flatten() for name in names]) for grads in (update, gradient))
                found[f"opposed/W{l}"] = u @ g < -ROUNDING * u.norm() * g.norm()
        return found

    numbers = sum(t.numel() for t in w.values()) + sum(net.units(l) for l in range(net.L + 1))
    over_samples = torch.func.vmap(of_one_sample, in_dims=(0, 0, own), chunk_size=max(1, CHUNK // numbers))
    found = over_samples(batch.x, batch.y, dict(batch.noise))
    return {name: opposed.float().mean() for name, opposed in found.items()}
