"""Rules to which labels or rewards come in other ways than as an error: what each must equal, where that is known."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import NETS, Problem
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.activations import Activation
from nobackprop.core.architectures import row
from nobackprop.core.losses import SoftmaxCrossEntropy, SquaredError
from nobackprop.core.network import mlp
from nobackprop.core.rule import Batch
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.brainprop import BrainProp
from nobackprop.rules.channel_competitive_ff import ChannelCompetitiveFF
from nobackprop.rules.counter_current import CounterCurrent

SOFTMAX = [(name, "softmax") for name in (*NETS, "lenet")]


def _squared(problem: Problem) -> Problem:
    """The same under squared error."""
    batch = problem.batch
    return replace(problem, batch=Batch(batch.x, batch.y, SquaredError(batch.y.shape[1])))


def _y(batch: Batch) -> Tensor:
    return batch.y if batch.y.shape[1] > 1 else torch.cat([1 - batch.y, batch.y], 1)


# BrainProp


def _choosing(rule: BrainProp, problem: Problem, w: dict[str, Tensor], k: int) -> Batch:
    """The batch with random numbers by which each sample's choice is drawn, and is class k."""
    p = torch.softmax(problem.net.logits(w, problem.batch.x), 1)
    u = rule.epsilon * (p.cumsum(1)[:, k] - p[:, k] / 2)
    return replace(problem.batch, noise={"choice": torch.special.ndtri(u)})


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
@pytest.mark.parametrize("problem", [*SOFTMAX, ("residual", "softmax"), ("vit", "softmax")], indirect=True)
def test_brainprop_over_all_choices_is_bp_of_the_squared_error(problem: Problem, epsilon: float) -> None:
    rule, w = BrainProp(epsilon=epsilon), problem.weights(BP())
    chosen = [rule.grads(problem.net, w, _choosing(rule, problem, w, k))[0] for k in range(problem.batch.y.shape[1])]
    expected, _ = BP().grads(problem.net, w, _squared(problem).batch)
    torch.testing.assert_close({name: sum(g[name] for g in chosen) for name in expected}, expected)
    assert all(not torch.allclose(g[f"W{problem.net.L}"], expected[f"W{problem.net.L}"]) for g in chosen)


@pytest.mark.parametrize("problem", [("mlp", "softmax")], indirect=True)
def test_brainprops_error_is_autograds_of_the_chosen_outputs(problem: Problem) -> None:
    """Without exploring that is the largest one."""
    w = {name: t.requires_grad_() for name, t in problem.weights(BP()).items()}
    z = problem.net.logits(w, problem.batch.x)
    best = z.argmax(1, keepdim=True)
    loss = (z.gather(1, best) - problem.batch.y.gather(1, best)).square().sum(1).mean() / 2
    expected = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    w = {name: t.detach() for name, t in w.items()}
    torch.testing.assert_close(BrainProp(epsilon=0).grads(problem.net, w, problem.batch)[0], expected)


def test_brainprop_chooses_the_largest_output_and_else_draws_from_a_softmax() -> None:
    z = torch.tensor([[0.5, 2.0, -1.0, 1.5]], dtype=torch.float64).expand(200_000, -1)
    y = torch.full_like(z, 9)  # so that errors tell the chosen output
    n = torch.randn(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.empty(0), y, SoftmaxCrossEntropy(4), {"choice": n})
    chosen = BrainProp(epsilon=0.4).error(z, batch) != 0
    assert (chosen.sum(1) == 1).all()
    expected = 0.4 * torch.softmax(z[0], 0) + 0.6 * torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(chosen.double().mean(0), expected, rtol=0, atol=0.005)


