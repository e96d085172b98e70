"""A rule in a loop of one's own: the gradients are the rule's, and training is what `train` does."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Config, Problem, folder, train
from torch import Tensor, nn

import nobackprop
from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.layers import Conv, Dense
from nobackprop.core.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.network import Network
from nobackprop.core.optimizers import AdamW
from nobackprop.core.random import normal
from nobackprop.core.rule import Rule
from nobackprop.data.batches import TrainBatches, task
from nobackprop.data.sources import Digits
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.training.own_loop import ACTIVATIONS, Gradients, gradients

SOFTMAX = SoftmaxCrossEntropy(4)


def as_module(net: Network) -> nn.Sequential:
    """The same net in torch's modules, with their own random weights, in float64."""
    (activation,) = (kind for kind, name in ACTIVATIONS.items() if name == net.activation.name)
    parts: list[nn.Module] = []
    for layer, shape in zip(net.layers, net.shapes, strict=False):
        if isinstance(layer, Conv):
            parts.append(nn.Conv2d(shape[0], layer.channels, layer.kernel, layer.stride, layer.padding))
        else:
            assert isinstance(layer, Dense)
            parts += [nn.Flatten(), nn.Linear(torch.Size(shape).numel(), layer.units)]
        parts.append(activation())
    torch.manual_seed(0)
    return nn.Sequential(*parts[:-1]).double()


def of_problem(problem: Problem, rule: Rule, **options: Any) -> Gradients:
    return gradients(as_module(problem.net), rule, problem.batch.loss, in_shape=problem.net.in_shape, **options)


def labels(problem: Problem) -> Tensor:
    y = problem.batch.y
    return y.argmax(1) if y.shape[1] > 1 else y[:, 0].long()


def test_bp_fills_what_autograd_fills(problem: Problem) -> None:
    step = of_problem(problem, BP())
    x, y = problem.batch.x, labels(problem)
    logits = step(x, y)
    found = {name: p.grad for name, p in step.module.named_parameters()}
    step.module.zero_grad()
    z = step.module(x)
    loss = F.cross_entropy(z, y) if z.shape[1] > 1 else F.binary_cross_entropy_with_logits(z[:, 0], y.double())
    loss.backward()
    assert torch.allclose(logits, z, rtol=0, atol=1e-14)
    for name, p in step.module.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found[name], p.grad, rtol=1e-12, atol=1e-15), name  # pyright: ignore[reportArgumentType]


def test_every_rule_fills_what_it_gives_on_the_same_weights(rule: Rule, problem: Problem) -> None:
    step = of_problem(problem, rule, seed=3)
    w = {name: p.detach().clone() for name, p in step.weights().items()}
    drawn = normal(rule.noise(step.net, len(problem.batch.x)), 3, "noise", 0)  # that of the first step
    noise = {name: t.double() for name, t in drawn.items()}
    expected, _ = rule.all_grads(step.net, w, replace(problem.batch, noise=noise))
    step(problem.batch.x, labels(problem))
    for name, p in step.weights().items():
        assert torch.equal(p, w[name]), name
        if name in expected:
            assert torch.equal(p.grad, rule.gain(name) * expected[name]), name  # pyright: ignore[reportArgumentType]
        else:
            assert p.grad is None, name
    assert {id(p) for p in step.parameters()} == {id(p) for p in step.weights().values()}


