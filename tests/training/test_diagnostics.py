"""Each number against one known beforehand or computed some other way; then the callback in a fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Problem, fitted
from torch import Tensor

from nobackprop.core.initializers import Normal, Uniform, initial_weights
from nobackprop.core.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.data.batches import task
from nobackprop.data.pixels import Pixels
from nobackprop.data.sources import Dataset, Images
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation
from nobackprop.rules.fa import FA
from nobackprop.rules.forward_forward import ForwardForward
from nobackprop.rules.frsf import FRSF
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.training import diagnostics
from nobackprop.training.diagnostics import Diagnostics, angle, diagnose
from nobackprop.training.learner import Learner


def of(prefix: str, found: dict[str, float]) -> dict[str, float]:
    """The numbers whose names start with the prefix, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def binary(net: Network, rule: Rule, samples: int = 40, seed: int = 0) -> tuple[dict[str, Tensor], Batch]:
    """Weights and a batch in float32 for a net with one output."""
    w = initial_weights(net, rule, Uniform(2.0), Uniform(2.0), seed)
    generator = torch.Generator().manual_seed(seed)
    for l in range(1, net.L + 1):
        w[f"b{l}"] = torch.randn(w[f"b{l}"].shape, generator=generator)
    x = 2 * torch.randn(samples, *net.in_shape, generator=generator)
    y = torch.randint(2, (samples, 1), generator=generator).float()
    return w, Batch(x, y, SigmoidCrossEntropy(2))


@pytest.mark.parametrize("degrees", [0, 1e-5, 1, 90, 179, 180])
def test_an_angle_is_exact_also_where_it_is_small(degrees: float) -> None:
    turned = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    u, v = torch.tensor([[3.0, 0.0]]), 5 * torch.stack([turned.cos(), turned.sin()])[None].float()
    assert float(angle(u, v)) == pytest.approx(degrees, rel=1e-5)


def test_an_angle_with_a_zero_vector_is_none() -> None:
    assert isnan(float(angle(torch.zeros(3), torch.ones(3))))
    net = mlp((4,), 3, hidden=[5], activation="tanh")
    w = initial_weights(net, DFA(), Uniform(), Uniform(), 0)
    batch = Batch(torch.rand(6, 4), torch.eye(3).repeat(2, 1), SoftmaxCrossEntropy(3))
    found = diagnose(net, DFA(), w | {"B1": torch.zeros(5, 3)}, batch)
    assert of("angle/", found).keys() == {"update_W2"}
    assert found["norm/update_W1"] == 0


def test_backpropagation_is_at_no_angle_to_itself(problem: Problem) -> None:
    net = problem.net
    found = diagnose(net, BP(), problem.weights(BP()), problem.batch)
    assert of("angle/update_", found) == {f"W{l}": 0 for l in range(1, net.L + 1)}
    assert not of("angle/feedback_", found)
    assert of("opposed/", found) == {f"W{l}": 0 for l in range(1, net.L + 1) if net.units(net.L) == 1}


@pytest.mark.parametrize(("rule", "letter"), [(FA(), "B"), (LRAE(), "E")], ids=["fa", "lra_e"])
def test_feedback_weights_that_are_the_weights_are_at_no_angle(problem: Problem, rule: Rule, letter: str) -> None:
    above_the_first = range(2, problem.net.L + 1)
    w = problem.weights(rule)
    drawn = of("angle/feedback_", diagnose(problem.net, rule, w, problem.batch))
    assert drawn.keys() == {f"W{l}" for l in above_the_first}
    for name, degrees in drawn.items():
        cosine = torch.cosine_similarity(w[name].flatten(), w[name.replace("W", letter)].flatten(), 0)
        assert degrees == pytest.approx(float(cosine.arccos().rad2deg()))
    w |= {f"{letter}{l}": w[f"W{l}"] for l in above_the_first}
    found = diagnose(problem.net, rule, w, problem.batch)
    assert of("angle/feedback_", found) == {f"W{l}": 0 for l in above_the_first}
    if letter == "B":
        assert of("angle/update_", found) == {f"W{l}": 0 for l in range(1, problem.net.L + 1)}


