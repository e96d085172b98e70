"""Optimizers: torch's Adam, AdamW and RMSprop with less around their kernel, and those of the two original programs.

On nets of this size torch's own classes spend as long around the fused kernel as in it.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nobackprop.mistakes import Mistake

TINY = 5e-324  # equals 0 where denormal numbers are flushed to zero


class _ForeachOptimizer(Optimizer):
    """Steps all weights that have a gradient at once, through torch's `_foreach` operations."""

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            if name == "betas" and len(value) != 2:
                raise Mistake(f"betas is {value}: it must be two numbers")
            for number in value if name == "betas" else (value,):
                if number < 0:
                    raise Mistake(f"{name} is {value}: it must not be below 0")
                if name in ("betas", "beta1", "beta2", "decay") and number >= 1:
                    raise Mistake(f"{name} is {value}: it is a share of the past, so below 1")
        super().__init__(params, defaults)
        self._found_in: Any = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights, [p.grad for p in weights])

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _states(self, weights: list[Tensor]) -> list[dict[str, Any]]:
        """The state of each weight. It is looked up once for each choice of weights: torch is slow to hash a tensor."""
        if self._found_in is not self.state:  # at first, and after loading
            self._found, self._found_in = {}, self.state
        key = tuple(map(id, weights))
        if key not in self._found:
            self._found[key] = [self.state[p] for p in weights]
        return self._found[key]

    def _slot(self, weights: list[Tensor], name: str, start: float) -> list[Tensor]:
        """One state tensor a weight, filled with `start` the first time."""
        states = self._states(weights)
        for p, state in zip(weights, states, strict=True):
            if name not in state:
                state[name] = torch.full_like(p, start, memory_format=torch.preserve_format)
        return [state[name] for state in states]


class Adam(_ForeachOptimizer):
    """Kingma & Ba, "Adam: a method for stochastic optimization", 2015, to the bit as torch's Adam(fused=True)."""

    kernel = staticmethod(torch._fused_adam_)

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        m, v = self._slot(weights, "exp_avg", 0.0), self._slot(weights, "exp_avg_sq", 0.0)
        steps = []
        for state in self._states(weights):
            state["step"] = state.get("step", 0) + 1
            steps.append(state["step"])
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        if len(set(steps)) == 1:
            _adam(self.kernel, weights, grads, m, v, steps[0], **options)
        else:  # weights that had no gradient at some step
            for p, g, m1, v1, step in zip(weights, grads, m, v, steps, strict=True):
                _adam(self.kernel, [p], [g], [m1], [v1], step, **options)


class AdamW(Adam):
    """Loshchilov & Hutter, "Decoupled weight decay regularization", 2019, to the bit as torch's AdamW(fused=True)."""

    kernel = staticmethod(torch._fused_adamw_)

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class RMSprop(_ForeachOptimizer):
    """Tieleman & Hinton, 2012, as torch computes it.

    s = decay * s + (1 - decay) * g^2,   w = w - lr * g / (sqrt(s) + eps)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.9, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        self._root_step(group, weights, grads, self._slot(weights, "mean_square", 0.0), group["eps"])

    @staticmethod
    def _root_step(
        group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], mean_square: list[Tensor], eps: float
    ) -> None:
        # Adam without a first moment (beta1 = 0: the gradient itself) and past its bias correction is RMSprop.
        betas = (0.0, group["decay"])
        _adam(torch._fused_adam_, weights, grads, grads, mean_square, inf, group["lr"], betas, eps, 0.0)


class TFRMSprop(RMSprop):
    """RMSProp as TensorFlow 1 computes it: epsilon under the root, and a mean square that starts at 1 (torch: 0).

    s = decay * s + (1 - decay) * g^2,   w = w - lr * g / sqrt(s + eps)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.9, eps: float = 1e-10) -> None:
        if decay == 0:
            raise Mistake("decay is 0: it must be above 0, since the mean square keeps epsilon from step to step")
        super().__init__(params, lr, decay, eps)

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        shifted = self._slot(weights, "mean_square_plus_eps", 1.0 + group["eps"])
        torch._foreach_add_(shifted, (1 / group["decay"] - 1) * group["eps"])  # so that it decays to eps, not to zero
        self._root_step(group, weights, grads, shifted, eps=0.0)


class SignSGD(_ForeachOptimizer):
    """`w = w - lr * sign(g)` (Bernstein et al., 2018), which the mDFA program holds but gives no way to choose."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_add_(weights, torch._foreach_sign(grads), alpha=-group["lr"])


class MemorylessAdamW(_ForeachOptimizer):
    """Keras' AdamW as the LRA-E program for TensorFlow 2 uses it: made anew at every step, so always at its first one.

        w = w - lr * weight_decay * w,   w = w - lr * g / (|g| + eps / sqrt(1 - beta2))

    The defaults of eps, beta2 and weight_decay are Keras'.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-7,
        weight_decay: float = 0.004,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        size = torch._foreach_abs(grads)
        torch._foreach_add_(size, group["eps"] / (1 - group["beta2"]) ** 0.5)
        torch._foreach_addcdiv_(weights, grads, size, -group["lr"])


class TFAdam(_ForeachOptimizer):
    """Adam as TensorFlow 1 computes it: epsilon is added outside the bias correction.

    w = w - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "steps": 0})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        group["steps"] += 1
        beta1, beta2, t = group["beta1"], group["beta2"], group["steps"]
        m, v = self._slot(weights, "m", 0.0), self._slot(weights, "v", 0.0)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, group["eps"])
        rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        torch._foreach_addcdiv_(weights, m, root, -rate)


def _adam(
    kernel: Callable[..., None],
    weights: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    steps = [torch.full((), step, dtype=torch.float32, device=weights[0].device)] * len(weights)
    beta1, beta2 = betas
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    # Averages of gradients that are 0 from some step on, as of pixels at an image's border, shrink until they are
    # denormal, and rounding keeps them there. A processor takes many times as long for such numbers. As zeros they move
    # no weight either.
    flushed = TINY != 0 and torch.set_flush_denormal(True)
    kernel(weights, grads, m, v, [], steps, **options, amsgrad=False, maximize=False)
    if flushed:
        torch.set_flush_denormal(False)
