"""A config becomes objects: what is a user's mistake, what is a fault with a traceback, and what that takes."""

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT, Config, train
from torch import Tensor

from nobackprop.core.initializers import Initializer
from nobackprop.core.layers import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP
from nobackprop.training import build, hardware
from nobackprop.training.build import configure, prepare
from nobackprop.training.config import Settings


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_tried", {})


def chosen(group: str, target: str, *keys: str) -> list[str]:
    """Overrides that put a target in the place of the default choice of a group, with no keys but those."""
    default = {
        "rule": ["beta", "gamma", "learn_E", "difference"],
        "optimizer": ["lr", "betas", "eps", "weight_decay"],
        "arch": ["hidden", "activation", "bias"],
    }
    kept = {key.partition("=")[0] for key in keys}
    removed = [f"~{group}.{key}" for key in default.get(group, []) if key not in kept]
    return [*removed, f"{group}._target_={target}", *(f"+{group}.{key}" for key in keys if "=" in key)]


SLIPS: dict[str, Callable[[Any], Any]] = {
    "shapes": lambda x: x @ x.new_zeros(3),
    "too few values": lambda x: (lambda a, b: a)(x),  # pyright: ignore
    "too many values": lambda x: [a for a, b in [(1, 2, 3)]],  # pyright: ignore
    "name": lambda x: not_defined,  # pyright: ignore # noqa: F821
    "division": lambda x: 1 / 0,
    "key": lambda x: {}["W"],
    "attribute": lambda x: x.nothing,
}


@dataclass(frozen=True)
class Slip(BP):
    """BP with a slip of its author."""

    slip: str = ""

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        SLIPS[self.slip](batch.x)
        return super().grads(net, w, batch)