@pytest.mark.parametrize("hidden", [[7, 6, 5], [4, 4, 4]], ids=["widths_differ", "as_wide_as_the_output"])
def test_direct_feedback_that_is_the_product_of_the_weights_above_is_at_no_angle(hidden: list[int]) -> None:
    net = mlp((12,), 4, hidden=hidden, activation="tanh")
    w = {name: t.double() for name, t in initial_weights(net, DFA(), Normal(), Normal(), 0).items()}
    batch = Batch(torch.ones(1, 12).double(), torch.eye(4)[:1].double(), SoftmaxCrossEntropy(4))
    drawn = of("angle/feedback_", diagnose(net, DFA(), w, batch))
    assert drawn.keys() == {"W1", "W2", "W3"}
    assert min(drawn.values()) > 20
    w |= {"B3": w["W4"].T, "B2": (w["W4"] @ w["W3"]).T, "B1": (w["W4"] @ w["W3"] @ w["W2"]).T}
    assert of("angle/feedback_", diagnose(net, DFA(), w, batch)) == pytest.approx({"W1": 0, "W2": 0, "W3": 0}, abs=1e-6)


def test_direct_feedback_past_a_convolution_is_compared_with_nothing() -> None:
    net = allconv((1, 6, 5), 3, filters=[[3, 3, 1], [2, 2, 1]], activation="tanh")
    w = initial_weights(net, DFA(), Normal(), Normal(), 0)
    batch = Batch(torch.ones(1, 1, 6, 5), torch.eye(3)[:1], SoftmaxCrossEntropy(3))
    found = of("angle/feedback_", diagnose(net, DFA(), w | {"B2": 3 * w["W3"].T}, batch))
    assert found == {"W2": pytest.approx(0, abs=1e-3)}


@pytest.mark.parametrize("rule", [FA(), DFA()], ids=["fa", "dfa"])
def test_all_numbers_of_a_small_net_are_those_of_numpy(rule: Rule) -> None:
    net = mlp((6,), 3, hidden=[5, 4], activation="tanh")
    tensors = {k: t.double() for k, t in initial_weights(net, rule, Normal(1.0), Normal(1.0), seed=1).items()}
    labels = torch.arange(8) % 3
    x = 2 * torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, torch.eye(3, dtype=torch.float64)[labels], SoftmaxCrossEntropy(3))

    w = {name: t.numpy() for name, t in tensors.items()}
    h0 = x.numpy()
    h1 = np.tanh(h0 @ w["W1"].T)
    h2 = np.tanh(h1 @ w["W2"].T)
    p = np.exp(h2 @ w["W3"].T)
    d3 = p / p.sum(1, keepdims=True) - np.eye(3)[labels.numpy()]
    d2 = d3 @ w["W3"] * (1 - h2**2)
    d1 = d2 @ w["W2"] * (1 - h1**2)
    if isinstance(rule, FA):
        f2 = d3 @ w["B3"] * (1 - h2**2)
        f1 = f2 @ w["B2"] * (1 - h1**2)
        feedback = {"W3": (w["B3"], w["W3"]), "W2": (w["B2"], w["W2"])}
    else:
        f2 = d3 @ w["B2"].T * (1 - h2**2)
        f1 = d3 @ w["B1"].T * (1 - h1**2)
        feedback = {"W2": (w["B2"], w["W3"].T), "W1": (w["B1"], w["W2"].T @ w["W3"].T)}
    gradient = {"W1": d1.T @ h0 / 8, "W2": d2.T @ h1 / 8, "W3": d3.T @ h2 / 8}
    update = {"W1": f1.T @ h0 / 8, "W2": f2.T @ h1 / 8, "W3": gradient["W3"]}

    def degrees(u: Any, v: Any) -> float:
        cosine = (u * v).sum() / np.sqrt((u * u).sum() * (v * v).sum())
        return float(np.degrees(np.arccos(min(cosine, 1.0))))

    expected = {f"norm/{name}": np.sqrt((w[name] ** 2).sum()) for name in gradient}
    expected |= {f"norm/update_{name}": np.sqrt((u**2).sum()) for name, u in update.items()}
    expected |= {f"angle/update_{name}": degrees(update[name], g) for name, g in gradient.items()}
    expected |= {f"angle/feedback_{name}": degrees(*pair) for name, pair in feedback.items()}
    expected |= {f"saturation/h{l}": (np.abs(h) > np.sqrt(0.95)).mean() for l, h in ((1, h1), (2, h2))}
    found = diagnose(net, rule, tensors, batch)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert all(type(value) is float for value in found.values())
    assert found["angle/update_W1"] > 1
    assert 0 < found["saturation/h1"] < 1


