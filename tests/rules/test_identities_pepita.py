"""PEPITA's errors are what the error in the input changes; a matching F makes them backpropagation's."""

import pytest
import torch
from conftest import Problem
from torch import Tensor

from nobackprop.core.architectures import row
from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.maps import Mask
from nobackprop.core.network import mlp
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch
from nobackprop.rules.bp import BP
from nobackprop.rules.pepita import PEPITA


def test_without_an_error_in_the_input_hidden_layers_are_left_alone(problem: Problem) -> None:
    net, w = problem.net, problem.weights(PEPITA())
    grads, logits = PEPITA().grads(net, w | {"F": torch.zeros_like(w["F"])}, problem.batch)
    expected, expected_logits = BP().grads(net, w, problem.batch)
    assert not any(grads[f"{letter}{l}"].any() for letter in "Wb" for l in range(1, net.L))
    for name in (f"W{net.L}", f"b{net.L}"):
        torch.testing.assert_close(grads[name], expected[name])
    torch.testing.assert_close(logits, expected_logits)


def test_the_first_layer_of_a_linear_net_gets_bps_error_where_w1_f_is_minus_w2_transposed() -> None:
    net, loss = mlp((12,), 4, hidden=[7], activation="identity"), SoftmaxCrossEntropy(4)
    w = {name: t.double() for name, t in initial_weights(net, PEPITA(), Uniform(), Uniform(), seed=0).items()}
    w["F"] = -torch.linalg.pinv(w["W1"]) @ w["W2"].T
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, loss.target(torch.arange(6) % 4, x.dtype), loss)
    grads, expected = PEPITA().grads(net, w, batch)[0], BP().grads(net, w, batch)[0]
    torch.testing.assert_close(grads["b1"], expected["b1"])


@pytest.mark.parametrize("name", ["tanh", "sign"])
def test_pepita_is_the_closed_form(problem: Problem, name: str) -> None:
    net, batch = problem.activated(name).net, problem.batch
    w = problem.weights(PEPITA(scale=1.0))
    z, h = net.forward(w, batch.x)
    shift = torch.einsum("no,io->ni", batch.error(z[net.L]), w["F"]).view_as(batch.x)
    z_err, h_err = net.forward(w, batch.x + shift)
    expected = net.hebbian(net.L, h_err[net.L - 1], batch.error(z_err[net.L]))
    for l in range(1, net.L):
        expected |= net.hebbian(l, h_err[l - 1], h[l] - h_err[l])
    grads, logits = PEPITA().grads(net, w, batch)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(logits, z[net.L])


def test_the_output_learns_from_the_second_passs_error(problem: Problem) -> None:
    net, batch = problem.net, problem.batch
    w = problem.weights(PEPITA(scale=1.0))
    grads, logits = PEPITA().grads(net, w, batch)
    assert logits is not None
    shift = torch.einsum("no,io->ni", batch.error(logits), w["F"]).view_as(batch.x)
    z_err, h_err = net.forward(w, batch.x + shift)
    first, second = (net.hebbian(net.L, h_err[net.L - 1], batch.error(z)) for z in (logits, z_err[net.L]))
    for name, g in second.items():
        torch.testing.assert_close(grads[name], g)
        assert (g - first[name]).norm() > 0.01 * g.norm()


def test_f_is_drawn_as_in_the_papers_program() -> None:
    net = mlp((1, 28, 28), 10, hidden=[5], activation="tanh")
    F = initial_weights(net, PEPITA(), Uniform(), Uniform(1.0), seed=0)["F"]
    bound = 0.05 * (6 / 784) ** 0.5  # 0.05 times He's uniform of 784 inputs
    assert F.shape == (784, 10)
    assert 0.99 * bound < F.abs().max() < 1.001 * bound


def test_a_unit_that_dropout_sets_to_zero_learns_nothing() -> None:
    drawn = row((12,), 4, layers=[{"dense": 7}, "tanh", {"dropout": 0.5}, {"dense": 6}, "tanh"])
    noise = {name: t.double() for name, t in normal(drawn.noise(5), 0, "noise").items()}
    net, loss = drawn.with_noise(noise), SoftmaxCrossEntropy(4)
    w = {name: t.double() for name, t in initial_weights(net, PEPITA(), Uniform(), Uniform(), seed=0).items()}
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, loss.target(torch.arange(5) % 4, x.dtype), loss)

    def step(w: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        return PEPITA(scale=1.0).grads(drawn.with_noise(noise), w, batch)[0]

    (mask,) = net.layers[1].read
    assert isinstance(mask, Mask)
    z, h = net.forward(w, x)
    shift = batch.error(z[net.L]) @ w["F"].T
    _, h_err = net.forward(w, x + shift)
    grads = step(w, noise)
    change = mask.factors * (h[1] - h_err[1])
    assert 0 < (change == 0).sum() < change.numel()
    torch.testing.assert_close(grads["W1"], change.T @ (x + shift) / 5)
    torch.testing.assert_close(grads["W2"], (h[2] - h_err[2]).T @ (mask.factors * h_err[1]) / 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(w, noise), grads)