class SlipInit(Initializer):
    def draw(self, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.zeros(2) @ torch.zeros(3)


class SlipOptimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ValueError("a slip")


@pytest.mark.parametrize(
    "overrides",
    [
        *(chosen("rule", f"{__name__}.Slip", f"slip={slip}") for slip in SLIPS),
        [f"init.forward={{_target_:{__name__}.SlipInit}}"],
        chosen("optimizer", f"{__name__}.SlipOptimizer", "lr"),
    ],
    ids=lambda overrides: overrides[-1],
)
def test_a_slip_in_a_part_of_the_users_own_keeps_its_traceback(config: Config, overrides: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whichever
        prepare(config(*overrides))
    assert not isinstance(caught.value, Mistake)
    assert traceback.extract_tb(caught.tb)[-1].filename == __file__


@dataclass(frozen=True)
class Strange(BP):
    """BP with a gradient for another weight, or of another shape."""

    name: str = "W1"

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        g, logits = super().grads(net, w, batch)
        return g | {self.name: g["W1"].T}, logits


GIVEN: dict[str, Callable[..., Any]] = {
    "nothing": lambda g, logits: None,
    "gradients alone": lambda g, logits: g,
    "no tensors": lambda g, logits: ({"W1": [1.0]}, logits),
    "other logits": lambda g, logits: (g, logits[:, :3]),
}


@dataclass(frozen=True)
class Gives(BP):
    """BP that gives something else than a rule should."""

    kind: str = "nothing"

    def grads(self, net: Network, w: Weights, batch: Batch) -> Any:
        return GIVEN[self.kind](*super().grads(net, w, batch))


@dataclass(frozen=True)
class Feeds(BP):
    """BP with feedback weights that are a list, or called as the net's are."""

    name: str | None = None

    def feedback(self, net: Network, draw: Any) -> Any:
        return [draw("B1", (2, 2))] if self.name is None else {self.name: draw(self.name, (2, 2))}


@dataclass(frozen=True)
class Doubles(BP):
    """BP that passes each image twice, for which dropout has drawn nothing."""

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        twice = Batch(torch.cat([batch.x] * 2), torch.cat([batch.y] * 2), batch.loss)
        g, logits = super().grads(net, w, twice)
        return g, logits if logits is None else logits[: len(batch.x)]


class Counts(BP):
    """BP that counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        self.steps += 1
        return super().grads(net, w, batch)


@dataclass(frozen=True)
class Impure(BP):
    """BP that does what a rule must not."""

    does: str = ""

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        g, logits = super().grads(net, w, batch)
        if self.does == "draws":
            return {name: t + 0.01 * torch.randn_like(t) for name, t in g.items()}, logits
        (w["W1"] if self.does == "halves a weight" else batch.x).mul_(0.5)
        return g, logits


class Unfinished(Rule):
    def gradz(self, net: Network, w: Weights, batch: Batch) -> Grads:
        return {}, None


def no_net(in_shape: Shape) -> None:
    """A function of too few arguments."""


class Rates:
    """No torch.optim.Optimizer."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.step = lambda: None


def two(*_: Any, **__: Any) -> tuple[int, int]:
    return 1, 2


PIXELS = "nobackprop.data.pixels.Pixels"
COSINE = ["schedule=cosine", "~schedule.T_max"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            chosen("rule", PIXELS),
            f"rule: _target_ '{PIXELS}' makes an object of type Pixels, and a nobackprop.core.rule.Rule",
        ),
        (chosen("loss", "builtins.float"), "loss: .* of type float, and a nobackprop.core.losses.Loss is needed"),
        (
            chosen("arch", f"{__name__}.two"),
            "arch: .* of type tuple, and a .*Network or a torch.nn.Sequential is needed",
        ),
        (
            [f"init.forward={{_target_:{PIXELS}}}"],
            "init.forward: .* a nobackprop.core.initializers.Initializer is needed",
        ),
        (chosen("dataset.source", PIXELS), "dataset.source: .* a nobackprop.data.sources.Source is needed"),
        (
            ["diagnostics=alignment", "~diagnostics.samples", f"diagnostics._target_={__name__}.two"],
            "diagnostics: .* of type tuple, and a .*Callback is needed",
        ),
        (chosen("optimizer", f"{__name__}.Rates", "lr"), "optimizer: .*Rates is no torch.optim.Optimizer"),
        (chosen("optimizer", "torch.nn.ReLU"), "optimizer: .*ReLU"),
        (chosen("optimizer", "torch.optim.LBFGS", "lr"), "optimizer: .*LBFGS: missing a required argument: 'closure'"),
        (chosen("optimizer", "torch.optim.Muon", "lr"), r"optimizer: Muon only supports 2D .*\[1, 2, 2\]"),
        (["optimizer=sgd", "optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        ([*COSINE, "schedule._target_=torch.optim.SGD"], "schedule: "),
        (
            [*COSINE, "~schedule.eta_min", f"schedule._target_={__name__}.two"],
            "schedule: .* is no torch.optim.lr_scheduler.LRScheduler",
        ),
        (COSINE, "schedule: .*CosineAnnealingLR: missing a required argument: 'T_max'"),
        (
            chosen("rule", f"{__name__}.Strange", "name=V1"),
            r"Strange gives gradients of \['V1'\], which are no weights",
        ),
        (chosen("rule", f"{__name__}.Strange"), r"gives W1, of shape \(12, 64\), a gradient of shape \(64, 12\)"),
        (chosen("rule", f"{__name__}.Counts"), "rule Counts changes an attribute of its own at each step"),
        *(
            (chosen("rule", f"{__name__}.Impure", f"does={does!r}"), f"rule Impure {told}")
            for does, told in {
                "draws": r"gives two different gradients of \w+ for the same step: random numbers come from `noise`",
                "halves a weight": "changes W1 in place",
                "halves the images": "changes the images in place",
            }.items()
        ),
        *(
            (chosen("rule", f"{__name__}.Gives", f"kind={kind!r}"), f"Gives gives {what}")
            for kind, what in {
                "nothing": "an object of type NoneType for a step; a pair is needed",
                "gradients alone": "an object of type dict",
                "no tensors": r"\(dict, Tensor\)",
                "other logits": r"logits of shape \(2, 3\); a pair.* \(2, 10\)",
            }.items()
        ),
        (chosen("rule", f"{__name__}.Feeds"), "Feeds: feedback gives a list; a dict of tensors by name is needed"),
        (chosen("rule", f"{__name__}.Feeds", "name=W2"), "Feeds: feedback gives W2, as weights of the net are called"),
        (chosen("rule", f"{__name__}.Unfinished"), "rule: .*Unfinished lacks grads: write what is missing, or check"),
        (chosen("arch", f"{__name__}.no_net"), r"arch: .*no_net\(in_shape.*can't take \(\(1, 8, 8\), 10\): too many"),
        (["trainer.devices=[0]", "trainer.accelerator=cpu"], r"trainer.devices is \[0\], a list of GPUs, and this run"),
        (["trainer=ddp", "trainer.devices=[0,1]", "trainer.accelerator=cpu"], r"is \[0, 1\], a list of GPUs, and this"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_part_that_does_not_fit_is_a_mistake(config: Config, overrides: list[str], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        prepare(config(*overrides))


@dataclass(frozen=True)
class Watching(BP):
    """BP that notes how it is computed."""

    number: int = 0
    seen: ClassVar[list[Any]] = []

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        short = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        types = {t.dtype for t in (*w.values(), batch.x, batch.y)}
        self.seen.append((types, torch.zeros(1).dtype, short, torch.is_grad_enabled()))
        return super().grads(net, w, batch)


WATCHING = chosen("rule", f"{__name__}.Watching")


@pytest.mark.parametrize(
    ("precision", "seen"),
    [
        ("64-true", ({torch.float64}, torch.float64, None, False)),
        ("32-true", ({torch.float32}, torch.float32, None, False)),
        ("bf16-mixed", ({torch.float32}, torch.float32, torch.bfloat16, False)),
    ],
)
def test_the_trial_step_computes_as_training_does(config: Config, precision: str, seen: tuple[Any, ...]) -> None:
    Watching.seen.clear()
    overrides = [*WATCHING, f"trainer.precision={precision}"]
    configure(Settings.of(config(*overrides)))
    assert Watching.seen == [seen] * 2
    train(config(*overrides, "max_steps=2"))
    assert Watching.seen == [seen] * 4
    assert torch.get_default_dtype() == torch.float32


def test_the_trial_step_drops_units_as_training_does(config: Config) -> None:
    doubles = chosen("rule", f"{__name__}.Doubles")
    configure(Settings.of(config(*doubles)))
    dropout = ["arch=layers", "arch.layers=[{dense: 9}, relu, {dropout: 0.2}]"]
    configure(Settings.of(config("rule=bp", *dropout)))
    with pytest.raises(RuntimeError, match="size of tensor"):
        configure(Settings.of(config(*doubles, *dropout)))
    with pytest.raises(Mistake, match="ForwardForward does not train nets with dropout"):
        configure(Settings.of(config("rule=forward_forward", *dropout)))


def test_the_same_step_is_tried_once(config: Config) -> None:
    Watching.seen.clear()
    for overrides in ([], ["seeds=3"], ["optimizer.lr=0.5"], ["schedule=cosine"], ["max_epochs=7"], ["update=sum"]):
        prepare(config(*WATCHING, *overrides))
    assert len(Watching.seen) == 2
    others = "+rule.number=3", "arch.hidden=[5]", "arch.bias=false", "init.forward=N1", "trainer.precision=64-true"
    for i, other in enumerate(others, 2):
        prepare(config(*WATCHING, other))
        assert len(Watching.seen) == 2 * i
    for _ in range(2):  # a mistake is none the less told again
        with pytest.raises(Mistake, match="lr is -1"):
            prepare(config(*WATCHING, "optimizer.lr=-1"))


def printed(code: str, cwd: Path) -> list[str]:
    """The lines that a new process prints, and whether it has imported Lightning."""
    code = f"import sys\n{code}\nprint('pytorch_lightning' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return shown.stdout.splitlines()


def test_a_run_on_a_cpu_makes_one_trainer(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning

    made = []

    class Counted(pytorch_lightning.Trainer):
        def __init__(self, **options: Any) -> None:
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr(pytorch_lightning, "Trainer", Counted)
    train(config("max_epochs=1", "trainer.accelerator=cpu"))
    assert len(made) == 1


def test_a_wrong_value_is_told_before_lightning_is_imported(tmp_path: Path) -> None:
    wrong = [
        ["rule.beta=abc"],
        ["rule=bp", "arch.activation=sign"],
        ["optimizer.lr=-1"],
        ["schedule=cosine", "schedule.T_max=0"],
        ["init.forward=Q1"],
    ]
    code = f"""
import os
from nobackprop import cli
for wrong in {wrong}:
    sys.argv[1:] = wrong
    os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        cli.main()
    except SystemExit as e:
        print(e)"""
    *told, lightning = printed(code, tmp_path)
    assert len(told) == len(wrong)
    assert all(line.startswith("nobackprop: ") for line in told)
    assert lightning == "False"


def test_a_whole_config_is_checked_without_lightning(tmp_path: Path) -> None:
    code = f"sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom conftest import run_config\n"
    code += (
        "from nobackprop.training.build import prepare\nprepare(run_config('logger=none', 'trainer.precision=64-true'))"
    )
    assert printed(code, tmp_path) == ["False"]


def test_a_gpu_that_is_not_there_or_does_not_work_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Mistake, match=r"trainer\.accelerator is gpu, and torch .* finds no GPU here: use cpu"):
        prepare(config("trainer.accelerator=gpu"))
    assert configure(Settings.of(config())).device == torch.device("cpu")

    def no_kernel(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "zeros", no_kernel)
    with pytest.raises(Mistake, match=r"cuda:0 is there and can't be used \(CUDA error: no kernel .* device\): mend"):
        hardware.check_gpu(torch.device("cuda", 0))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.")])
def test_too_little_memory_for_a_net_is_a_mistake(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(BP, "grads", full)
    with pytest.raises(Mistake, match=r"arch: this net takes more memory than there is: (MemoryError|CUDA out of)"):
        prepare(config("rule=bp"))
