"""Rules that bring no error down layer by layer: what each must equal, in the limits where that is known."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from conftest import MAPPED, NETS, Problem
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.losses import SquaredError
from nobackprop.core.network import allconv, mlp
from nobackprop.core.rule import Batch
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.direct_kolen_pollack import DirectKolenPollack
from nobackprop.rules.evolution import Evolution
from nobackprop.rules.forward_gradient import ForwardGradient
from nobackprop.rules.local_errors import LocalErrors
from nobackprop.rules.node_perturbation import NodePerturbation
from nobackprop.rules.soft_hebb import SoftHebb

Losses = Literal["prediction", "similarity", "both"]


def _similarity(u: Tensor) -> Tensor:
    """Cosines between samples around their own means, as the paper's program has them (its `similarity_matrix`)."""
    v = u.flatten(2).std(2) if u.ndim == 4 and u[0, 0].numel() > 1 else u.flatten(1)
    unit = F.normalize(v - v.mean(1, keepdim=True), dim=1)
    return unit @ unit.mT


def _own_loss(rule: LocalErrors, problem: Problem, w: dict[str, Tensor], l: int, h: Tensor) -> Tensor:
    net, batch = problem.net, problem.batch
    total = h.new_zeros(())
    for letter, share in rule.shares.items():
        M = w[f"{letter}{l}"]
        if letter == "C":
            r = maps.through(net.layers[l].read, h).flatten(1)
            total = total + share * batch.loss.value(r @ M, batch.y).mean()
        else:
            u = F.conv2d(h, M, padding=1) if h.ndim == 4 else h.flatten(1) @ M.mT
            y = batch.y if batch.y.shape[1] > 1 else torch.cat([1 - batch.y, batch.y], 1)
            total = total + share * F.mse_loss(_similarity(u), _similarity(y))
    return total


@pytest.mark.parametrize("loss", ["prediction", "similarity", "both"])
@pytest.mark.parametrize("problem", [(n, "softmax") for n in NETS | MAPPED] + [("mlp", "sigmoid")], indirect=True)
def test_local_errors_are_autograds_of_each_layers_own_loss(problem: Problem, loss: Losses) -> None:
    rule, net, batch = LocalErrors(loss=loss, beta=0.3), problem.net, problem.batch
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    h, losses = [batch.x], []
    for l in range(1, net.L):
        below = [t.detach() for t in h]
        h.append(net.output(l, net.preactivation(l, w, below[-1]), below))
        losses.append(_own_loss(rule, problem, w, l, h[-1]))
    losses.append(batch.loss.value(net.preactivation(net.L, w, h[-1].detach()), batch.y).mean())
    expected = dict(zip(w, torch.autograd.grad(sum(losses[1:], losses[0]), list(w.values())), strict=True))
    grads, _ = rule.grads(net, {name: t.detach() for name, t in w.items()}, batch)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)  # TINY in the place of F.normalize's bound


@pytest.mark.parametrize("loss", ["similarity", "both"])
def test_similarity_of_maps_of_one_position_compares_their_channels(loss: Losses) -> None:
    net = allconv((1, 5, 5), 3, filters=[[4, 3, 1], [5, 3, 1]], activation="tanh")
    assert net.shapes[2] == (5, 1, 1)
    x = torch.randn(6, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, SquaredError(3).target(torch.arange(6) % 3, x.dtype), SquaredError(3))
    rule = LocalErrors(loss=loss)
    grads, _ = rule.grads(net, Problem(net, batch).weights(rule), batch)
    assert all(g.isfinite().all() and g.any() for g in grads.values())


def test_forward_gradients_need_derivatives() -> None:
    with pytest.raises(Mistake, match=r"forward gradients need the derivative of every activation.*node_perturbation"):
        ForwardGradient().check(mlp((3,), 4, hidden=[5], activation="sign"))


