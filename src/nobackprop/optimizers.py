"""Optimizers of the two original programs that torch does not have, or computes differently."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _ForeachOptimizer(Optimizer):
    """Steps all weights that have a gradient at once, through torch's `_foreach` operations."""

    def __init__(self, params: Iterable[Tensor], defaults: dict[str, Any]) -> None:
        if defaults["lr"] < 0:
            raise ValueError(f"Invalid learning rate: {defaults['lr']}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(group, weights, [p.grad for p in weights])

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _slot(self, weights: list[Tensor], name: str, start: float) -> list[Tensor]:
        """One state tensor a weight, filled with `start` the first time."""
        for p in weights:
            if name not in self.state[p]:
                self.state[p][name] = torch.full_like(p, start, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in weights]


class TFRMSprop(_ForeachOptimizer):
    """RMSProp as TensorFlow 1 computes it: epsilon under the root, and a mean square that starts at 1 (torch: 0).

    s = decay * s + (1 - decay) * g^2,   w = w - lr * g / sqrt(s + eps)
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, decay: float = 0.9, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        mean_square = self._slot(weights, "mean_square", 1.0)
        torch._foreach_mul_(mean_square, group["decay"])
        torch._foreach_addcmul_(mean_square, grads, grads, 1 - group["decay"])
        root = torch._foreach_add(mean_square, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_addcdiv_(weights, grads, root, -group["lr"])


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
