"""Forward-forward descends each layer's own loss; it answers by a linear readout, and the goodness with each label."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import cos, pi, sin
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Config, Problem, train
from torch import Tensor

from nobackprop.core.layers import Conv
from nobackprop.core.network import Network, mlp
from nobackprop.rules.forward_forward import ForwardForward, _other

GOODNESS = ForwardForward(readout="goodness")


def _with_label(net: Network, x: Tensor, shares: Tensor) -> Tensor:
    """An image with so much of each label."""
    image = x.clone()
    if not isinstance(net.layers[0], Conv):
        image.view(-1)[: len(shares)] = shares
        return image
    image *= 0.65
    for label, share in enumerate(shares.tolist()):
        direction, length = pi * label / len(shares), 8 if label % 2 else 4
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                wave = (1 + cos(2 * pi * (j * cos(direction) + i * sin(direction)) / length)) / 2
                image[:, i, j] += 0.35 * share * wave
    return image


def _labelled(net: Network, x: Tensor, labels: list[int], classes: int) -> Tensor:
    shares = F.one_hot(torch.tensor(labels), classes).double()
    return torch.stack([_with_label(net, one, s) for one, s in zip(x, shares, strict=True)])


def _long(h: Tensor) -> Tensor:
    """At a mean square of 1."""
    return h / h.flatten(1).pow(2).mean(1).sqrt().view(-1, *[1] * (h.ndim - 1))


def _run(rule: ForwardForward, net: Network, w: dict[str, Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's activations and goodness; no derivative goes from one layer to the next."""
    layers, handed_on = [], _long(x) if rule.normalize_input else x
    for l in range(1, net.L + 1):
        h = net.activation.f(net.preactivation(l, w, handed_on.detach()))
        layers.append((h, h.flatten(1).pow(2).sum(1)))
        handed_on = _long(h)
    return layers


def _read(rule: ForwardForward, net: Network, w: dict[str, Tensor], x: Tensor, classes: int) -> Tensor:
    """The linear readout; no derivative goes below it."""
    shares = torch.full((classes,), 1 / classes, dtype=torch.float64)
    layers = _run(rule, net, w, torch.stack([_with_label(net, one, shares) for one in x]))
    read = range(2, net.L) if net.L > 2 else [1]
    return sum((_long(layers[l - 1][0]).detach().flatten(1) @ w[f"R{l}"].T for l in read), torch.zeros(()))


@pytest.mark.parametrize("normalize_input", [True, False])
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize("theta", [0.1, 1.0])
def test_the_update_is_the_gradient_of_each_layers_own_loss_and_of_the_readouts(
    problem: Problem, name: str, theta: float, normalize_input: bool
) -> None:
    net, rule = problem.activated(name).net, ForwardForward(theta, normalize_input=normalize_input)
    batch, classes = problem.noisy(rule), problem.batch.loss.classes
    labels = (batch.y.argmax(1) if classes > 2 else batch.y[:, 0].long()).tolist()
    if classes > 2:
        wrong = [
            max((i for i in range(classes) if i != k), key=lambda i: r[i])
            for k, r in zip(labels, batch.noise["wrong_label"], strict=True)
        ]
    else:
        wrong = [1 - label for label in labels]
    positive, negative = (_labelled(net, batch.x, each, classes) for each in (labels, wrong))
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    read = _read(rule, net, w, batch.x, classes)
    loss = batch.loss.value(read, batch.y).mean()
    for l, ((_, good), (_, bad)) in enumerate(
        zip(_run(rule, net, w, positive), _run(rule, net, w, negative), strict=True), start=1
    ):
        threshold = theta * net.units(l)
        loss = loss + (F.softplus(threshold - good).mean() + F.softplus(bad - threshold).mean()) / 2
    expected = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    fixed = {name: t.detach() for name, t in w.items()}
    grads, logits = rule.grads(net, fixed, batch)
    torch.testing.assert_close((grads, logits), (expected, read.detach()))
    alone, none = replace(rule, readout="goodness").grads(net, fixed, batch)
    torch.testing.assert_close(alone, {name: g for name, g in expected.items() if name[0] != "R"})
    assert none is None


