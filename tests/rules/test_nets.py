"""Rules on nets with pooling, normalization, shortcuts and attention: identities in float64, and what they refuse."""

import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
from conftest import CONF, MAPPED, NETS, Problem, options, problem_of, refuses
from torch import Tensor

from nobackprop.core.activations import ACTIVATIONS
from nobackprop.core.architectures import Part, Residual, assemble, row
from nobackprop.core.layers import Conv, Dense, Tokens
from nobackprop.core.losses import SigmoidCrossEntropy
from nobackprop.core.maps import Attention, AvgPool, Dropout, Elementwise, GroupNorm, LayerNorm, MaxPool, Mean
from nobackprop.core.network import Network, Weights
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.block_dfa import BlockDFA
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.dfa_two_pass import DFATwoPass
from nobackprop.rules.direct_kolen_pollack import DirectKolenPollack
from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.rules.predictive_coding import PredictiveCoding

_TANH = ACTIVATIONS["tanh"]


def _autograd(net: Network, w: Weights, batch: Batch) -> dict[str, Tensor]:
    w = {name: t.detach().requires_grad_() for name, t in w.items() if name[0] in "Wb"}
    loss = batch.loss.value(net.logits(w, batch.x), batch.y).mean()
    return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def _grads(rule: Rule, problem: Problem, w: Weights) -> dict[str, Tensor]:
    with torch.no_grad():
        return rule.grads(problem.net, w, problem.batch)[0]