@pytest.mark.parametrize("problem", [("mlp", "softmax"), ("lenet", "softmax")], indirect=True)
def test_direct_kolen_pollack_decays_the_difference_of_the_outputs_weights(problem: Problem) -> None:
    """W[L] - B[L-1]^T shrinks by 1 - lambda at each step of SGD with decay, whatever the data."""
    rule, net, decay, rate = DirectKolenPollack(), problem.net, 0.1, 0.3
    w, name = problem.weights(rule), f"B{net.L - 1}"
    difference = w[f"W{net.L}"] - w[name].mT
    for _ in range(3):
        grads, _ = rule.grads(net, w, problem.batch)
        w |= {n: (1 - decay) * w[n] - rate * g for n, g in grads.items()}
        difference = (1 - decay) * difference
        torch.testing.assert_close(w[f"W{net.L}"] - w[name].mT, difference)


@pytest.mark.parametrize("problem", [(n, "softmax") for n in NETS | MAPPED], indirect=True)
def test_node_perturbation_tends_to_the_forward_gradient_along_its_noise(problem: Problem) -> None:
    w = problem.weights(BP())
    noisy = problem.noisy(NodePerturbation())
    along = replace(noisy, noise={name: t.unsqueeze(1) for name, t in noisy.noise.items()})
    forward, _ = ForwardGradient().grads(problem.net, w, along)
    perturbed, _ = NodePerturbation(sigma=1e-7).grads(problem.net, w, noisy)
    torch.testing.assert_close(perturbed, forward, rtol=1e-3, atol=1e-6)