@pytest.mark.parametrize("normalize_input", [True, False])
def test_the_answers_are_the_readout_and_the_goodness_of_all_layers_but_the_first_with_each_label(
    problem: Problem, normalize_input: bool
) -> None:
    net, rule, x = problem.net, ForwardForward(normalize_input=normalize_input), problem.batch.x
    w, classes = problem.weights(rule), problem.batch.loss.classes
    G = torch.stack(
        [
            torch.stack([g for _, g in _run(rule, net, w, _labelled(net, x, [k] * len(x), classes))]).T
            for k in range(classes)
        ],
        1,
    )  # (N, classes, layers)
    total = (G[..., 1:] if net.L > 1 else G).sum(-1)
    expected = total if classes > 2 else total[:, 1:] - total[:, :1]
    torch.testing.assert_close(rule.logits(net, w, x), _read(rule, net, w, x, classes))
    torch.testing.assert_close(rule.other_logits(net, w, x), {"goodness": expected})
    alone = replace(rule, readout="goodness")
    torch.testing.assert_close(alone.logits(net, w, x), expected)
    assert alone.other_logits(net, w, x) == alone.feedback(net, lambda *_: x) == {}


def test_the_readout_leaves_the_layers_alone(problem: Problem) -> None:
    rule = ForwardForward()
    w, batch = problem.weights(rule), problem.noisy(rule)
    grads = [rule.grads(problem.net, w | r, batch)[0] for r in ({}, {n: 3 * t for n, t in w.items() if n[0] == "R"})]
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]) == (name[0] != "R"), name


def test_the_readouts_rate_is_its_own(problem: Problem, learner: Callable[..., Any]) -> None:
    rule = ForwardForward(readout_rate=7.0)
    w = problem.weights(rule)
    trained = learner(problem.net, rule, problem.batch.loss, w, partial(torch.optim.SGD, lr=1.0))
    trained.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
    moved = {name: w[name] - p[0] for name, p in trained.w.items()}
    grads = {name: p.grad[0] for name, p in trained.w.items()}
    torch.testing.assert_close(moved, grads)
    once = learner(
        problem.net, replace(rule, readout_rate=1.0), problem.batch.loss, w, partial(torch.optim.SGD, lr=1.0)
    )
    once.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
    for name, p in once.w.items():
        torch.testing.assert_close(grads[name], (7 if name[0] == "R" else 1) * p.grad[0])


@pytest.mark.parametrize("stack", [False, True])
def test_both_answers_are_in_the_record(config: Config, stack: bool) -> None:
    records = train(config("rule=forward_forward", "arch.activation=relu", "seeds=2", f"stack={stack}"))
    for record in records:
        assert record.test is not None
        assert record.test.keys() >= {"accuracy", "accuracy_goodness"}
        assert all(epoch.keys() >= {"train/accuracy", "val/accuracy_goodness"} for epoch in record.epochs)
        assert 0.05 < record.test["accuracy_goodness"] < 1
        assert record.test["accuracy"] != record.test["accuracy_goodness"]


def test_goodness_beside_the_readout_is_that_of_the_goodness_alone(config: Config) -> None:
    """The layers learn the same, whatever reads them."""
    (both,) = train(config("rule=forward_forward", "max_epochs=1"))
    (alone,) = train(config("rule=forward_forward", "max_epochs=1", "rule.readout=goodness"))
    assert both.epochs[-1]["val/accuracy_goodness"] == pytest.approx(alone.epochs[-1]["val/accuracy"])
    assert "val/accuracy_goodness" not in alone.epochs[-1]


def test_a_wrong_label_is_any_of_the_others_alike() -> None:
    label = F.one_hot(torch.arange(4), 4).double().repeat(3000, 1)
    wrong = _other(label, torch.randn(label.shape, generator=torch.Generator().manual_seed(0)))
    counts = label.T @ wrong  # (right, wrong)
    assert torch.equal(wrong.sum(1), torch.ones(12000, dtype=torch.float64))
    assert not counts.diagonal().any()
    assert ((counts - 1000).abs() < 120)[~torch.eye(4, dtype=torch.bool)].all()


@pytest.mark.parametrize("rule", [ForwardForward(), GOODNESS], ids=["linear", "goodness"])
def test_a_dead_layer_gives_no_nan(problem: Problem, rule: ForwardForward) -> None:
    net = problem.activated("relu").net
    w = {name: -t.abs() for name, t in problem.weights(rule).items()}
    batch = replace(problem.noisy(rule), x=problem.batch.x.abs())
    grads, _ = rule.grads(net, w, batch)
    assert rule.logits(net, w, batch.x).isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_more_classes_than_pixels_are_refused() -> None:
    net = mlp((1, 1, 3), 4, hidden=[5], activation="relu")
    with pytest.raises(ValueError, match=r"4 classes need as many, and images of shape \(1, 1, 3\) have 3"):
        ForwardForward().noise(net, 2)