@pytest.mark.parametrize("problem", [("mlp", "sigmoid")], indirect=True)
def test_brainprop_with_one_output_expects_rewards_around_a_half(problem: Problem) -> None:
    z = torch.tensor([[0.2], [-0.7]], dtype=torch.float64)
    batch = replace(problem.batch, y=torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    expected = torch.tensor([[0.2 + 0.5 - 1], [-0.7 + 0.5]], dtype=torch.float64)
    torch.testing.assert_close(BrainProp().error(z, batch), expected)
    assert BrainProp().noise(problem.net, 6) == {}


# Counter-current learning


def _spread(layer: Any, c: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Through at most one pool of 2x2: values repeated, and the nearest where a row is left over."""
    return F.interpolate(c, size=shape[1:]) if layer.read else c


@pytest.mark.parametrize("problem", [*SOFTMAX, ("mlp", "sigmoid"), ("padded_conv", "sigmoid")], indirect=True)
def test_counter_current_is_autograds_of_each_layers_own_loss(problem: Problem) -> None:
    rule, net, batch = CounterCurrent(scale=0.7), problem.net, problem.batch
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    y = _y(batch)
    h, losses = [batch.x], []
    for l in range(1, net.L):
        h.append(net.output(l, net.preactivation(l, w, h[-1].detach()), h))
    losses.append(batch.loss.value(net.preactivation(net.L, w, h[-1].detach()), batch.y).mean())
    c = torch.eye(4, dtype=y.dtype) if y.shape[1] == 4 else torch.tensor([[-1.0], [1.0]], dtype=y.dtype)
    for l in range(net.L - 1, 0, -1):
        layer = net.layers[l]
        r = maps.through(layer.read, h[l])
        u = layer.feedback(w[f"Q{l + 1}"], c.detach(), r[:1].expand(len(c), *r.shape[1:]))
        c = torch.tanh(u)
        units, products = r[0].numel(), r.flatten(1) @ c.flatten(1).mT
        losses.append(0.7 * 128 / units * (products - y).square().mean())
        c = _spread(layer, c, net.shapes[l])
    expected = dict(zip(w, torch.autograd.grad(sum(losses[1:], losses[0]), list(w.values())), strict=True))
    grads, _ = rule.grads(net, {name: t.detach() for name, t in w.items()}, batch)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("problem", [(name, "softmax") for name in NETS], indirect=True)
def test_counter_current_in_a_linear_net_whose_feedback_is_its_weights_is_bp_of_the_squared_error(
    problem: Problem,
) -> None:
    problem = _squared(problem.activated("identity"))
    net, rule = replace(problem.net, bias=False), CounterCurrent(scale=0.3)
    w = problem.weights(rule)
    w = {name: t for name, t in w.items() if name[0] != "b"} | {f"Q{l}": w[f"W{l}"] for l in range(2, net.L + 1)}
    found, exact = rule.grads(net, w, problem.batch)[0], BP().grads(net, w, problem.batch)[0]
    for l in range(1, net.L + 1):
        own = 1 if l == net.L else 256 * 0.3 / (net.units(l) * net.units(net.L))
        torch.testing.assert_close(found[f"W{l}"], own * exact[f"W{l}"])
        if l > 1:
            learned = 256 * 0.3 / (net.units(l - 1) * net.units(net.L))
            torch.testing.assert_close(found[f"Q{l}"], learned * exact[f"W{l}"])


def test_labels_come_down_through_pools_and_flattening() -> None:
    """Values are repeated at all positions that were pooled."""
    parts = [{"conv": [4, 3]}, "tanh", {"max_pool": 2}, {"conv": [4, 3]}, "tanh", "mean", {"dense": 5}, "tanh"]
    net = row((2, 10, 10), 3, layers=parts)
    x = torch.randn(6, 2, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = SoftmaxCrossEntropy(3)
    batch, rule = Batch(x, loss.target(torch.arange(6) % 3, x.dtype), loss), CounterCurrent()
    w = Problem(net, batch).weights(rule)
    of_mean = torch.tanh(torch.tanh(w["Q4"]) @ w["Q3"])  # (classes, channels)
    c = torch.tanh(F.conv_transpose2d(of_mean[:, :, None, None].expand(-1, -1, 2, 2), w["Q2"]))  # what is read, 4x4
    h = torch.tanh(F.conv2d(x, w["W1"], w["b1"]))
    pooled = F.max_pool2d(h.requires_grad_(), 2)
    (128 / 64 * (pooled.flatten(1) @ c.flatten(1).mT - batch.y).square().mean()).backward()
    expected = net.hebbian(1, x, 6 * h.grad * (1 - h.detach().square()))  # pyright: ignore
    found, _ = rule.grads(net, w, batch)
    torch.testing.assert_close({name: found[name] for name in expected}, expected)


# Channel-wise competitive forward-forward


@pytest.mark.parametrize("problem", [*SOFTMAX, ("mlp", "sigmoid"), ("lenet", "sigmoid")], indirect=True)
def test_channel_competition_is_autograds_of_each_layers_own_loss(problem: Problem) -> None:
    rule, net, batch = ChannelCompetitiveFF(), problem.net, problem.batch
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    labels, classes = _y(batch).argmax(1), _y(batch).shape[1]
    below, losses, G = batch.x, [], torch.empty(0)
    for l in range(1, net.L):
        h = torch.tanh(net.preactivation(l, w, below))
        seen = h / h.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (h.ndim - 1))
        r = maps.through(net.layers[l].read, seen).flatten(1).unflatten(1, (net.read_shapes[l + 1][0], -1))
        groups = min(classes, r.shape[1])
        own = [[c for c in range(r.shape[1]) if c * groups // r.shape[1] == k] for k in range(groups)]
        assert all(own)
        G = torch.stack([r[:, channels].square().flatten(1).mean(1) for channels in own], 1)
        losses.append(F.cross_entropy(G, labels * groups // classes))
        below = seen.detach()
    losses.append(batch.loss.value(net.preactivation(net.L, w, below), batch.y).mean())
    expected = dict(zip(w, torch.autograd.grad(sum(losses[1:], losses[0]), list(w.values())), strict=True))
    w = {name: t.detach() for name, t in w.items()}
    torch.testing.assert_close(rule.grads(net, w, batch)[0], expected, rtol=1e-6, atol=1e-8)
    others = rule.other_logits(net, w, batch.x)
    assert others.keys() == ({"goodness"} if net.L > 1 else set())
    if net.L > 1:
        G = G.detach()
        expected_G = G if classes == G.shape[1] == 4 else G[:, 1:] - G[:, :1]
        torch.testing.assert_close(others["goodness"], expected_G, rtol=1e-6, atol=1e-8)


def test_channel_competition_of_roots_is_softmax_regression_on_shares() -> None:
    """With one unit a class and f the square root, goodness is each unit's z over the mean of all."""
    root = Activation("root", torch.sqrt, lambda z, h: 0.5 / h)
    net = replace(mlp((5,), 4, hidden=[4], activation="tanh"), activation=root)
    x = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = SoftmaxCrossEntropy(4)
    batch, rule = Batch(x, loss.target(torch.arange(6) % 4, x.dtype), loss), ChannelCompetitiveFF()
    w = {name: t.abs() for name, t in Problem(net, batch).weights(rule).items()}
    z = x @ w["W1"].mT + w["b1"]
    mean = z.mean(1, keepdim=True)
    torch.testing.assert_close(rule.other_logits(net, w, x)["goodness"], z / mean, rtol=1e-6, atol=0)
    e = batch.error(z / mean)  # of softmax regression
    d = (e - (e * z / mean).mean(1, keepdim=True)) / mean
    expected = net.hebbian(1, x, d)
    found, _ = rule.grads(net, w, batch)
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BrainProp(epsilon=2), "rule.epsilon is 2: it is the share of choices that are drawn, so 0 to 1"),
        (
            lambda: CounterCurrent(scale=0),
            "rule.scale is 0: it scales the losses of hidden layers, so it must be above",
        ),
    ],
)
def test_settings_that_make_no_sense_are_told(make: Any, message: str) -> None:
    with pytest.raises(Mistake, match=message):
        make()
