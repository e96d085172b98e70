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
from torch.utils.data import DataLoader, TensorDataset

import nobackprop
from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.maps import Attention, Mean, Patches, Positions
from nobackprop.core.modules import MapModule, ResidualModule, to_torch
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
from nobackprop.training.own_loop import Gradients, gradients

SOFTMAX = SoftmaxCrossEntropy(4)


def of_problem(problem: Problem, rule: Rule, **options: Any) -> Gradients:
    module = to_torch(problem.net, problem.weights(BP()))
    return gradients(module, rule, problem.batch.loss, in_shape=problem.net.in_shape, **options)


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
    with torch.no_grad():  # as in training: with gradients torch's norms round otherwise
        expected, _ = rule.all_grads(step.net, w, replace(problem.batch, noise=noise))
    step(problem.batch.x, labels(problem))
    for name, p in step.weights().items():
        assert torch.equal(p, w[name]), name
        if name in expected:
            assert torch.equal(p.grad, rule.gain(name) * expected[name]), name  # pyright: ignore[reportArgumentType]
        else:
            assert p.grad is None, name
    assert {id(p) for p in step.parameters()} == {id(p) for p in step.weights().values()}


def test_no_two_gradients_share_memory(rule: Rule, problem: Problem) -> None:
    """So that what works on gradients in place, as clipping does, works on each once."""
    step = of_problem(problem, rule)
    step(problem.batch.x, labels(problem))
    places = [p.grad.data_ptr() for p in step.parameters() if p.grad is not None and p.grad.numel()]
    assert len(places) == len(set(places)) > 0


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
    # Training has the weights in another order in memory, so that products round in another way.
    torch.testing.assert_close(dict(step.weights()), dict(trained.weights), rtol=0, atol=1e-3)
    images = dataset.test.pixels.float() / 255
    right = (module(images).argmax(1) == dataset.test.labels).float().mean().item()
    assert record.test is not None
    assert right == pytest.approx(record.test["accuracy"], abs=0.005)


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


@pytest.mark.parametrize(
    ("rule", "parts", "told"),
    [
        (
            BP(),
            [nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)],
            r"^module\.1, GELU.* can't be taken; allowed are nn\.Linear",
        ),
        (BP(), [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)], "the module has 3 outputs, and SoftmaxCross.* needs 4"),
        (BP(), [nn.Conv2d(3, 4, 3)], r"the module does not begin with nn\.Linear: say .* in_shape=\(3, 32, 32\)"),
        (BP(), [], "the module does not begin with nn.Linear"),
        (
            LRAE(),
            [nn.Linear(6, 5), ResidualModule(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 4)],
            r"LRAE does not train nets with shortcut \(layer 2 has Shortcut",
        ),
    ],
)
def test_a_module_that_can_not_be_trained_is_refused(rule: Rule, parts: list[nn.Module], told: str) -> None:
    with pytest.raises(Mistake, match=told):
        gradients(nn.Sequential(*parts), rule, SOFTMAX)


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
        (X, Y + 1, "y has class numbers from 1 to 4; allowed: 0 to 3"),
        (
            X.double(),
            Y,
            r"x is of type torch.float64, and the module's weights are torch.float32: write x.to\(torch.fl",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(x: Tensor, y: Tensor, told: str) -> None:
    with pytest.raises(Mistake, match=told):
        small(BP())(x, y)


@pytest.mark.parametrize(
    ("rule", "loss", "told"),
    [
        (LRAE, SOFTMAX, r"rule is the class LRAE: give an object such as nobackprop\.LRAE\(\)"),
        ("lra_e", SOFTMAX, "rule is of type str: give an object"),
        (
            LRAE(),
            nn.CrossEntropyLoss(),
            r"loss is of type CrossEntropyLoss: give .* nobackprop\.SoftmaxCrossEntropy\(10\)",
        ),
    ],
)
def test_what_is_no_rule_or_loss_is_refused(rule: Any, loss: Any, told: str) -> None:
    with pytest.raises(Mistake, match=told):
        gradients(nn.Sequential(nn.Linear(6, 4)), rule, loss)


def test_an_unknown_update_is_refused() -> None:
    with pytest.raises(Mistake, match=r"unknown update 'mena': choose one of mean, sum, .* Did you mean mean"):
        gradients(nn.Sequential(nn.Linear(6, 4)), BP(), SOFTMAX, update="mena")


def pooled_and_normalized() -> nn.Sequential:
    """A net of a user's: dropout aside, all that a convolutional net has."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8, affine=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


@pytest.mark.parametrize("rule", [BP(), FA(), DFA(), LRAE(beta=0.1)], ids=lambda rule: type(rule).__name__)
def test_torchs_own_loop_trains_a_net_by_rules_of_each_family(rule: Rule) -> None:
    digits = Digits().load()
    x, y = digits.train.pixels.double() / 255, digits.train.labels
    module = pooled_and_normalized().double()
    step = gradients(module, rule, SoftmaxCrossEntropy(10), in_shape=(1, 8, 8))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    shuffled = torch.Generator().manual_seed(0)
    for _ in range(8):
        for images, classes in DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True, generator=shuffled):
            step(images, classes)
            if type(rule) is BP:
                assert_autograds(module, images, classes)
            optimizer.step()
        scheduler.step()
    test = digits.test
    assert (module(test.pixels.double() / 255).argmax(1) == test.labels).float().mean() > 0.9
    assert optimizer.param_groups[0]["lr"] == 0.025


def assert_autograds(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """That `.grad` is what autograd gives."""
    expected = torch.autograd.grad(F.cross_entropy(module(x), y), [*module.parameters()])
    for p, g in zip(module.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_a_net_with_pooling_and_group_norm_learns_by_dfa_in_ten_lines() -> None:
    torch.manual_seed(0)

    digits = nobackprop.Digits().load()
    x, y = digits.train.pixels / 255, digits.train.labels
    below = nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32, affine=False), nn.ReLU(), nn.MaxPool2d(2)
    module = nn.Sequential(*below, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    step = nobackprop.gradients(module, nobackprop.DFA(), nobackprop.SoftmaxCrossEntropy(10), in_shape=(1, 8, 8))
    optimizer = torch.optim.Adam(step.parameters(), lr=3e-3)
    for _ in range(10):
        for images, classes in DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True):
            step(images, classes)  # fills .grad
            optimizer.step()

    assert (module(digits.test.pixels / 255).argmax(1) == digits.test.labels).float().mean() > 0.9


def test_residual_blocks_attention_and_dropout_are_trained_as_autograd_would() -> None:
    torch.manual_seed(0)
    norm, norms = nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm(6, elementwise_affine=False)
    module = nn.Sequential(
        MapModule(Patches(4)),
        nn.Linear(16, 6),
        MapModule(Positions()),
        ResidualModule(norm, nn.Linear(6, 18), MapModule(Attention(heads=2)), nn.Dropout(0.3), nn.Linear(6, 6)),
        ResidualModule(norms, nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 6)),
        MapModule(Mean()),
        nn.Linear(6, 4),
    ).double()
    step = gradients(module, BP(), SOFTMAX, in_shape=(1, 8, 8), seed=3)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    for number in range(2):  # dropout is drawn anew in each step
        noise = normal(step.net.noise(5), 3, "noise", number)
        dropped = to_torch(step.net.with_noise(noise), step.weights())
        logits = step(x, Y[:5])
        torch.testing.assert_close(logits, dropped(x))
        expected = torch.autograd.grad(F.cross_entropy(dropped(x), Y[:5]), [*dropped.parameters()])
        for p, g in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(step.logits(x), module.eval()(x))
