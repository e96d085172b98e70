"""Forward gradients."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.local_errors import head, of_head

with warnings.catch_warnings():  # torch warns of itself where it differentiates forward for the first time
    warnings.simplefilter("ignore", FutureWarning)
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


@dataclass(frozen=True)
class ForwardGradient(Rule):
    """Forward gradients: the derivative of the loss along a random direction, times that direction.

    Baydin, Pearlmutter, Syme, Wood & Torr, "Gradients without backpropagation", arXiv 2202.08587 (2022): for v standard
    normal, `g = (dloss/dw v) v` is on average the gradient, and dloss/dw v comes with the forward pass (forward-mode
    differentiation), so that no error comes down. `perturb` says what moves:

    - `weights`: all W and b, as there. The same direction serves all samples.
    - `activities`: all z, each sample's its own way, so that `d[l] = (dloss/dz v) v[l]` (Ren, Kornblith, Liao & Hinton,
      "Scaling forward gradient with local losses", ICLR 2023), which has less variance, since there are fewer units
      than weights.

    The mean over `directions` is taken. Along as many orthogonal directions as there are numbers that move, each of
    length sqrt(that number), it is the gradient. Derivatives along a direction need f', which is torch's: 0 at the kink
    of relu. `loss` says which loss is followed:

    - `net`: the net's own, from every layer to the output.
    - `local`: in each hidden layer that of a linear head on it, as in `local_errors`, along directions of z[l] alone
      (Ren et al., "local greedy" losses). A direction then stands for the units of one layer. The heads `C1 ...
      C(L-1)`, (units that are read, outputs), and the output layer have no layer between them and their loss, and
      learn by its exact gradient, as in the program.

    Departs from the program of Ren et al.: noise enters before a layer's norm, and units that relu shuts off are
    updated. With the net's loss the output layer is perturbed as all others are, where the program gives it its exact
    gradient. Local losses are one a layer, where the paper also has one for each patch and group of channels.

    Raises Mistake for another `perturb` or `loss`, for local losses where weights are perturbed, for fewer `directions`
    than one, and for a net with an activation that has no derivative.
    """

    family: ClassVar[str] = "perturbation"

    perturb: Literal["activities", "weights"] = "activities"
    directions: int = 1
    loss: Literal["net", "local"] = field(default="net", metadata={"before": "net"})

    def __post_init__(self) -> None:
        if self.perturb not in ("activities", "weights"):
            raise Mistake(f"rule.perturb is {self.perturb!r}: write activities or weights")
        if self.loss not in ("net", "local"):
            raise Mistake(f"rule.loss is {self.loss!r}: write net or local")
        if (self.perturb, self.loss) == ("weights", "local"):
            raise Mistake("rule.loss=local follows the loss of each layer's activities: write rule.perturb=activities")
        if self.directions < 1:
            raise Mistake(f"rule.directions is {self.directions}: the loss is followed along 1 direction or more")

    def check(self, net: Network) -> None:
        super().check(net)
        if not net.differentiable:  # torch's derivative of a step is 0, and hidden layers would walk at random
            raise Mistake(
                "forward gradients need the derivative of every activation, and this net has one without: choose "
                "another activation, or rule=node_perturbation, which does without"
            )

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        if self.loss == "local":
            return self._of_local_losses(net, w, batch)
        return (self._of_weights if self.perturb == "weights" else self._of_activities)(net, w, batch)

    def _of_weights(self, net: Network, w: Weights, batch: Batch) -> Grads:
        moving = {name: w[name] for name in self._shapes(net)}
        logits = net.logits(w, batch.x)
        slopes = self._slopes(lambda moved: net.logits({**w, **moved}, batch.x), moving, batch.noise, batch)
        slope = slopes.mean(1)  # (K,), of the mean loss
        return {name: torch.tensordot(slope, batch.noise[name], 1) / self.directions for name in moving}, logits

    def _of_activities(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        layers = range(1, net.L + 1)

        def moved(u: Mapping[str, Tensor]) -> Tensor:
            below = {0: batch.x}
            for l in layers:
                at = net.preactivation(l, w, below[l - 1]) + u[f"z{l}"]
                below[l] = at if l == net.L else net.output(l, at, below)
            return below[net.L]

        v = {name: t.movedim(1, 0) for name, t in batch.noise.items() if name in self._shapes(net)}  # (K, N, ...)
        slopes = self._slopes(moved, {f"z{l}": torch.zeros_like(z[l]) for l in layers}, v, batch)  # (K, N)
        d = {l: torch.einsum("kn,kn...->n...", slopes, v[f"z{l}"]) / self.directions for l in layers}
        return {name: t for l in layers for name, t in net.hebbian(l, h[l - 1], d[l]).items()}, z[net.L]

    def _of_local_losses(self, net: Network, w: Weights, batch: Batch) -> Grads:
        h, g = {0: batch.x}, {}
        for l in range(1, net.L):
            C, z = w[f"C{l}"], net.preactivation(l, w, h[l - 1])

            def answer(moved: Mapping[str, Tensor], l: int = l, C: Tensor = C) -> Tensor:
                return head(net, l, C, net.output(l, moved["z"], h))[1]

            v = batch.noise[f"z{l}"].movedim(1, 0)  # (K, N, ...)
            slopes = self._slopes(answer, {"z": z}, {"z": v}, batch)  # (K, N)
            d = torch.einsum("kn,kn...->n...", slopes, v) / self.directions
            g |= net.hebbian(l, h[l - 1], d)
            h[l] = net.output(l, z, h)
            g[f"C{l}"], _ = of_head(net, l, C, h[l], batch)
            h.pop(l - net.span, None)
        z = net.preactivation(net.L, w, h[net.L - 1])
        return g | net.hebbian(net.L, h[net.L - 1], batch.error(z)), z

    def _slopes(
        self,
        logits: Callable[[Mapping[str, Tensor]], Tensor],
        at: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        batch: Batch,
    ) -> Tensor:
        """The derivative of each sample's loss along each direction, (K, N), by forward-mode differentiation."""

        def along(direction: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(lambda moved: batch.loss.value(logits(moved), batch.y), (dict(at),), (direction,))[1]

        return torch.func.vmap(along)({name: directions[name] for name in at})

    def _shapes(self, net: Network) -> dict[str, Shape]:
        """What moves, by name: the shape of one sample's z, or of the weights."""
        if self.perturb == "activities":
            return {f"z{l}": net.shapes[l] for l in range(1, net.L + (self.loss == "net"))}
        return net.weight_shapes

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        layers = range(1, net.L) if self.loss == "local" else ()
        return {f"C{l}": draw(f"C{l}", net.head_shape(l)) for l in layers}

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return {}  # C stands in for no W

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        first = (samples, self.directions) if self.perturb == "activities" else (self.directions,)
        return {name: (*first, *shape) for name, shape in self._shapes(net).items()}
