"""What the rules do whose feedback weights follow W: sign symmetry, Kolen-Pollack, weight mirrors; in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from conftest import Problem
from torch import Tensor

from nobackprop.core.layers import Conv
from nobackprop.core.rule import Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.brsf import BRSF
from nobackprop.rules.fa import FA
from nobackprop.rules.frsf import FRSF
from nobackprop.rules.kolen_pollack import KolenPollack
from nobackprop.rules.usf import USF
from nobackprop.rules.weight_mirror import WeightMirror


def _grads(rule: Rule, problem: Problem, w: dict[str, Tensor]) -> dict[str, Tensor]:
    return rule.grads(problem.net, w, problem.noisy(rule))[0]


def _above_the_first(problem: Problem) -> range:
    return range(2, problem.net.L + 1)


# Sign symmetry


def test_usf_is_bp_times_a_factor_where_all_weights_are_equally_large(problem: Problem) -> None:
    w = problem.weights(USF())
    w |= {f"W{l}": 0.3 * w[f"W{l}"].sign() for l in _above_the_first(problem)}
    grads, expected = _grads(USF(scale=0.6), problem, w), _grads(BP(), problem, w)
    for l in range(1, problem.net.L + 1):
        for name in (f"W{l}", f"b{l}"):
            torch.testing.assert_close(grads[name], expected[name] * 2 ** (problem.net.L - l))


def test_brsf_with_the_magnitudes_of_the_weights_is_bp(problem: Problem) -> None:
    rule, w = BRSF(scale=0.5), problem.weights(BRSF())
    signs = {
        f"B{l}": torch.ones_like(w[f"W{l}"]).bernoulli_(generator=torch.Generator().manual_seed(l))
        for l in _above_the_first(problem)
    }
    noise = {f"B{l}": w[f"W{l}"] / 0.5 * (2 * signs[f"B{l}"] - 1) for l in _above_the_first(problem)}
    assert {name: tuple(t.shape) for name, t in noise.items()} == rule.noise(problem.net, 6)
    grads, _ = rule.grads(problem.net, w, replace(problem.batch, noise=noise))
    torch.testing.assert_close(grads, _grads(BP(), problem, w))


def test_brsfs_magnitudes_are_new_at_every_step_whatever_the_batch(
    problem: Problem, learner: Callable[..., Any]
) -> None:
    net, rule = problem.net, BRSF()
    assert rule.noise(net, 6) == rule.noise(net, 7)
    trained = learner(net, rule, problem.batch.loss, problem.weights(rule), partial(torch.optim.SGD, lr=0.0))
    first, second = [], []
    for grads in (first, second):
        trained.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
        grads.extend(trained.w[f"W{l}"].grad for l in range(1, net.L + 1))
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [False] * (net.L - 1) + [True]


def test_frsf_with_the_magnitudes_of_the_weights_is_bp(problem: Problem) -> None:
    w = problem.weights(FRSF())
    w |= {f"B{l}": w[f"W{l}"] * w[f"B{l}"].sign() for l in _above_the_first(problem)}
    torch.testing.assert_close(_grads(FRSF(), problem, w), _grads(BP(), problem, w))


@pytest.mark.parametrize("rule", [USF(scale=0.5), BRSF(scale=0.5), FRSF()], ids=["usf", "brsf", "frsf"])
def test_the_signs_follow_the_weights_and_fixed_magnitudes_stay(
    rule: USF | BRSF | FRSF, problem: Problem, learner: Callable[..., Any]
) -> None:
    w, batch = problem.weights(rule), problem.noisy(rule)
    trained = learner(problem.net, rule, batch.loss, w, partial(torch.optim.AdamW, lr=0.3, weight_decay=0.1))
    for _ in range(3):
        trained.step(batch.x.unsqueeze(0), batch.y.unsqueeze(0))
    after = {name: p[0] for name, p in trained.w.items()}
    turned = dict(after)
    for l in _above_the_first(problem):
        assert (after[f"W{l}"].sign() != w[f"W{l}"].sign()).any()
        if isinstance(rule, FRSF):
            assert torch.equal(after[f"B{l}"], w[f"B{l}"])
            magnitude = w[f"B{l}"].abs()
        else:
            magnitude = 0.5 * (batch.noise[f"B{l}"].abs() if isinstance(rule, BRSF) else 1)
        turned[f"B{l}"] = magnitude * after[f"W{l}"].sign()
    torch.testing.assert_close(_grads(rule, problem, after), _grads(FA(), problem, turned))


# Kolen-Pollack


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (partial(torch.optim.SGD, lr=0.1), {"l2": 0.2}),
        (partial(torch.optim.SGD, lr=0.1), {"l2": 0.2, "update": "unit_norm"}),
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.2), {}),
    ],
    ids=["sgd", "unit_norm", "adamw"],
)
def test_kolen_pollacks_distance_from_the_weights_decays_exactly(
    problem: Problem, learner: Callable[..., Any], optimizer: Any, options: dict[str, Any]
) -> None:
    w = problem.weights(KolenPollack())
    trained = learner(problem.net, KolenPollack(), problem.batch.loss, w, optimizer, **options)
    for t in range(1, 6):
        trained.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
        for l in _above_the_first(problem):
            distance = trained.w[f"W{l}"][0] - trained.w[f"B{l}"][0]
            torch.testing.assert_close(distance, (1 - 0.1 * 0.2) ** t * (w[f"W{l}"] - w[f"B{l}"]))
    assert all(not torch.equal(trained.w[name][0], t) for name, t in w.items())


def test_kolen_pollack_with_the_weights_themselves_is_and_stays_bp(
    problem: Problem, learner: Callable[..., Any]
) -> None:
    w = problem.weights(KolenPollack())
    w |= {f"B{l}": w[f"W{l}"] for l in _above_the_first(problem)}
    trained = learner(problem.net, KolenPollack(), problem.batch.loss, w, partial(torch.optim.SGD, lr=0.5))
    bp = {name: t for name, t in w.items() if not name.startswith("B")}
    expected = learner(problem.net, BP(), problem.batch.loss, bp, partial(torch.optim.SGD, lr=0.5))
    for _ in range(4):
        for each in (trained, expected):
            each.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
    torch.testing.assert_close({name: trained.w[name][0] for name in bp}, {n: p[0] for n, p in expected.w.items()})


# Weight mirrors


def _mirrored(rule: WeightMirror, problem: Problem, w: dict[str, Tensor], l: int) -> Tensor:
    """The gradient of B[l] on average over the noise: samples whose second moments are those of the noise, exactly."""
    shapes = rule.noise(problem.net, n := prod(problem.net.shapes[l - 1]))
    noise = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    noise[f"h{l - 1}"] = n**0.5 * torch.eye(n, dtype=torch.float64).view(shapes[f"h{l - 1}"])
    return rule.mirror(problem.net, w, replace(problem.batch, noise=noise))[0][f"B{l}"]


def _seen(problem: Problem, l: int) -> Tensor | float:
    """Of each tap of layer l's kernels, at which share of all positions it sees units and not padding."""
    layer = problem.net.layers[l - 1]
    if not isinstance(layer, Conv):
        return 1.0

    def along(size: int) -> Tensor:
        places = range(-layer.padding, size + layer.padding - layer.kernel + 1, layer.stride)
        inside = [[0 <= place + tap < size for place in places] for tap in range(layer.kernel)]
        return torch.tensor(inside, dtype=torch.float64).mean(1)

    _, height, width = problem.net.shapes[l - 1]
    return torch.outer(along(height), along(width))


