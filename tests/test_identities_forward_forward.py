"""Forward-forward descends each layer's own loss; its answer is the goodness with each label."""

from dataclasses import replace
from math import cos, pi, sin

import pytest
import torch
import torch.nn.functional as F
from conftest import Problem
from torch import Tensor

from nobackprop.layers import Conv
from nobackprop.network import Network, mlp
from nobackprop.rules.forward_forward import ForwardForward, _other


def _with_label(net: Network, x: Tensor, label: int, classes: int) -> Tensor:
    image = x.clone()
    if not isinstance(net.layers[0], Conv):
        image.view(-1)[:classes] = 0
        image.view(-1)[label] = 1
        return image
    direction, length = pi * label / classes, 8 if label % 2 else 4
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            wave = (1 + cos(2 * pi * (j * cos(direction) + i * sin(direction)) / length)) / 2
            image[:, i, j] = 0.65 * x[:, i, j] + 0.35 * wave
    return image


def _run(net: Network, w: dict[str, Tensor], h: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's activations and goodness; no derivative goes from one layer to the next."""
    layers = []
    for l in range(1, net.L + 1):
        h = net.activation.f(net.preactivation(l, w, h.detach()))
        layers.append((h, h.flatten(1).pow(2).sum(1)))
        h = h / h.flatten(1).pow(2).mean(1).sqrt().view(-1, *[1] * (h.ndim - 1))
    return layers


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize("theta", [0.1, 1.0])
def test_the_update_is_the_gradient_of_each_layers_own_loss(problem: Problem, name: str, theta: float) -> None:
    net, rule = problem.activated(name).net, ForwardForward(theta)
    batch, classes = problem.noisy(rule), problem.batch.loss.classes
    labels = batch.y.argmax(1) if classes > 2 else batch.y[:, 0].long()
    if classes > 2:
        wrong = [
            max((i for i in range(classes) if i != k), key=lambda i: r[i])
            for k, r in zip(labels, batch.noise["wrong_label"], strict=True)
        ]
    else:
        wrong = (1 - labels).tolist()
    positive = torch.stack([_with_label(net, x, k, classes) for x, k in zip(batch.x, labels.tolist(), strict=True)])
    negative = torch.stack([_with_label(net, x, k, classes) for x, k in zip(batch.x, wrong, strict=True)])
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    loss = torch.zeros((), dtype=torch.float64)
    for l, ((_, good), (_, bad)) in enumerate(
        zip(_run(net, w, positive), _run(net, w, negative), strict=True), start=1
    ):
        threshold = theta * net.units(l)
        loss = loss + (F.softplus(threshold - good).mean() + F.softplus(bad - threshold).mean()) / 2
    expected = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    torch.testing.assert_close(rule.grads(net, {name: t.detach() for name, t in w.items()}, batch)[0], expected)


def test_logits_are_the_goodness_of_all_layers_but_the_first_with_each_label(problem: Problem) -> None:
    net, rule, x = problem.net, ForwardForward(), problem.batch.x
    w, classes = problem.weights(rule), problem.batch.loss.classes
    G = torch.stack(
        [
            torch.stack([g for _, g in _run(net, w, torch.stack([_with_label(net, one, k, classes) for one in x]))]).T
            for k in range(classes)
        ],
        1,
    )  # (N, classes, layers)
    total = (G[..., 1:] if net.L > 1 else G).sum(-1)
    expected = total if classes > 2 else total[:, 1:] - total[:, :1]
    torch.testing.assert_close(rule.logits(net, w, x), expected)


def test_a_wrong_label_is_any_of_the_others_alike() -> None:
    label = F.one_hot(torch.arange(4), 4).double().repeat(3000, 1)
    wrong = _other(label, torch.randn(label.shape, generator=torch.Generator().manual_seed(0)))
    counts = label.T @ wrong  # (right, wrong)
    assert torch.equal(wrong.sum(1), torch.ones(12000, dtype=torch.float64))
    assert not counts.diagonal().any()
    assert ((counts - 1000).abs() < 120)[~torch.eye(4, dtype=torch.bool)].all()


def test_a_dead_layer_gives_no_nan(problem: Problem) -> None:
    net = problem.activated("relu").net
    w = {name: -t.abs() for name, t in problem.weights(ForwardForward()).items()}
    batch = replace(problem.noisy(ForwardForward()), x=problem.batch.x.abs())
    grads, _ = ForwardForward().grads(net, w, batch)
    assert ForwardForward().logits(net, w, batch.x).isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_more_classes_than_pixels_are_refused() -> None:
    net = mlp((1, 1, 3), 4, hidden=[5], activation="relu")
    with pytest.raises(ValueError, match=r"4 classes need as many, and images of shape \(1, 1, 3\) have 3"):
        ForwardForward().noise(net, 2)
