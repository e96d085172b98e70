"""The work of a rule's training step, counted: it does not depend on a machine, as seconds do."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.losses import Loss
from nobackprop.core.network import Network
from nobackprop.core.rule import Batch, Rule


def passes(rule: Rule, net: Network, loss: Loss, samples: int = 50) -> float:
    """The products and sums of one step of a rule, in forward passes of the net."""
    normal = Normal(0.1)
    w = {name: tensor.detach() for name, tensor in initial_weights(net, rule, normal, normal, seed=0).items()}
    numbers = torch.Generator().manual_seed(0)
    x = torch.rand(samples, *net.in_shape, generator=numbers)
    noise = {name: torch.randn(shape, generator=numbers) for name, shape in rule.noise(net, samples).items()}
    batch = Batch(x, loss.target(torch.arange(samples) % loss.classes, x.dtype), loss, noise)
    with torch.no_grad(), FlopCounterMode(display=False) as step:
        rule.all_grads(net, w, batch)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        net.logits(w, x)
    return step.get_total_flops() / forward.get_total_flops()
