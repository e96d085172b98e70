"""Nets of any parts through a whole run: stacked, computed again, looked at, saved and loaded."""

from pathlib import Path

import pytest
from conftest import Config, folder, same_results, train

from nobackprop.core.maps import Dropout
from nobackprop.data.sources import Digits
from nobackprop.training.saved import load

ARCHES = {
    "layers": ["arch=layers", "arch.layers=[{conv:[4,3]},relu,{avg_pool:2},{dense:12},tanh]"],
    "resnet": ["arch=resnet", "arch.depth=6", "arch.widths=[4,8]", "arch.groups=2"],
    "vgg": ["arch=vgg", "arch.width=4", "arch.activation=tanh"],
    "vit": ["arch=vit", "arch.width=8", "arch.heads=2", "arch.hidden=12", "arch.dropout=0.1"],
}


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> list[str]:
    return [*ARCHES[request.param], "max_epochs=1", "max_steps=60", "optimizer.lr=0.01"]


@pytest.mark.parametrize("rule", ["dfa", "predictive_coding"])
def test_a_run_is_recorded_loaded_and_the_same_when_computed_again(
    arch: list[str], rule: str, config: Config, tmp_path: Path
) -> None:
    more = ["rule.form=errors", "rule.steps=3"] if rule == "predictive_coding" else []
    cfg = config(f"rule={rule}", *arch, *more)
    (record,) = train(cfg)
    trained = load(folder(cfg))
    test = Digits().load().test
    assert record.test is not None
    assert trained.evaluate(test)["accuracy"] == pytest.approx(record.test["accuracy"])
    assert not any(isinstance(m, Dropout) and m(test.pixels) is not test.pixels for _, _, m in trained.net.parts())
    train(config(f"rule={rule}", *arch, *more, "recompute=true", f"paths.runs={tmp_path / 'again'}"))
    assert same_results(tmp_path / "runs", tmp_path / "again") == 1


def test_stacked_seeds_learn_what_each_does_alone(arch: list[str], config: Config, tmp_path: Path) -> None:
    together = train(config("rule=fa", *arch, "seeds=2", "stack=true"))
    apart = train(config("rule=fa", *arch, "seeds=2", "stack=false", f"paths.runs={tmp_path / 'apart'}"))
    assert [record.stacked for record in together] == [2, 2]
    for a, b in zip(together, apart, strict=True):
        assert a.epochs[0]["train/loss"] == pytest.approx(b.epochs[0]["train/loss"], rel=1e-3)
        assert a.epochs[0]["val/loss"] == pytest.approx(b.epochs[0]["val/loss"], rel=1e-2)


def test_backprops_update_is_the_gradient_in_the_diagnostics(arch: list[str], config: Config) -> None:
    (record,) = train(config("rule=bp", *arch, "diagnostics=alignment"))
    angles = [value for name, value in record.epochs[0].items() if name.startswith("angle/update_W")]
    assert angles
    assert max(float(value or 0) for value in angles) < 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["arch=lenet"], r"part 4 of the net, Conv\(.*\) does not fit a feature map of 4x4"),
        (["arch=resnet", "rule=lra_e"], "LRAE does not train nets with shortcut .layer 3 has Shortcut"),
        (["arch=vit", "rule=mdfa"], "MDFA does not train nets with normalization"),
        (["arch=layers", "arch.layers=[{conv:[4,3]},softmax]"], r"arch.layers\[1\] is 'softmax': choose one of"),
        (["arch=resnet", "arch.groups=5"], "needs channels that 5 divides"),
    ],
)
def test_a_net_that_can_not_be_trained_is_refused_before_training(
    given: list[str], message: str, config: Config
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(*given))