@pytest.mark.parametrize(("name", "sigma"), [("identity", 0.7), ("tanh", 1e-4)])
def test_mirrors_move_to_the_weights_on_average(problem: Problem, name: str, sigma: float) -> None:
    problem = problem.activated(name)
    rule = WeightMirror(sigma=sigma, decay=0.3)
    w = problem.weights(rule)
    for l in _above_the_first(problem):
        moved = 0.3 * w[f"B{l}"] - _mirrored(rule, problem, w, l)
        torch.testing.assert_close(moved / sigma**2, _seen(problem, l) * w[f"W{l}"], rtol=1e-6, atol=1e-7)


def test_a_mirror_that_is_the_weights_stays(problem: Problem) -> None:
    problem = problem.activated("identity")
    rule = WeightMirror(sigma=0.7, decay=0.49)
    w = problem.weights(rule)
    w |= {f"B{l}": w[f"W{l}"] for l in _above_the_first(problem)}
    for l in _above_the_first(problem):
        if not getattr(problem.net.layers[l - 1], "padding", 0):
            torch.testing.assert_close(_mirrored(rule, problem, w, l), torch.zeros_like(w[f"B{l}"]))
    torch.testing.assert_close(_grads(rule, problem, w), _grads(BP(), problem, w))


def test_mirrors_answer_through_the_activation_but_for_the_outputs(problem: Problem) -> None:
    problem = problem.activated("sign")
    rule, net = WeightMirror(sigma=2.0, decay=0.0), problem.net
    w, batch = problem.weights(rule), problem.noisy(rule)
    g, _ = rule.mirror(net, w, batch)
    assert g.keys() == {f"B{l}" for l in _above_the_first(problem)}
    if net.L == 4:  # dense
        for l in (2, 3, 4):
            noise = batch.noise[f"h{l - 1}"]
            answer = noise @ w[f"W{l}"].T
            answer = 2 * answer if l == 4 else answer.sign()
            torch.testing.assert_close(g[f"B{l}"], -2 * answer.T @ noise / 6)
