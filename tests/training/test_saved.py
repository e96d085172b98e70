"""A trained net as it is loaded: it says what it said when it was tested, and what is wrong where it can't."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, folder, options, train

import nobackprop
from nobackprop.core.losses import SoftmaxCrossEntropy, SquaredError
from nobackprop.core.network import Network, Weights, mlp
from nobackprop.data.pixels import Pixels
from nobackprop.data.sources import Digits
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.training.build import prepare
from nobackprop.training.saved import save


def test_a_trained_net_predicts_as_it_was_tested(config: Config) -> None:
    cfg = config("seeds=[3]", "dataset.classes=3", "dataset.normalize=true")
    (record,) = train(cfg)
    trained = nobackprop.load(folder(cfg) / "seed3")
    test = Digits().load().test
    assert trained.evaluate(test) == pytest.approx(record.test)
    known = torch.isin(test.labels, torch.tensor(record.data.classes))
    predicted = trained.predict(test.pixels[known])
    assert record.test is not None
    assert (predicted == test.labels[known]).double().mean().item() == pytest.approx(record.test["accuracy"])
    z, h = trained.activations(test.pixels[:5])
    assert [t.shape for t in z[1:]] == [(5, 12), (5, 3)]
    assert torch.equal(z[2], trained.logits(test.pixels[:5]))
    assert torch.equal(h[1], z[1].tanh())


@dataclass(frozen=True)
class Upside(BP):
    """Says the opposite of what its net says, times the scale."""

    scale: float = 1.0

    def logits(self, net: Network, w: Weights, x: torch.Tensor) -> torch.Tensor:
        return -self.scale * net.logits(w, x)


def test_a_trained_net_predicts_as_its_rule_does(config: Config) -> None:
    cfg = config("max_epochs=1", "rule=bp", f"rule._target_={__name__}.Upside", "+rule.scale=2.0")
    (record,) = train(cfg)
    trained = nobackprop.load(folder(cfg))
    test = Digits().load().test
    assert trained.rule == Upside(scale=2.0)
    assert trained.evaluate(test) == pytest.approx(record.test)
    z, _ = trained.activations(test.pixels)
    assert torch.equal(trained.logits(test.pixels), -2 * z[-1])


@pytest.mark.parametrize("option", options("rule"))
def test_a_trained_net_knows_its_rule(config: Config, tmp_path: Path, option: str) -> None:
    run = prepare(config(f"rule={option}"))
    save(tmp_path / "best.pt", run.net, run.rule, {}, run.loss, Pixels(), tuple(range(10)))
    assert nobackprop.load(tmp_path).rule == run.rule


@pytest.mark.parametrize("name", ["my.rules.Mine", "nobackprop.training.config.Settings", "os.system"])
def test_a_rule_that_is_no_rule_or_not_imported_is_not_made(tmp_path: Path, name: str) -> None:
    run_net, loss = mlp((4,), 2, hidden=[3], activation="tanh"), SoftmaxCrossEntropy(2)
    path = tmp_path / "best.pt"
    save(path, run_net, BP(), {}, loss, Pixels(), (0, 1))
    content = torch.load(path, weights_only=True)
    torch.save(content | {"rule": {"class": name, "fields": {}}}, path)
    with pytest.raises(ValueError, match=rf"best\.pt was trained with {name}, which is not in nobackprop: import it"):
        nobackprop.load(tmp_path)


@dataclass(frozen=True)
class Scaled(SquaredError):
    """A loss of one's own."""

    scale: float = 1.0


def test_a_net_trained_with_a_loss_of_ones_own_is_loaded_where_that_is_imported(tmp_path: Path) -> None:
    net = mlp((1,), 2, hidden=[], activation="tanh")
    path = tmp_path / "best.pt"
    save(path, net, BP(), {}, Scaled(2, scale=3.0), Pixels(), (0, 1))
    assert nobackprop.load(tmp_path).loss == Scaled(2, scale=3.0)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"loss": {"class": "my.Elsewhere", "fields": {}}}, path)
    with pytest.raises(
        ValueError, match=r"best\.pt was trained with my\.Elsewhere, which is not in nobackprop: import"
    ):
        nobackprop.load(tmp_path)
    torch.save(content | {"rule": {"class": "nobackprop.rules.bp.BP", "fields": {"rate": 1}}}, path)
    with pytest.raises(ValueError, match=r"was trained with another version of nobackprop\.rules\.bp\.BP: .*'rate'"):
        nobackprop.load(tmp_path)


