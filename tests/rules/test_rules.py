"""The contract of a learning rule, over every config in conf/rule and every small net: nothing to add for a new rule.

What a particular rule computes is in test_identities.py and test_golden.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Problem
from torch import Tensor
from torch.utils._pytree import tree_map

from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.layers import Shape
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.core.random import normal
from nobackprop.core.rule import FAMILIES, Batch, Rule
from nobackprop.mistakes import Mistake

Outputs = tuple[dict[str, Tensor], list[Tensor]]


def _phases(rule: Rule, problem: Problem, w: dict[str, Tensor], batch: Batch | None = None) -> tuple[Outputs, ...]:
    """What each phase of the rule gives, all from the same weights; an empty list in the place of no logits."""
    batch, found = batch or problem.noisy(rule), []
    for phase in rule.phases():
        given, logits = phase(problem.net, w, batch)
        grads, batch = batch.after(given, w)
        found.append((grads, [] if logits is None else [logits]))
    return tuple(found)


def _grads(
    rule: Rule, problem: Problem, w: dict[str, Tensor], batch: Batch | None = None
) -> dict[tuple[int, str], Tensor]:
    """Every gradient of every phase, by phase and name."""
    phases = _phases(rule, problem, w, batch)
    return {(i, name): g for i, (grads, _) in enumerate(phases) for name, g in grads.items()}


def _samples(rule: Rule, problem: Problem, which: Tensor) -> Batch:
    """The samples of those numbers, each with the noise of its own."""
    batch = problem.noisy(rule)
    n = len(batch.x)
    more = rule.noise(problem.net, n + 1)
    own = {name for name, t in batch.noise.items() if t.shape != more[name]}
    noise = {name: t[which] if name in own else t for name, t in batch.noise.items()}
    assert all(noise[name].shape == shape for name, shape in rule.noise(problem.net, len(which)).items())
    return replace(batch, x=batch.x[which], y=batch.y[which], noise=noise)


def test_gradients_fit_the_weights_and_logits_are_the_rules(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    before = {name: t.clone() for name, t in w.items()}
    grads = _grads(rule, problem, w)
    moved = {name for _, name in grads}
    assert moved <= w.keys()
    assert {f"W{l}" for l in range(1, problem.net.L + 1)} <= moved
    for (_, name), g in grads.items():
        assert (g.shape, g.dtype) == (w[name].shape, w[name].dtype), name
        assert g.isfinite().all(), name
        assert not g.requires_grad, name
    assert moved == {name for (_, name), g in grads.items() if g.any()}
    for logits in _phases(rule, problem, w)[-1][1]:
        assert not logits.requires_grad
        torch.testing.assert_close(logits, rule.logits(problem.net, w, problem.batch.x))
    assert w.keys() == before.keys()
    assert all(torch.equal(w[name], t) for name, t in before.items())


def test_layers_in_which_no_unit_is_active_leave_gradients_finite(rule: Rule, problem: Problem) -> None:
    problem = problem.activated("relu")
    w = problem.weights(rule)
    w |= {f"b{l}": torch.full_like(w[f"b{l}"], -1000) for l in range(1, problem.net.L) if f"b{l}" in w}
    grads = _grads(rule, problem, w)
    assert all(g.isfinite().all() for g in grads.values()), [
        name for name, g in grads.items() if not g.isfinite().all()
    ]


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
    grads = _grads(rule, problem, w)
    for name in own:
        changed = _grads(rule, problem, w | {name: 2 * w[name]})
        assert any(not torch.equal(changed[other], g) for other, g in grads.items()), f"{name} is not used"


def test_all_the_noise_asked_for_is_used(rule: Rule, problem: Problem) -> None:
    w, batch = problem.weights(rule), problem.noisy(rule)
    grads = _grads(rule, problem, w, batch)
    for name in batch.noise:
        other = replace(batch, noise={**batch.noise, name: -2 * batch.noise[name]})
        changed = _grads(rule, problem, w, other)
        assert any(not torch.equal(changed[key], g) for key, g in grads.items()), f"{name} is not used"


def test_a_look_at_all_phases_gives_each_weights_last_gradient(rule: Rule, problem: Problem) -> None:
    w, batch = problem.weights(rule), problem.noisy(rule)
    grads, logits = rule.all_grads(problem.net, w, batch)
    phases = _phases(rule, problem, w, batch)
    assert grads.keys() == set().union(*(phase for phase, _ in phases))
    for name, g in grads.items():
        *_, last = (phase[name] for phase, _ in phases if name in phase)
        assert torch.equal(g, last)
    torch.testing.assert_close(logits, rule.logits(problem.net, w, batch.x))


def test_without_biases_none_are_asked_for(rule: Rule, problem: Problem) -> None:
    bare = replace(problem, net=replace(problem.net, bias=False))
    assert not any(name.startswith("b") for _, name in _grads(rule, bare, bare.weights(rule)))


def test_the_order_of_samples_does_not_matter(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected = tuple((grads, [z[order] for z in logits]) for grads, logits in _phases(rule, problem, w))
    torch.testing.assert_close(_phases(rule, problem, w, _samples(rule, problem, order)), expected)


def test_the_gradient_is_the_mean_of_each_samples_own(rule: Rule, problem: Problem) -> None:
    """Which lets any rule train in parallel: the halves of a batch give the whole batch's gradient."""
    w = problem.weights(rule)
    each = [_grads(rule, problem, w, _samples(rule, problem, torch.tensor([i]))) for i in range(len(problem.batch.x))]
    grads = _grads(rule, problem, w)
    torch.testing.assert_close({name: torch.stack([g[name] for g in each]).mean(0) for name in grads}, grads)


