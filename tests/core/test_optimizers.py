"""The original programs' optimizers against the same formulas written in numpy, the others against torch's."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nobackprop.core.optimizers import Adam, AdamW, MemorylessAdamW, RMSprop, SignSGD, TFAdam, TFRMSprop

STEPS = 6
SHAPES = [(3, 4), (2, 3, 3, 3), (5,)]


def _numpy_rmsprop(w: np.ndarray, grads: np.ndarray, lr: float, decay: float, eps: float) -> np.ndarray:
    mean_square = np.ones_like(w)
    for g in grads:
        mean_square = decay * mean_square + (1 - decay) * g**2
        w = w - lr * g / np.sqrt(mean_square + eps)
    return w


def _numpy_adam(w: np.ndarray, grads: np.ndarray, lr: float, beta1: float, beta2: float, eps: float) -> np.ndarray:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * np.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (np.sqrt(v) + eps)
    return w


def _numpy_sign(w: np.ndarray, grads: np.ndarray, lr: float) -> np.ndarray:
    for g in grads:
        w = w - lr * np.sign(g)
    return w


def _numpy_first_adamw_steps(
    w: np.ndarray, grads: np.ndarray, lr: float, beta2: float, eps: float, weight_decay: float
) -> np.ndarray:
    """Keras' AdamW at t = 1 with new moments, over and over."""
    beta1 = 0.9
    for g in grads:
        w = w - lr * weight_decay * w
        m, v = (1 - beta1) * g, (1 - beta2) * g**2
        w = w - lr * np.sqrt(1 - beta2) / (1 - beta1) * m / (np.sqrt(v) + eps)
    return w


KERAS = {"lr": 1e-3, "beta2": 0.999, "eps": 1e-7, "weight_decay": 0.004}
CASES = [
    pytest.param(TFRMSprop, _numpy_rmsprop, {"lr": 1e-4, "decay": 0.9, "eps": 1e-10}, id="rmsprop_defaults"),
    pytest.param(TFRMSprop, _numpy_rmsprop, {"lr": 0.03, "decay": 0.5, "eps": 0.1}, id="rmsprop"),
    pytest.param(TFAdam, _numpy_adam, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}, id="adam_defaults"),
    pytest.param(TFAdam, _numpy_adam, {"lr": 0.03, "beta1": 0.6, "beta2": 0.8, "eps": 0.1}, id="adam"),
    pytest.param(SignSGD, _numpy_sign, {"lr": 1e-4}, id="sign_defaults"),
    pytest.param(SignSGD, _numpy_sign, {"lr": 0.1}, id="sign"),
    pytest.param(MemorylessAdamW, _numpy_first_adamw_steps, KERAS, id="memoryless_defaults"),
    pytest.param(
        MemorylessAdamW,
        _numpy_first_adamw_steps,
        {"lr": 0.03, "beta2": 0.8, "eps": 0.1, "weight_decay": 0.5},
        id="memoryless",
    ),
]
OPTIMIZERS = pytest.mark.parametrize("optimizer", [Adam, AdamW, RMSprop, TFRMSprop, TFAdam, SignSGD, MemorylessAdamW])


@pytest.fixture
def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator), requires_grad=False) for s in SHAPES]


@pytest.fixture
def grads() -> list[list[Tensor]]:
    """A gradient of each weight for each step, of sizes 0.001 to 10."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 1, STEPS, dtype=torch.float64)
    return [[size * torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES] for size in sizes]


def _run(optimizer: Optimizer, weights: list[nn.Parameter], grads: list[list[Tensor]]) -> None:
    for step_grads in grads:
        for p, g in zip(weights, step_grads, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize(("optimizer", "formula", "options"), CASES)
def test_steps_follow_the_formula(optimizer, formula, options, weights, grads) -> None:
    starts = [p.detach().numpy().copy() for p in weights]
    _run(optimizer(weights, **options), weights, grads)
    for i, (p, start) in enumerate(zip(weights, starts, strict=True)):
        expected = formula(start, np.stack([g[i].numpy() for g in grads]), **options)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (partial(Adam, betas=[0.8, 0.95]), partial(torch.optim.Adam, betas=(0.8, 0.95), fused=True)),
        (partial(Adam, weight_decay=0.1), partial(torch.optim.Adam, weight_decay=0.1, fused=True)),
        (AdamW, partial(torch.optim.AdamW, fused=True)),
        (partial(AdamW, eps=0.1), partial(torch.optim.AdamW, eps=0.1, fused=True)),
        (partial(RMSprop, lr=0.01, eps=0.1), partial(torch.optim.RMSprop, lr=0.01, alpha=0.9, eps=0.1)),
    ],
)
def test_steps_are_torchs_also_after_a_step_without_a_gradient(ours, theirs, weights, grads) -> None:
    results = []
    for optimizer in (ours, theirs):
        copies = [nn.Parameter(p.clone(), requires_grad=False) for p in weights]
        stepper = optimizer(copies)
        for i, step_grads in enumerate(grads):
            for j, (p, g) in enumerate(zip(copies, step_grads, strict=True)):
                p.grad = None if (i, j) == (2, 1) else g.clone()
            stepper.step()
        results.append(copies)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("optimizer", "options"), [(case.values[0], case.values[2]) for case in CASES[::2]])
def test_defaults(optimizer, options, weights) -> None:
    assert options.items() <= optimizer(weights).defaults.items()


@OPTIMIZERS
def test_a_loaded_state_goes_on_identically(optimizer, weights, grads, tmp_path: Path) -> None:
    straight = optimizer(weights, lr=0.01)
    _run(straight, weights, grads[:3])
    torch.save({"optimizer": straight.state_dict(), "weights": weights}, tmp_path / "state.pt")
    _run(straight, weights, grads[3:])

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = optimizer(saved["weights"], lr=99.0)
    resumed.load_state_dict(saved["optimizer"])
    _run(resumed, saved["weights"], grads[3:])
    assert all(torch.equal(a, b) for a, b in zip(saved["weights"], weights, strict=True))


@OPTIMIZERS
def test_a_weight_without_a_gradient_is_left_alone(optimizer, weights, grads) -> None:
    before = [p.clone() for p in weights]
    opt = optimizer(weights, lr=0.01)
    weights[0].grad, weights[2].grad = grads[0][0], grads[0][2]
    opt.step()
    assert [torch.equal(p, b) for p, b in zip(weights, before, strict=True)] == [False, True, False]
    assert weights[1] not in opt.state


@OPTIMIZERS
def test_groups_have_rates_of_their_own(optimizer, weights, grads) -> None:
    alone = [nn.Parameter(p.clone(), requires_grad=False) for p in weights]
    _run(optimizer([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], lr=0.01), weights, grads)
    for p, lr, single in zip(alone, (0.1, 0.01, 0.01), range(3), strict=True):
        _run(optimizer([p], lr=lr), [p], [[g[single]] for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(alone, weights, strict=True))


@OPTIMIZERS
def test_a_weight_without_any_step_yet_can_be_saved(optimizer, weights) -> None:
    opt = optimizer(weights)
    opt.step()  # no gradient anywhere
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
