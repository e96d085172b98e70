"""Every rule on every kind of net in every precision: a step of training, as Lightning's Trainer computes it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Config, Problem, train
from pytorch_lightning.plugins import DoublePrecision, MixedPrecision, Precision
from torch import Tensor

from nobackprop.core.layers import Conv, Dense, Layer, Shape
from nobackprop.core.rule import Rule

PRECISIONS = {"64-true": DoublePrecision(), "32-true": Precision(), "bf16-mixed": MixedPrecision("bf16-mixed", "cpu")}
TYPES = {"64-true": torch.float64, "32-true": torch.float32, "bf16-mixed": torch.float32}


def computing(precision: str) -> AbstractContextManager[Any]:
    return PRECISIONS[precision].forward_context()


def typed(problem: Problem, dtype: torch.dtype) -> Problem:
    batch = problem.batch
    return replace(problem, batch=replace(batch, x=batch.x.to(dtype), y=batch.y.to(dtype)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_moves_each_weight_by_its_gradient(
    rule: Rule, problem: Problem, precision: str, learner: Callable[..., Any]
) -> None:
    net, batch, dtype = problem.net, typed(problem, TYPES[precision]).batch, TYPES[precision]
    before = {name: t.to(dtype) for name, t in problem.weights(rule).items()}
    trained = learner(net, rule, batch.loss, before, partial(torch.optim.SGD, lr=1.0))
    given: list[dict[str, Tensor]] = []
    for i, phase in enumerate(trained.phases):

        def noted(*args: Any, phase: Callable[..., Any] = phase) -> Any:
            grads, logits = phase(*args)
            given.append({name: g for name, g in grads.items() if name in before})
            return grads, logits

        trained.phases[i] = noted
    with torch.no_grad(), computing(precision):
        trained.step(batch.x.unsqueeze(0), batch.y.unsqueeze(0))
    assert {f"W{l}" for l in range(1, net.L + 1)} <= {name for grads in given for name in grads}
    for grads in given:
        for name, g in grads.items():
            assert g.shape == before[name].shape
            assert g.isfinite().all(), name
    for name, p in trained.w.items():
        assert (p.dtype, p[0].shape) == (dtype, before[name].shape)
        assert torch.equal(p[0], before[name]) == (not any(grads[name].any() for grads in given if name in grads)), name


def test_short_products_give_nearly_the_same_gradients(rule: Rule, problem: Problem) -> None:
    """Also where a rule compares two activations that are almost the same; less so where maps amplify what was rounded.

    Max pooling may choose another unit, and a norm divides by what is small.
    """
    within = 0.4 if any(problem.net.parts()) else 0.95
    batch = typed(replace(problem, batch=problem.noisy(rule)), torch.float32).batch
    batch = replace(batch, noise={name: t.float() for name, t in batch.noise.items()})
    w = {name: t.float() for name, t in problem.weights(rule).items()}
    with torch.no_grad():
        expected, _ = rule.all_grads(problem.net, w, batch)
        with computing("bf16-mixed"):
            grads, _ = rule.all_grads(problem.net, w, batch)
    assert grads.keys() == expected.keys()
    for name, g in grads.items():
        assert F.cosine_similarity(g.flatten(), expected[name].flatten(), dim=0) > within, name
        assert not torch.equal(g, expected[name]), "nothing was computed in a short type"


@pytest.mark.parametrize("layer", [Dense(5), Conv(4, 3), Conv(4, 3, stride=2, padding=1)], ids=str)
def test_short_operations_are_those_of_autograd_under_autocast(layer: Layer) -> None:
    in_shape = (3, 8, 7)
    generator = torch.Generator().manual_seed(0)
    shapes: list[Shape] = [layer.weight_shape(in_shape), (6, *in_shape), (6, *layer.out_shape(in_shape))]
    W, h, d = (torch.randn(shape, generator=generator) for shape in shapes)
    b = torch.randn(len(W), generator=generator)
    with computing("bf16-mixed"):
        ours = layer.forward(W, b, h), layer.feedback(W, d, like=h), *layer.hebbian(h, d)
        inputs = [t.requires_grad_() for t in (h, W, b)]
        plain = {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, Conv) else {}
        z = F.conv2d(h, W, b, **plain) if plain else F.linear(h.flatten(1), W, b)
        dh, dW, db = torch.autograd.grad(z, inputs, d.to(z.dtype))
    assert z.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in ours)
    for t, theirs in zip(ours, (z, dh, dW / len(h), db / len(h)), strict=True):
        torch.testing.assert_close(t, theirs.float(), rtol=2**-6, atol=2**-6)


CONVOLUTIONAL = ["arch=allconv", "arch.filters=[[3,3,1],[4,3,2,1]]", "trainer.precision=bf16-mixed", "max_steps=3"]


def test_a_convolutional_net_trains_in_mixed_precision(config: Config) -> None:
    """The whole way, validation and test included."""
    for record in train(config("rule=lra_e", *CONVOLUTIONAL, "seeds=2", "stack=true", "diagnostics=alignment")):
        assert record.steps == 3
        assert record.test is not None
        assert record.diverged_epoch is None


@pytest.mark.slow  # the compiler takes half a minute
def test_a_compiled_convolutional_net_trains_in_mixed_precision(config: Config, tmp_path) -> None:
    eager, compiled = (
        train(config("rule=bp", *CONVOLUTIONAL, f"compile={c}", f"paths.runs={tmp_path}/{c}"))[0] for c in (False, True)
    )
    assert compiled.machine.compiled
    assert compiled.epochs[0]["train/loss"] == pytest.approx(eager.epochs[0]["train/loss"], rel=0.01)
