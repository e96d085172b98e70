"""Attention-gated brain propagation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network
from nobackprop.core.rule import Batch
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP


@dataclass(frozen=True)
class BrainProp(BP):
    """BrainProp: the net chooses one output and learns from the reward alone, which says whether the choice was right.

    Pozzi, Bohte & Roelfsema, "Attention-gated brain propagation: how the brain can implement reward-based error
    backpropagation", NeurIPS 2020, and its program. The output z[k] is the reward that the net expects for choosing
    class k. Of each sample the net chooses the class s with the largest z, or, with probability `epsilon`, one drawn
    from softmax(z). The reward is r = 1 for the right class and 0 for all others. The chosen output alone has an error,

        e[s] = z[s] - r,   e[k] = 0 for all other k

    which comes down through the feedback connections of the chosen unit. These have the weights of the forward ones. So
    a step is backpropagation of (z[s] - r)^2 / 2. The net's own loss does not enter; it is reported alone.

    One output unit stands for two choices whose expected rewards are 1/2 - z and 1/2 + z. Then both choices have the
    same error, z + 1/2 - y. Raises Mistake for an `epsilon` outside 0 to 1.

    Departs from the paper's program: output units have biases if the net has them; W starts as `init.forward` says.
    """

    epsilon: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise Mistake(f"rule.epsilon is {self.epsilon}: it is the share of choices that are drawn, so 0 to 1")

    def error(self, z: Tensor, batch: Batch) -> Tensor:
        outputs = z.shape[1]
        if outputs == 1:
            return z + 0.5 - batch.y
        chosen = z.argmax(1, keepdim=True)
        if self.epsilon:
            u = torch.special.ndtr(batch.noise["choice"]).unsqueeze(1)  # uniform; below epsilon, u / epsilon is, too
            drawn = (torch.softmax(z, 1).cumsum(1)[:, :-1] < u / self.epsilon).sum(1, keepdim=True)
            chosen = torch.where(u < self.epsilon, drawn, chosen)
        return torch.where(torch.arange(outputs, device=z.device) == chosen, z - batch.y, 0)

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {"choice": (samples,)} if self.epsilon and net.units(net.L) > 1 else {}