def test_labels_of_no_class_of_the_net_do_not_count(config: Config) -> None:
    cfg = config("max_epochs=1", "dataset.classes=3")
    train(cfg)
    trained = nobackprop.load(folder(cfg))
    test = Digits().load().test
    strange = replace(test, labels=torch.where(test.labels % 2 == 0, test.labels, -1))
    even = test.labels % 2 == 0
    assert trained.evaluate(strange) == trained.evaluate(
        replace(test, pixels=test.pixels[even], labels=test.labels[even])
    )
    with pytest.raises(ValueError, match="none of these images is of a class that the net knows"):
        trained.evaluate(replace(test, labels=torch.full_like(test.labels, -100)))


def test_a_net_refuses_other_images(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    trained = nobackprop.load(folder(cfg) / "seed0")
    with pytest.raises(ValueError, match=r"this net takes torch.uint8 of shape \(N, 1, 8, 8\)"):
        trained.predict(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got images of type torch\.float32"):
        trained.predict(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_a_net_takes_images_in_the_form_in_which_they_were_given(
    shape: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    digits = Digits().load()
    data, test = (
        (part.pixels.view(-1, *shape).numpy().astype(kind), part.labels.numpy()) for part in (digits.train, digits.test)
    )
    options = ("rule=bp", "max_epochs=1", "logger=none", f"paths.runs={tmp_path}")
    runs = nobackprop.train(*options, data=data, test=test)
    trained = nobackprop.load(runs.folder(runs[0]))
    assert trained.evaluate(test) == pytest.approx(runs[0].test)
    assert trained.evaluate(test)["accuracy"] == pytest.approx((trained.predict(test[0]).numpy() == test[1]).mean())


def test_what_can_not_be_evaluated_is_told(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    trained = nobackprop.load(folder(cfg))
    for given in (Digits(), Digits().load()):
        with pytest.raises(Mistake, match=r"write \.test or \.train, as in Digits\(\)\.load\(\)\.test"):
            trained.evaluate(given)
    with pytest.raises(Mistake, match="images is of type int: give a pair"):
        trained.evaluate(3)


def test_loading_says_what_is_wrong(config: Config, tmp_path: Path) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    assert nobackprop.load(folder(cfg)).classes == tuple(range(10))
    train(config("max_epochs=1", "seeds=2"))
    with pytest.raises(FileNotFoundError, match=r"choose one of its seeds: .*seed0"):
        nobackprop.load(folder(cfg))
    with pytest.raises(FileNotFoundError, match="train it first"):
        nobackprop.load(tmp_path)
    path = folder(cfg) / "seed0" / "best.pt"
    whole = torch.load(path, weights_only=True)
    for part, damaged in {"rule": {"fields": {}}, "pixels": {"std": 1.0}, "classes": 3, "net": {}}.items():
        torch.save(whole | {part: damaged}, path)
        with pytest.raises(ValueError, match=r"best.pt holds no trained net that this version knows .*: delete it and"):
            nobackprop.load(path.parent)
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"best.pt is damaged .*: delete it and the record"):
        nobackprop.load(path.parent)


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a run folder was unpickled",))


def test_nothing_in_a_run_folder_is_unpickled(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    path = folder(cfg) / "seed0" / "best.pt"
    torch.save({"net": Evil()}, path)
    with pytest.raises(ValueError, match=r"best\.pt is damaged"):
        nobackprop.load(path.parent)


def test_a_seed_that_never_finished_an_epoch_has_no_net(config: Config) -> None:
    cfg = config("arch.activation=identity", "optimizer=sgd", "optimizer.lr=1e30")
    (record,) = train(cfg)
    assert (record.diverged_epoch, record.best_epoch, record.test) == (1, None, None)
    with pytest.raises(FileNotFoundError, match="a seed that diverged in its first epoch has none"):
        nobackprop.load(folder(cfg) / "seed0")
