"""A learning rule in a training loop of one's own: it fills `.grad` of a torch module's parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nobackprop.core.initializers import Initializer, Uniform, Zeros, initial_weights
from nobackprop.core.losses import Loss
from nobackprop.core.maps import Shape
from nobackprop.core.modules import Product, held, leaves, walked
from nobackprop.core.network import Network
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule
from nobackprop.core.updates import UPDATES
from nobackprop.mistakes import Mistake, close


class Gradients(nn.Module):
    """`step(x, y)` fills `.grad` of all weights by a learning rule, where `loss.backward()` would by autograd.

    `gradients` makes it. `step.parameters()` are the parameters of `step.module` and the rule's own weights
    (`step.feedback`: `B1`, `E2`, ...), so that one optimizer takes both. `.grad` is None for weights that the rule
    leaves alone. `step.state_dict()` holds both kinds of weights and the number of steps, which noise depends on.
    """

    def __init__(
        self,
        module: nn.Module,
        net: Network,
        rule: Rule,
        loss: Loss,
        products: Sequence[Product],
        feedback: Initializer,
        seed: int,
        update: str,
    ) -> None:
        super().__init__()
        self.module, self.net, self.rule, self.loss = module, net, rule, loss
        self.products, self.seed, self.update, self.steps = products, seed, UPDATES[update], 0
        self.feedback = nn.ParameterDict()
        names = self.weights()
        for name, t in initial_weights(net, rule, Zeros(), feedback, seed).items():
            if name not in names:
                self.feedback[name] = nn.Parameter(t.to(names["W1"]), requires_grad=False)
        with torch.no_grad():
            for name in rule.nonnegative(net) & names.keys():
                names[name].abs_()

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights, not copies, by the names that rules use: `W1 b1 ... WL bL`, then the rule's own."""
        return held(self.products) | dict(self.feedback)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Fills `.grad` from inputs x (N, ...) and labels y (N,) or targets (N, outputs); gives logits (N, outputs).

        Earlier gradients are replaced, so no `zero_grad` is needed. The new ones are means over the mini-batch, changed
        as `update` says. Raises Mistake where x or y do not have the shape, the type or the class numbers needed.
        """
        x = self._inputs(x)
        if tuple(y.shape) not in {(len(x),), (len(x), self.loss.outputs)} or y.is_floating_point() == (y.ndim == 1):
            raise Mistake(
                f"y has the shape {tuple(y.shape)} and type {y.dtype} for {len(x)} samples: give whole numbers of "
                f"classes ({len(x)},), or targets ({len(x)}, {self.loss.outputs}) in floats"
            )
        on_cpu = y.device.type == "cpu"  # elsewhere the check would wait for the device
        if on_cpu and y.ndim == 1 and len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.loss.classes:
            raise Mistake(
                f"y has class numbers from {int(y.min())} to {int(y.max())}; allowed: 0 to {self.loss.classes - 1}"
            )
        self.constrain()
        w = self.weights()
        targets = y.to(x) if y.is_floating_point() else self.loss.target(y.long(), x.dtype)
        shapes = self.rule.noise(self.net, len(x)) | self.net.noise(len(x))
        drawn = normal(shapes, self.seed, "noise", self.steps)
        batch = Batch(x, targets, self.loss, {name: t.to(x) for name, t in drawn.items()})
        grads, logits = self.rule.all_grads(self.net.with_noise(batch.noise), w, batch)
        for name, p in w.items():
            p.grad = None
            if name in grads:
                own = grads[name].to(p.dtype).clone(memory_format=torch.contiguous_format)  # two weights may share one
                g = self.update(own.unsqueeze(0), len(x))[0]
                p.grad = g if (gain := self.rule.gain(name)) == 1 else g * gain
        self.steps += 1
        return logits

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The rule's prediction for x (N, ...): logits (N, outputs).

        It is the module's output, except for rules that predict in their own way. Raises Mistake for another shape of
        x.
        """
        x = self._inputs(x)
        self.constrain()
        return self.rule.logits(self.net, self.weights(), x)

    @torch.no_grad()
    def constrain(self) -> None:
        """Puts weights back into the bounds that the rule sets (mDFA), in place.

        `step` and `logits` begin with it. After the optimizer's last step, call it before you use the module by itself.
        """
        w = self.weights()
        for name, projected in self.rule.constrain(self.net, w).items():
            w[name].copy_(projected)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state)

    def _inputs(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or tuple(x.shape[1:]) not in {self.net.in_shape, (self.net.units(0),)}:
            shape = ", ".join(map(str, self.net.in_shape))
            raise Mistake(f"x has the shape {tuple(x.shape)}: this net takes (N, {shape})")
        if x.dtype != (dtype := next(self.parameters()).dtype):
            raise Mistake(f"x is of type {x.dtype}, and the module's weights are {dtype}: write x.to({dtype})")
        return x.reshape(-1, *self.net.in_shape)


def gradients(
    module: nn.Module,
    rule: Rule,
    loss: Loss,
    *,
    in_shape: Shape | None = None,
    feedback: Initializer | None = None,
    update: str = "mean",
    seed: int = 0,
) -> Gradients:
    """A learning rule for a torch module, in a training loop of your own.

        step = nobackprop.gradients(module, nobackprop.DFA(), nobackprop.SoftmaxCrossEntropy(10))
        optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
        for x, y in loader:
            step(x, y)  # fills .grad
            optimizer.step()

    The module is what `from_torch` takes: an `nn.Sequential` of nn.Linear, nn.Conv2d, activations, pooling, norms,
    dropout, residual blocks. Its weights are trained in place, from the values that they have. Where the rule needs
    non-negative weights (mDFA), they are first replaced by their absolute values. `step` draws dropout whatever mode
    the module is in. If the module has dropout, call `module.eval()` before you use it by itself.

    `in_shape` is the shape of one input, such as (C, H, W). It must be given unless nn.Linear comes first. The rule's
    own weights are drawn by `feedback`, by default uniform in +-1/sqrt(fan-in). `seed` decides what is drawn, also for
    noise and dropout. `update` says how a batch becomes one update: mean, sum, unit_norm or unit_norm_relative. Move
    `step`, not the module, to a device. A rule with several phases (weight mirrors) computes all of them at the same
    weights, while `nobackprop.train` lets the optimizer step between them.

    Raises Mistake for a module with other parts, and names the place; for a net that the rule does not train; and for a
    loss with another number of outputs.
    """
    if update not in UPDATES:
        raise Mistake(f"unknown update {update!r}: choose one of {', '.join(UPDATES)}{close(update, UPDATES)}")
    for given, kind, example in ((rule, Rule, "nobackprop.LRAE()"), (loss, Loss, "nobackprop.SoftmaxCrossEntropy(10)")):
        if not isinstance(given, kind):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"of type {type(given).__name__}"
            raise Mistake(f"{kind.__name__.lower()} is {what}: give an object such as {example}")
    net, products = walked(module, _first_shape(module) if in_shape is None else in_shape)
    if loss.outputs != net.units(net.L):
        raise Mistake(f"the module has {net.units(net.L)} outputs, and {loss} needs {loss.outputs}")
    rule.check(net)
    return Gradients(module, net, rule, loss, products, feedback or Uniform(), seed, update)


def _first_shape(module: nn.Module) -> Shape:
    """The shape of one input of a module that begins with nn.Linear. Raises Mistake for another one."""
    for _, first in leaves(module):
        if isinstance(first, nn.Linear):
            return (first.in_features,)
        if not isinstance(first, nn.Flatten | nn.Identity | nn.Dropout):
            break
    raise Mistake("the module does not begin with nn.Linear: say what it will see, as in in_shape=(3, 32, 32)")