def _with_the_weights(letter: str, w: dict[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    return w | {f"{letter}{l}": w[f"W{l}"] for l in range(2, problem.net.L + 1)}


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_bp_is_autograd(mapped: Problem, name: str) -> None:
    problem = mapped.activated(name)
    w = problem.weights(BP())
    torch.testing.assert_close(_grads(BP(), problem, w), _autograd(problem.net, w, problem.batch))


def test_bp_is_autograd_with_shortcuts_in_shortcuts_and_from_the_image() -> None:
    inner = Residual((Conv(3, 3, 1, 1), Conv(3, 3, 1, 1)))
    net = assemble(
        (2, 6, 6),
        [
            Residual((Conv(3, 3, 1, 1),)),
            Residual((GroupNorm(1), Conv(3, 3, 1, 1), inner, Conv(3, 1))),
            Mean(),
            Dense(4),
        ],
    )
    problem = replace(problem_of("lenet", "softmax"), net=net)
    problem = replace(problem, batch=replace(problem.batch, x=problem.batch.x[:, :, :6, :6]))
    w = problem.weights(BP())
    torch.testing.assert_close(_grads(BP(), problem, w), _autograd(net, w, problem.batch))
    again = replace(problem, net=replace(net, recompute=True))
    torch.testing.assert_close(_grads(BP(), again, w), _grads(BP(), problem, w), rtol=0, atol=0)


def test_with_dropout_drawn_bp_is_autograd_through_the_same_mask() -> None:
    drawn = MAPPED["vit"](outputs=4, activation="tanh", dropout=0.4)
    noise = {name: t.double() for name, t in normal(drawn.noise(6), 0, "noise").items()}
    problem = replace(problem_of("vit", "softmax"), net=drawn.with_noise(noise))
    w = problem.weights(BP())
    found = _grads(BP(), problem, w)
    torch.testing.assert_close(found, _autograd(problem.net, w, problem.batch))
    assert not torch.equal(found["W1"], _grads(BP(), replace(problem, net=drawn), w)["W1"])

    def step(w: dict[str, Tensor], x: Tensor, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        return BP().grads(drawn.with_noise(noise), w, replace(problem.batch, x=x))[0]

    with torch.no_grad():
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(w, problem.batch.x, noise), found)
        pairs = {name: torch.stack([t, -t]) for name, t in noise.items()}
        stacked = torch.func.vmap(step, in_dims=(None, None, 0))(w, problem.batch.x, pairs)
        torch.testing.assert_close({name: t[0] for name, t in stacked.items()}, found)


def test_fa_with_the_weights_themselves_is_bp(mapped: Problem) -> None:
    w = _with_the_weights("B", mapped.weights(FA()), mapped)
    torch.testing.assert_close(_grads(FA(), mapped, w), _grads(BP(), mapped, w))


def _linear() -> Problem:
    """A residual net with pooling and shortcuts that shrink, all linear."""
    block = Residual((Conv(6, 3, 2, 1), Conv(6, 3, 1, 1)))
    parts: list[Part] = [
        Conv(4, 3, 1, 1),
        AvgPool(2, 1),
        block,
        Residual((Conv(6, 3, 1, 1),)),
        Mean(),
        Dense(5),
        Dense(4),
    ]
    problem = problem_of("lenet", "softmax")
    return replace(problem, net=assemble(problem.net.in_shape, parts))


def test_dfa_of_a_linear_residual_net_with_the_total_jacobian_is_bp() -> None:
    """B[l] stands for all ways from what reads h[l] to the output, shortcuts included, so nothing is counted twice."""
    problem = _linear()
    net, x = problem.net, problem.batch.x[:1]
    w = problem.weights(DFA())
    _, h = net.forward(w, x)
    for l in range(1, net.L):

        def above(h_l: Tensor, l: int = l) -> Tensor:
            upper = {number: h[number] for number in range(l)} | {l: h_l}
            for m in range(l + 1, net.L):
                upper[m] = net.output(m, net.preactivation(m, w, upper[m - 1]), upper)
            return net.preactivation(net.L, w, upper[net.L - 1])

        jacobian = torch.autograd.functional.jacobian(above, h[l]).squeeze(0).flatten(1)  # (outputs, units of h[l])
        read = net.layers[l].read
        if not read:
            w[f"B{l}"] = jacobian.T
        else:  # B is for what is read: any that the pooling's transpose takes to the Jacobian
            through = torch.autograd.functional.jacobian(lambda t, read=read: read[0](t), h[l])
            P = through.flatten(0, -1 - h[l].ndim).flatten(1)  # (units read, units of h[l])
            solution = torch.linalg.lstsq(P.T, jacobian.T).solution
            torch.testing.assert_close(P.T @ solution, jacobian.T, atol=1e-9, rtol=1e-9)  # shortcuts pool as reads do
            w[f"B{l}"] = solution
    for rule in (DFA(), BlockDFA(ends=[2, 4]), BlockDFA(ends=[3])):
        torch.testing.assert_close(_grads(rule, problem, w), _grads(BP(), problem, w))


def test_dfa_has_a_feedback_unit_for_each_unit_that_is_read(mapped: Problem) -> None:
    w = replace(mapped, net=replace(mapped.net, own_feedback=True)).weights(DFA())
    for l in range(1, mapped.net.L):
        assert w[f"B{l}"].shape == (torch.Size(mapped.net.read_shapes[l + 1]).numel(), 4)


def test_block_dfa_without_ends_is_bp_and_with_all_of_them_dfa(mapped: Problem) -> None:
    w = mapped.weights(DFA())
    torch.testing.assert_close(_grads(BlockDFA(ends=[]), mapped, w), _grads(BP(), mapped, w))
    every = range(1, mapped.net.L)
    torch.testing.assert_close(_grads(BlockDFA(ends=every), mapped, w), _grads(DFA(), mapped, w))


def test_block_dfa_sends_errors_to_the_ends_of_residual_blocks() -> None:
    net = MAPPED["vit"](outputs=4, activation="tanh")
    own = BlockDFA().feedback(net, lambda name, shape: torch.zeros(shape))
    assert [*own] == ["B3", "B5", "B7", "B9"]
    row_of_them = NETS["mlp"](outputs=4, activation="tanh")
    assert [*BlockDFA().feedback(row_of_them, lambda name, shape: torch.zeros(shape))] == ["B1", "B2", "B3"]
    with pytest.raises(ValueError, match=r"rule.ends has \[10\]: this net's hidden layers are 1 to 9"):
        BlockDFA(ends=[3, 10]).feedback(net, lambda name, shape: torch.zeros(shape))


def test_predictive_coding_with_its_prediction_fixed_relaxes_to_bp(mapped: Problem) -> None:
    w = mapped.weights(BP())
    rule = PredictiveCoding(fixed_prediction=True, rate=1.0, steps=mapped.net.L)
    torch.testing.assert_close(_grads(rule, mapped, w), _grads(BP(), mapped, w))


def test_predictive_coding_carries_the_errors_that_subtracting_gives(mapped: Problem) -> None:
    w = {name: t / 2 for name, t in mapped.weights(BP()).items()}
    carried, subtracted = (
        _grads(PredictiveCoding(form=form, rate=0.1, steps=30, variance=10.0), mapped, w) for form in _FORMS
    )
    torch.testing.assert_close(carried, {name: 10 * t for name, t in subtracted.items()})


def test_predictive_coding_by_errors_tends_to_bp_as_the_variance_grows(mapped: Problem) -> None:
    w = {name: t / 2 for name, t in mapped.weights(BP()).items()}
    expected, distance = _grads(BP(), mapped, w), []
    for variance in (1e3, 1e4):
        found = _grads(PredictiveCoding(form="errors", rate=0.2, steps=200, variance=variance), mapped, w)
        distance.append(max(float((found[n] - t).norm() / t.norm()) for n, t in expected.items()))
    assert distance[1] < 0.12 * distance[0] < 0.01


_FORMS: tuple[Literal["states"], Literal["subtracted"]] = ("states", "subtracted")


def _angle(u: Tensor, v: Tensor) -> float:
    return torch.rad2deg(torch.arccos((u * v).sum() / u.norm() / v.norm())).item()


_DIFFERENCES: list[tuple[Literal["exact", "plain"], float]] = [("exact", 1e-5), ("plain", 1e-3)]


@pytest.mark.parametrize(("pool", "within"), [("avg_pool", 1e-6), ("max_pool", 0.25)])
def test_equilibrium_propagation_with_pooling_gives_the_gradient_of_its_prediction(pool: str, within: float) -> None:
    """With max pooling, roughly: where the largest changes places, states go on moving."""
    problem = problem_of("lenet", "softmax")
    layers = [{"conv": [3, 3]}, "tanh", {"avg_pool": 2}, {"conv": [4, 3]}, "tanh", {pool: 2}, {"dense": 6}, "tanh"]
    problem = replace(problem, net=row(problem.net.in_shape, 4, layers=layers))
    w = {name: t / 4 for name, t in problem.weights(BP()).items()}

    def loss(w: dict[str, Tensor]) -> Tensor:
        return problem.batch.loss.value(rule.logits(problem.net, w, problem.batch.x), problem.batch.y).mean()

    for difference, beta in _DIFFERENCES:
        rule = EquilibriumPropagation(beta, free_steps=150, nudged_steps=150, difference=difference)
        found, expected = _grads(rule, problem, w), torch.func.grad(loss)(w)
        for name, t in expected.items():
            assert (found[name] - t).norm() < within * t.norm(), name


@pytest.mark.parametrize("middle", [MaxPool(2), AvgPool(2), GroupNorm(2), Elementwise(_TANH)])
def test_lra_e_with_the_weights_themselves_tends_to_bp(middle: MaxPool | AvgPool | GroupNorm | Elementwise) -> None:
    problem = problem_of("lenet", "softmax")
    parts: list[Part] = [Conv(4, 3), _TANH, middle, Conv(4, 3), _TANH, Dense(4)]
    problem = replace(problem, net=assemble(problem.net.in_shape, parts))
    w = _with_the_weights("E", problem.weights(LRAE()), problem)
    local, expected = _grads(LRAE(beta=1e-4), problem, w), _grads(BP(), problem, w)
    for l in range(1, problem.net.L + 1):
        scaled = local[f"W{l}"] / 1e-4 ** (problem.net.L - l)
        assert (scaled - expected[f"W{l}"]).norm() < 1e-2 * expected[f"W{l}"].norm(), l


def test_lra_e_through_a_shortcut_is_no_gradient_in_the_limit() -> None:
    """Why it refuses shortcuts: errors that pass different numbers of layers have different powers of beta."""
    parts: list[Part] = [Dense(6), _TANH, Residual((Dense(6), _TANH, Dense(6))), Dense(4)]
    problem = problem_of("mlp", "softmax")
    problem = replace(problem, net=assemble(problem.net.in_shape, parts))
    w = _with_the_weights("E", problem.weights(LRAE()), problem)
    local, expected = _grads(LRAE(beta=1e-4), problem, w), _grads(BP(), problem, w)
    assert _angle(local["W1"], expected["W1"]) > 5
    assert _angle(local["W4"], expected["W4"]) < 1e-3


@pytest.mark.parametrize("pool", [MaxPool(2), AvgPool(2)])
def test_mdfas_updates_oppose_no_gradient_behind_a_pool(pool: MaxPool | AvgPool) -> None:
    """Its paper's theorem 1 on a net that pools its images; and with normalization it does not hold."""
    loss = SigmoidCrossEntropy(2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 6, 6, dtype=torch.float64, generator=generator)
    y = loss.target(torch.randint(2, (60,), generator=generator), x.dtype)

    def opposed(parts: list[Part]) -> int:
        problem = Problem(assemble((2, 6, 6), parts), Batch(x, y, loss))
        w, count = problem.weights(MDFA()), 0
        w |= {f"W{l}": w[f"W{l}"].abs() for l in range(2, problem.net.L + 1)}
        for n in range(60):
            one = replace(problem, batch=Batch(x[n : n + 1], y[n : n + 1], loss))
            update, gradient = _grads(MDFA(), one, w), _grads(BP(), one, w)
            products = [(update[f"W{l}"] * gradient[f"W{l}"]).sum() for l in range(1, problem.net.L + 1)]
            count += any(p < -1e-12 for p in products)
        return count

    assert opposed([pool, Dense(6), _TANH, Residual((Dense(6), _TANH)), Dense(1)]) == 0
    assert opposed([Dense(6), LayerNorm(), _TANH, Dense(6), _TANH, Dense(1)]) > 0


PARTS: dict[str, list[Part]] = {
    "pooling": [MaxPool(2)],
    "normalization": [Conv(2, 3, 1, 1), GroupNorm(2)],
    "shortcut": [Conv(2, 3, 1, 1), Residual((Conv(2, 3, 1, 1),))],
    "activation": [Conv(2, 3, 1, 1), _TANH, _TANH],
    "dropout": [Dropout(0.5)],
}


@pytest.mark.parametrize("kind", [*PARTS, "attention"])
def test_a_rule_says_why_it_refuses_a_part_of_a_net(rule: Rule, kind: str) -> None:
    parts: list[Part] = [*PARTS.get(kind, []), Dense(4)]
    net = assemble((2, 4, 4), parts)
    if isinstance(rule, PredictiveCoding):
        rule = replace(rule, form="errors")  # the form for nets that normalize
    if kind == "attention":
        net = assemble((4, 6), [Tokens(6), Attention(2), Dense(4)])
    if kind in rule.refuses:
        with pytest.raises(ValueError, match=f"{type(rule).__name__} does not train nets with {kind} .layer . has"):
            rule.check(net)
        assert len(rule.refuses[kind]) > 40
    else:
        rule.check(net)


@pytest.mark.parametrize("name", options("rule"))
def test_every_rule_trains_nets_in_a_row(name: str) -> None:
    assert not any(refuses(name, make(outputs=4, activation="tanh")) for make in NETS.values())


def test_predictive_coding_says_which_of_its_forms_a_net_that_normalizes_needs() -> None:
    net = MAPPED["vit"](outputs=4, activation="tanh")
    with pytest.raises(Mistake, match=r"rule.form is 'states', and layer 2 has LayerNorm.*use rule.form=errors"):
        PredictiveCoding().check(net)
    PredictiveCoding(form="errors").check(net)
    PredictiveCoding(fixed_prediction=True).check(net)
    PredictiveCoding().check(MAPPED["lenet"](outputs=4, activation="tanh"))


def test_every_kind_that_a_rule_refuses_is_one_that_there_is() -> None:
    for path in (CONF.parent / "src/nobackprop/rules").glob("*.py"):
        for block in re.findall(r"refuses: .*?\n    [})]", path.read_text(), re.DOTALL):
            for kind in re.findall(r'"(\w+)"', block):
                assert kind in {*PARTS, "attention"}, path


@pytest.mark.parametrize("rule", [DFA(), DFATwoPass(), BlockDFA(), DirectKolenPollack()])
def test_tokens_share_direct_feedback(rule: Rule) -> None:
    """One B for all tokens is a B of its own for each in which all are the same."""
    problem = problem_of("vit", "softmax")
    shared, own = problem.net, replace(problem.net, own_feedback=True)
    tokens = shared.read_shapes[2][0]
    w = problem.weights(rule)
    names = [n for n in w if n[0] == "B" and tuple(w[n].shape) != own.direct_shape(int(n[1:]))]
    assert names
    one = _grads(rule, problem, w)
    each = _grads(rule, replace(problem, net=own), w | {name: w[name].repeat(tokens, 1) for name in names})
    each |= {name: each[name].unflatten(0, (tokens, -1)).sum(0) for name in names if name in each}
    torch.testing.assert_close(one, each)