def test_saturation_and_norms_by_hand() -> None:
    net = mlp((1,), 2, hidden=[4], activation="tanh", bias=False)
    w = {"W1": torch.tensor([[1.0], [2.0], [-3.0], [0.0]]), "W2": torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)}
    batch = Batch(torch.tensor([[1.0], [1.2]]), torch.eye(2), SoftmaxCrossEntropy(2))
    found = diagnose(net, BP(), w, batch)
    assert found["saturation/h1"] == 3 / 8  # z = 1, 2, -3, 0 and 1.2, 2.4, -3.6, 0; 1 - tanh^2 < 0.05 from 2.18 on
    assert of("saturation/", found).keys() == {"h1"}
    assert found["norm/W1"] == pytest.approx(14**0.5)
    assert found["norm/W2"] == pytest.approx(60**0.5)


def test_relu_saturates_where_it_is_off() -> None:
    net = mlp((1,), 2, hidden=[4], activation="relu", bias=False)
    w = {"W1": torch.tensor([[1.0], [2.0], [-3.0], [4.0]]), "W2": torch.ones(2, 4)}
    batch = Batch(torch.tensor([[1.0], [2.0]]), torch.eye(2), SoftmaxCrossEntropy(2))
    assert diagnose(net, BP(), w, batch)["saturation/h1"] == 0.25


def test_without_a_derivative_nothing_is_said_of_gradients(problem: Problem) -> None:
    outputs, L = problem.net.units(problem.net.L), problem.net.L
    net = mlp(problem.net.in_shape, outputs, hidden=[4] * (L - 1), activation="sign")
    w = {name: t.double() for name, t in initial_weights(net, LRAE(), Uniform(), Uniform(), 0).items()}
    found = diagnose(net, LRAE(), w, problem.batch)
    assert found.keys() == (
        {f"norm/{kind}W{l}" for l in range(1, L + 1) for kind in ("", "update_")}
        | {f"angle/feedback_W{l}" for l in range(2, L + 1)}
    )


def test_feedback_is_what_errors_go_down_through(problem: Problem) -> None:
    net, L = problem.net, problem.net.L
    w = {name: t.double() for name, t in initial_weights(net, FRSF(), Uniform(), Uniform(), 0).items()}
    found = of("angle/feedback_W", diagnose(net, FRSF(), w, problem.batch))
    assert found.keys() == {str(l) for l in range(2, L + 1)}
    assert all(value < 70 for value in found.values())  # the signs are those of W; through B it would be 90
    w |= {f"B{l}": w[f"W{l}"].abs() for l in range(2, L + 1)}
    assert all(v < 1e-5 for v in of("angle/feedback_W", diagnose(net, FRSF(), w, problem.batch)).values())


@pytest.mark.parametrize("chunk", [1, 2_000, 10_000_000])
@pytest.mark.parametrize("rule", [FA(), DFA(), MDFA(), LRAE()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    "net",
    [
        mlp((1, 5, 4), 1, hidden=[6, 5], activation="tanh"),
        allconv((1, 5, 4), 1, filters=[[3, 2, 1], [3, 2, 1], [2, 2, 1]], activation="tanh"),
    ],
    ids=["mlp", "conv"],
)
def test_opposition_is_counted_over_single_samples(
    net: Network, rule: Rule, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "CHUNK", chunk)
    w, batch = binary(net, rule, samples=25)
    opposed = dict.fromkeys((f"W{l}" for l in range(1, net.L + 1)), 0)
    for i in range(25):
        single = Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.loss)
        update, gradient = rule.grads(net, w, single)[0], BP().grads(net, w, single)[0]
        for l in range(1, net.L + 1):
            inner = sum(float((update[name] * gradient[name]).sum()) for name in (f"W{l}", f"b{l}"))
            opposed[f"W{l}"] += inner < 0
    found = diagnose(net, rule, w, batch)
    assert of("opposed/", found) == pytest.approx({name: n / 25 for name, n in opposed.items()})
    if not isinstance(rule, MDFA):
        assert any(opposed.values())


def test_opposition_is_of_weights_and_biases_together_and_beyond_rounding() -> None:
    class Against(BP):
        def grads(self, net: Network, w: Any, batch: Batch) -> Grads:
            g, logits = super().grads(net, w, batch)
            return {"W1": -g["W1"], "b1": g["b1"]}, logits

    net = mlp((1,), 1, hidden=[], activation="tanh")
    x = torch.tensor([[0.5], [1.0], [1.0 + 2e-7], [2.0], [-3.0]])  # the inner product is d^2 (1 - x^2)
    batch = Batch(x, torch.ones(5, 1), SigmoidCrossEntropy(2))
    found = diagnose(net, Against(), {"W1": torch.ones(1, 1), "b1": torch.zeros(1)}, batch)
    assert of("opposed/", found) == {"W1": pytest.approx(2 / 5)}


