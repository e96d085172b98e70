"""What difference target propagation and equilibrium propagation compute, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Problem, errors_of_float32
from torch import Tensor

from nobackprop.core.activations import ACTIVATIONS
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import Network, mlp
from nobackprop.core.rule import Batch, Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.dtp import DTP
from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation


def _grads(rule: Rule, problem: Problem, w: dict[str, Tensor], batch: Batch | None = None) -> dict[str, Tensor]:
    return rule.grads(problem.net, w, batch or problem.noisy(rule))[0]


# Difference target propagation


def _decoder(net: Network, w: dict[str, Tensor], l: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda u: net.activation.f(net.feedback(l, w[f"Q{l}"], u, like))


def test_dtps_decoders_descend_their_reconstruction_loss(problem: Problem) -> None:
    rule, net = DTP(sigma=0.3), problem.net
    w, batch = problem.weights(rule), problem.noisy(rule)
    _, h = net.forward(w, batch.x)
    grads = _grads(rule, problem, w, batch)
    assert {name for name in grads if name.startswith("Q")} == {f"Q{l}" for l in range(2, net.L)}
    for l in range(2, net.L):
        Q = w[f"Q{l}"].clone().requires_grad_()
        n = h[l - 1] + 0.3 * batch.noise[f"h{l - 1}"]
        u = net.activation.f(net.layers[l - 1].forward(w[f"W{l}"], w[f"b{l}"], n))
        r = _decoder(net, {f"Q{l}": Q}, l, n)(u)
        (expected,) = torch.autograd.grad((r - n).square().flatten(1).sum(1).mean(), Q)
        torch.testing.assert_close(grads[f"Q{l}"], expected)


def test_dtps_last_two_layers_learn_as_under_bp(problem: Problem) -> None:
    rule, L = DTP(eta=0.3), problem.net.L
    w = problem.weights(rule)
    grads, expected = _grads(rule, problem, w), _grads(BP(), problem, w)
    for letter in "Wb":
        torch.testing.assert_close(grads[f"{letter}{L}"], expected[f"{letter}{L}"])
        if L > 1:  # the first target is a step of eta down the loss
            torch.testing.assert_close(grads[f"{letter}{L - 1}"], 2 * 0.3 * expected[f"{letter}{L - 1}"])


def test_dtps_small_steps_go_down_through_the_decoders_jacobians(problem: Problem) -> None:
    rule, net = DTP(eta=1e-6), problem.net
    w, batch = problem.weights(rule), problem.noisy(rule)
    z, h = net.forward(w, batch.x)
    grads = _grads(rule, problem, w, batch)
    step = -net.feedback(net.L, w[f"W{net.L}"], batch.error(z[net.L]), h[-1])
    for l in range(net.L - 1, 0, -1):
        expected = net.hebbian(l, h[l - 1], -2 * step * net.df(l, z[l], h[l]))
        for name, g in expected.items():
            torch.testing.assert_close(grads[name] / 1e-6, g, rtol=1e-4, atol=1e-7)
        if l > 1:
            step = torch.autograd.functional.jvp(_decoder(net, w, l, h[l - 1]), h[l], step)[1]
            assert isinstance(step, Tensor)


def test_dtps_targets_through_exact_inverses_are_gauss_newtons() -> None:
    """Square linear layers: the targets move layer l by the inverse, not the transpose, of the weights above it."""
    rule, loss = DTP(eta=0.3), SoftmaxCrossEntropy(4)
    problem = Problem(mlp((5,), 4, hidden=[5, 5, 5], activation="identity"), _batch(5, loss))
    net, batch = problem.net, problem.noisy(rule)
    w = problem.weights(rule)
    w |= {f"Q{l}": torch.linalg.inv(w[f"W{l}"]).T.contiguous() for l in (2, 3)}
    z, h = net.forward(w, batch.x)
    to_the_last = torch.eye(5, dtype=torch.float64)  # the Jacobian of the last hidden layer by layer l
    biases = {name: torch.zeros_like(t) if name.startswith("b") else t for name, t in w.items()}
    unbiased, grads = _grads(rule, problem, biases, batch), _grads(rule, problem, w, batch)
    for l in (3, 2, 1):
        d = 2 * 0.3 * torch.linalg.solve(to_the_last, (batch.error(z[4]) @ w["W4"]).T).T
        torch.testing.assert_close({n: grads[n] for n in (f"W{l}", f"b{l}")}, net.hebbian(l, h[l - 1], d))
        to_the_last = to_the_last @ w[f"W{l}"]
    for l in (2, 3):  # nothing is left to learn for a decoder that is exact, which without biases it is
        torch.testing.assert_close(unbiased[f"Q{l}"], torch.zeros_like(w[f"Q{l}"]))
    assert grads["Q2"].norm() > 0.1


def _batch(inputs: int, loss: Any) -> Batch:
    x = torch.randn(6, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch(x, loss.target(torch.arange(6) % loss.classes, x.dtype), loss)


# Equilibrium propagation

LONG = EquilibriumPropagation(free_steps=100, nudged_steps=100, epsilon=0.5)
PLAIN = replace(LONG, difference="plain")


def _small(problem: Problem) -> dict[str, Tensor]:
    """Weights under which the units come to rest."""
    return {name: 0.2 * t for name, t in problem.weights(LONG).items()}


def _at_rest(rule: Rule, problem: Problem, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the prediction's loss by autograd through the whole relaxation."""
    w = {name: t.clone().requires_grad_() for name, t in w.items()}
    loss = problem.batch.loss.value(rule.logits(problem.net, w, problem.batch.x), problem.batch.y).mean()
    return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def _distance(
    beta: float,
    problem: Problem,
    w: dict[str, Tensor],
    expected: dict[str, Tensor],
    rule: EquilibriumPropagation = LONG,
) -> float:
    grads = _grads(replace(rule, beta=beta), problem, w)
    return max(float((grads[name] - g).norm() / g.norm()) for name, g in expected.items())


