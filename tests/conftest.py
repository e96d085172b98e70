"""What several test files use: small runs, config files as objects, every rule, small problems, a learner to step."""

import atexit
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from nobackprop.core.activations import activation
from nobackprop.core.architectures import resnet, row, vit
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.maps import Elementwise
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule
from nobackprop.data.batches import EvalBatches, Task, TrainBatches
from nobackprop.data.pixels import Pixels
from nobackprop.data.sources import Dataset, Images
from nobackprop.records.record import Record
from nobackprop.training import kernels

if TYPE_CHECKING:
    from nobackprop.training.learner import Learner

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # as a run does: two busy threads on a small net are slower than one

ROOT = Path(__file__).parents[1]
CONF, PAPERS = ROOT / "conf", ROOT / "papers"
SMALL = ("logger=none", "arch.hidden=[12]", "batch_size=8", "max_epochs=2")
Config = Callable[..., DictConfig]


def nobackprop(*overrides: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a folder of its own, of this checkout, or of the package that is installed at `path`."""
    if path is None:
        return started("-m", "nobackprop", *overrides, cwd=cwd)
    command, environment = [sys.executable, "-m", "nobackprop", *overrides], {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def started(*run: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m module ...` or `python -c code`, where torch and Lightning have been imported as by the command."""
    with TemporaryDirectory() as shown:
        out, err = Path(shown, "out"), Path(shown, "err")
        asked = {"run": run, "cwd": str(cwd), "environment": {**os.environ}, "out": str(out), "err": str(err)}
        starter = _starter()
        assert starter.stdin
        assert starter.stdout
        print(json.dumps(asked), file=starter.stdin, flush=True)
        status = int(starter.stdout.readline())
        return subprocess.CompletedProcess(run, status, out.read_text(), err.read_text())


@cache
def _starter() -> "subprocess.Popen[str]":
    """One for all tests of this process, so that torch is imported once and not for each start."""
    command, pipe = [sys.executable, str(ROOT / "tests" / "started.py")], subprocess.PIPE
    starter = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    atexit.register(starter.communicate)  # without input it ends
    return starter


def train(cfg: DictConfig, console: Console | None = None, wait_for_others: bool = True) -> list[Record]:
    """The records of a composed config, trained."""
    from nobackprop.training.build import prepare  # here, since Lightning takes a second to import
    from nobackprop.training.run import train

    return train(prepare(cfg), console, wait_for_others)


def options(group: str) -> list[str]:
    """The names of the config files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def run_config(*overrides: str) -> DictConfig:
    """The config of a run, as the command composes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def small(runs: Path, *overrides: str) -> DictConfig:
    """A run on digits of 161 mini-batches an epoch, so two chunks: the first ends in mid-epoch."""
    dense = not any(o.startswith("arch=") and o != "arch=mlp" for o in overrides)
    return run_config(*(o for o in SMALL if dense or not o.startswith("arch.")), f"paths.runs={runs}", *overrides)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """`config("rule=bp", ...)` is a small run in the folder `runs`, with those overrides."""
    return partial(small, tmp_path / "runs")


def folder(cfg: DictConfig) -> Path:
    from nobackprop.training.build import prepare  # here, since Lightning takes seconds to import

    return prepare(cfg).folder


class Killed(BaseException):
    """Ends a run where it stands, as a power cut does."""


def raise_killed() -> None:
    raise Killed


def at_save(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Does something just before the run's `number`-th occasion to write a checkpoint."""
    from nobackprop.training.checkpoints import ResumePoint  # here, since Lightning takes seconds to import

    save, calls = ResumePoint.save, []

    def counted(self: ResumePoint, trainer: Any) -> None:
        calls.append(None)
        if len(calls) == number:
            action()
        save(self, trainer)

    monkeypatch.setattr(ResumePoint, "save", counted)


def interrupt(cfg: DictConfig) -> list[Path]:
    """Trains a small run of one group of seeds, killed at step 261; gives its checkpoints, of steps 161 and 261."""
    cfg = cfg.copy()
    cfg.checkpoint_minutes = 0.0
    with pytest.MonkeyPatch.context() as patched:
        at_save(patched, 4, raise_killed)
        with pytest.raises(Killed):
            train(cfg)
    return sorted(folder(cfg).glob("checkpoints/*/*.ckpt"))


@pytest.fixture
def console() -> Console:
    """Wide, into memory; `shown` gives what was printed."""
    return Console(width=250, file=io.StringIO())


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def same_results(one: Path, other: Path, seeds: str = "*/seed*") -> int:
    """Asserts that two folders of runs hold the same records, but for time and machine, and weights; how many."""
    changing = {"finished", "wall_s", "command", "dirty", "commit", "commits"}
    paths = sorted(path.relative_to(one) for path in one.glob(f"{seeds}/record.json"))
    assert paths == sorted(path.relative_to(other) for path in other.glob(f"{seeds}/record.json"))
    for path in paths:
        a, b = (Record.read(root / path).model_dump(exclude=changing) for root in (one, other))
        assert a == b, path
        v, w = (torch.load((root / path).with_name("best.pt"), weights_only=True)["weights"] for root in (one, other))
        assert v.keys() == w.keys()
        assert all(torch.equal(v[name], w[name]) for name in v), path
    return len(paths)


def until(
    condition: Callable[[], object],
    unless: Callable[[], object] = lambda: None,
    pause: float = 0.01,
    seconds: float = 240,
) -> None:
    """Waits until something is so; fails where the other thing comes first, or neither."""
    deadline = time.monotonic() + seconds
    while not condition():
        instead = unless()
        assert not instead, instead
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def holders(path: Path) -> set[int]:
    """The processes, other than this one, that hold a lock on a file."""
    if not path.exists():
        return set()
    inode = f":{path.stat().st_ino} "
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if inode in line]
    return {int(fields[4]) for fields in locks if fields[1] == "FLOCK"} - {os.getpid()}


@pytest.fixture(scope="session", autouse=True)
def built_kernels() -> None:
    """Kernels are built before all tests, since that tells the user so."""
    kernels.use(None)


own_kernels = pytest.mark.skipif(
    not shutil.which("g++") or torch.backends.cpu.get_cpu_capability() not in kernels.INSTRUCTIONS,
    reason="no g++ here, or another kind of processor",
)


@pytest.fixture(autouse=True)
def torchs_kernels() -> Iterator[None]:
    """Torch's are used where a test does not train, or ask for others."""
    kernels.use(False)
    yield
    kernels.use(False)


@pytest.fixture(autouse=True)
def first_rank() -> Iterator[None]:
    """A test that makes this process another rank of a data-parallel run does not make it one for those after it."""
    yield
    if lightning := sys.modules.get("lightning_utilities.core.rank_zero"):  # which remembers the rank for good
        lightning.rank_zero_only.rank = 0


@pytest.fixture(scope="session")
def configured() -> Callable[..., Any]:
    """`configured(group, option, *args)` is what conf/<group>/<option>.yaml makes."""

    @cache
    def composed(group: str, option: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base=None):
            return compose(overrides=[f"+{group}={option}"])[group]

    def make(group: str, option: str, *args: Any) -> Any:
        return instantiate(composed(group, option), *args, _convert_="all")

    return make


@pytest.fixture
def rule(request: pytest.FixtureRequest, configured: Callable[..., Any]) -> Rule:
    """Every rule that has a config file; further words of the parameter are options."""
    name, *changed = request.param.split()
    return replace(configured("rule", name), **dict(option.split("=") for option in changed))


@dataclass(frozen=True)
class Problem:
    """A small net and a batch for it, in float64."""

    net: Network
    batch: Batch

    def activated(self, name: str) -> "Problem":
        """The same with another activation, wherever there is one."""
        f = activation(name)
        layers = [
            replace(
                layer,
                activation=f if layer.activation and layer.activation.name != "identity" else layer.activation,
                read=tuple(Elementwise(f) if isinstance(m, Elementwise) else m for m in layer.read),
            )
            for layer in self.net.layers
        ]
        return replace(self, net=replace(self.net, layers=tuple(layers), activation=f))

    def weights(self, rule: Rule, seed: int = 0) -> dict[str, Tensor]:
        """Random weights in float64, signed as the rule wants them; biases are random too."""
        w = initial_weights(self.net, rule, Normal(0.4), Normal(0.4), seed)
        generator = torch.Generator().manual_seed(seed)
        for name in w:
            w[name] = torch.randn(w[name].shape, generator=generator) * 0.4 if name.startswith("b") else w[name]
        return {name: t.double() for name, t in w.items()}

    def noisy(self, rule: Rule, seed: int = 0) -> Batch:
        """The batch with the noise that the rule asks for, in float64."""
        noise = normal(rule.noise(self.net, len(self.batch.x)), seed, "noise")
        return replace(self.batch, noise={name: t.double() for name, t in noise.items()})


def errors_of_float32(rule: Rule, reference: Rule, problem: Problem, w: Mapping[str, Tensor]) -> list[float]:
    """Of each layer's gradient of W in float32, against the reference's in float64, in units of its largest entry.

    Layers whose gradient float32 can't hold are left out.
    """
    batch = problem.batch
    shorter = replace(batch, x=batch.x.float(), y=batch.y.float())
    found = rule.grads(problem.net, {name: t.float() for name, t in w.items()}, shorter)[0]
    exact = reference.grads(problem.net, w, batch)[0]
    sizes = {f"W{l}": exact[f"W{l}"].abs().max() for l in range(1, problem.net.L + 1)}
    return [float((found[n] - exact[n]).abs().max() / size) for n, size in sizes.items() if size > 1e-30]


# In the convolutional nets the second layer's stride does not divide its input, and images are not square.
NETS = {
    "linear": partial(mlp, (1, 3, 4), hidden=[]),
    "mlp": partial(mlp, (1, 3, 4), hidden=[7, 6, 5]),
    "strided_conv": partial(allconv, (2, 8, 7), filters=[[3, 3, 1], [4, 3, 2]]),
    "padded_conv": partial(allconv, (2, 6, 4), filters=[[3, 3, 1, 1], [4, 3, 2, 1]]),
}
LOSSES = {"softmax": SoftmaxCrossEntropy(4), "sigmoid": SigmoidCrossEntropy(2)}


def _lenet(outputs: int, activation: str) -> Network:
    below = [{"conv": [3, 3]}, activation, {"avg_pool": 2}, {"conv": [4, 3]}, activation, {"max_pool": 2}]
    return row((2, 12, 11), outputs, layers=[*below, {"dense": 6}, activation])


# Nets with pooling, with normalization and shortcuts, and with attention.
MAPPED = {
    "lenet": _lenet,
    "residual": partial(resnet, (2, 7, 6), depth=6, widths=[4, 6], groups=2),
    "vit": partial(vit, (2, 8, 6), patch=2, width=6, depth=2, heads=2, hidden=5, dropout=0.0),
}
# The slow tests have every rule with every net and loss. The others have each rule with each net in a row and with each
# loss, and of the rules that train a net with maps one for each way through the code.
PAIRED = {"linear": "softmax", "mlp": "softmax sigmoid", "strided_conv": "sigmoid", "padded_conv": "softmax"}
SAMPLE = {
    "lenet": "bp dfa dfa_two_pass difference_reconstruction equilibrium_propagation forward_forward lra_e pepita "
    "predictive_coding weight_mirror",
    "residual": "bp dfa dfa_two_pass predictive_coding",
    "vit": "bp dfa predictive_coding",
}


def refuses(rule: str, net: Network) -> bool:
    """Whether the rule of that config file has no form for the net."""
    kind = get_class(OmegaConf.load(CONF / "rule" / f"{rule}.yaml")._target_)
    return any(part in kind.refuses for _, part, _ in net.parts())


@cache
def _pairs(few: bool) -> list[Any]:
    """Every rule with every small net and loss that it does not refuse; `few` of them often."""
    pairs = []
    for rule in options("rule"):
        for name in NETS | MAPPED:
            if name in MAPPED and refuses(rule, MAPPED[name](outputs=4, activation="tanh")):
                continue
            for loss in LOSSES:
                often = loss in PAIRED[name] if name in NETS else loss == "softmax" and rule in SAMPLE[name].split()
                often = often and (not few or name == "mlp" or rule == "bp")
                marks = () if often else (pytest.mark.slow,)
                form = " form=errors" * (rule == "predictive_coding" and name in ("residual", "vit"))  # they normalize
                pairs.append(pytest.param(rule + form, (name, loss), marks=marks, id=f"{rule}-{name}-{loss}"))
    return pairs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Over every rule, every small net in a row, or the pairs of rules and nets, as a test asks for.

    A test with the mark `few` often takes each rule with the MLP, and bp with each net. The slow tests have all pairs.
    """
    marks = metafunc.definition.iter_markers("parametrize")
    own = {name for mark in marks for name in re.findall(r"\w+", str(mark.args[0]))}  # a string, or several in a tuple
    asked = {"rule", "problem"} & {*metafunc.fixturenames} - own
    if asked == {"rule", "problem"}:
        few = metafunc.definition.get_closest_marker("few") is not None
        metafunc.parametrize(("rule", "problem"), _pairs(few), indirect=True)
    elif asked == {"rule"}:
        metafunc.parametrize("rule", options("rule"), indirect=True)
    elif asked == {"problem"}:
        metafunc.parametrize("problem", [(net, loss) for net in NETS for loss in LOSSES], indirect=True, ids="-".join)


def problem_of(name: str, loss_name: str) -> Problem:
    loss = LOSSES[loss_name]
    net = (NETS | MAPPED)[name](outputs=loss.outputs, activation="tanh")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *net.in_shape, dtype=torch.float64, generator=generator)
    labels = torch.randint(loss.classes, (6,), generator=generator)
    return Problem(net, Batch(x, loss.target(labels, x.dtype), loss))


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> Problem:
    """Every small net in a row with four softmax outputs, and with one sigmoid output; of `MAPPED` with each rule."""
    return problem_of(*request.param)


@pytest.fixture(params=MAPPED)
def mapped(request: pytest.FixtureRequest) -> Problem:
    """The small nets with maps and shortcuts."""
    return problem_of(request.param, "softmax")


def fitted(
    dataset: Dataset,
    net: Network,
    rule: Rule,
    loss: Loss,
    tasks: Sequence[Task],
    weights: Mapping[int, Mapping[str, Tensor]],
    *,
    batch_size: int,
    epochs: int,
    device: str,
    eval_size: int = 1000,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> "Learner":
    """A learner that has trained those tasks as one stack."""
    from pytorch_lightning import Trainer  # here, since Lightning takes seconds to import

    from nobackprop.training.learner import Learner

    relabels = [t.relabel for t in tasks]
    learner = Learner(
        net,
        rule,
        loss,
        weights,
        batches=partial(TrainBatches, dataset, tasks, batch_size),
        validation=partial(EvalBatches, dataset.train, [t.validation for t in tasks], relabels, batch_size=eval_size),
        test=partial(EvalBatches, dataset.test, [t.test for t in tasks], relabels),
        **options,
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator=device,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    trainer.fit(learner)
    return learner


@pytest.fixture
def learner() -> "Callable[..., Learner]":
    """Makes a Learner of one seed whose `step` can be called without a trainer."""
    from nobackprop.training.learner import Learner  # here, since Lightning takes seconds to import

    def unused(**_: Any) -> Any:
        raise AssertionError("no data is needed for a step")

    def make(net: Network, rule: Rule, loss: Loss, w: dict[str, Tensor], optimizer: Any, **kwargs: Any) -> Learner:
        learner = Learner(
            net,
            rule,
            loss,
            {0: w},
            batches=unused,
            validation=unused,
            test=unused,
            pixels=Pixels(),
            optimizer=optimizer,
            **kwargs,
        )
        learner.configure_optimizers()
        return learner

    return make


@pytest.fixture
def hundred_steps(learner: Callable[..., Any]) -> Callable[[Problem, Rule], tuple[float, float]]:
    """A hundred steps of Adam on a problem's one batch, from small weights: the loss at the start and the end."""

    def run(problem: Problem, rule: Rule) -> tuple[float, float]:
        net, batch = problem.net, problem.batch
        w = {name: t.double() for name, t in initial_weights(net, rule, Normal(0.1), Normal(0.4), seed=0).items()}
        trained = learner(net, rule, batch.loss, w, partial(torch.optim.Adam, lr=0.01))

        def loss() -> float:
            z = rule.logits(net, {name: p[0] for name, p in trained.w.items()}, batch.x)
            return batch.loss.value(z, batch.y).mean().item()

        first = loss()
        for _ in range(100):
            trained.step(batch.x.unsqueeze(0), batch.y.unsqueeze(0))
        return first, loss()

    return run


def random_images(n: int, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Images:
    g = torch.Generator().manual_seed(seed)
    return Images(
        torch.randint(256, (n, *shape), generator=g, dtype=torch.uint8), torch.randint(classes, (n,), generator=g)
    )


def assert_same_images(a: Images, b: Images) -> None:
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.labels, b.labels)
    assert (a.pixels.dtype, a.labels.dtype) == (b.pixels.dtype, b.labels.dtype) == (torch.uint8, torch.int64)


@pytest.fixture(scope="session")
def toy() -> Dataset:
    """137 + 40 images of 5 classes; the first pixel of each is its index."""
    train, test = random_images(137, (2, 4, 6), 5), random_images(40, (2, 4, 6), 5, seed=1)
    for images in (train, test):
        images.pixels[:, 0, 0, 0] = torch.arange(len(images.pixels))
    return Dataset("toy", train, test, 5)