@pytest.mark.parametrize("rule", [BP(), DFA(), LRAE(gamma=0.5), MDFA()], ids=lambda rule: type(rule).__name__)
def test_a_loop_of_ones_own_ends_where_training_ends(rule: Rule, config: Config) -> None:
    fields = [f"rule.gamma={rule.gamma}"] if isinstance(rule, LRAE) else []
    name = type(rule).__module__.split(".")[-1]
    chosen = ["arch.hidden=[12,10]", "max_epochs=1", "update=unit_norm", "optimizer.lr=0.01", "seeds=[5]"]
    cfg = config(f"rule={name}", *fields, *chosen)
    (record,) = train(cfg)
    trained = nobackprop.load(folder(cfg))

    dataset, loss = Digits().load(), SoftmaxCrossEntropy(10)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 10))
    step = gradients(module, rule, loss, in_shape=(1, 8, 8), update="unit_norm", seed=5)
    start = initial_weights(step.net, rule, Uniform(), Uniform(), 5)
    with torch.no_grad():
        for key, p in step.weights().items():
            if not key.startswith(("W", "b")):
                assert torch.equal(p, start[key])
            p.copy_(start[key])
    optimizer = AdamW(step.parameters(), lr=0.01)
    for pixels, classes in TrainBatches(dataset, [task(dataset, 5)], 8, position=lambda: 0, device="cpu"):
        for x, y in zip(pixels[:, 0], classes[:, 0], strict=True):
            step(x.float() / 255, y)
            optimizer.step()
    step.constrain()
    assert step.steps == record.steps == 161
    assert {name for name, p in step.weights().items() if torch.equal(p, trained.weights[name])} == {*trained.weights}
    images = dataset.test.pixels.float() / 255
    right = (module(images).argmax(1) == dataset.test.labels).float().mean().item()
    assert record.test is not None
    assert right == pytest.approx(record.test["accuracy"], abs=1e-7)


def small(rule: Rule, bias: bool = True) -> Gradients:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, bias), nn.Tanh(), nn.Linear(5, 5, bias), nn.Tanh(), nn.Linear(5, 4, bias))
    return gradients(module, rule, SOFTMAX)


X, Y = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 4


def test_a_state_holds_both_and_goes_on_as_before(configured: Callable[..., Any]) -> None:
    def trained(step: Gradients, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
        for _ in range(steps):
            step(X, Y)
            optimizer.step()
        return step.state_dict()

    rule = configured("rule", "dtp")  # with noise, a function of the step, and learned weights
    one = small(rule)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    content = io.BytesIO()
    torch.save(trained(one, optimizer, 3), content)
    content.seek(0)
    other = small(rule)
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(torch.load(content, weights_only=True))
    a, b = trained(one, optimizer, 3), trained(other, torch.optim.SGD(other.parameters(), lr=0.1), 3)
    assert a.keys() == b.keys() >= {"module.0.weight", "feedback.Q2"}
    assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)
    assert one.steps == other.steps == 6
    copied = copy.deepcopy(one)
    assert copied.weights()["W1"] is copied.module[0].weight  # pyright: ignore[reportIndexIssue]


def test_mdfa_keeps_its_weights_in_bounds() -> None:
    step = small(MDFA())
    above = [p for name, p in step.weights().items() if name in ("W2", "W3")]
    assert all((p >= 0).all() for p in above)
    optimizer = torch.optim.SGD(step.parameters(), lr=5.0)
    step(X, Y)
    optimizer.step()
    assert any((p < 0).any() for p in above)
    before = step.logits(X)
    assert torch.equal(before, step.module(X))
    assert all((p >= 1e-6).all() for p in above)
    step(X, Y)
    optimizer.step()
    step.constrain()
    assert all((p >= 1e-6).all() for p in above)
    assert (step.weights()["W1"] < 0).any()


def test_feedback_is_drawn_from_the_seed_and_stays_in_fixed_rules() -> None:
    step = small(FA(), bias=False)
    before = {name: p.clone() for name, p in step.feedback.items()}
    assert before.keys() == {"B2", "B3"}
    step(X, Y)
    torch.optim.AdamW(step.parameters(), lr=0.1, weight_decay=0.5).step()
    assert all(torch.equal(step.feedback[name], t) for name, t in before.items())
    ones = gradients(step.module, FA(), SOFTMAX, seed=1, feedback=Uniform(0.5))
    assert not torch.equal(ones.feedback["B2"], before["B2"])
    assert ones.feedback["B2"].abs().max() <= 0.5 / 5**0.5


def test_targets_vectors_and_a_single_output_are_taken() -> None:
    step = small(BP())
    step(X, Y)
    expected = step.weights()["W1"].grad
    step(X, F.one_hot(Y, 4).float())
    assert torch.equal(step.weights()["W1"].grad, expected)  # pyright: ignore[reportArgumentType]
    images = gradients(nn.Sequential(nn.Flatten(), step.module), BP(), SOFTMAX, in_shape=(1, 2, 3))
    images(X.view(7, 1, 2, 3), Y)
    assert torch.equal(step.weights()["W1"].grad, expected)  # pyright: ignore[reportArgumentType]
    single = gradients(nn.Sequential(nn.Linear(6, 1)), BP(), SigmoidCrossEntropy(2))
    assert single(X, Y % 2).shape == (7, 1)