@pytest.mark.parametrize("rule", [LONG, PLAIN], ids=["exact", "plain"])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softsign"])
def test_equilibrium_propagation_tends_to_the_gradient_of_the_loss_at_equilibrium(
    problem: Problem, name: str, rule: EquilibriumPropagation
) -> None:
    problem = problem.activated(name)
    w = _small(problem)
    expected = _at_rest(LONG, problem, w)
    coarse, fine = (_distance(beta, problem, w, expected, rule) for beta in (0.1, 0.01))
    assert fine < 1e-3
    assert fine < 0.02 * coarse + 1e-9  # a linear net has the gradient itself
    if rule is LONG:
        assert _distance(1e-9, problem, w, expected) < 1e-8  # nothing cancels


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_difference_of_the_nudged_states_is_that_of_subtracting_them(problem: Problem, name: str) -> None:
    problem = problem.activated(name)
    short = EquilibriumPropagation(beta=0.5, free_steps=2, nudged_steps=3)  # far from rest, which both have in common
    w = problem.weights(short)
    exact, plain = _grads(short, problem, w), _grads(replace(short, difference="plain"), problem, w)
    top = {f"{letter}{problem.net.L}" for letter in "Wb"}
    torch.testing.assert_close(*({n: t for n, t in g.items() if n not in top} for g in (exact, plain)))
    prediction = problem.net.preactivation(problem.net.L, w, (h := short._free(problem.net, w, problem.batch.x))[-1])
    expected = problem.net.hebbian(problem.net.L, h[-1], problem.batch.error(prediction))
    torch.testing.assert_close({name: exact[name] for name in top}, expected)


@pytest.mark.parametrize("depth", [3, 8])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "hard_sigmoid"])
def test_equilibrium_propagation_in_float32_has_float64s_gradients(name: str, depth: int) -> None:
    rule = EquilibriumPropagation()
    problem = Problem(mlp((20,), 4, hidden=[32] * depth, activation=name), _batch(20, SoftmaxCrossEntropy(4)))
    w = {name: 0.2 * t for name, t in problem.weights(rule).items()}
    assert max(errors_of_float32(rule, rule, problem, w)) < 1e-4
    assert max(errors_of_float32(replace(rule, difference="plain"), rule, problem, w)) > 0.01


def test_steps_left_to_the_depth_are_ten_a_hidden_layer_and_bring_the_states_to_rest(problem: Problem) -> None:
    rule, hidden = EquilibriumPropagation(), problem.net.L - 1
    w = _small(problem)
    explicit = replace(rule, free_steps=10 * hidden, nudged_steps=max(1, 10 * hidden))
    torch.testing.assert_close(_grads(rule, problem, w), _grads(explicit, problem, w), rtol=0, atol=0)
    names = {f"unrest/h{l}" for l in range(1, problem.net.L)}
    found = [replace(rule, free_steps=n).measured(problem.net, w, problem.batch) for n in (0, None, 200)]
    assert all(each.keys() == names for each in found)
    if hidden > 1:  # a lone hidden layer is at rest from the forward pass on
        start, default, end = (max(map(float, each.values())) for each in found)
        assert end < 1e-12 < default < 1e-3
        assert default < 0.01 * start


def test_units_at_rest_are_drawn_nowhere(problem: Problem) -> None:
    net, w = problem.net, _small(problem)
    h = LONG._free(net, w, problem.batch.x)
    assert torch.equal(h[0], problem.batch.x)
    z = [net.layers[l - 1].forward(w[f"W{l}"], w[f"b{l}"], h[l - 1]) for l in range(1, net.L + 1)]
    torch.testing.assert_close(LONG.logits(net, w, problem.batch.x), z[-1])
    for l in range(1, net.L):
        if l < net.L - 1:
            z[l - 1] = z[l - 1] + net.feedback(l + 1, w[f"W{l + 1}"], h[l + 1], h[l])
        torch.testing.assert_close(h[l], z[l - 1].tanh())


def test_a_step_goes_epsilon_of_the_way_all_layers_at_once(problem: Problem) -> None:
    rule, net, w = replace(LONG, epsilon=0.3, free_steps=1), problem.net, problem.weights(LONG)
    _, h = net.forward(w, problem.batch.x)
    after = rule._free(net, w, problem.batch.x)
    for l in range(1, net.L):
        z = net.preactivation(l, w, h[l - 1])
        if l < net.L - 1:
            z = z + net.feedback(l + 1, w[f"W{l + 1}"], h[l + 1], h[l])
        torch.testing.assert_close(after[l], 0.7 * h[l] + 0.3 * z.tanh())


@pytest.mark.parametrize("hidden", [[], [6]], ids=["linear", "one hidden layer"])
def test_where_no_layer_feeds_back_the_prediction_is_the_forward_pass(hidden: list[int]) -> None:
    net = mlp((5,), 4, hidden=hidden, activation="tanh")
    problem = Problem(net, _batch(5, SoftmaxCrossEntropy(4)))
    w = problem.weights(LONG)
    torch.testing.assert_close(LONG.logits(net, w, problem.batch.x), net.logits(w, problem.batch.x))
    assert _distance(1e-5, problem, w, _grads(BP(), problem, w)) < 1e-3
