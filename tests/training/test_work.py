"""The counted work of a step, and the lengths of runs at equal compute that follow from it."""

import pytest
from conftest import CONF

from nobackprop.core.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.network import mlp
from nobackprop.papers import grid, tune
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.equilibrium_propagation import EquilibriumPropagation
from nobackprop.sweeps.jobs import Job
from nobackprop.training.work import passes

NET = mlp((784,), 10, hidden=[256, 256], activation="tanh")
LOSS = SoftmaxCrossEntropy(10)
FORWARD = 784 * 256 + 256 * 256 + 256 * 10


def test_work_is_counted_in_forward_passes() -> None:
    down = 256 * 256 + 256 * 10
    assert passes(BP(), NET, LOSS) == pytest.approx((2 * FORWARD + down) / FORWARD)  # forward, gradients, errors down
    assert passes(DFA(), NET, LOSS) == pytest.approx((2 * FORWARD + 2 * 256 * 10) / FORWARD)
    few, many = (passes(EquilibriumPropagation(free_steps=n, nudged_steps=n), NET, LOSS) for n in (10, 20))
    assert 1.5 < many / few < 2.1
    one_output = mlp((784,), 1, hidden=[256], activation="tanh")
    assert passes(BP(), one_output, SigmoidCrossEntropy(2)) == pytest.approx(2 + 256 / (784 * 256 + 256))


def test_runs_at_equal_compute_cost_the_same() -> None:
    """Each file of settings ends its run after as many forward passes as every other one, to a step."""
    search = tune.Search.read("compare")
    assert search.compute
    cells = [cell for cell in grid.cells("compare") if cell.labels.get("budget") == "compute"]
    searched = [cell for cell in cells if cell.tuned and cell.tuned.exists()]
    apart = [cell for cell in searched if search.forward_passes(cell) is None]  # their trials did not cost the same
    assert {cell.tuned for cell in apart} == {*(CONF / "tuned" / "compare" / "compute").glob("*.yaml")}
    for cell in searched:
        run = Job("", cell.config(["paths.runs=unused"])).run
        cost = passes(run.rule, run.net, run.loss, run.settings.batch_size)
        assert run.settings.max_steps == round(search.compute / cost)
        if cell not in apart:
            continue
        other = {**cell.labels, "budget": "epochs", "schedule": "constant"}
        (alone,) = [each for each in grid.cells("compare") if each.labels == other]
        same = Job("", alone.config(["paths.runs=unused"])).settings
        assert (same.rule, same.optimizer, same.init) == (run.settings.rule, run.settings.optimizer, run.settings.init)
