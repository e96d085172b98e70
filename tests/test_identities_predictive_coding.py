"""Predictive coding descends its energy; it is BP after one step, and where the variance of the output is large."""

import pytest
import torch
from conftest import Problem
from torch import Tensor

from nobackprop.rules.bp import BP
from nobackprop.rules.predictive_coding import PredictiveCoding


def _layers(problem: Problem, grads: dict[str, Tensor], l: int) -> Tensor:
    return torch.cat([grads[f"W{l}"].flatten(), grads[f"b{l}"]])


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_predictive_coding_descends_the_energy(problem: Problem, name: str) -> None:
    net, batch = problem.activated(name).net, problem.batch
    rule = PredictiveCoding(steps=5, rate=0.3, variance=2.0)
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    x, _ = net.forward(w, batch.x)
    hidden = [t.detach().requires_grad_() for t in x[1 : net.L]]

    def energy() -> Tensor:
        h, E = batch.x, torch.zeros((), dtype=torch.float64)
        for l, state in enumerate(hidden, start=1):
            E = E + (state - net.preactivation(l, w, h)).square().sum() / 2
            h = net.activation.f(state)
        return E + batch.loss.value(net.preactivation(net.L, w, h), batch.y).sum() / rule.variance

    for _ in range(rule.steps if hidden else 0):
        slopes = torch.autograd.grad(energy(), hidden)
        hidden = [(t - rule.rate * slope).detach().requires_grad_() for t, slope in zip(hidden, slopes, strict=True)]
    expected = dict(zip(w, torch.autograd.grad(energy() / len(batch.x), list(w.values())), strict=True))
    grads, logits = rule.grads(net, {name: t.detach() for name, t in w.items()}, batch)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(logits, x[net.L].detach())


def test_one_step_from_the_forward_pass_is_bp_in_the_layer_below_the_output(problem: Problem) -> None:
    net = problem.net
    rule = PredictiveCoding(steps=1, rate=0.5)
    w = problem.weights(rule)
    grads, expected = rule.grads(net, w, problem.batch)[0], BP().grads(net, w, problem.batch)[0]
    for l in range(1, net.L):
        share = 0.5 if l == net.L - 1 else 0.0
        torch.testing.assert_close(_layers(problem, grads, l), share * _layers(problem, expected, l))


def test_predictive_coding_tends_to_bp_as_the_variance_of_the_output_grows(problem: Problem) -> None:
    w = {name: 0.3 * t for name, t in problem.weights(BP()).items()}  # larger ones take more and smaller steps
    expected = BP().grads(problem.net, w, problem.batch)[0]

    def distance(variance: float) -> float:
        grads = PredictiveCoding(steps=100, rate=0.5, variance=variance).grads(problem.net, w, problem.batch)[0]
        return max(float((variance * grads[name] - g).norm() / g.norm()) for name, g in expected.items())

    assert distance(1e6) < 1e-5
    if problem.net.L > 1:
        assert 50 < distance(1e3) / distance(1e5) < 200


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_with_fixed_predictions_one_step_a_hidden_layer_gives_bp(problem: Problem, name: str) -> None:
    net = problem.activated(name).net
    rule = PredictiveCoding(steps=max(1, net.L - 1), rate=1, variance=2.0, fixed_prediction=True)
    w = problem.weights(rule)
    (grads, logits), (expected, forward) = rule.grads(net, w, problem.batch), BP().grads(net, w, problem.batch)
    torch.testing.assert_close({name: 2 * g for name, g in grads.items()}, expected)
    torch.testing.assert_close(logits, forward)
