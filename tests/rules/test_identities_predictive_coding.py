"""Predictive coding descends its energy; it is BP after one step, and where the variance of the output is large."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from conftest import Problem, errors_of_float32
from torch import Tensor

from nobackprop.core.initializers import Normal, Uniform, initial_weights
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.core.rule import Batch
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.incremental_predictive_coding import IncrementalPredictiveCoding
from nobackprop.rules.predictive_coding import PredictiveCoding
from nobackprop.training.diagnostics import angle

CARRIED_OR_NOT = pytest.mark.parametrize("form", ["states", "subtracted"])


def _grads(rule: PredictiveCoding, problem: Problem, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rule's gradients with the factor that those of all forms but one have."""
    grads = rule.grads(problem.net, w, problem.batch)[0]
    return {name: rule.variance * g for name, g in grads.items()} if rule.form == "subtracted" else grads


def _layers(problem: Problem, grads: dict[str, Tensor], l: int) -> Tensor:
    return torch.cat([grads[f"W{l}"].flatten(), grads[f"b{l}"]])


def _energy(rule: PredictiveCoding, problem: Problem, w: Mapping[str, Tensor], x: Sequence[Tensor]) -> Tensor:
    """The sum over samples, of these states of the hidden layers."""
    net, h, E = problem.net, problem.batch.x, torch.zeros((), dtype=torch.float64)
    for l, state in enumerate(x, start=1):
        E = E + (state - net.preactivation(l, w, h)).square().sum() / 2
        h = net.activation.f(state)
    return E + problem.batch.loss.value(net.preactivation(net.L, w, h), problem.batch.y).sum() / rule.variance


