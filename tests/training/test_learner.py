"""One update, seeds stacked against seeds alone, divergence, and what is kept per seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from conftest import fitted
from torch import Tensor

from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.optimizers import Adam
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.data.batches import task
from nobackprop.data.pixels import Pixels
from nobackprop.data.sources import Dataset, Images
from nobackprop.mistakes import Mistake
from nobackprop.rules.dfa import DFA
from nobackprop.rules.forward_forward import ForwardForward
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.training.learner import Learner
from nobackprop.training.run import divide, keeps_seeds_apart

SGD = partial(torch.optim.SGD, lr=0.1)
NET = mlp((1, 4, 4), 3, hidden=[6, 5], activation="tanh")
CONV = allconv((1, 4, 4), 3, filters=[[3, 3, 1, 1], [2, 2, 2]], activation="tanh")


def small_images(n: int, generator: torch.Generator) -> Images:
    """Three classes, each with a bright row of its own."""
    labels = torch.randint(3, (n,), generator=generator)
    pixels = torch.randint(100, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[torch.arange(n), 0, labels] += 150
    return Images(pixels, labels)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset("rows", small_images(200, generator), small_images(50, generator), 3)


Fit = Callable[..., Learner]


@pytest.fixture
def fit(dataset: Dataset) -> Fit:
    """`fit(net, rule, seeds)` trains those seeds as one stack."""

    def run(
        net: Network,
        rule: Rule,
        seeds: list[int],
        epochs: int = 2,
        device: str = "cpu",
        change: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]] = lambda _, w: w,
        **options: Any,
    ) -> Learner:
        tasks = [task(dataset, seed) for seed in seeds]
        weights = {seed: change(seed, initial_weights(net, rule, Uniform(), Uniform(), seed)) for seed in seeds}
        options = {"optimizer": SGD, "pixels": Pixels(), **options}
        loss = SoftmaxCrossEntropy(3)
        learner = fitted(
            dataset, net, rule, loss, tasks, weights, batch_size=18, epochs=epochs, device=device, **options
        )
        learner.trainer.test(learner, verbose=False)
        return learner

    return run


def step_once(learner: Learner, w: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step from w on a fixed batch: the rule's gradients, and the weights afterwards."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 1, 4, 4, generator=generator)
    y = learner.loss.target(torch.arange(8) % 3, x.dtype)
    grads, _ = learner.rule.grads(learner.net, w, Batch(x, y, learner.loss))
    with torch.no_grad():
        learner.step(x[None], y[None])
    return grads, {name: p[0] for name, p in learner.w.items()}


@pytest.mark.parametrize("update", ["mean", "sum", "unit_norm"])
def test_a_step_is_update_then_gain_then_l2(learner: Callable[..., Learner], update: str) -> None:
    rule = LRAE(gamma=0.5)
    w = initial_weights(NET, rule, Uniform(), Uniform(), 0)
    l = learner(NET, rule, SoftmaxCrossEntropy(3), w, SGD, update=update, l2=0.01)
    grads, after = step_once(l, w)
    for name, g in grads.items():
        g = {"mean": g, "sum": 8 * g, "unit_norm": g / (g.norm() + 1e-8)}[update]
        gain = 0.5 if name.startswith("E") else 1
        torch.testing.assert_close(after[name], w[name] - 0.1 * (gain * g + 0.01 * w[name]))


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_steps_are_the_same_but_for_rounding(learner: Callable[..., Learner]) -> None:
    rule = LRAE()
    w = initial_weights(NET, rule, Uniform(), Uniform(), 0)
    eager, compiled = (learner(NET, rule, SoftmaxCrossEntropy(3), w, SGD, compile=c) for c in (False, True))
    for l in (eager, compiled):
        for _ in range(3):
            step_once(l, w)
    torch.testing.assert_close(dict(compiled.w), dict(eager.w))


@pytest.mark.slow  # the compiler takes half a minute
def test_every_net_of_a_process_is_compiled(learner: Callable[..., Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config, utils

    monkeypatch.setattr(config, "recompile_limit", 1)  # of a function's code, which all nets share
    torch.compiler.reset()
    compiled = []
    for rule in (DFA(), LRAE()):
        w = initial_weights(NET, rule, Uniform(), Uniform(), 0)
        step_once(learner(NET, rule, SoftmaxCrossEntropy(3), w, SGD, compile=True), w)
        compiled.append(utils.counters["frames"]["ok"])
    assert 0 < compiled[0] < compiled[1]


def test_a_step_that_finds_no_memory_is_a_mistake(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(LRAE, "grads", full)
    told = r"a step on 18 images takes more memory than there is \(CUDA out .*\): use a smaller batch_size or arch, or "
    with pytest.raises(Mistake, match=f"{told}recompute=true; stack=false trains the 2 seeds one after another"):
        fit(NET, LRAE(), [0, 1])
    with pytest.raises(Mistake, match=f"{told}recompute=true$"):
        fit(NET, LRAE(), [0])


def test_weights_without_a_gradient_are_left_alone(learner: Callable[..., Learner]) -> None:
    rule = DFA()
    w = initial_weights(NET, rule, Uniform(), Uniform(), 0)
    decay = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    _, after = step_once(learner(NET, rule, SoftmaxCrossEntropy(3), w, decay), w)
    for name in w:
        assert torch.equal(after[name], w[name]) == name.startswith("B"), name


def test_the_constraint_holds_after_a_step(learner: Callable[..., Learner]) -> None:
    rule = MDFA(floor=0.01)
    w = initial_weights(NET, rule, Uniform(), Uniform(), 0)
    grads, after = step_once(learner(NET, rule, SoftmaxCrossEntropy(3), w, SGD), w)
    for l in (2, 3):
        free = w[f"W{l}"] - 0.1 * grads[f"W{l}"]
        torch.testing.assert_close(after[f"W{l}"], free.clamp(min=0.01))
    assert after["W1"].min() < 0


def test_fused_optimizers_step_large_kernels_as_the_others_do(learner: Callable[..., Learner]) -> None:
    """Large enough for convolutions that put the channels last in memory, which the fused kernels do not see."""
    net = allconv((3, 16, 16), 3, filters=[[32, 3, 1], [32, 3, 2]], activation="tanh")
    pixels = torch.randint(256, (1, 16, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    w = initial_weights(net, LRAE(), Uniform(), Uniform(), 0)
    after = []
    for fused in (True, False):
        made = learner(net, LRAE(), SoftmaxCrossEntropy(3), w, partial(torch.optim.AdamW, lr=0.01, fused=fused))
        y = made.loss.target(torch.arange(16) % 3, torch.float32)
        with torch.no_grad():
            made.step(made.inputs(pixels), y[None])
        after.append(dict(made.w))
    for name, p in after[0].items():
        torch.testing.assert_close(p, after[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adam, lr=1e-2),
        partial(torch.optim.AdamW, lr=1e-2, fused=True),
        partial(torch.optim.RMSprop, lr=1e-3),
    ],
    ids=["momentum", "adam", "adamw", "rmsprop"],
)
def test_stacked_seeds_are_separate_runs(fit: Fit, net: Network, optimizer: Any) -> None:
    stack = fit(net, LRAE(), [0, 1, 2], optimizer=optimizer)
    for i, seed in enumerate([0, 1, 2]):
        alone = fit(net, LRAE(), [seed], optimizer=optimizer)
        for name, p in stack.w.items():
            torch.testing.assert_close(p[i], alone.w[name][0], rtol=1e-4, atol=1e-5)
        assert stack.progress[i].best_epoch == alone.progress[0].best_epoch


def test_a_seed_learns(fit: Fit) -> None:
    learner = fit(NET, LRAE(), [0], epochs=10, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    assert learner.progress[0].test is not None
    assert learner.progress[0].test["accuracy"] > 0.9


def test_a_diverged_seed_leaves_the_others_untouched(fit: Fit) -> None:
    def explode(seed: int, w: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: t * 1e30 if seed == 1 else t for name, t in w.items()}

    net = mlp((1, 4, 4), 3, hidden=[6, 5], activation="identity")
    sound = fit(net, LRAE(), [0, 1], epochs=3)
    broken = fit(net, LRAE(), [0, 1], epochs=3, change=explode)
    assert broken.progress[1].diverged_epoch == 1
    assert broken.progress[1].epochs[0]["train/loss"] is None
    assert (broken.progress[1].best_epoch, broken.progress[1].test) == (None, None)
    assert broken.progress[0] == sound.progress[0]
    assert len(broken.progress[0].epochs) == 3
    for name in sound.w:
        assert torch.equal(broken.w[name][0], sound.w[name][0])


def test_a_rule_without_logits_at_hand_trains_without_training_metrics(fit: Fit) -> None:
    def broken(seed: int, w: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: t * torch.nan if seed == 2 else t for name, t in w.items()}

    rule = ForwardForward(readout="goodness")
    stack = fit(NET, rule, [0, 1, 2], change=broken)
    for p, seed in zip(stack.progress[:2], (0, 1), strict=True):
        assert [set(epoch) for epoch in p.epochs] == [{"epoch", "step", "val/loss", "val/accuracy"}] * 2
        assert p.best_epoch is not None
        alone = fit(NET, rule, [seed]).progress[0]
        assert alone.epochs == [pytest.approx(epoch, rel=1e-4) for epoch in p.epochs]
    assert stack.progress[2].diverged_epoch == 1


def test_training_stops_when_every_seed_has_diverged(fit: Fit) -> None:
    learner = fit(NET, LRAE(), [0], epochs=5, optimizer=partial(torch.optim.SGD, lr=float("nan")))
    assert learner.progress[0].diverged_epoch == 1
    assert learner.steps == 10


def test_best_weights_are_kept_for_each_seed(fit: Fit) -> None:
    """At so high a rate the accuracy jumps about, so that best epochs differ between seeds."""
    learner = fit(NET, LRAE(), [0, 1, 2, 3], epochs=6, optimizer=partial(torch.optim.SGD, lr=3.0))
    best = [p.best_epoch for p in learner.progress]
    assert len(set(best)) > 1
    for p in learner.progress:
        accuracies = [e["val/accuracy"] for e in p.epochs]
        assert p.best_epoch == 1 + accuracies.index(max(accuracies))
    for i, p in enumerate(learner.progress):
        again = fit(NET, LRAE(), [0, 1, 2, 3], epochs=p.best_epoch or 0, optimizer=partial(torch.optim.SGD, lr=3.0))
        for name, weights in learner.best.items():
            assert torch.equal(weights[i], again.w[name][i])


def test_patience_stops_a_seed_as_if_it_were_alone(fit: Fit) -> None:
    options: dict[str, Any] = {"epochs": 12, "patience": 2, "optimizer": partial(torch.optim.SGD, lr=3.0)}
    stack = fit(NET, LRAE(), [0, 1, 2, 3], **options)
    lengths = [len(p.epochs) for p in stack.progress]
    assert len(set(lengths)) > 1
    for p in stack.progress:
        assert p.best_epoch is not None
        assert len(p.epochs) == min(12, p.best_epoch + 2)
    assert stack.steps == 10 * max(lengths)


def test_a_schedule_steps_once_an_epoch(fit: Fit) -> None:
    schedule = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3], gamma=0.1)
    learner = fit(NET, LRAE(), [0], epochs=4, schedule=schedule)
    assert learner.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("options", [{}, {"replay": True}, {"optimizer": partial(Adam, lr=0.01), "replay": True}])
def test_a_schedule_steps_after_each_mini_batch_where_it_says_so(fit: Fit, options: dict[str, Any]) -> None:
    """Two of four epochs have a rate of 0, so they change nothing."""
    schedule = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[20], gamma=0.0)
    left = fit(NET, LRAE(), [0], epochs=4, schedule=schedule, schedule_interval="step", **options)
    shorter = fit(NET, LRAE(), [0], epochs=2, **options)
    assert left.steps == 2 * shorter.steps == 40
    for name, weights in shorter.w.items():
        assert torch.equal(left.w[name], weights)


@dataclass(frozen=True)
class NoAutograd(LRAE):
    """LRA-E that looks whether a graph could be recorded."""

    def grads(self, net: Network, w: Mapping[str, Tensor], batch: Batch) -> Grads:
        assert not torch.is_grad_enabled()
        assert not any(t.requires_grad for t in w.values())
        return super().grads(net, w, batch)


def test_training_records_no_graph(fit: Fit) -> None:
    assert fit(NET, NoAutograd(), [0, 1], epochs=1).steps == 10


def test_seeds_with_different_numbers_of_batches_are_not_stacked(dataset: Dataset) -> None:
    tasks = [task(dataset, seed, classes=2) for seed in range(6)]
    groups = divide(tasks, 5, stack=True)
    assert sorted(t.seed for group in groups for t in group) == list(range(6))
    assert len(groups) > 1
    for group in groups:
        assert len({len(t.train) // 5 for t in group}) == 1
    assert [len(group) for group in divide(tasks, 5, stack=False)] == [1] * 6


def test_an_interrupted_stack_stays_together_and_alone(dataset: Dataset) -> None:
    tasks = [task(dataset, seed) for seed in range(6)]
    groups = divide(tasks, 5, True, [(1, 4), (4, 5), (3, 9)])  # 4 is taken, 9 is not to be trained
    assert [[t.seed for t in group] for group in groups] == [[1, 4], [0, 2, 3, 5]]


@pytest.mark.parametrize(
    ("optimizer", "apart"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), True),
        (partial(torch.optim.AdamW, lr=0.1, fused=True), True),
        (partial(torch.optim.RMSprop, lr=0.1), True),
        (partial(torch.optim.Adafactor, lr=0.1), False),
        (partial(torch.optim.LBFGS, lr=0.1), False),
    ],
    ids=["sgd", "adamw", "rmsprop", "adafactor", "lbfgs"],
)
def test_optimizers_that_mix_seeds_are_recognised(optimizer: Any, apart: bool) -> None:
    assert keeps_seeds_apart(optimizer) == apart


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_on_a_gpu_stacked_seeds_are_separate_runs_and_agree_with_the_cpu(fit: Fit, rule: Rule, net: Network) -> None:
    cpu, stack = fit(net, rule, [0, 1], epochs=1), fit(net, rule, [0, 1], epochs=1, device="gpu")
    assert stack.steps == 10
    for i, seed in enumerate([0, 1]):
        alone = fit(net, rule, [seed], epochs=1, device="gpu")
        for name, p in stack.w.items():
            torch.testing.assert_close(p[i], alone.w[name][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(p[i].cpu(), cpu.w[name][i], rtol=1e-4, atol=1e-5)
