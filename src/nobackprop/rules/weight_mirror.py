"""Weight mirrors."""

from dataclasses import dataclass

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Phase
from nobackprop.mistakes import Mistake
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class WeightMirror(FA):
    """Weight mirror: feedback alignment in which B learns W from the layer's own response to noise.

    Akrout, Wilson, Humphreys, Lillicrap & Tweed, "Deep learning without weight transport", NeurIPS 2019, section 3. In
    mirror mode each layer l-1 sends out noise and the layer above answers; then comes the step of feedback alignment:

        delta[l-1] = sigma noise,   delta[l] = f(W[l] delta[l-1]),   dB[l] = decay B[l] - delta[l] delta[l-1]^T

    where the outputs answer without f. The last product, the mean over samples, is sigma^2 W[l] on average where f is
    linear with slope 1, so that B tends to (sigma^2 / decay) W. `sigma` is the noise's standard deviation; a step takes
    `decay` times the learning rate of B. `B2 ... BL` have the shapes of `W2 ... WL` (the paper's B is their transpose);
    in a convolutional layer the product is the mean over positions, where padding takes its part from those at the
    edge. Raises Mistake for a `sigma` of 0 or less, or a `decay` below 0.

    Departs from the paper: one mirror step, with as many samples as the batch, comes before each other step, not a
    period of its own; biases do not take part, nor does f at the output, through which the paper's program mirrors too.
    The program's noise is uniform in +-0.05, here it is standard normal times `sigma`.
    """

    sigma: float = 0.5
    decay: float = 0.25

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise Mistake(f"rule.sigma is {self.sigma}: without noise there is nothing to mirror, so above 0")
        if self.decay < 0:
            raise Mistake(f"rule.decay is {self.decay}: it keeps B from growing, so 0 or more")

    def mirror(self, net: Network, w: Weights, batch: Batch) -> Grads:
        """The gradients of B from the layers' answers to noise; no logits."""
        g = {}
        for l in range(2, net.L + 1):
            below = self.sigma * batch.noise[f"h{l - 1}"]
            layer = net.layers[l - 1]
            above = layer.forward(w[f"W{l}"], None, below)
            if l < net.L:
                above = net.f(l, above)
            positions = net.units(l) // net.weight_shape(l)[0]
            seen = layer.hebbian(below, above)[0] / positions
            g[f"B{l}"] = self.decay * w[f"B{l}"] - seen
        return g, None

    def phases(self) -> tuple[Phase, ...]:
        return self.mirror, self.grads

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {f"h{l - 1}": (samples, *net.read_shapes[l]) for l in range(2, net.L + 1)}
