"""Steps that are replayed against steps that are computed as written: to the bit, whatever the rule and net."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import Live
from conftest import Config, Problem, interrupt, same_results, train
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import nobackprop.training.replay
import nobackprop.training.run
from nobackprop.core.architectures import lenet, row
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.optimizers import AdamW, RMSprop, TFAdam
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule, apart
from nobackprop.data.pixels import Pixels
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.kolen_pollack import KolenPollack
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.rules.weight_mirror import WeightMirror
from nobackprop.training.build import prepare
from nobackprop.training.learner import Learner
from nobackprop.training.replay import Replay

ADAMW = partial(AdamW, lr=0.01)
LOSS = SoftmaxCrossEntropy(3)
NET = mlp((1, 4, 4), 3, hidden=[6, 5], activation="tanh")
CONV = allconv((1, 8, 8), 3, filters=[[3, 3, 1, 1], [4, 3, 2]], activation="tanh")


def learners(net: Network, rule: Rule, w: list[dict[str, Tensor]], optimizer: Any = ADAMW, **options: Any) -> list[Any]:
    """A learner that computes its steps as they are written, and one that replays them."""
    data = dict.fromkeys(("batches", "validation", "test"), dict)
    made = [
        Learner(net, rule, LOSS, dict(enumerate(w)), pixels=Pixels(), optimizer=optimizer, replay=r, **data, **options)  # pyright: ignore
        for r in (False, True)
    ]
    for each in made:
        each.configure_optimizers()
    return made


def replays(learner: Any) -> bool:
    return all(isinstance(each, Replay) and each.replays for each in learner.gradients)


def batches(net: Network, seeds: int = 1, steps: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pixels = torch.randint(256, (seeds, 8, *net.in_shape), generator=generator, dtype=torch.uint8)
        yield pixels, torch.randint(3, (seeds, 8), generator=generator)


def assert_equal_training(learners: list[Any], net: Network, seeds: int = 1) -> None:
    """Chunks of mini-batches as in training; scores and weights."""
    with torch.no_grad():
        for chunk in zip(*batches(net, seeds), strict=True), zip(*batches(net, seeds), strict=True):
            pixels, labels = (torch.stack(column) for column in chunk)
            for each in learners:
                each.training_step((pixels, labels), 0)
    eager, replayed = learners
    assert replays(replayed)
    assert not any(isinstance(each, Replay) for each in eager.gradients)
    for name, p in eager.w.items():
        assert torch.equal(p, replayed.w[name]), name
    assert {n: t.tolist() for n, t in eager.train_scores.compute().items()} == {
        n: t.tolist() for n, t in replayed.train_scores.compute().items()
    }


def test_every_rule_on_every_net(rule: Rule, problem: Problem) -> None:
    net, loss, dtype = problem.net, problem.batch.loss, torch.float32
    w = {name: t.to(dtype) for name, t in problem.weights(rule).items()}
    eager, replayed = learners(net, rule, [w])
    for each in (eager, replayed):
        each.loss = loss
        each.configure_optimizers()
    x, y = problem.batch.x.to(dtype), problem.batch.y.to(dtype)
    with torch.no_grad():
        for shift in range(4):
            rolled = (x + shift / 3).roll(shift, 0).unsqueeze(0), y.roll(shift, 0).unsqueeze(0)
            logits = [each.step(*rolled) for each in (eager, replayed)]
            assert (logits[0] is None) == (logits[1] is None)
            if logits[0] is not None:
                assert torch.equal(*logits)
    assert replays(replayed)
    for name, p in eager.w.items():
        assert torch.equal(p, replayed.w[name]), name


@pytest.mark.parametrize("update", ["mean", "sum", "unit_norm", "unit_norm_relative"])
@pytest.mark.parametrize("rule", [LRAE(gamma=0.5), MDFA(floor=0.01), WeightMirror()], ids=str)
@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize("optimizer", [ADAMW, partial(torch.optim.SGD, lr=0.1, momentum=0.9)], ids=["own", "torch's"])
def test_what_comes_after_the_rule(net: Network, rule: Rule, update: str, optimizer: Any) -> None:
    """The batch made one update, gains, l2, constraints, several phases, and noise."""
    w = initial_weights(net, rule, Normal(0.4), Normal(0.4), 0)
    assert_equal_training(learners(net, rule, [w], optimizer, update=update, l2=0.01), net)


@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_float64(net: Network) -> None:
    w = {name: t.double() for name, t in initial_weights(net, LRAE(), Normal(0.4), Normal(0.4), 0).items()}
    assert_equal_training(learners(net, LRAE(), [w]), net)


@pytest.mark.parametrize("rule", [BP(), LRAE(), MDFA(), WeightMirror()], ids=str)
@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_stacked_seeds(net: Network, rule: Rule) -> None:
    w = [initial_weights(net, rule, Normal(0.4), Normal(0.4), seed) for seed in range(3)]
    assert_equal_training(learners(net, rule, w), net, seeds=3)


def test_dropout_is_drawn_anew_at_every_step() -> None:
    net = row((1, 4, 4), 3, layers=[{"dense": 6}, "tanh", {"dropout": 0.5}])
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), 0)
    assert_equal_training(learners(net, BP(), [w]), net)


@pytest.mark.parametrize("optimizer", [AdamW, RMSprop, TFAdam])
def test_a_rate_that_changes_counts_at_once(optimizer: Any) -> None:
    w = initial_weights(NET, BP(), Normal(0.4), Normal(0.4), 0)
    pair = learners(NET, BP(), [w], partial(optimizer, lr=0.01))
    for each in pair:
        before = iter([0.01] * 8 + [0.5, 0.1])
        step = each.step

        def changing(x: Tensor, y: Tensor, each: Any = each, before: Any = before, step: Any = step) -> Any:
            each.optimizer.param_groups[0]["lr"] = next(before)
            return step(x, y)

        each.step = changing
    assert_equal_training(pair, NET)


WHOLE = ["schedule=multistep", "schedule.milestones=[1]", "dataset.crop=1", "seeds=[0]"]


@pytest.fixture
def replayed_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda steps: monkeypatch.setattr(nobackprop.training.run, "REPLAY_FROM", steps)


@pytest.mark.parametrize(
    "choice",
    [
        ["rule=weight_mirror"],
        ["rule=incremental_predictive_coding"],
        ["rule=dfa", "optimizer=sgd", "optimizer.momentum=0.9"],
    ],
)
def test_a_whole_run_gives_the_same_record(
    config: Config, tmp_path: Path, replayed_from: Callable[[int], None], choice: list[str]
) -> None:
    """Lightning validates between the epochs, and takes gradients away."""
    for name, steps in (("eager", 10**9), ("replayed", 1)):
        replayed_from(steps)
        train(config(*WHOLE, *choice, f"paths.runs={tmp_path}/{name}"))
    assert same_results(tmp_path / "eager", tmp_path / "replayed") == 1


@pytest.mark.parametrize("rule", ["lra_e", "incremental_predictive_coding"])
def test_a_resumed_run_gives_what_an_uninterrupted_one_does(
    config: Config, tmp_path: Path, replayed_from: Callable[[int], None], rule: str
) -> None:
    choice = [f"rule={rule}", "seeds=[0]"]
    replayed_from(1)
    train(config(*choice, f"paths.runs={tmp_path}/at_once"))
    interrupt(config(*choice))
    train(config(*choice))
    assert same_results(tmp_path / "at_once", tmp_path / "runs") == 1


class Clamping(torch.optim.SGD):
    """Puts other tensors in the place of gradients, as an optimizer of a user's may."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad = None if p.grad is None else p.grad.clamp(-0.01, 0.01)
        return super().step(closure)