def _basis(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """By name, all directions of an orthogonal basis over all these numbers together, of length sqrt(their number)."""
    total = sum(int(torch.tensor(s).prod()) for s in shapes.values())
    rows, found, at = torch.eye(total, dtype=torch.float64) * total**0.5, {}, 0
    for name, shape in shapes.items():
        size = int(torch.tensor(shape).prod())
        found[name] = rows[:, at : at + size].reshape(total, *shape)
        at += size
    return found


@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("problem", [("mlp", "softmax"), ("padded_conv", "sigmoid")], indirect=True)
def test_a_forward_gradient_along_each_direction_of_a_basis_is_the_gradient(problem: Problem, perturb: Any) -> None:
    net, w = problem.net, problem.weights(BP())
    if perturb == "weights":
        noise = _basis(net.weight_shapes)
        count = len(next(iter(noise.values())))
    else:
        basis = _basis({f"z{l}": net.shapes[l] for l in range(1, net.L + 1)})
        count = len(next(iter(basis.values())))
        noise = {name: t.expand(len(problem.batch.x), *t.shape) for name, t in basis.items()}
    grads, _ = ForwardGradient(perturb=perturb, directions=count).grads(net, w, replace(problem.batch, noise=noise))
    torch.testing.assert_close(grads, BP().grads(net, w, problem.batch)[0])


@pytest.mark.parametrize(
    "problem", [("mlp", "softmax"), ("padded_conv", "sigmoid"), ("lenet", "softmax")], indirect=True
)
def test_forward_gradients_of_local_losses_along_each_direction_of_a_basis_are_those_of_local_errors(
    problem: Problem,
) -> None:
    """A basis for each layer by itself, of length sqrt(directions): its slope takes no other layer in."""
    net, sizes = problem.net, [problem.net.units(l) for l in range(1, problem.net.L)]
    count = max(sizes)
    noise = {}
    for l, size in enumerate(sizes, 1):
        directions = torch.eye(count, size, dtype=torch.float64) * count**0.5
        noise[f"z{l}"] = directions.view(count, *net.shapes[l]).expand(len(problem.batch.x), -1, *net.shapes[l])
    rule = ForwardGradient(loss="local", directions=count)
    w = problem.weights(rule)
    grads, logits = rule.grads(net, w, replace(problem.batch, noise=noise))
    expected, expected_logits = LocalErrors(loss="prediction").grads(net, w, problem.batch)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(logits, expected_logits)
    assert rule.noise(net, 6) == {f"z{l}": (6, count, *net.shapes[l]) for l in range(1, net.L)}


@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_the_mean_of_forward_gradients_of_local_losses_tends_to_their_gradient(problem: Problem) -> None:
    rule = ForwardGradient(loss="local", directions=20_000)
    w = problem.weights(rule)
    grads, _ = rule.grads(problem.net, w, problem.noisy(rule))
    for name, g in LocalErrors().grads(problem.net, w, problem.batch)[0].items():
        assert F.cosine_similarity(grads[name].flatten(), g.flatten(), dim=0) > 0.98, name
        assert 0.95 < grads[name].norm() / g.norm() < 1.05, name


@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_the_mean_of_forward_gradients_tends_to_the_gradient(problem: Problem, perturb: Any) -> None:
    rule = ForwardGradient(perturb=perturb, directions=20_000)
    w = problem.weights(rule)
    grads, _ = rule.grads(problem.net, w, problem.noisy(rule))
    for name, g in BP().grads(problem.net, w, problem.batch)[0].items():
        assert F.cosine_similarity(grads[name].flatten(), g.flatten(), dim=0) > 0.95, name
        assert 0.9 < grads[name].norm() / g.norm() < 1.1, name


@pytest.fixture
def quadratic() -> Problem:
    """A linear classifier under squared error, whose loss is a quadratic function of its weights."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.arange(6) % 4
    loss = SquaredError(4)
    return Problem(mlp((3,), 4, hidden=[], activation="tanh"), Batch(x, loss.target(labels, x.dtype), loss))


def test_evolution_on_a_quadratic_is_the_gradient_on_average(quadratic: Problem) -> None:
    """Two opposite changes give a quadratic's slope exactly, however large; over a basis these make the gradient."""
    noise = _basis(quadratic.net.weight_shapes)
    rule = Evolution(sigma=0.7, population=len(noise["W1"]))
    w = quadratic.weights(rule)
    grads, _ = rule.grads(quadratic.net, w, replace(quadratic.batch, noise=noise))
    torch.testing.assert_close(grads, BP().grads(quadratic.net, w, quadratic.batch)[0])


@pytest.mark.parametrize("rank", [1, 3])
def test_evolution_of_low_rank_is_the_gradient_on_average(quadratic: Problem, rank: int) -> None:
    rule = Evolution(sigma=0.5, population=20_000, rank=rank)
    w, noise = quadratic.weights(rule), quadratic.noisy(rule).noise
    assert noise["W1_rows"].shape == (20_000, 4, rank)
    changes = noise["W1_rows"] @ noise["W1_columns"].mT / rank**0.5
    assert (torch.linalg.matrix_rank(changes[:50]) == min(rank, 3)).all()
    torch.testing.assert_close(changes.flatten(1).T.cov(), torch.eye(12).double(), rtol=0, atol=0.1)
    grads, _ = rule.grads(quadratic.net, w, replace(quadratic.batch, noise=noise))
    for name, g in BP().grads(quadratic.net, w, quadratic.batch)[0].items():
        assert F.cosine_similarity(grads[name].flatten(), g.flatten(), dim=0) > 0.98, name
        assert 0.9 < grads[name].norm() / g.norm() < 1.1, name


@pytest.mark.parametrize("problem", [("mlp", "softmax"), ("strided_conv", "sigmoid")], indirect=True)
def test_evolution_follows_the_slope_along_its_change(problem: Problem) -> None:
    rule = Evolution(sigma=1e-5, population=1)
    w, batch = problem.weights(rule), problem.noisy(rule)
    gradient, _ = BP().grads(problem.net, w, batch)
    slope = sum((g * batch.noise[name][0]).sum() for name, g in gradient.items())
    expected = {name: slope * batch.noise[name][0] for name in gradient}
    torch.testing.assert_close(rule.grads(problem.net, w, batch)[0], expected, rtol=1e-4, atol=1e-6)


def test_soft_hebb_rests_at_the_centres_of_a_mixture() -> None:
    """Each unit of a hard competition ends at length 1, in the direction of the mean of the cluster that it wins."""
    numbers = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(8, 3, generator=numbers, dtype=torch.float64))[0].T  # orthogonal, length 1
    x = centres.repeat_interleave(40, 0) + 0.05 * torch.randn(120, 8, generator=numbers, dtype=torch.float64)
    loss = SquaredError(2)
    batch = Batch(x, loss.target(torch.arange(120) % 2, x.dtype), loss)
    net = mlp((8,), 2, hidden=[3], activation="relu")
    rule = SoftHebb(temperature=0.01, anti_hebbian=False)
    w = Problem(net, batch).weights(rule) | {"W1": centres + 0.3 * torch.randn(3, 8, generator=numbers).double()}
    for _ in range(500):
        w["W1"] = w["W1"] - 0.3 * rule.grads(net, w, batch)[0]["W1"]
    means = x.view(3, 40, 8).mean(1)
    torch.testing.assert_close(w["W1"], F.normalize(means, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("anti", [False, True])
@pytest.mark.parametrize("problem", [("mlp", "softmax"), ("padded_conv", "softmax")], indirect=True)
def test_soft_hebb_is_the_papers_update_of_each_unit(problem: Problem, anti: bool) -> None:
    """Over all positions and samples by a loop, for the first layer."""
    rule, net = SoftHebb(temperature=0.5, anti_hebbian=anti), problem.net
    w, x = problem.weights(rule), problem.batch.x
    W = w["W1"].flatten(1)
    patches = F.unfold(x, 3, padding=1).mT.flatten(0, 1) if w["W1"].ndim == 4 else x.flatten(1)
    expected = torch.zeros_like(W)
    for r in patches:
        u = W @ r
        y = torch.softmax(u / 0.5, 0)
        if anti:
            y = torch.where(torch.arange(len(u)) == u.argmax(), y, -y)
        expected -= (torch.outer(y, r) - (y * u)[:, None] * W) / len(x)
    found, _ = rule.grads(net, w, problem.batch)
    torch.testing.assert_close(found["W1"].flatten(1), expected)
    torch.testing.assert_close(found[f"W{net.L}"], BP().grads(net, w, problem.batch)[0][f"W{net.L}"])
    assert "b1" not in found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalErrors(loss="sim"), "rule.loss is 'sim': write prediction, similarity or both"),  # pyright: ignore
        (lambda: LocalErrors(beta=2), "rule.beta is 2: it is the share of the similarity loss, so 0 to 1"),
        (lambda: SoftHebb(temperature=0), "rule.temperature is 0: it divides what units compete by, so above 0"),
        (lambda: NodePerturbation(sigma=0), "rule.sigma is 0: without noise no loss changes"),
        (lambda: ForwardGradient(perturb="z"), "rule.perturb is 'z': write activities or weights"),  # pyright: ignore
        (lambda: ForwardGradient(loss="all"), "rule.loss is 'all': write net or local"),  # pyright: ignore
        (lambda: ForwardGradient("weights", loss="local"), "rule.loss=local follows .*: write rule.perturb=activities"),
        (lambda: ForwardGradient(directions=0), "rule.directions is 0: the loss is followed along 1 direction or more"),
        (lambda: Evolution(sigma=-1), "rule.sigma is -1: without a change no loss changes"),
        (lambda: Evolution(population=0), "rule.population is 0: how many pairs of changes, so 1 or more"),
        (lambda: Evolution(rank=0), "rule.rank is 0: 1 or more, or null for changes of full rank"),
    ],
)
def test_settings_that_make_no_sense_are_told(make: Any, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        make()
