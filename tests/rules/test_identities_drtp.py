"""DRTP is DFA with the target in the place of the error; two-pass DFA is DFA; neither stores activations."""

from dataclasses import dataclass, replace

import pytest
import torch
from benchmark import peak
from conftest import Problem
from torch import Tensor

from nobackprop.core.losses import Loss, SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.core.rule import Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.dfa_two_pass import DFATwoPass
from nobackprop.rules.drtp import DRTP


@dataclass(frozen=True)
class MinusTarget(Loss):
    """Its error is minus the one-hot target; with one output unit, the target that is +-1."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z * self.error(z, y)).sum(-1)

    def error(self, z: Tensor, y: Tensor) -> Tensor:
        return -y if y.shape[-1] > 1 else torch.where(y > 0, -1.0, 1.0).to(y.dtype)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_drtp_is_dfa_with_the_target_in_the_place_of_the_error(problem: Problem, name: str) -> None:
    net = problem.activated(name).net
    w = problem.weights(DRTP())
    grads, logits = DRTP().grads(net, w, problem.batch)
    hidden = DFA().grads(net, w, replace(problem.batch, loss=MinusTarget(problem.batch.loss.classes)))[0]
    output, expected_logits = BP().grads(net, w, problem.batch)
    top = (f"W{net.L}", f"b{net.L}")
    torch.testing.assert_close(grads, hidden | {name: output[name] for name in top})
    torch.testing.assert_close(logits, expected_logits)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_two_pass_dfa_is_dfa(problem: Problem, name: str) -> None:
    net = problem.activated(name).net
    w = problem.weights(DFA())
    grads, logits = DFATwoPass().grads(net, w, problem.batch)
    expected, expected_logits = DFA().grads(net, w, problem.batch)
    torch.testing.assert_close((grads, logits), (expected, expected_logits), rtol=0, atol=0)


@pytest.mark.parametrize("rule", [DRTP(), DFATwoPass()], ids=["drtp", "dfa_two_pass"])
def test_activations_are_freed_at_once(rule: Rule) -> None:
    def peaks(rule: Rule) -> list[int]:
        nets = [mlp((64,), 4, hidden=[64] * depth, activation="tanh") for depth in (8, 16)]
        return [peak(net, rule, SoftmaxCrossEntropy(4), 50) for net in nets]

    shallow, deep = peaks(rule)
    assert shallow == deep
    shallow, deep = peaks(DFA())
    assert deep > 1.5 * shallow