def test_stacked_seeds_equal_a_loop(rule: Rule, problem: Problem) -> None:
    seeds = [problem.weights(rule, seed) for seed in range(3)]
    batches = [
        replace(problem.noisy(rule, s), x=problem.batch.x.roll(s, 0) + s, y=problem.batch.y.roll(s + 1, 0))
        for s in range(3)
    ]

    def all_of_it(w: dict[str, Tensor], x: Tensor, y: Tensor, noise: dict[str, Tensor]) -> Any:
        phases = _phases(rule, problem, w, Batch(x, y, problem.batch.loss, noise))
        return phases, rule.logits(problem.net, w, x), rule.constrain(problem.net, w)

    alone = [(w, b.x, b.y, dict(b.noise)) for w, b in zip(seeds, batches, strict=True)]
    stacked = torch.func.vmap(all_of_it)(*tree_map(lambda *each: torch.stack(each), *alone))
    for s, arguments in enumerate(alone):
        torch.testing.assert_close(tree_map(lambda t, s=s: t[s], stacked), all_of_it(*arguments))


def test_activations_computed_again_give_the_same_gradients(rule: Rule, problem: Problem) -> None:
    w = problem.weights(rule)
    frugal = replace(problem, net=replace(problem.net, recompute=True))
    for again, kept in zip(_phases(rule, frugal, w), _phases(rule, problem, w), strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.few
def test_compiled_whole_equals_eager(rule: Rule, problem: Problem) -> None:
    torch.compiler.reset()  # else the nets before this one count as recompilations
    w, batch = problem.weights(rule), problem.noisy(rule)

    def all_phases(w: dict[str, Tensor], x: Tensor, y: Tensor, noise: dict[str, Tensor]) -> tuple[Outputs, ...]:
        return _phases(rule, problem, w, Batch(x, y, batch.loss, noise))

    compiled = torch.compile(all_phases, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w, batch.x, batch.y, dict(batch.noise)), _phases(rule, problem, w, batch))


def test_runs_on_tensors_without_memory(rule: Rule, problem: Problem) -> None:
    w = {name: t.to("meta") for name, t in problem.weights(rule).items()}
    batch = problem.noisy(rule)
    noise = {name: t.to("meta") for name, t in batch.noise.items()}
    phases = _phases(rule, problem, w, Batch(batch.x.to("meta"), batch.y.to("meta"), batch.loss, noise))
    for grads, logits in phases:
        assert all(g.shape == w[name].shape and g.is_meta for name, g in grads.items())
        assert all(z.shape == batch.y.shape for z in logits)


def test_activations_without_a_derivative_are_taken_or_refused(rule: Rule) -> None:
    net, loss = mlp((12,), 4, hidden=[7, 6, 5], activation="tanh"), SoftmaxCrossEntropy(4)
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(net, Batch(x, loss.target(torch.arange(6) % 4, x.dtype), loss))
    w = problem.weights(rule)
    without = replace(problem, net=replace(net, activation=replace(net.activation, derivative=None)))
    asked: list[bool] = []
    noting = replace(net.activation, derivative=lambda z, h: (asked.append(True), 1 - h.square())[1])
    expected = _grads(rule, replace(problem, net=replace(net, activation=noting)), w)
    if asked:
        with pytest.raises(Mistake, match="'tanh' has no derivative and this rule needs one"):
            _grads(rule, without, w)
    else:
        torch.testing.assert_close(_grads(rule, without, w), expected, rtol=0, atol=0)


def test_signs_are_right_at_the_start(rule: Rule, problem: Problem) -> None:
    w = initial_weights(problem.net, rule, Normal(1.0), Normal(1.0), seed=0)
    nonnegative = rule.nonnegative(problem.net)
    assert nonnegative <= w.keys()
    for name, t in w.items():
        if not name.startswith("b"):
            assert (t >= 0).all() == (name in nonnegative), name


def test_a_step_takes_the_phases_in_turn_and_touches_nothing_else(
    rule: Rule, problem: Problem, learner: Callable[..., Any]
) -> None:
    net, batch = problem.net, problem.batch
    before, rate = problem.weights(rule), 1.0
    trained = learner(net, rule, batch.loss, before, partial(torch.optim.SGD, lr=rate))
    logits = trained.step(batch.x.unsqueeze(0), batch.y.unsqueeze(0))
    after = {name: p[0] for name, p in trained.w.items()}

    noise = {name: t.to(batch.x) for name, t in normal(rule.noise(net, len(batch.x)), 0, "noise", 0).items()}
    w, moved, expected = dict(before), set(), None
    batch = replace(batch, noise=noise)
    for phase in rule.phases():
        given, expected = phase(net, w, batch)
        grads, batch = batch.after(given, w)
        w |= {name: w[name] - rate * rule.gain(name) * g for name, g in grads.items()}
        w |= rule.constrain(net, w)
        moved |= grads.keys() | rule.constrain(net, w).keys()
    torch.testing.assert_close(after, w)
    torch.testing.assert_close(logits, None if expected is None else expected.unsqueeze(0))
    for name, projected in rule.constrain(net, after).items():
        assert torch.equal(after[name], projected), name
    for name in w.keys() - moved:
        assert torch.equal(after[name], before[name]), name


def test_every_rule_says_to_which_family_it_belongs(rule: Rule) -> None:
    assert rule.family in FAMILIES


@pytest.mark.few
def test_the_loss_falls(
    rule: Rule, problem: Problem, hundred_steps: Callable[[Problem, Rule], tuple[float, float]]
) -> None:
    first, last = hundred_steps(problem, rule)
    # Hebbian layers below the output see no labels, and nets with maps are deep for a hundred steps of noisy rules.
    assert last < (0.95 if rule.family == "Hebbian" or any(problem.net.parts()) else 0.8) * first