@pytest.mark.parametrize("rule", [BP(), KolenPollack()], ids=["bp", "kolen_pollack"])
@pytest.mark.parametrize(
    "optimizer",
    [partial(Clamping, lr=0.1), partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True)],
    ids=["clamping", "in place"],
)
def test_an_optimizer_may_do_with_gradients_what_it_likes(rule: Rule, optimizer: Any) -> None:
    """The reference is one whose gradients are new tensors at each step: no replay, and each weight by itself."""
    w = initial_weights(NET, rule, Normal(0.4), Normal(0.4), 0)
    assert_equal_training(learners(NET, rule, [w], optimizer), NET)
    if "foreach" in optimizer.keywords:
        one_by_one = partial(optimizer, foreach=False)
        (eager, _), (_, replayed) = learners(NET, rule, [w], one_by_one), learners(NET, rule, [w], optimizer)
        assert_equal_training([eager, replayed], NET)


def test_a_state_that_lies_in_memory_as_weights_once_did_is_taken_over() -> None:
    w = initial_weights(NET, BP(), Normal(0.4), Normal(0.4), 0)
    fused = partial(torch.optim.AdamW, lr=0.01, fused=True)
    for optimizer in (ADAMW, fused):
        pair = learners(NET, BP(), [w], optimizer)
        assert_equal_training(pair, NET)
        older = pair[1]
        for state in older.optimizer.state.values():
            state |= {n: t.contiguous() if isinstance(t, Tensor) else t for n, t in state.items()}
        older.on_train_start()
        older.given = {}  # as after loading
        assert_equal_training(pair, NET)


