"""The contract of a learning rule, over every config in conf/rule and every small net: nothing to add for a new rule.

What a particular rule computes is in test_identities.py and test_golden.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from conftest import Problem
from torch import Tensor

from nobackprop.initializers import Normal, initial_weights
from nobackprop.layers import Shape
from nobackprop.rule import Batch, Rule

Grads = tuple[dict[str, Tensor], Tensor]


def _grads(
    rule: Rule, problem: Problem, w: dict[str, Tensor], x: Tensor | None = None, y: Tensor | None = None
) -> Grads:
    batch = problem.batch
    return rule.grads(problem.net, w, Batch(batch.x if x is None else x, batch.y if y is None else y, batch.loss))


def _assert_close(actual: Grads, expected: Grads) -> None:
    assert actual[0].keys() == expected[0].keys()
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_gradients_fit_the_weights_and_logits_are_the_nets(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    before = {name: t.clone() for name, t in w.items()}
    grads, logits = _grads(rule, problem, w)
    assert grads.keys() <= w.keys()
    assert {f"W{l}" for l in range(1, problem.net.L + 1)} <= grads.keys()
    for name, g in grads.items():
        assert (g.shape, g.dtype) == (w[name].shape, w[name].dtype), name
        assert g.isfinite().all(), name
        assert g.any(), name
        assert not g.requires_grad, name
    torch.testing.assert_close(logits, problem.net.logits(w, problem.batch.x))
    assert w.keys() == before.keys()
    assert all(torch.equal(w[name], t) for name, t in before.items())


def test_each_of_the_rules_own_weights_is_drawn_by_its_name_and_used(rule: Rule, problem: Problem) -> None:
    drawn: list[str] = []

    def draw(name: str, shape: Shape) -> Tensor:
        drawn.append(name)
        return torch.zeros(shape)

    own = rule.feedback(problem.net, draw)
    assert sorted(drawn) == sorted(own)  # a name is a random stream: two weights of one name would be alike
    w = problem.weights(rule)
    assert all(name[0] not in "Wb" for name in own)
    assert w.keys() == own.keys() | {f"{letter}{l}" for letter in "Wb" for l in range(1, problem.net.L + 1)}
    grads, _ = _grads(rule, problem, w)
    for name in own:
        changed, _ = _grads(rule, problem, w | {name: 2 * w[name]})
        assert any(not torch.equal(changed[other], g) for other, g in grads.items()), f"{name} is not used"


def test_without_biases_none_are_asked_for(rule: Rule, problem: Problem) -> None:
    bare = replace(problem, net=replace(problem.net, bias=False))
    grads, _ = _grads(rule, bare, bare.weights(rule))
    assert not any(name.startswith("b") for name in grads)


def test_weights_that_require_grad_give_plain_gradients_under_no_grad(rule: Rule, problem: Problem) -> None:
    w = {name: t.requires_grad_() for name, t in problem.weights(rule).items()}
    with torch.no_grad():
        grads, logits = _grads(rule, problem, w)
    assert not any(t.requires_grad for t in [*grads.values(), logits])


def test_the_order_of_samples_does_not_matter(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    grads, logits = _grads(rule, problem, w, problem.batch.x[order], problem.batch.y[order])
    expected = _grads(rule, problem, w)
    _assert_close((grads, logits), (expected[0], expected[1][order]))


def test_the_gradient_is_the_mean_of_each_samples_own(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    samples = zip(problem.batch.x.split(1), problem.batch.y.split(1), strict=True)
    each = [_grads(rule, problem, w, x, y)[0] for x, y in samples]
    grads, _ = _grads(rule, problem, w)
    torch.testing.assert_close({name: torch.stack([g[name] for g in each]).mean(0) for name in grads}, grads)


def test_stacked_seeds_equal_a_loop(rule: Rule, problem: Problem) -> None:
    seeds = [problem.weights(rule, seed) for seed in range(3)]
    batches = [(problem.batch.x.roll(s, 0) + s, problem.batch.y.roll(s + 1, 0)) for s in range(3)]
    stack = {name: torch.stack([w[name] for w in seeds]) for name in seeds[0]}
    x, y = (torch.stack(t) for t in zip(*batches, strict=True))
    grads, logits = torch.func.vmap(lambda w, x, y: _grads(rule, problem, w, x, y))(stack, x, y)
    for s, (w, batch) in enumerate(zip(seeds, batches, strict=True)):
        _assert_close(({name: g[s] for name, g in grads.items()}, logits[s]), _grads(rule, problem, w, *batch))
    projected = torch.func.vmap(lambda w: rule.constrain(problem.net, w))(stack)
    for s, w in enumerate(seeds):
        torch.testing.assert_close({n: t[s] for n, t in projected.items()}, rule.constrain(problem.net, w))


def test_activations_computed_again_give_the_same_gradients(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    frugal = replace(problem, net=replace(problem.net, recompute=True))
    (grads, logits), (kept, kept_logits) = _grads(rule, frugal, w), _grads(rule, problem, w)
    assert grads.keys() == kept.keys()
    assert all(torch.equal(g, kept[name]) for name, g in grads.items())
    assert torch.equal(logits, kept_logits)


def test_compiled_whole_equals_eager(rule: Rule, problem: Problem) -> None:
    torch.compiler.reset()  # else the nets before this one count as recompilations
    w = problem.weights(rule)
    compiled = torch.compile(lambda w, x, y: _grads(rule, problem, w, x, y), backend="aot_eager", fullgraph=True)
    _assert_close(compiled(w, problem.batch.x, problem.batch.y), _grads(rule, problem, w))


def test_runs_on_tensors_without_memory(rule: Rule, problem: Problem) -> None:
    w = {name: t.to("meta") for name, t in problem.weights(rule).items()}
    grads, logits = _grads(rule, problem, w, problem.batch.x.to("meta"), problem.batch.y.to("meta"))
    assert all(g.shape == w[name].shape and g.is_meta for name, g in grads.items())
    assert logits.shape == problem.batch.y.shape


def test_signs_are_right_at_the_start(rule: Rule, problem: Problem) -> None:
    w = initial_weights(problem.net, rule, Normal(1.0), Normal(1.0), seed=0)
    nonnegative = rule.nonnegative(problem.net)
    assert nonnegative <= w.keys()
    for name, t in w.items():
        if not name.startswith("b"):
            assert (t >= 0).all() == (name in nonnegative), name


def test_constraints_hold_after_a_step_and_touch_nothing_else(
    rule: Rule, problem: Problem, learner: Callable[..., Any]
) -> None:
    w, rate = problem.weights(rule), 100.0
    trained = learner(problem.net, rule, problem.batch.loss, w, partial(torch.optim.SGD, lr=rate))
    trained.step(problem.batch.x.unsqueeze(0), problem.batch.y.unsqueeze(0))
    after = {name: p[0] for name, p in trained.w.items()}
    projected = rule.constrain(problem.net, after)
    assert projected.keys() <= w.keys()
    for name, t in after.items():
        if name in projected:
            assert torch.equal(t, projected[name]), name
        elif trained.w[name].grad is None:
            assert torch.equal(t, w[name]), name
        else:
            torch.testing.assert_close(t, w[name] - rate * trained.w[name].grad[0], msg=name)


def test_the_loss_falls(rule: Rule, problem: Problem, train: Callable[[Problem, Rule], tuple[float, float]]) -> None:
    first, last = train(problem, rule)
    assert last < 0.8 * first
