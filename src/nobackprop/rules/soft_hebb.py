"""Soft winner-take-all Hebbian learning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from nobackprop.core import maps
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class SoftHebb(Rule):
    """SoftHebb: units of a layer compete for each input, and winners move towards it; labels train the output alone.

    Moraitis, Toichkin, Journe, Chua & Guo, "SoftHebb: Bayesian inference in unsupervised Hebbian soft winner-take-all
    networks", Neuromorphic Computing and Engineering 2022, and Journe, Garcia Rodriguez, Guo & Moraitis, "Hebbian deep
    learning without feedback", ICLR 2023 (arXiv 2209.11883). With r what layer l reads and u = W[l] r,

        y = softmax(u / temperature) over the units, or over the channels at each position of a convolution
        dW[l] = -(y r^T - (y u) W[l])

    and with `anti_hebbian` y has the opposite sign in all units but the winner (the second paper). Without it, weights
    at rest have length 1 and point along the mean of y r, the centre of what the unit wins. Biases of hidden layers
    stay 0. The output layer descends the net's loss from h[L-1], which no error passes. No derivative is needed.

    Raises Mistake for a `temperature` of 0 or less.

    Departs from the papers' program: no batch norm; activations are the net's (there a power of what exceeds the mean
    over channels); steps are the optimizer's, where the program scales each to a largest entry of 1 and slows units
    down whose weights are near length 1, without which `anti_hebbian` learned little in our trials; all layers learn
    at once, where the program's learn one after the other.
    """

    family: ClassVar[str] = "Hebbian"
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("shortcut", "attention"),
        "units compete for what their own layer reads (Journe et al. 2023 have layers in a row)",
    )

    temperature: float = 1.0
    anti_hebbian: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise Mistake(f"rule.temperature is {self.temperature}: it divides what units compete by, so above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        h, g = batch.x, {}
        for l in range(1, net.L):
            layer, W = net.layers[l - 1], w[f"W{l}"]
            r = maps.through(layer.read, h)
            u = layer.forward(W, None, r)  # (N, *shape of layer l)
            units = 1 if W.ndim == 4 else -1  # of a convolution's channels, positions come behind
            y = torch.softmax(u / self.temperature, units)
            if self.anti_hebbian:
                y = torch.where(u == u.amax(units, keepdim=True), y, -y)
            won = (y * u).movedim(units, 0).flatten(1).sum(1) / len(u)  # (units,)
            g[f"W{l}"] = layer.hebbian(r, -y)[0] + won.view(-1, *[1] * (W.ndim - 1)) * W
            b = w.get(f"b{l}", torch.zeros_like(won))
            h = net.f(l, u + (b[:, None, None] if units == 1 else b))
        z = net.preactivation(net.L, w, h)
        return g | net.hebbian(net.L, h, batch.error(z)), z