def test_one_activation_may_stand_in_several_places() -> None:
    f = nn.ReLU()
    module = nn.Sequential(nn.Linear(6, 5), f, nn.Sequential(nn.Linear(5, 5), f), nn.Linear(5, 4))
    step = gradients(module, BP(), SOFTMAX)
    assert step.net.L == 3
    assert torch.allclose(step(X, Y), module(X), atol=1e-6)


L, C = nn.Linear(5, 5), nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (
            [nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)],
            r"module\.1, GELU.* can't be taken; allowed are nn.Linear, nn.Co",
        ),
        ([nn.Sequential(nn.Linear(6, 5), nn.Dropout()), nn.Linear(5, 4)], r"module\.0\.1, Dropout"),
        ([nn.Linear(6, 5), nn.Linear(5, 4)], r"module\.1, .*: an activation must stand between it and module\.0"),
        ([nn.Tanh(), nn.Linear(6, 4)], r"module\.0, Tanh\(\): an activation follows a layer"),
        ([nn.Linear(6, 4), nn.Tanh()], "the module must end with nn.Linear, without an activation"),
        ([], "the module must end with nn.Linear"),
        ([nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)], r"several: module\.1, .*module\.3"),
        (
            [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)],
            r"layers \[2\] have no bias: give all one, or none",
        ),
        ([nn.Linear(6, 5), nn.Tanh(), nn.Linear(7, 4)], r"layer 2, .* shape \(4, 7\); .* shape \(5,\), needs \(4, 5\)"),
        ([nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)], r"the module has 3 outputs, and SoftmaxCross.* needs 4"),
        ([nn.Linear(6, 5), nn.Tanh(), L, nn.Tanh(), L, nn.Tanh(), nn.Linear(5, 4)], r"module\.4, .*: stands twice"),
        ([nn.Linear(6, 5), nn.Hardtanh(0, 1), nn.Linear(5, 4)], r"nn.Hardtanh\(\) clips to -1\.\.1"),
        ([C, nn.ReLU(), nn.Linear(4, 4)], r"module\.2, .*: put nn\.Flatten\(\) before it"),
        ([C, nn.ReLU(), nn.Flatten(), nn.Linear(4, 4)], r"begins with a convolution: say .* in_shape=\(3, 32, 32\)"),
        ([C, nn.ReLU(), nn.Flatten(2), nn.Linear(4, 4)], r"module\.2, Flatten.* can't be taken"),
        ([nn.Conv2d(3, 4, (3, 2))], "kernel, stride and padding must be square"),
        ([nn.Conv2d(3, 4, 3, padding="same")], "kernel, stride and padding must be square, and the padding zeros"),
        ([nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")], "the padding zeros"),
        ([nn.Conv2d(4, 4, 3, groups=2)], "groups and dilation must be 1"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))], "can't be taken"),
    ],
)
def test_what_a_module_must_not_hold_is_told_with_its_place(parts: list[nn.Module], told: str) -> None:
    with pytest.raises(Mistake, match=told):
        gradients(nn.Sequential(*parts), BP(), SOFTMAX)


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (X[:, :5], Y, r"x has the shape \(7, 5\): this net takes \(N, 6\)"),
        (X[0], Y, r"x has the shape \(6,\)"),
        (
            X,
            Y[:5],
            r"y has the shape \(5,\) and type torch.int64 for 7 samples: give whole numbers of classes \(7,\), or",
        ),
        (X, Y.float(), r"or targets \(7, 4\) in floats"),
        (X, F.one_hot(Y, 4), r"y has the shape \(7, 4\) and type torch.int64"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(Mistake, match=told):
        small(BP())(x, y)


def test_an_unknown_update_is_refused() -> None:
    with pytest.raises(Mistake, match=r"unknown update 'mena': choose one of mean, sum, .* Did you mean mean"):
        gradients(nn.Sequential(nn.Linear(6, 4)), BP(), SOFTMAX, update="mena")