def test_layers_that_a_rule_leaves_alone_have_no_update() -> None:
    class OutputAlone(BP):
        def grads(self, net: Network, w: Any, batch: Batch) -> Grads:
            g, logits = super().grads(net, w, batch)
            return {"W2": g["W2"]}, logits

    net = mlp((5,), 1, hidden=[4], activation="tanh")
    found = diagnose(net, OutputAlone(), *binary(net, BP()))
    assert found.keys() == {"norm/W1", "norm/W2", "norm/update_W2", "angle/update_W2", "saturation/h1", "opposed/W2"}


def test_the_updates_are_computed_as_in_training_and_the_gradient_exactly(problem: Problem) -> None:
    w = {name: t.float() for name, t in problem.weights(BP()).items()}
    batch = replace(problem.batch, x=problem.batch.x.float(), y=problem.batch.y.float())
    found = of("angle/update_", diagnose(problem.net, BP(), w, batch))
    rounded = of("angle/update_", diagnose(problem.net, BP(), w, batch, torch.autocast("cpu", torch.bfloat16)))
    assert found == dict.fromkeys(rounded, 0)
    assert all(0 < angle < 5 for angle in rounded.values())


def test_nothing_is_said_of_a_net_whose_logits_are_not_finite() -> None:
    net = mlp((5,), 1, hidden=[4], activation="tanh")
    w, batch = binary(net, BP())
    assert diagnose(net, BP(), w | {"W2": w["W2"] * torch.inf}, batch) == {}


@dataclass(frozen=True)
class NoisyPhases(BP):
    """Backpropagation with noise of the samples' own and noise of the weights' shapes, after a phase of its own."""

    def grads(self, net: Network, w: Any, batch: Batch) -> Grads:
        g, logits = super().grads(net, w, replace(batch, x=batch.x + batch.noise["x"]))
        return {name: g[name] * batch.noise.get(name, 1) for name in g}, logits

    def first(self, net: Network, w: Any, batch: Batch) -> Grads:
        g, logits = super().grads(net, w, batch)
        return {"W1": 100 * g["W1"], "V1": g["W1"]}, logits

    def phases(self) -> Any:
        return self.first, self.grads

    def noise(self, net: Network, samples: int) -> dict[str, Any]:
        return {"x": (samples, *net.in_shape), "W1": net.weight_shape(1)}

    def feedback(self, net: Network, draw: Any) -> dict[str, Tensor]:
        return {"V1": draw("V1", net.weight_shape(1))}


def test_noise_and_phases_are_those_of_the_rule() -> None:
    net = mlp((5,), 1, hidden=[4], activation="tanh")
    rule = NoisyPhases()
    w, batch = binary(net, rule)
    noise = normal(rule.noise(net, 40), 0)
    found = diagnose(net, rule, w, replace(batch, noise=noise))
    moved = replace(batch, x=batch.x + noise["x"])
    g = BP().grads(net, w, moved)[0]
    assert found["norm/update_W1"] == pytest.approx(float((g["W1"] * noise["W1"]).norm()))
    opposed = {"W1": 0, "W2": 0}
    for i in range(40):
        update = BP().grads(net, w, Batch(moved.x[i : i + 1], batch.y[i : i + 1], batch.loss))[0]
        gradient = BP().grads(net, w, Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.loss))[0]
        update["W1"] = update["W1"] * noise["W1"]
        for l in (1, 2):
            opposed[f"W{l}"] += sum(float((update[n] * gradient[n]).sum()) for n in (f"W{l}", f"b{l}")) < 0
    assert of("opposed/", found) == pytest.approx({name: n / 40 for name, n in opposed.items()})
    assert any(opposed.values())


