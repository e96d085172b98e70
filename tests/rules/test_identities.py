"""What each rule computes, in float64: its identity with backpropagation, and what the papers say of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Problem, errors_of_float32
from torch import Tensor

from nobackprop.core.activations import ACTIVATIONS
from nobackprop.core.initializers import Normal, Uniform, initial_weights
from nobackprop.core.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.core.rule import Batch, Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.brsf import BRSF
from nobackprop.rules.dfa import DFA
from nobackprop.rules.dtp import DTP
from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation
from nobackprop.rules.fa import FA
from nobackprop.rules.forward_forward import ForwardForward
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.rules.pepita import PEPITA
from nobackprop.rules.predictive_coding import PredictiveCoding
from nobackprop.rules.usf import USF
from nobackprop.rules.weight_mirror import WeightMirror

WITH_DERIVATIVE = [name for name, a in ACTIVATIONS.items() if a.derivative is not None]


def _grads(rule: Rule, problem: Problem, w: dict[str, Tensor]) -> dict[str, Tensor]:
    return rule.grads(problem.net, w, problem.batch)[0]


def _standing_in(letter: str, w: dict[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """The weights with B or E of every layer above the first set to W."""
    return w | {f"{letter}{l}": w[f"W{l}"] for l in range(2, problem.net.L + 1)}


@pytest.mark.parametrize("name", WITH_DERIVATIVE)
def test_bp_is_autograd(problem: Problem, name: str) -> None:
    problem = problem.activated(name)
    net, batch = problem.net, problem.batch
    w = {name: t.requires_grad_() for name, t in problem.weights(BP()).items()}
    loss = batch.loss.value(net.logits(w, batch.x), batch.y).mean()
    expected = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    torch.testing.assert_close(_grads(BP(), problem, {name: t.detach() for name, t in w.items()}), expected)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_fa_with_the_weights_themselves_is_bp(problem: Problem, name: str) -> None:
    problem = problem.activated(name)
    w = _standing_in("B", problem.weights(FA()), problem)
    torch.testing.assert_close(_grads(FA(), problem, w), _grads(BP(), problem, w))


def test_fa_sends_the_error_through_b_and_not_w(problem: Problem) -> None:
    w = problem.weights(FA())
    other = w | {f"B{l}": 2 * w[f"B{l}"] for l in range(2, problem.net.L + 1)}
    once, twice = _grads(FA(), problem, w), _grads(FA(), problem, other)
    for l in range(1, problem.net.L + 1):
        torch.testing.assert_close(twice[f"W{l}"], once[f"W{l}"] * 2 ** (problem.net.L - l))


def test_dfa_of_a_linear_net_with_the_product_of_the_downstream_weights_is_bp(problem: Problem) -> None:
    problem = problem.activated("identity")
    net = problem.net
    w = problem.weights(DFA())
    _, h = net.forward(w, torch.zeros(net.units(net.L), *net.in_shape, dtype=torch.float64))
    d = torch.eye(net.units(net.L), dtype=torch.float64)  # one sample for each output
    for l in range(net.L, 1, -1):
        d = net.feedback(l, w[f"W{l}"], d, h[l - 1])
        w[f"B{l - 1}"] = d.flatten(1).T  # (units, outputs)
    torch.testing.assert_close(_grads(DFA(), problem, w), _grads(BP(), problem, w))


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_dfa_is_the_closed_form(problem: Problem, name: str) -> None:
    problem = problem.activated(name)
    net, batch = problem.net, problem.batch
    w = problem.weights(DFA())
    z, h = net.forward(w, batch.x)
    e = batch.error(z[net.L])
    expected = net.hebbian(net.L, h[net.L - 1], e)
    for l in range(1, net.L):
        d = torch.einsum("no,uo->nu", e, w[f"B{l}"]).view_as(z[l]) * net.df(l, z[l], h[l])
        expected |= net.hebbian(l, h[l - 1], d)
    torch.testing.assert_close(_grads(DFA(), problem, w), expected)


def _distance_from_bp(problem: Problem, beta: float) -> dict[int, float]:
    """For each hidden layer, how far LRA-E's gradients with E = W, over beta^(L-l), are from BP's, relatively."""
    net = problem.net
    w = _standing_in("E", problem.weights(LRAE()), problem)
    local, expected = _grads(LRAE(beta=beta), problem, w), _grads(BP(), problem, w)
    return {
        l: max(
            float((local[name] / beta ** (net.L - l) - expected[name]).norm() / expected[name].norm())
            for name in (f"W{l}", f"b{l}")
        )
        for l in range(1, net.L)
    }


def test_lra_e_with_the_weights_themselves_tends_to_bp(problem: Problem) -> None:
    coarse, fine = _distance_from_bp(problem, 1e-2), _distance_from_bp(problem, 1e-3)
    for l in fine:
        assert fine[l] < 1e-2
        assert fine[l] < 0.15 * coarse[l]
    assert all(distance < 1e-5 for distance in _distance_from_bp(problem, 1e-7).values())  # nothing cancels


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lra_es_plain_differences_are_the_exact_ones_but_for_rounding(problem: Problem, name: str) -> None:
    problem = problem.activated(name)
    w = problem.weights(LRAE())
    torch.testing.assert_close(_grads(LRAE(), problem, w), _grads(LRAE(difference="plain"), problem, w))


@pytest.mark.parametrize("depth", [3, 8, 30])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "softsign"])
def test_lra_e_in_float32_has_float64s_gradients_at_any_depth(name: str, depth: int) -> None:
    loss, generator = SoftmaxCrossEntropy(4), torch.Generator().manual_seed(0)
    net = mlp((20,), 4, hidden=[32] * depth, activation=name)
    w = {n: t.double() for n, t in initial_weights(net, LRAE(), Normal(0.2), Normal(0.2), 0).items()}
    x = torch.randn(6, 20, generator=generator).double()
    problem = Problem(net, Batch(x, loss.target(torch.arange(6) % 4, x.dtype), loss))
    assert max(errors_of_float32(LRAE(), LRAE(), problem, w)) < 1e-5
    plain = errors_of_float32(LRAE(difference="plain"), LRAE(), problem, w)
    assert (plain[0] > 0.5) == (depth >= 8)


def test_lra_e_trains_the_output_layer_as_bp_does(problem: Problem) -> None:
    w = problem.weights(LRAE())
    local, expected = _grads(LRAE(), problem, w), _grads(BP(), problem, w)
    for name in (f"W{problem.net.L}", f"b{problem.net.L}"):
        torch.testing.assert_close(local[name], expected[name])


def test_lra_e_without_an_error_sent_down_leaves_hidden_layers_alone(problem: Problem) -> None:
    w = problem.weights(LRAE())
    silent = w | {name: torch.zeros_like(t) for name, t in w.items() if name.startswith("E")}
    grads = _grads(LRAE(), problem, silent)
    assert not any(grads[f"{letter}{l}"].any() for letter in "Wb" for l in range(1, problem.net.L))


def test_lra_e_trains_e_as_it_trains_w(problem: Problem) -> None:
    grads = _grads(LRAE(), problem, problem.weights(LRAE()))
    above_the_first = range(2, problem.net.L + 1)
    assert {name for name in grads if name.startswith("E")} == {f"E{l}" for l in above_the_first}
    assert all(torch.equal(grads[f"E{l}"], grads[f"W{l}"]) for l in above_the_first)


def test_lra_e_leaves_e_alone_when_told_to(problem: Problem) -> None:
    w = problem.weights(LRAE())
    learned, fixed = _grads(LRAE(), problem, w), _grads(LRAE(learn_E=False), problem, w)
    assert fixed.keys() == {name for name in learned if not name.startswith("E")}
    torch.testing.assert_close(fixed, {name: learned[name] for name in fixed})


def test_lra_e_needs_no_derivative(problem: Problem) -> None:
    problem = problem.activated("sign")
    grads = _grads(LRAE(beta=1.0), problem, problem.weights(LRAE()))
    assert all(g.isfinite().all() and g.any() for g in grads.values())


def test_lra_e_trains_nets_of_sign_activations(
    problem: Problem, hundred_steps: Callable[[Problem, Rule], tuple[float, float]]
) -> None:
    outputs = problem.net.units(problem.net.L)
    net = mlp(problem.net.in_shape, outputs, hidden=[32, 32], activation="sign")  # wide, since a step flips units
    first, last = hundred_steps(replace(problem, net=net), LRAE(beta=1.0))
    assert last < 0.8 * first


FEEDBACK = "it scales the feedback weights, so it must be above 0"
PART = "a step goes part of the way, so above 0 and at most 1"


@pytest.mark.parametrize(
    ("kind", "field", "value", "why"),
    [
        (LRAE, "beta", 0, "it scales the error sent down, so it must be above 0"),
        (LRAE, "beta", -0.1, "it scales the error sent down, so it must be above 0"),
        (LRAE, "gamma", -1, "it scales the rate of E, so 0 or more"),
        (LRAE, "difference", "none", "write exact, or plain for h - y as it stands"),
        (MDFA, "floor", -1e-6, "mDFA needs non-negative weights, so 0 or more"),
        (USF, "scale", 0, FEEDBACK),
        (BRSF, "scale", -1, FEEDBACK),
        (WeightMirror, "sigma", 0, "without noise there is nothing to mirror, so above 0"),
        (WeightMirror, "decay", -1, "it keeps B from growing, so 0 or more"),
        (PEPITA, "scale", 0, "without the error in the input nothing is learned"),
        (ForwardForward, "theta", 0, "no goodness is below 0, so it must be above"),
        (ForwardForward, "readout", "none", "write linear or goodness"),
        (ForwardForward, "readout_rate", -1, "it scales the rate of R, so 0 or more"),
        (PredictiveCoding, "steps", 0, "the net must relax for 1 step or more"),
        (PredictiveCoding, "rate", 0, "above 0, and 1 at most"),
        (PredictiveCoding, "rate", 1.5, "above 0, and 1 at most"),
        (PredictiveCoding, "variance", 0, "it divides the output's error, so it must be above 0"),
        (PredictiveCoding, "form", "none", "write states, errors or subtracted"),
        (PredictiveCoding, "scaling", "ntk", "write none or mupc"),
        (DTP, "eta", 0, "it scales the step to the first target, so it must be above 0"),
        (DTP, "sigma", -1, "it is a standard deviation, so 0 or more"),
        (EquilibriumPropagation, "beta", 0, "it scales the push of the outputs"),
        (EquilibriumPropagation, "epsilon", 0, PART),
        (EquilibriumPropagation, "epsilon", 1.5, PART),
        (EquilibriumPropagation, "free_steps", -1, "it must be 0 or more"),
        (EquilibriumPropagation, "nudged_steps", 0, "without any nothing is learned"),
        (EquilibriumPropagation, "difference", "none", "write exact, or plain to subtract the states"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(kind: type[Rule], field: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rule.{field} is {value!r}: {why}")):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (LRAE, "gamma", 0),
        (MDFA, "floor", 0),
        (WeightMirror, "decay", 0),
        (PredictiveCoding, "rate", 1),
        (DTP, "sigma", 0),
        (EquilibriumPropagation, "epsilon", 1),
        (EquilibriumPropagation, "free_steps", 0),
    ],
)
def test_hyper_parameters_at_the_edge_of_their_range_are_taken(kind: type[Rule], field: str, value: float) -> None:
    assert getattr(kind(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("option", "papers"),
    [("lra_e", LRAE(beta=0.1, gamma=1.0, learn_E=True)), ("mdfa", MDFA(floor=1e-6))],
    ids=["lra_e", "mdfa"],
)
def test_hyper_parameters_are_the_papers_unless_set(configured: Callable[..., Any], option: str, papers: Rule) -> None:
    assert type(papers)() == papers
    assert configured("rule", option) == papers


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.1])
def test_mdfa_keeps_weights_above_the_first_layer_at_the_floor(problem: Problem, floor: float) -> None:
    rule = MDFA(floor=floor)
    signed = problem.weights(DFA())
    projected = rule.constrain(problem.net, signed)
    assert projected.keys() == {f"W{l}" for l in range(2, problem.net.L + 1)}
    for name, t in projected.items():
        assert (signed[name] < floor).any()
        assert torch.equal(t, torch.where(signed[name] < floor, floor, signed[name]))


def _violations(rule: Rule, activation: str, nets: int = 10, samples: int = 10) -> int:
    """In how many layers of random nets with one output a sample's update opposes its gradient."""
    loss = SigmoidCrossEntropy(2)
    generator = torch.Generator().manual_seed(0)
    count = 0
    for seed in range(nets):
        widths = torch.randint(2, 9, (1 + seed % 4,), generator=generator).tolist()
        net = mlp((5,), 1, hidden=widths, activation=activation)
        w = {k: t.double() for k, t in initial_weights(net, rule, Uniform(2.0), Uniform(2.0), seed).items()}
        for l in range(1, net.L + 1):
            w[f"b{l}"] = torch.randn(w[f"b{l}"].shape, dtype=torch.float64, generator=generator)
        x = 2 * torch.randn(samples, 5, dtype=torch.float64, generator=generator)
        y = torch.randint(2, (samples, 1), generator=generator).double()
        for i in range(samples):
            batch = Batch(x[i : i + 1], y[i : i + 1], loss)
            update, gradient = rule.grads(net, w, batch)[0], BP().grads(net, w, batch)[0]
            count += sum(bool((update[name] * gradient[name]).sum() < 0) for name in update)
    return count


@pytest.mark.parametrize("name", WITH_DERIVATIVE)
def test_mdfas_updates_never_oppose_the_gradient_with_one_output(name: str) -> None:
    assert _violations(MDFA(), name) == 0


@pytest.mark.parametrize("name", WITH_DERIVATIVE)
def test_dfas_updates_sometimes_do(name: str) -> None:
    assert _violations(DFA(), name) > 10
