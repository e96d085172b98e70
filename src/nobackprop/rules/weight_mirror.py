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
    mirror mode each layer l-1 sends out noise, and the layer above answers. Then comes a step of feedback alignment:

        delta[l-1] = sigma noise,   delta[l] = f(W[l] delta[l-1]),   dB[l] = decay B[l] - delta[l] delta[l-1]^T

    The outputs answer without f. The last product is a mean over samples. Where f is linear with slope 1, it is
    sigma^2 W[l] on average, so that B tends to (sigma^2 / decay) W. `sigma` is the standard deviation of the noise. A
    step shrinks B by the share `decay` times its learning rate. `B2 ... BL` have the shapes of `W2 ... WL` (the paper's
    B is their transpose). In a convolutional layer the product is also a mean over positions; where a kernel covers
    padding at an edge, the padding adds nothing to it.

    Raises Mistake for a `sigma` of 0 or less, or a `decay` below 0.

    Departs from the paper:

    - One mirror step, with as many samples as the batch, comes before each step of feedback alignment. In the paper
      mirror mode is a period of its own.
    - Biases do not take part, nor does f at the output. The paper's program mirrors through that f, too.
    - The noise is normal. The program's is uniform in +-0.05.
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