def _own_gradient(net: Network, rule: Rule, w: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """By autograd, of the loss of the rule's own answer."""
    leaves = {name: t.clone().requires_grad_() for name, t in w.items()}
    loss = batch.loss.value(rule.logits(net, leaves, batch.x), batch.y).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("rule", [EquilibriumPropagation(), ForwardForward(), ForwardForward(readout="goodness")])
def test_a_rule_that_predicts_in_its_own_way_is_measured_against_the_gradient_of_that(
    problem: Problem, rule: Rule
) -> None:
    net, w = problem.net, {name: 0.2 * t for name, t in problem.weights(rule).items()}
    batch = problem.noisy(rule)
    with torch.no_grad():  # as the callback
        found = diagnose(net, rule, w, batch)
    expected, update = _own_gradient(net, rule, w, batch), rule.grads(net, w, batch)[0]
    for l in range(1, net.L + 1):
        degrees = float(angle(update[f"W{l}"], expected[f"W{l}"]))
        assert found.get(f"angle/update_W{l}", float("nan")) == pytest.approx(degrees, abs=1e-4, nan_ok=True)
    if isinstance(rule, EquilibriumPropagation):
        assert max(of("angle/update_W", found).values()) < 0.5
        assert of("unrest/", found).keys() == {f"h{l}" for l in range(1, net.L)}
        forward = BP().grads(net, w, batch)[0]
        others = [float(angle(update[f"W{l}"], forward[f"W{l}"])) for l in range(1, net.L)]
        assert net.L < 3 or max(others) > 1
    if net.units(net.L) == 1:
        opposed = dict.fromkeys(range(1, net.L + 1), 0)
        for i in range(len(batch.x)):
            noise = {name: t[i : i + 1] for name, t in batch.noise.items()}
            single = Batch(batch.x[i : i + 1], batch.y[i : i + 1], batch.loss, noise)
            own, g = rule.grads(net, w, single)[0], _own_gradient(net, rule, w, single)
            for l in opposed:
                opposed[l] += sum(float((own[n] * g[n]).sum()) for n in (f"W{l}", f"b{l}")) < 0
        assert of("opposed/W", found) == pytest.approx({str(l): n / len(batch.x) for l, n in opposed.items()})


def test_a_readout_stands_in_for_no_weights() -> None:
    net = mlp((12,), 4, hidden=[4, 4, 4], activation="tanh")
    w = {name: t.double() for name, t in initial_weights(net, ForwardForward(), Normal(), Normal(), 0).items()}
    assert w["R2"].shape == w["W2"].shape
    noise = normal(ForwardForward().noise(net, 1), 0)
    batch = Batch(torch.ones(1, 12).double(), torch.eye(4)[:1].double(), SoftmaxCrossEntropy(4), noise)
    assert not of("angle/feedback_", diagnose(net, ForwardForward(), w, batch))


# The callback

TRAINING = {"train/loss", "train/accuracy"}  # which not every rule has
SCORES = TRAINING | {"epoch", "step", "val/loss", "val/accuracy"}  # an entry without diagnostics
LOSS = SigmoidCrossEntropy(2)
NET = mlp((1, 4, 4), 1, hidden=[6, 5], activation="tanh")
CONV = allconv((1, 4, 4), 1, filters=[[3, 3, 1, 1], [2, 2, 2]], activation="tanh")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Three classes of 50, 60 and 72 images; each class has a bright row of its own."""
    generator = torch.Generator().manual_seed(0)

    def images(*counts: int) -> Images:
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        pixels = torch.randint(150, (len(labels), 1, 4, 4), generator=generator, dtype=torch.uint8)
        pixels[torch.arange(len(labels)), 0, labels] += 100
        return Images(pixels, labels)

    return Dataset("rows", images(50, 60, 72), images(9, 9, 9), 3)


Fit = Callable[..., Learner]


@pytest.fixture
def fit(dataset: Dataset) -> Fit:
    """`fit(rule, seeds, samples=...)` trains seeds of two classes as one stack, with diagnostics if there are samples.

    Validation comes in batches of 4 images, of which the seeds have 11 or 12.
    """

    def run(
        rule: Rule,
        seeds: list[int],
        samples: int | None = None,
        net: Network = NET,
        lr: float = 0.1,
        epochs: int = 2,
        device: str = "cpu",
        **options: Any,
    ) -> Learner:
        tasks = [task(dataset, seed, classes=2) for seed in seeds]
        return fitted(
            dataset,
            net,
            rule,
            LOSS,
            tasks,
            {seed: initial_weights(net, rule, Uniform(), Uniform(), seed) for seed in seeds},
            batch_size=45,
            eval_size=4,
            epochs=epochs,
            device=device,
            callbacks=[] if samples is None else [Diagnostics(samples)],
            pixels=Pixels((0.4,), (0.3,)),
            optimizer=partial(torch.optim.SGD, lr=lr),
            **options,
        )

    return run


def expected(learner: Learner, dataset: Dataset, s: int, seed: int, samples: int) -> dict[str, float]:
    """What `diagnose` finds for a seed's weights on the first images of its validation table."""
    t = task(dataset, seed, classes=2)
    chosen = t.validation[:samples]
    x = learner.pixels(dataset.train.pixels[chosen])
    y = t.relabel[dataset.train.labels[chosen]].float()[:, None]
    return diagnose(learner.net, learner.rule, {k: p[s] for k, p in learner.w.items()}, Batch(x, y, LOSS))


@pytest.mark.parametrize("samples", [3, 6, 64])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2, 3]], ids=["alone", "stacked"])
def test_the_numbers_of_the_last_weights_are_in_the_last_entry_of_each_seed(
    fit: Fit, dataset: Dataset, seeds: list[int], samples: int
) -> None:
    assert {len(task(dataset, seed, classes=2).validation) for seed in (0, 1, 2, 3)} == {11, 12}
    learner = fit(DFA(), seeds, samples)
    plain = fit(DFA(), seeds)
    for s, seed in enumerate(seeds):
        entry = learner.progress[s].epochs[-1]
        numbers = expected(learner, dataset, s, seed, samples)
        assert {"angle/update_W1", "angle/feedback_W1", "saturation/h2", "norm/W3", "opposed/W1"} < numbers.keys()
        assert entry == plain.progress[s].epochs[-1] | numbers


