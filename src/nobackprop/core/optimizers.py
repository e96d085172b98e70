"""Optimizers: torch's Adam, AdamW and RMSprop with less overhead, and those of the two original programs.

On nets of this size torch's own classes spend as long around the fused kernel as in it.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nobackprop.mistakes import Mistake

TINY = 5e-324  # equals 0 where denormal numbers are flushed to zero


class Prepared(Optimizer):
    """Steps all weights that have a gradient at once, through torch's `_foreach` operations or a fused kernel."""

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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.prepared()()

    def prepared(self) -> Callable[[], None]:
        """What `step` does, but for torch's hooks, as long as the same weights have the same tensors as gradients.

        Whatever can be found out beforehand is; rates are read at each call. Loading a state ends it.
        """
        updates = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                updates.append(self._prepared(group, weights, [p.grad for p in weights]))
        return _in_turn(updates)

    def _prepared(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
        """The step of a group's weights with these gradients."""
        return partial(self._update, group, weights, grads)

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _slot(self, weights: list[Tensor], name: str, start: float) -> list[Tensor]:
        """One state tensor a weight, filled with `start` the first time."""
        states = [self.state[p] for p in weights]
        for p, state in zip(weights, states, strict=True):
            if name not in state:
                state[name] = torch.full_like(p, start, memory_format=torch.preserve_format)
        return [state[name] for state in states]


class Adam(Prepared):
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

    def _prepared(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
        m, v = self._slot(weights, "exp_avg", 0.0), self._slot(weights, "exp_avg_sq", 0.0)
        states = [self.state[p] for p in weights]
        done = [state.get("step", 0) for state in states]
        if len(set(done)) > 1:  # weights that had no gradient at some step
            return _in_turn([self._prepared(group, [p], [g]) for p, g in zip(weights, grads, strict=True)])
        kernel = _adam(self.kernel, weights, grads, m, v)

        def update() -> None:
            step = states[0].get("step", 0) + 1
            for state in states:
                state["step"] = step
            kernel(step, group["lr"], group["betas"], group["eps"], group["weight_decay"])

        return update


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


class RMSprop(Prepared):
    """Tieleman & Hinton, 2012, as torch computes it.

    s = decay * s + (1 - decay) * g^2,   w = w - lr * g / (sqrt(s) + eps)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.9, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    def _prepared(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
        root_step = self._root_step(weights, grads, self._slot(weights, "mean_square", 0.0))
        return lambda: root_step(group["lr"], group["decay"], group["eps"])

    @staticmethod
    def _root_step(
        weights: list[Tensor], grads: list[Tensor], mean_square: list[Tensor]
    ) -> Callable[[float, float, float], None]:
        # Adam without a first moment (beta1 = 0: the gradient itself) and past its bias correction is RMSprop.
        kernel = _adam(torch._fused_adam_, weights, grads, grads, mean_square)
        return lambda lr, decay, eps: kernel(inf, lr, (0.0, decay), eps, 0.0)


class TFRMSprop(RMSprop):
    """RMSProp as TensorFlow 1 computes it: epsilon under the root, and a mean square that starts at 1 (torch: 0).

    s = decay * s + (1 - decay) * g^2,   w = w - lr * g / sqrt(s + eps)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.9, eps: float = 1e-10) -> None:
        if decay == 0:
            raise Mistake("decay is 0: it must be above 0, since the mean square keeps epsilon from step to step")
        super().__init__(params, lr, decay, eps)

    def _prepared(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
        shifted = self._slot(weights, "mean_square_plus_eps", 1.0 + group["eps"])
        root_step = self._root_step(weights, grads, shifted)

        def update() -> None:
            torch._foreach_add_(shifted, (1 / group["decay"] - 1) * group["eps"])  # so that it decays to eps, not to 0
            root_step(group["lr"], group["decay"], 0.0)

        return update


class SignSGD(Prepared):
    """`w = w - lr * sign(g)` (Bernstein et al., 2018), which the mDFA program holds but gives no way to choose."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_add_(weights, torch._foreach_sign(grads), alpha=-group["lr"])


class MemorylessAdamW(Prepared):
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


class TFAdam(Prepared):
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


def _in_turn(updates: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def all_of_them() -> None:
        for update in updates:
            update()

    return updates[0] if len(updates) == 1 else all_of_them


def _adam(
    kernel: Callable[..., None], weights: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor]
) -> Callable[[float, float, tuple[float, float], float, float], None]:
    """The kernel's call for a step (counted from 1), lr, betas, eps and weight decay."""
    at = torch.zeros((), dtype=torch.float32, device=weights[0].device)
    steps = [at] * len(weights)
    # The kernel takes three times as long over matrices that lie transposed in memory, as the learner's do.
    turned = [p.ndim > 1 and not p.is_contiguous() and p.mT.is_contiguous() for p in weights]
    if any(turned):
        every = (weights, grads, m, v)
        weights, grads, m, v = ([t.mT if turn else t for t, turn in zip(e, turned, strict=True)] for e in every)

    def call(step: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        at.fill_(step)
        # Averages of gradients that are 0 from some step on, as of pixels at an image's border, shrink until they are
        # denormal, and rounding keeps them there. A processor takes many times as long for such numbers. As zeros they
        # move no weight either.
        flushed = TINY != 0 and torch.set_flush_denormal(True)
        try:
            kernel(
                weights,
                grads,
                m,
                v,
                [],
                steps,
                lr=lr,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )
        finally:
            if flushed:
                torch.set_flush_denormal(False)

    return call