def _of_weights(
    rule: PredictiveCoding, problem: Problem, w: dict[str, Tensor], x: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradient of the mean energy of resting states, times the variance."""
    w = {name: t.detach().requires_grad_() for name, t in w.items()}
    E = _energy(rule, problem, w, [t.detach() for t in x]) / len(problem.batch.x)
    return dict(zip(w, torch.autograd.grad(rule.variance * E, list(w.values())), strict=True))


@CARRIED_OR_NOT
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_the_states_descend_the_energy(problem: Problem, name: str, form: Any) -> None:
    problem = problem.activated(name)
    rule = PredictiveCoding(steps=5, rate=0.3, variance=2.0, form=form)
    w = problem.weights(rule)
    z, _ = problem.net.forward(w, problem.batch.x)
    x = [t.requires_grad_() for t in z[1 : problem.net.L]]
    for _ in range(rule.steps if x and rule.steps else 0):
        slopes = torch.autograd.grad(_energy(rule, problem, w, x), x)
        x = [(t - rule.rate * slope).detach().requires_grad_() for t, slope in zip(x, slopes, strict=True)]
    torch.testing.assert_close(_grads(rule, problem, w), _of_weights(rule, problem, w, x))
    torch.testing.assert_close(rule.grads(problem.net, w, problem.batch)[1], z[problem.net.L].detach())


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_the_errors_descend_the_energy(problem: Problem, name: str) -> None:
    net, rule = problem.activated(name).net, PredictiveCoding(steps=5, rate=0.3, variance=2.0, form="errors")
    problem = replace(problem, net=net)
    w = problem.weights(rule)

    def states(errors: Sequence[Tensor]) -> list[Tensor]:
        h, x = problem.batch.x, []
        for l, error in enumerate(errors, start=1):
            x.append(net.preactivation(l, w, h) + error)
            h = net.activation.f(x[-1])
        return x

    z, _ = net.forward(w, problem.batch.x)
    errors = [torch.zeros_like(t).requires_grad_() for t in z[1 : net.L]]
    for _ in range(rule.steps if errors and rule.steps else 0):
        slopes = torch.autograd.grad(_energy(rule, problem, w, states(errors)), errors)
        errors = [(t - rule.rate * slope).detach().requires_grad_() for t, slope in zip(errors, slopes, strict=True)]
    torch.testing.assert_close(_grads(rule, problem, w), _of_weights(rule, problem, w, states(errors)))


def test_errors_come_to_rest_where_the_states_do(problem: Problem) -> None:
    w = {name: 0.3 * t for name, t in problem.weights(BP()).items()}
    states = PredictiveCoding(steps=400, rate=0.3, variance=2.0)
    errors = PredictiveCoding(steps=100, rate=0.3, variance=2.0, form="errors")
    torch.testing.assert_close(_grads(errors, problem, w), _grads(states, problem, w))


@CARRIED_OR_NOT
def test_one_step_from_the_forward_pass_is_bp_in_the_layer_below_the_output(problem: Problem, form: Any) -> None:
    rule = PredictiveCoding(steps=1, rate=0.5, variance=1.0, form=form)
    w = problem.weights(rule)
    grads, expected = _grads(rule, problem, w), BP().grads(problem.net, w, problem.batch)[0]
    for l in range(1, problem.net.L):
        share = 0.5 if l == problem.net.L - 1 else 0.0
        torch.testing.assert_close(_layers(problem, grads, l), share * _layers(problem, expected, l))


@pytest.mark.parametrize("form", ["states", "errors", "subtracted"])
def test_predictive_coding_tends_to_bp_as_the_variance_of_the_output_grows(problem: Problem, form: Any) -> None:
    w = {name: 0.3 * t for name, t in problem.weights(BP()).items()}  # larger ones take more and smaller steps
    expected = BP().grads(problem.net, w, problem.batch)[0]

    def distance(variance: float) -> float:
        grads = _grads(PredictiveCoding(steps=100, rate=0.5, variance=variance, form=form), problem, w)
        return max(float((grads[name] - g).norm() / g.norm()) for name, g in expected.items())

    assert distance(1e6) < 1e-5
    if problem.net.L > 1:
        assert 50 < distance(1e3) / distance(1e5) < 200
    if form != "subtracted":
        assert distance(1e12) < 1e-9  # nothing cancels


@pytest.mark.parametrize("name", ["tanh", "relu"])
@pytest.mark.parametrize("form", ["states", "errors", "subtracted"])
def test_with_fixed_predictions_one_step_a_hidden_layer_gives_bp(problem: Problem, name: str, form: Any) -> None:
    problem = problem.activated(name)
    steps = 1 if form == "errors" else max(1, problem.net.L - 1)  # for all layers
    rule = PredictiveCoding(steps=steps, rate=1, variance=2.0, fixed_prediction=True, form=form)
    w = problem.weights(rule)
    expected, forward = BP().grads(problem.net, w, problem.batch)
    torch.testing.assert_close(_grads(rule, problem, w), expected)
    torch.testing.assert_close(rule.grads(problem.net, w, problem.batch)[1], forward)


def test_mupc_is_predictive_coding_of_scaled_weights(problem: Problem) -> None:
    net, plain, rule = problem.net, PredictiveCoding(steps=3), PredictiveCoding(steps=3, scaling="mupc")
    w = problem.weights(rule)
    factor = {f"W{l}": prod(net.weight_shape(l)[1:]) ** (-0.5 if l < net.L else -1.0) for l in range(1, net.L + 1)}
    scaled = {name: factor.get(name, 1.0) * t for name, t in w.items()}
    expected = {name: factor.get(name, 1.0) * g for name, g in _grads(plain, problem, scaled).items()}
    torch.testing.assert_close(_grads(rule, problem, w), expected)
    torch.testing.assert_close(rule.logits(net, w, problem.batch.x), net.logits(scaled, problem.batch.x))


def _deep(width: int, depth: int, name: str, std: float | None = None) -> tuple[Problem, dict[str, Tensor]]:
    loss, generator = SoftmaxCrossEntropy(4), torch.Generator().manual_seed(0)
    net = mlp((20,), 4, hidden=[width] * depth, activation=name)
    start = Uniform() if std is None else Normal(std)
    w = {n: t.double() for n, t in initial_weights(net, BP(), start, start, 0).items()}
    x = torch.randn(6, 20, generator=generator).double()
    return Problem(net, Batch(x, loss.target(torch.arange(6) % 4, x.dtype), loss)), w


@pytest.mark.parametrize("depth", [3, 8])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("form", ["states", "errors"])
def test_predictive_coding_in_float32_has_float64s_gradients(name: str, depth: int, form: Any) -> None:
    rule = PredictiveCoding(form=form)
    problem, w = _deep(32, depth, name)
    assert max(errors_of_float32(rule, rule, problem, w)) < 1e-4
    subtracted = replace(rule, form="subtracted")
    assert max(errors_of_float32(subtracted, subtracted, problem, w)) > 1e-3


@pytest.mark.parametrize(("depth", "degrees"), [(2, 10), (8, 30)])
@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("std", [None, 0.14], ids=["U1", "N0.14"])  # at this width as N0.05 is at 256 units
@pytest.mark.parametrize("form", ["states", "errors"])
def test_by_default_updates_follow_the_gradient(
    depth: int, degrees: float, name: str, std: float | None, form: Any
) -> None:
    problem, w = _deep(32, depth, name, std)
    grads, expected = _grads(PredictiveCoding(form=form), problem, w), BP().grads(problem.net, w, problem.batch)[0]
    assert max(float(angle(grads[name], g)) for name, g in expected.items() if name.startswith("W")) < degrees


def test_incremental_predictive_coding_at_rate_0_moves_the_output_alone(problem: Problem) -> None:
    """At first the output's error alone is not 0, and its gradient is backpropagation's; states stay."""
    rule, net, w = IncrementalPredictiveCoding(rate=0.0, steps=2), problem.net, problem.weights(BP())
    expected, _ = BP().grads(net, w, problem.batch)
    given, _ = rule.step(0, net, w, problem.batch)
    grads, batch = problem.batch.after(given, w)
    output = {f"{letter}{net.L}" for letter in "Wb"}
    torch.testing.assert_close(grads, {name: expected[name] for name in output})
    z, _ = net.forward(w, problem.batch.x)
    assert batch.noise.keys() == {"logits"} | {f"x{l}" for l in range(1, net.L)}
    for l in range(1, net.L):
        torch.testing.assert_close(batch.noise[f"x{l}"], z[l])
    again, _ = problem.batch.after(rule.step(1, net, w, batch)[0], w)
    torch.testing.assert_close(again, {name: grads.get(name, torch.zeros_like(g)) for name, g in again.items()})


def test_incremental_predictive_coding_at_fixed_weights_relaxes_as_predictive_coding(problem: Problem) -> None:
    steps, net = 7, problem.net
    rule, w = IncrementalPredictiveCoding(rate=0.2, steps=steps + 1), problem.weights(BP())
    found, _ = rule.all_grads(net, w, problem.batch)
    relaxed = PredictiveCoding(form="subtracted", steps=steps, rate=0.2, variance=1.0)
    torch.testing.assert_close(found, relaxed.grads(net, w, problem.batch)[0])


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("rate", -0.1), ("rate", 2)])
def test_incremental_predictive_coding_tells_settings_that_make_no_sense(key: str, value: Any) -> None:
    with pytest.raises(Mistake, match=f"rule.{key} is {value}"):
        IncrementalPredictiveCoding(**{key: value})