@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_training_is_the_same_with_and_without(fit: Fit, rule: Rule, net: Network) -> None:
    before = torch.get_rng_state()
    measured, plain = (fit(rule, [0, 1], samples, net=net) for samples in (64, None))
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in plain.w.items():
        assert torch.equal(measured.w[name], p)
        assert torch.equal(measured.best[name], plain.best[name])
    for ours, theirs in zip(measured.progress, plain.progress, strict=True):
        assert ours.best_epoch == theirs.best_epoch
        for entry, scores in zip(ours.epochs, theirs.epochs, strict=True):
            assert scores.keys() - TRAINING - {"val/accuracy_goodness"} == SCORES - TRAINING
            assert entry.keys() > scores.keys()
            assert {name: entry[name] for name in scores} == scores


def test_a_seed_beside_others_has_the_numbers_it_has_alone(fit: Fit, rule: Rule) -> None:
    stack = fit(rule, [0, 1, 2, 3], 64)
    for s, seed in enumerate([0, 1, 2, 3]):
        (alone,) = fit(rule, [seed], 64).progress
        for entry, other in zip(stack.progress[s].epochs, alone.epochs, strict=True):
            assert entry == pytest.approx(other, rel=1e-3, abs=1e-3)


def test_a_seed_that_has_stopped_is_measured_no_more(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(diagnostics, "diagnose", lambda *_: measured.append(1) or {"norm/W1": 1.0})
    learner = fit(DFA(), [0, 1, 2, 3], 64, epochs=12, patience=2)
    lengths = [len(p.epochs) for p in learner.progress]
    assert len({*lengths}) > 1
    assert len(measured) == sum(lengths)


def test_a_seed_that_diverged_has_no_numbers(fit: Fit) -> None:
    (progress,) = fit(DFA(), [0], 64, lr=float("nan")).progress
    assert progress.diverged_epoch == 1
    assert progress.epochs[-1].keys() == SCORES


def test_an_entry_holds_no_number_of_an_earlier_epoch(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"norm/W1": 1.0}, {}])
    monkeypatch.setattr(diagnostics, "diagnose", lambda *_: next(found))
    (progress,) = fit(DFA(), [0], 64).progress
    assert ["norm/W1" in entry for entry in progress.epochs] == [True, False]


def test_without_samples_there_is_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match=r"diagnostics.samples is 0: it must be 1 or more"):
        Diagnostics(0)


def test_the_config_makes_the_callback(configured: Callable[..., Any]) -> None:
    assert isinstance(configured("diagnostics", "alignment"), Diagnostics)
    assert configured("diagnostics", "alignment").samples == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(fit: Fit, net: Network) -> None:
    cpu, gpu = (fit(DFA(), [0, 1], 64, net=net, epochs=1, device=device).progress for device in ("cpu", "gpu"))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.epochs[-1] == pytest.approx(theirs.epochs[-1], rel=1e-3, abs=1e-2)
