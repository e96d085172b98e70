"""Rules with targets or two states a unit: what each must equal, in the limits where that is known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import NETS, Problem
from torch import Tensor

from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.difference_reconstruction import DifferenceReconstruction
from nobackprop.rules.dual_propagation import DualPropagation
from nobackprop.rules.fixed_weight_dtp import FixedWeightDTP


def _decoding(problem: Problem, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with each Q set to W."""
    return w | {f"Q{l}": w[f"W{l}"] for l in range(2, problem.net.L + 1)}


@pytest.mark.parametrize("problem", [*[(n, "softmax") for n in NETS], ("lenet", "sigmoid")], indirect=True)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_dual_propagation_tends_to_bp_as_beta_goes_to_0(problem: Problem, sweeps: int) -> None:
    w = problem.weights(BP())
    found, _ = DualPropagation(beta=1e-5, sweeps=sweeps).grads(problem.net, w, problem.batch)
    torch.testing.assert_close(found, BP().grads(problem.net, w, problem.batch)[0], rtol=1e-4, atol=1e-6)


def test_dual_propagations_states_are_at_rest_after_some_sweeps(problem: Problem) -> None:
    """At rest, mean and difference of each layer's two states satisfy the paper's equations."""
    net, batch, w = problem.net, problem.batch, problem.weights(BP())
    few, more = (DualPropagation(beta=0.5, sweeps=n).grads(net, w, batch)[0] for n in (40, 41))
    torch.testing.assert_close(few, more)
    one = DualPropagation(beta=0.5).grads(net, w, batch)[0]
    assert net.L == 1 or not torch.allclose(one["W1"], more["W1"], rtol=1e-3)


@pytest.mark.parametrize("rule", [DifferenceReconstruction(eta=0.7), FixedWeightDTP(eta=0.7)])
def test_targets_of_a_linear_net_whose_decoders_are_its_weights_are_the_gradient(problem: Problem, rule: Any) -> None:
    problem = problem.activated("identity")
    w = _decoding(problem, problem.weights(rule))
    torch.testing.assert_close(
        rule.grads(problem.net, w, problem.batch)[0], BP().grads(problem.net, w, problem.batch)[0]
    )


@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_fixed_decoders_send_small_errors_through_their_jacobians(problem: Problem) -> None:
    rule, net = FixedWeightDTP(eta=1e-6), problem.net
    w = problem.weights(rule)
    z, h = net.forward(w, problem.batch.x)
    e, expected = problem.batch.error(z[net.L]), {}
    for l in range(net.L, 1, -1):
        v = (z[l] if l == net.L else h[l]) @ w[f"Q{l}"]
        e = e @ w[f"Q{l}"] * (1 - torch.tanh(v) ** 2)
        expected |= net.hebbian(l - 1, h[l - 2], e * (1 - h[l - 1] ** 2))
    found, _ = rule.grads(net, w, problem.batch)
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_decoders_descend_their_distance_from_the_transposed_jacobian(problem: Problem) -> None:
    """With noise that is white over the batch, a linear net's Q goes 2 (Q - W) down: to the Jacobian's transpose."""
    problem = problem.activated("identity")
    rule, net = DifferenceReconstruction(iterations=1), problem.net
    n = 64
    white = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    noise = {name: n**0.5 * white[:, : shape[1]] for name, shape in rule.noise(net, n).items()}
    x, y = (t.repeat(n, 1, 1, 1)[:n] if t.ndim == 4 else t.repeat(n, 1)[:n] for t in (problem.batch.x, problem.batch.y))
    batch, w = replace(problem.batch, x=x, y=y, noise=noise), problem.weights(rule)
    grads, logits = rule.of_decoders(0, net, w, batch)
    assert logits is None
    torch.testing.assert_close(grads, {f"Q{l}": 2 * (w[f"Q{l}"] - w[f"W{l}"]) for l in range(2, net.L + 1)})


@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_after_the_feedback_phase_targets_are_near_the_gradient(problem: Problem) -> None:
    """tanh units, whose Jacobians differ from sample to sample, so that Q can only come near."""
    rule, net = DifferenceReconstruction(eta=1e-3, sigma=0.01, iterations=1), problem.net
    w = problem.weights(rule)

    def cosine() -> float:
        pairs = zip(*(r.grads(net, w, problem.batch)[0].items() for r in (rule, BP())), strict=True)
        return min(
            float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for (_, a), (_, b) in pairs
        )

    before = cosine()
    for step in range(500):
        grads, _ = rule.of_decoders(0, net, w, problem.noisy(rule, seed=step))
        w |= {name: w[name] - 0.05 * g for name, g in grads.items()}
    assert before < 0.5
    assert cosine() > 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualPropagation(beta=0), "rule.beta is 0: it scales the nudge at the output"),
        (lambda: DualPropagation(sweeps=0), "rule.sweeps is 0: states are found by 1 sweep or more"),
        (lambda: FixedWeightDTP(eta=0), "rule.eta is 0: it scales the step to the first target"),
        (lambda: DifferenceReconstruction(eta=0), "rule.eta is 0: it scales the step to the first target"),
        (lambda: DifferenceReconstruction(sigma=0), "rule.sigma is 0: decoders learn from noise alone"),
        (lambda: DifferenceReconstruction(iterations=0), "rule.iterations is 0: decoders take 1 step or more"),
        (lambda: DifferenceReconstruction(decoder_rate=-1), "rule.decoder_rate is -1: it scales the rate of Q"),
    ],
)
def test_settings_that_make_no_sense_are_told(make: Any, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        make()