@pytest.mark.parametrize("rule", ["bp", "weight_mirror"])
def test_a_run_that_is_over_keeps_none_of_its_buffers(
    config: Config, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many runs follow each other in the process of a sweep, faster than Python looks for cycles."""
    kept: list[weakref.ref[Any]] = []
    replay = Replay._replay

    def noted(self: Replay, *args: Any) -> Any:
        named, others = replay(self, *args)
        kept.extend(weakref.ref(each) for each in (self, self.x, *named.values()))
        return named, others

    monkeypatch.setattr(Replay, "_replay", noted)
    gc.disable()
    try:
        train(config(f"rule={rule}"))
        left = [each() for each in kept if each() is not None]
    finally:
        gc.enable()
    assert kept
    assert not left


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_epochs=2", True),
        ("max_steps=199", False),
        ("recompute=true", False),
        ("trainer.precision=bf16-mixed", False),
        ("trainer.precision=64-true", True),
        ("compile=true", False),
        ("stack=true", True),
    ],
)
def test_which_runs_are_replayed(config: Config, override: str, expected: bool) -> None:
    """Those that are long enough, and need no more memory for it."""
    run = prepare(config(override))
    steps = run.settings.max_steps or 322
    assert nobackprop.training.run._replays(run, steps) == expected


def test_a_config_of_an_earlier_version_may_have_left_compiling_open(config: Config) -> None:
    assert prepare(config("compile=null")).settings.compile is False


def test_other_compiling_than_in_the_checkpoint_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    interrupt(config("seeds=[0]"))
    told = (
        r"000000261\.ckpt was trained with compile=false, and this command says compile=true.*go on with compile=false"
    )
    with pytest.raises(Mistake, match=told):
        train(config("seeds=[0]", "compile=true"))
    (record,) = train(config("seeds=[0]"))
    assert not record.machine.compiled


# What can't be replayed is called as it is.

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a branch on a number": lambda x: x + 1 if x.sum() > 0 else x - 1,
    "a number out of a tensor": lambda x: x * x.sum().item(),
    "a number that nothing shows": lambda x: x * x.flatten().tolist()[0],
    "random numbers": lambda x: x + torch.rand_like(x),
    "a shape that depends on numbers": lambda x: x[x > 0].sum() + x,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_can_not_be_replayed_is_called(name: str) -> None:
    function = OTHERS[name]
    replay = Replay(lambda x, y, noise: ({"W1": function(x) + y}, []))
    y = torch.zeros(3)
    for seed in range(5):
        x = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected = function(x)
        torch.manual_seed(seed)
        assert torch.equal(replay(x, y, {})[0]["W1"], expected)
    assert not replay.replays


def test_a_function_that_changes_with_time_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nobackprop.training.replay, "AGAIN", 10)
    steps = count()
    replay = Replay(lambda x, y, noise: ({"W1": x * (1.0 if next(steps) < 5 else 0.5)}, []))
    x = torch.randn(3)
    for _ in range(2 + 9):  # two that are noted, and nine replays
        assert torch.equal(replay(x, x, {})[0]["W1"], x)
    for _ in range(5):
        next(steps)
    with pytest.raises(Mistake, match="the rule gives other numbers now than in the first steps"):
        replay(x, x, {})


def test_views_constants_and_changes_in_place() -> None:
    def function(x: Tensor, y: Tensor, noise: Any) -> Any:
        table = torch.arange(4.0).sin()  # depends on nothing
        h = (x.mT @ x)[1:3].flatten() * table.repeat(2)[: 2 * len(x.mT)]
        total = torch.zeros(2 * len(x.mT)).add_(h)
        total[::2] -= 1
        parts = torch.cat([total, h]).split(3)
        a, b = torch.stack(parts[:2]).unbind()
        return {"W1": a * b / 8 + noise["n"], "b1": y}, [total]

    replay = Replay(function)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        x, y, noise = torch.randn(5, 4, generator=g), torch.randn(2, generator=g), {"n": torch.randn(3, generator=g)}
        named, (total,) = replay(x, y, noise)
        expected, (expected_total,) = function(x, y, noise)
        assert all(torch.equal(named[name], t) for name, t in expected.items())
        assert torch.equal(total, expected_total)
    assert replay.replays


def test_what_is_computed_twice_is_replayed_once() -> None:
    """But not where it is changed in between, given to the caller, or larger than what it is computed from.

    Inputs do not count as that.
    """

    def function(x: Tensor, y: Tensor, noise: Any) -> Any:
        h = x.neg() + x.neg()
        changed, same, again = h.exp(), h.sin(), h.sin()
        changed += 1
        larger = h.repeat(2).tanh() + h.repeat(2).tanh()
        given = {"W1": (changed + h.exp()) * same, "W2": again.cos() + same.cos(), "W3": h.sin(), "W4": h.sin()}
        return given | {"W5": larger}, []

    replay = Replay(function)
    for seed in range(5):
        x = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            named, _ = replay(x, torch.zeros(1), {})
        expected, _ = function(x, torch.zeros(1), {})
        assert all(torch.equal(named[name], t) for name, t in expected.items())
    assert replay.replays
    calls = {each.key: each.count for each in profiled.key_averages()}  # of the last step
    expected_calls = {"exp": 2, "sin": 3, "cos": 1, "neg": 2, "tanh": 2}
    assert {name: calls[f"aten::{name}"] for name in expected_calls} == expected_calls
    assert named["W3"].data_ptr() != named["W4"].data_ptr()


def test_a_net_is_pooled_once_at_each_step() -> None:
    """A rule reads a pooled output three times: going up, going down, and for the weights' gradients."""
    net = lenet((1, 28, 28), 3, activation="tanh")
    w = initial_weights(net, BP(), Normal(0.1), Normal(0.1), 0)
    replay = Replay(lambda x, y, noise: (BP().grads(net, w, Batch(x, y, LOSS))[0], []))
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            replay(torch.rand(5, 1, 28, 28), torch.rand(5, 3), {})
    assert replay.replays
    pools = [each.count for each in profiled.key_averages() if each.key == "aten::max_pool2d_with_indices"]
    assert pools == [2]


def test_weights_are_read_where_they_are() -> None:
    w = torch.ones(3)
    replay = Replay(lambda x, y, noise: ({"W1": w * x}, []))
    for step in range(5):
        w += 1
        assert torch.equal(replay(torch.full((3,), 2.0), torch.zeros(1), {})[0]["W1"], torch.full((3,), 4.0 + 2 * step))
    assert replay.replays


def test_memory_is_no_more_than_what_is_alive_at_once() -> None:
    """Of 40 layers as many activations as backpropagation keeps, and each gradient once."""
    net = mlp((1, 4, 4), 3, hidden=[32] * 40, activation="tanh")
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), 0)
    batch = 50

    def function(x: Tensor, y: Tensor, noise: Any) -> Any:
        grads, z = BP().grads(net, w, Batch(x, y, LOSS))
        return grads, [z]

    replay = Replay(function)
    for _ in range(2):
        replay(torch.rand(batch, 1, 4, 4), torch.rand(batch, 3), {})
    gradients = sum(t.nbytes for t in w.values())
    activations = 2 * 4 * batch * 32 * 40  # z and h
    assert replay.bytes < 1.1 * (gradients + activations)


def test_a_replay_of_any_rule_keeps_about_what_its_step_has_in_memory_at_once(rule: Rule) -> None:
    """Gradients included, on a deep net where activations are large and weights small."""
    net, batch = mlp((1, 4, 4), 3, hidden=[16] * 12, activation="tanh"), 256
    # By default some rules relax for many steps, which takes long and needs no more memory.
    rule = replace(rule, **{each.name: 3 for each in fields(rule) if each.name.endswith("steps")})
    w = initial_weights(net, rule, Normal(0.4), Normal(0.4), 0)
    x, y, noise = torch.rand(batch, 1, 4, 4), torch.rand(batch, 3), normal(rule.noise(net, batch), 0, "noise")
    for phase in rule.phases():

        def function(x: Tensor, y: Tensor, noise: Any, phase: Any = phase) -> Any:
            given, z = phase(net, w, Batch(x, y, LOSS, noise))
            return given, [] if z is None else [z]

        replay = Replay(function)
        for _ in range(2):
            replay(x, y, noise)
        assert replay.replays
        with Live() as live:
            given, _ = function(x, y, noise)
        assert replay.bytes < 1.3 * live.peak([])
        noise = noise | apart(given, w)[1]
