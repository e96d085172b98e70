"""Rules with targets or two states a unit: what each must equal, in the limits where that is known."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from conftest import LOSSES, NETS, Problem, problem_of
from torch import Tensor

from nobackprop.core.architectures import row
from nobackprop.core.layers import Layer
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.maps import through
from nobackprop.core.network import Network, mlp
from nobackprop.core.rule import Batch
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.difference_reconstruction import DifferenceReconstruction
from nobackprop.rules.dual_propagation import DualPropagation
from nobackprop.rules.fixed_weight_dtp import FixedWeightDTP
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.recursive_lra import RecursiveLRA

DRL = DifferenceReconstruction(eta=0.7)


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


@pytest.mark.parametrize(
    ("problem", "rule"),
    [
        *[((net, loss), rule) for net in NETS for loss in LOSSES for rule in (DRL, FixedWeightDTP(eta=0.7))],
        (("lenet", "softmax"), DRL),
    ],
    indirect=["problem"],
)
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


@pytest.mark.parametrize(
    "net",
    [
        mlp((1, 3, 4), 4, hidden=[7, 6, 5], activation="identity"),
        row((1, 6, 6), 4, layers=[{"conv": [3, 3]}, "relu", {"max_pool": 2}]),  # many windows of zeros alone
    ],
)
def test_decoders_descend_their_distance_from_the_transposed_jacobian(net: Network) -> None:
    """With noise that is white over the batch, Q of a linear layer goes 2 (Q - W) down: to the Jacobian's transpose."""
    rule, n = DifferenceReconstruction(iterations=1), 64
    problem = replace(problem_of("mlp", "softmax"), net=net)
    w = problem.weights(rule)
    w["b1"] = w["b1"] - 0.5 * w["W1"].norm()
    white = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    noise = {name: n**0.5 * white[:, : prod(size[1:])].reshape(size) for name, size in rule.noise(net, n).items()}
    x = torch.randn(1, *net.in_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = replace(problem.batch, x=x.expand(n, *net.in_shape), y=problem.batch.y[:1].expand(n, -1), noise=noise)
    grads, logits = rule.of_decoders(0, net, w, batch)
    assert logits is None
    torch.testing.assert_close(grads, {f"Q{l}": 2 * (w[f"Q{l}"] - w[f"W{l}"]) for l in range(2, net.L + 1)})


@pytest.mark.parametrize(
    "problem", [("mlp", "softmax"), ("padded_conv", "softmax"), ("lenet", "softmax")], indirect=True
)
def test_a_decoders_gradient_is_autograds_of_its_own_loss(problem: Problem) -> None:
    rule, net = DifferenceReconstruction(iterations=1), problem.net
    w, batch = problem.weights(rule), problem.noisy(rule)
    found, _ = rule.of_decoders(0, net, w, batch)
    z, h = net.forward(w, batch.x)
    for l in range(2, net.L + 1):
        Q, layer = w[f"Q{l}"].clone().requires_grad_(), net.layers[l - 1]
        r = through(layer.read, h[l - 1])

        def decoded(u: Tensor, l: int = l, Q: Tensor = Q, layer: Layer = layer, r: Tensor = r) -> Tensor:
            return layer.feedback(Q, u if l == net.L else net.f(l, u), r)

        epsilon, xi = (rule.sigma * batch.noise[f"{side}{l}_0"] for side in ("below", "above"))
        moved = layer.forward(w[f"W{l}"], w[f"b{l}"], r + epsilon)
        at, up = (z[l], moved) if l == net.L else (h[l], net.f(l, moved))
        loss = -2 * (epsilon * (decoded(up) - decoded(at))).flatten(1).sum(1)
        loss = loss + (decoded(at + xi) - decoded(at)).square().flatten(1).sum(1)
        (expected,) = torch.autograd.grad(loss.mean() / rule.sigma**2, Q)
        torch.testing.assert_close(found[f"Q{l}"], expected)


@pytest.mark.parametrize(("activation", "apart", "cosine"), [("identity", 0.05, 0.995), ("tanh", 0.2, 0.97)])
@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_after_the_feedback_phase_jacobians_are_transposed_and_updates_are_the_gradient(
    problem: Problem, activation: str, apart: float, cosine: float
) -> None:
    """From Q at random. Jacobians of tanh differ from sample to sample, so that one Q can only come near."""
    problem = problem.activated(activation)
    rule, net = DifferenceReconstruction(eta=1e-3, sigma=0.01, iterations=1), problem.net
    w, batch = problem.weights(rule), problem.batch
    z, h = net.forward(w, batch.x)
    slope = {"identity": torch.ones_like, "tanh": lambda u: 1 - torch.tanh(u) ** 2}[activation]

    def distances() -> list[float]:
        found = []
        for l in range(2, net.L + 1):
            above, own = (torch.ones_like(z[l]) if l == net.L else slope(u[l]) for u in (h, z))
            decoder, layer = above[:, :, None] * w[f"Q{l}"], own[:, :, None] * w[f"W{l}"]
            found.append(float((decoder - layer).norm() / layer.norm()))
        return found

    assert min(distances()) > 1
    often = replace(problem, batch=replace(batch, x=batch.x.repeat(50, 1, 1, 1), y=batch.y.repeat(50, 1)))
    for step in range(400):
        grads, _ = rule.of_decoders(0, net, w, often.noisy(rule, seed=step))
        w |= {name: w[name] - 0.1 * (1 - step / 400) * g for name, g in grads.items()}
    assert max(distances()) < apart
    found, expected = (r.grads(net, w, batch)[0] for r in (rule, BP()))
    for name, g in expected.items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), g.flatten(), dim=0) > cosine, name
        assert (found[name] - g).norm() < 0.25 * g.norm(), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualPropagation(beta=0), "rule.beta is 0: it scales the nudge at the output"),
        (lambda: DualPropagation(sweeps=0), "rule.sweeps is 0: states are found by 1 sweep or more"),
        (lambda: FixedWeightDTP(eta=0), "rule.eta is 0: it scales the step to the first target"),
        (lambda: DifferenceReconstruction(eta=0), "rule.eta is 0: it scales the step to the first target"),
        (lambda: DifferenceReconstruction(sigma=0), "rule.sigma is 0: decoders learn from noise alone"),
        (lambda: DifferenceReconstruction(iterations=0), "rule.iterations is 0: decoders take 1 step or more"),
        (lambda: RecursiveLRA(skip=-1), "rule.skip is -1: 1 or more, where 2 means every second layer, or 0 for no"),
        (lambda: RecursiveLRA(alpha=2), "rule.alpha is 2: it is a share of the error itself, so 0 to 1"),
        (lambda: RecursiveLRA(update_E="w"), "rule.update_E is 'w': write recursive or lra_e"),  # pyright: ignore
        (lambda: DifferenceReconstruction(decoder_rate=-1), "rule.decoder_rate is -1: it scales the rate of Q"),
    ],
)
def test_settings_that_make_no_sense_are_told(make: Any, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        make()


@pytest.mark.parametrize("problem", [*[(n, "softmax") for n in NETS], ("lenet", "sigmoid")], indirect=True)
def test_recursive_lra_without_skips_and_with_its_update_of_e_is_lra_e(problem: Problem) -> None:
    plain = RecursiveLRA(skip=0, alpha=1.0, gamma=0.7, update_E="lra_e")
    w, lra_e = problem.weights(plain), LRAE(gamma=0.7)
    torch.testing.assert_close(plain.grads(problem.net, w, problem.batch), lra_e.grads(problem.net, w, problem.batch))
    assert {name: plain.gain(name) for name in w} == {name: lra_e.gain(name) for name in w}
    drawn = lra_e.feedback(problem.net, lambda _, shape: torch.arange(float(torch.Size(shape).numel())).view(shape))
    ours = plain.feedback(problem.net, lambda _, shape: torch.arange(float(torch.Size(shape).numel())).view(shape))
    assert drawn.keys() == ours.keys()
    assert all(torch.equal(drawn[name], ours[name]) for name in drawn)


def test_recursive_lra_mixes_errors_with_signs_and_skips_layers() -> None:
    """By hand, on an MLP with four hidden layers: the output's error skips to the second."""
    net = mlp((5,), 3, hidden=[4, 4, 4, 4], activation="tanh")
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, generator=numbers)
    loss = SoftmaxCrossEntropy(3)
    problem = Problem(net, Batch(x, loss.target(torch.arange(6) % 3, x.dtype), loss))
    rule = RecursiveLRA(beta=0.3)
    w = problem.weights(rule)
    assert {name for name in w if name[0] in "DE"} == {"D2", "E2", "E4", "E5"}
    z, h = net.forward(w, x)
    e = {5: problem.batch.error(z[5])}
    for l, d, alpha in (
        (4, e[5] @ w["E5"], 0.24),
        (3, None, 0.24),
        (2, e[5] @ w["D2"].mT, 0.19),
        (1, None, 0.24),
    ):
        d = e[l + 1] @ w[f"E{l + 1}"] if d is None else d
        change = h[l] - torch.tanh(z[l] - 0.3 * d)
        e[l] = alpha * change + (1 - alpha) * change.sign()
    found, _ = rule.grads(net, w, problem.batch)
    torch.testing.assert_close({f"W{l}": e[l].mT @ h[l - 1] / 6 for l in e}, {f"W{l}": found[f"W{l}"] for l in e})
    torch.testing.assert_close(found["D2"], -(e[5] @ w["D2"].mT).mT @ e[5] / 6)
    torch.testing.assert_close(found["E4"], -e[4].mT @ (e[4] @ w["E4"]) / 6)
