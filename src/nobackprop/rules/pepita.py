"""Present the error to perturb the input to modulate activity."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class PEPITA(Rule):
    """PEPITA: a second forward pass has the error added to its input. A layer's error is what this changes in it.

    Dellaferrera & Kreiman, "Error-driven input modulation: solving the credit assignment problem without a backward
    pass", ICML 2022. With e the error at the output and h' the activations of the second pass:

        x' = x + F e,   d[l] = h[l] - h'[l],   dW[l] = d[l] h'[l-1]^T,   and at the output d[L] is the second pass's e

    No derivative of f is needed. Both passes have the same dropout. Where it stands right above a layer, h and h' are
    what it leaves, as in the authors' notebook. `F` is (units of the input, outputs): `scale` times a draw whose fan-in
    is the number of input units. The paper's program draws 0.05 times he_uniform, which is `U1` times 0.05 sqrt(6), the
    default here.
    Raises Mistake for a `scale` of 0 or less.

    Programs differ in d[L]. The authors' notebook takes the second pass's error, as here, and so does their
    main_pytorch.py where a net has several dense layers. With one dense layer above convolutions main_pytorch.py takes
    the first pass's, as the program of the follow-up does (Srinivasan et al., "Forward learning with top-down
    feedback", arXiv 2302.05440).

    Departs from the paper's program:

    - d[L] is the second pass's error in convolutional nets, too.
    - The gradient of a kernel is the sum over positions, as under every rule here. The program takes the mean.
    - Biases, which the program's nets lack, get d[l], too.
    """

    family: ClassVar[str] = "aligned feedback"

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("normalization", "shortcut", "attention"),
        "the paper and its program have products, activations, pooling and dropout alone",
    )

    scale: float = 0.1225

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise Mistake(f"rule.scale is {self.scale}: without the error in the input nothing is learned, so above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = batch.error(z[net.L])  # (N, outputs)
        z_err, h_err = net.forward(w, batch.x + F.linear(e, w["F"]).view_as(batch.x))
        g = net.hebbian(net.L, h_err[net.L - 1], batch.error(z_err[net.L]))
        for l in range(1, net.L):
            dropout = takewhile(lambda m: isinstance(m, maps.Mask), net.layers[l].read)
            g |= net.hebbian(l, h_err[l - 1], maps.through(tuple(dropout), h[l] - h_err[l]))
        return g, z[net.L]

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {"F": self.scale * draw("F", (net.units(net.L), net.units(0))).T.contiguous()}
