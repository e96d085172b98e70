"""Measures speed and memory, side by side in one run on one thread, of training steps against plain PyTorch's.

    python benchmarks/benchmark.py [--only steps rules memory ...] [--jax PYTHON] [--rounds 9] [--output ...csv]

Everything is timed in turn, round after round, and medians are shown; a ratio is the median of the rounds' ratios, so a
machine whose speed drifts does not bend it. Plain PyTorch has processes of its own, with torch's defaults, and so has
JAX, by the interpreter PYTHON that has jax and optax. Steps are timed on one core, over a hundred mini-batches. Writes
what it prints, with the machine, as CSV; rows of parts that were not asked for stay. `steps` is drawn, too, beside it.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nobackprop.core import optimizers
from nobackprop.core.initializers import Uniform, initial_weights
from nobackprop.core.losses import Loss, SoftmaxCrossEntropy, cross_entropy
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.rule import Batch, Rule, apart
from nobackprop.data.batches import CHUNK_STEPS, TrainBatches, task
from nobackprop.data.folders import ImageNet
from nobackprop.data.pixels import Pixels
from nobackprop.papers.grid import composed, select
from nobackprop.papers.tune import Search, tune
from nobackprop.places import CONF
from nobackprop.records import machine, provenance
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.training import hardware, kernels
from nobackprop.training.build import prepare
from nobackprop.training.learner import Learner
from nobackprop.training.run import train

RULES: dict[str, Rule] = {"bp": BP(), "fa": FA(), "dfa": DFA(), "mdfa": MDFA(), "lra_e": LRAE()}
MLP = partial(mlp, (1, 28, 28), activation="tanh")
CONV = partial(allconv, (3, 32, 32), filters=[[96, 5, 2], [96, 3, 2], [96, 3, 1]], activation="tanh")
TORCH_ADAMW, ADAMW = partial(torch.optim.AdamW, lr=1e-3), partial(optimizers.AdamW, lr=1e-3)
TORCH_RMSPROP, RMSPROP = partial(torch.optim.RMSprop, lr=1e-4), partial(optimizers.RMSprop, lr=1e-4)
FUSED = partial(TORCH_ADAMW, fused=True)
# name: net, classes, batch, torch's optimizer, torch's with one kernel a step where it has one, ours
STEPS = {
    "784-256x4-10, batch 50, AdamW": (partial(MLP, hidden=[256] * 4), 10, 50, TORCH_ADAMW, FUSED, ADAMW),
    "784-200-200-10, batch 64, RMSprop": (
        partial(MLP, hidden=[200, 200]),
        10,
        64,
        TORCH_RMSPROP,
        partial(TORCH_RMSPROP, foreach=True),
        RMSPROP,
    ),
    "all-convolutional, 2 classes, batch 64, AdamW": (CONV, 2, 64, TORCH_ADAMW, FUSED, ADAMW),
}
PLAIN, TUNED = "plain PyTorch backprop", "the same, with our matrix products, memory and one kernel"
PRODUCTS = {getattr(torch.ops.aten, n) for n in ("mm", "addmm", "bmm", "convolution", "convolution_backward")}
COMPARED = ("mlp", "conv")  # of conf/experiment/compare
DEEP = {"depth": 64, "width": 1024, "batch": 2048}
SIZE, IMAGES, BATCH = 224, 512, 64
SHADES = {"here": "tab:blue", "JAX": "tab:orange", "plain PyTorch, torch.compile": "0.6"}
SWEPT, TRIALS = (2, 42), 40  # jobs of a short and of a long sweep, trials of a search


def seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


class Aside:
    """A step that lives in a process of its own, with torch as it is there, and is timed by it."""

    def __init__(self, make: Callable[..., Callable[[], Any]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()

    def __call__(self, times: int) -> float:
        self.connection.send(times)
        return self.connection.recv()


def _serve(connection: Connection, make: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    step = make(*args)
    with suppress(EOFError):  # the end
        while True:
            connection.send(seconds(step, connection.recv()))


def in_turn(runs: dict[str, Callable[[int], float]], rounds: int, round_s: float = 0.5) -> dict[str, list[float]]:
    """Seconds a call of each, one list entry a round; a round takes about `round_s` seconds for each.

    A run takes how often to call, and gives the seconds of one call.
    """
    for run in runs.values():
        run(3)  # compiles, and fills caches
    times = {name: max(1, round(round_s / run(3))) for name, run in runs.items()}
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), "timing in turn"):
        for name, run in runs.items():
            measured[name].append(run(times[name]))
    return measured


def plain_step(
    net: Network,
    loss: Loss,
    optimizer: Any,
    pixels: Tensor,
    labels: Tensor,
    matmul: str = "highest",
    compile: bool = False,
) -> Callable[[], Any]:
    """Backpropagation as one writes it in PyTorch: modules, autograd and an optimizer. Mini-batches take turns."""
    torch.set_float32_matmul_precision(matmul)
    modules: list[nn.Module] = []
    for l, layer in enumerate(net.layers, 1):
        shape = net.weight_shape(l)
        if len(shape) == 4:
            modules.append(nn.Conv2d(shape[1], shape[0], shape[2], layer.stride))  # pyright: ignore
        else:
            modules += [nn.Flatten(), nn.Linear(shape[1], shape[0])]
        modules.append(nn.Tanh())
    model = nn.Sequential(*modules[:-1])
    stepper = optimizer(model.parameters())
    if compile:
        model.compile(dynamic=False)
    y, turn = targets(loss, labels), cycle(range(len(labels)))
    criterion = F.cross_entropy if loss.outputs > 1 else F.binary_cross_entropy_with_logits

    def step() -> None:
        stepper.zero_grad()
        i = next(turn)
        criterion(model(pixels[i] / 255), labels[i] if loss.outputs > 1 else y[i]).backward()
        stepper.step()

    return step


def our_step(
    net: Network, rule: Rule, loss: Loss, optimizer: Any, pixels: Tensor, labels: Tensor, **how: bool
) -> Callable[[], Any]:
    """One step of the learner, as in training: pixels to floats, the rule, the optimizer, the constraint.

    Mini-batches take turns.
    """
    w = initial_weights(net, rule, Uniform(), Uniform(), 0)
    data = dict.fromkeys(("batches", "validation", "test"), partial(dict))
    learner = Learner(net, rule, loss, {0: w}, pixels=Pixels(), optimizer=optimizer, **how, **data)  # pyright: ignore
    learner.configure_optimizers()
    turn = cycle(zip(pixels.unsqueeze(1), targets(loss, labels).unsqueeze(1), strict=True))

    @torch.no_grad()
    def step() -> None:
        batch, y = next(turn)
        learner.step(learner.inputs(batch, learner.kept_input), y)

    return step


def targets(loss: Loss, labels: Tensor) -> Tensor:
    return loss.target(labels.flatten(), torch.float32).unflatten(0, labels.shape)


def problem(title: str) -> tuple[Network, Loss, Tensor, Tensor]:
    """Net, loss, and mini-batches of pixels and labels."""
    make, classes, batch, *_ = STEPS[title]
    loss = cross_entropy(classes)
    net = make(outputs=loss.outputs)
    return net, loss, *mini_batches(net, classes, batch)


def mini_batches(net: Network, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(256, (CHUNK_STEPS, batch, *net.in_shape), dtype=torch.uint8)
    return pixels, torch.randint(classes, (CHUNK_STEPS, batch))


def plain(title: str, compile: bool) -> Callable[[], Any]:
    """Plain PyTorch with torch's defaults; compiled, with the optimizer's one kernel too."""
    net, loss, pixels, labels = problem(title)
    return plain_step(net, loss, STEPS[title][4 if compile else 3], pixels, labels, compile=compile)


class Peer:
    """JAX's step, in a process of its own."""

    def __init__(self, python: Path, title: str, rule: str, form: str) -> None:
        command = [python, Path(__file__).with_name("jax_peer.py"), title, rule, form]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, times: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(times, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


class Products(TorchDispatchMode):
    """Notes the products of a step, to be computed again without anything between them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS:
            self.calls.append(partial(function._op, *args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    def __call__(self) -> None:
        for call in self.calls:
            call()


def products(net: Network, rule: Rule, loss: Loss, pixels: Tensor, labels: Tensor) -> Callable[[], Any]:
    """The products of a rule's step alone: what no step of it can be faster than with these kernels."""
    noted = Products()
    step = our_step(net, rule, loss, ADAMW, pixels, labels)
    with noted:
        step()

    @torch.no_grad()
    def run() -> None:
        noted()

    return run


@contextmanager
def one_core() -> Iterator[None]:
    """Within, this process and those that it starts have one core, the last."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def steps(rounds: int, jax: Path | None) -> list[dict[str, Any]]:
    """Our rules' steps, as written, replayed and compiled, against PyTorch's and JAX's."""
    with one_core():
        return [row for title in STEPS for row in _steps(title, rounds, jax)]


def _steps(title: str, rounds: int, jax: Path | None) -> list[dict[str, Any]]:
    _, _, batch, _, fused, ours = STEPS[title]
    torch.compiler.reset()  # else the steps before this one count as recompilations
    net, loss, pixels, labels = problem(title)
    matmul = torch.get_float32_matmul_precision()
    runs: dict[str, Callable[[int], float]] = {
        PLAIN: Aside(plain, title, False),
        f"{PLAIN}, torch.compile": Aside(plain, title, True),
        TUNED: partial(seconds, plain_step(net, loss, fused, pixels, labels, matmul)),
    }
    for name in ("bp", "dfa", "lra_e") if jax else ():
        forms = ("step",) if net.layers[0].spatial else ("step", "scan")  # its convolutions do not scan
        if name != "lra_e" or title.startswith("784-256x4"):
            runs |= {f"JAX, {name}, {form}": Peer(jax, title, name, form) for form in forms}  # pyright: ignore
    for name, rule in RULES.items():
        made = partial(our_step, net, rule, loss, ours, pixels, labels)
        runs[f"{name}, as written"] = partial(seconds, made())
        runs[name] = partial(seconds, made(replay=True))
        if name in ("bp", "dfa", "lra_e"):
            runs[f"{name}, compiled"] = partial(seconds, made(compile=True))
            runs[f"{name}, its products alone"] = partial(seconds, products(net, rule, loss, pixels, labels))
    rows = _rates(f"step: {title}", in_turn(runs, rounds), batch)
    for run in runs.values():
        if isinstance(run, Aside | Peer):
            run.process.terminate()
    return rows


def rules(rounds: int) -> list[dict[str, Any]]:
    """Speed and memory of every rule's step on the nets that compare all rules, against our own backpropagation.

    Each is timed as it trains, and as written, with torch's kernels.
    """
    every = {"bp": BP(), **configured_rules()}
    rows = []
    for title in COMPARED:
        run = prepare(composed([f"+experiment=compare/{title}", "logger=none"]))
        batch = run.settings.batch_size
        pixels, labels = mini_batches(run.net, run.loss.classes, batch)
        made = partial(our_step, net=run.net, loss=run.loss, optimizer=run.optimizer, pixels=pixels, labels=labels)
        ways = {f"every rule: compare/{title}": True, f"every rule, as written, with torch's kernels: {title}": False}
        runs: dict[str, Callable[[int], float]] = {}
        for measure, own in ways.items():
            for name, rule in every.items():
                runs[f"{measure}/{name}"] = partial(_with_kernels, own, made(rule=rule, replay=own))
        with one_core():
            measured = in_turn(runs, rounds, round_s=0.25)
        kernels.use(None)
        for measure in ways:
            rows += _rates(measure, {name: measured[f"{measure}/{name}"] for name in every}, batch)
        peaks = {name: peak(run.net, rule, run.loss, batch) for name, rule in every.items()}
        rows += [
            {
                "measure": f"memory of every rule: compare/{title}",
                "what": name,
                "value": each / 2**20,
                "unit": "MiB",
                "ratio": each / peaks["bp"],
            }
            for name, each in peaks.items()
        ]
    return rows


def _with_kernels(own: bool, step: Callable[[], Any], times: int) -> float:
    kernels.use(None if own else False)
    return seconds(step, times)


def _rates(measure: str, measured: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    first = next(iter(measured.values()))
    return [
        {
            "measure": measure,
            "what": name,
            "value": batch / median(each),
            "unit": "samples/s",
            "ratio": median(a / b for a, b in zip(first, each, strict=True)),
        }
        for name, each in measured.items()
    ]


def configured_rules() -> dict[str, Rule]:
    """Every rule of conf/rule, with its defaults."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        names = sorted(path.stem for path in (CONF / "rule").glob("*.yaml"))
        return {name: instantiate(compose(overrides=[f"+rule={name}"]).rule, _convert_="all") for name in names}


class Live(TorchDispatchMode):
    """Notes when each tensor storage that is made while it is on comes and goes, and how large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.changes: list[tuple[int, int]] = []  # number of the storage, bytes more or less

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage not in self.numbers and id(storage) not in known:
                    number = self.numbers[storage] = len(self.changes)
                    self.changes.append((number, storage.nbytes()))
                    weakref.finalize(storage, self.changes.append, (number, -storage.nbytes()))
        return result

    def peak(self, without: Iterable[Tensor]) -> int:
        """The most bytes alive at once, those tensors left out."""
        others = {self.numbers.get(t.untyped_storage()) for t in without}
        live = peak = 0
        for number, change in self.changes:
            live += change if number not in others else 0
            peak = max(peak, live)
        return peak


def peak(net: Network, rule: Rule, loss: Loss, batch: int) -> int:
    """The most bytes a step needs above inputs, weights, gradients and optimizer state.

    Counted on fake tensors, so exact, and the same on every machine; what a kernel needs inside is not seen.
    """
    peaks, left = [], {}
    with FakeTensorMode(), torch.no_grad():
        w = {f"W{l}": torch.empty(net.weight_shape(l)) for l in range(1, net.L + 1)}
        w |= {f"b{l}": torch.empty(net.weight_shape(l)[0]) for l in range(1, net.L + 1)}
        w |= rule.feedback(net, lambda _, shape: torch.empty(shape))
        x, y = torch.empty(batch, *net.in_shape), torch.empty(batch, loss.outputs)
        for phase in rule.phases():
            held = sum(t.nbytes for t in left.values())
            with Live() as live:
                # a step holds the noise of all its phases
                noise = {name: torch.empty(shape) for name, shape in rule.noise(net, batch).items()}
                given, _ = phase(net, w, Batch(x, y, loss, noise | left))
            grads, more = apart(given, w)
            peaks.append(held + live.peak(grads.values()))
            left |= more
    return max(peaks)


def memory(rounds: int) -> list[dict[str, Any]]:
    """The most bytes a step of a deep net needs, as `peak` counts them, against autograd."""
    depth, width, batch = DEEP.values()
    loss = SoftmaxCrossEntropy(10)
    net = mlp((width,), 10, hidden=[width] * depth, activation="tanh")
    title = f"memory: {depth} hidden layers of {width}, batch {batch}"
    rows = []
    with FakeTensorMode(), Live() as live:
        layers = [nn.Linear(net.units(l - 1), net.units(l)) for l in range(1, net.L + 1)]
        model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]
        x, y = torch.empty(batch, width), torch.empty(batch, loss.outputs)
        live.changes.clear()
        F.cross_entropy(model(x), y).backward()
        autograd = live.peak(p.grad for p in model.parameters() if p.grad is not None)
    rows.append({"what": "plain PyTorch backprop", "value": autograd / 2**20, "ratio": 1.0})
    for name, rule in track(configured_rules().items(), "counting bytes"):
        for recompute in (False, True):
            most = peak(replace(net, recompute=recompute), rule, loss, batch)
            what = f"{name}, activations computed again" if recompute else name
            rows.append({"what": what, "value": most / 2**20, "ratio": most / autograd})
    return [{"measure": title, "unit": "MiB", **row} for row in rows]


def images(rounds: int) -> list[dict[str, Any]]:
    """The cache of an ImageNet-like tree: images/s of its making and of reading it in mini-batches."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        low = random.integers(0, 256, (IMAGES, 12, 16, 3), dtype=np.uint8)
        for i in track(range(IMAGES), "making JPEGs"):
            path = root / ("val" if i % 8 == 0 else "train") / f"class{i // 8 % 2}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(low[i]).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)

        def build(name: str) -> ImageNet:
            return ImageNet(name=name, root=root, cache=root / name, size=SIZE)

        made = [seconds(build(f"cache{i}").load, 1) for i in range(3)]
        dataset = build("cache0").load()
        tasks = [task(dataset, 0)]

        def read(mapped: bool) -> Callable[[], None]:
            train = dataset.train if mapped else replace(dataset.train, pixels=dataset.train.pixels.clone())
            batches = TrainBatches(replace(dataset, train=train), tasks, BATCH, lambda: 0, "cpu")

            def epoch() -> None:
                for _ in batches:
                    pass

            return epoch

        number = len(tasks[0].train) // BATCH * BATCH
        runs = {"in memory": read(False), "read ahead from the file": read(True)}
        measured = in_turn({name: partial(seconds, run) for name, run in runs.items()}, rounds)
    rates = {"making the cache from JPEGs of 500x375": IMAGES / median(made)}
    rates |= {f"mini-batches of {BATCH}, {name}": number / median(each) for name, each in measured.items()}
    measure = f"images at {SIZE}x{SIZE}"
    return [{"measure": measure, "what": what, "value": rate, "unit": "images/s"} for what, rate in rates.items()]


def command(folder: Path, *arguments: str) -> float:
    """Seconds of the command, with a new folder for its runs."""
    call = [sys.executable, "-m", "nobackprop", *arguments, f"paths.runs={folder}/{time.monotonic_ns()}"]
    return seconds(partial(subprocess.run, call, check=True, capture_output=True), 1)


def startup(rounds: int) -> list[dict[str, Any]]:
    """From the command to its help, and to the end of a run of one step on digits."""
    commands = {
        "--help": ["--help"],
        "one step, without a logger": ["max_steps=1", "logger=none"],
        "one step, Weights & Biases offline": ["max_steps=1"],
    }
    measured: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "starting in turn"):
            for name, each in measured.items():
                each.append(command(Path(folder), *commands[name]))
    return [
        {"measure": "the command nobackprop", "what": name, "value": median(each), "unit": "s"}
        for name, each in measured.items()
    ]


def sweeps(rounds: int) -> list[dict[str, Any]]:
    """What one more job takes in a sweep, where it trains for one step on digits."""
    ways = {"one after another": "basic", f"side by side, on {machine.cores()} cores": "processes"}
    measured: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "sweeping in turn"):
            for name, each in measured.items():
                few, many = (
                    command(
                        Path(folder), "-m", "max_steps=1", "logger=none", f"launcher={ways[name]}", f"l2=range({n})"
                    )
                    for n in SWEPT
                )
                each.append((many - few) / (SWEPT[1] - SWEPT[0]))
    measure = "one more job of one step in a sweep"
    return [{"measure": measure, "what": name, "value": median(e), "unit": "s"} for name, e in measured.items()]


def search(rounds: int) -> list[dict[str, Any]]:
    """A search of settings with an epoch for each trial, one after another, and how long its training steps take."""
    budget = Search.of(Search.read("lra_e").model_dump() | {"trials": TRIALS, "epochs": 1}, "the benchmark")
    (cell,) = select(budget.cells("lra_e"), ["dataset=mnist", "hidden_layers=3", "rule=lra_e", "setting=tuned"])
    with (
        tempfile.TemporaryDirectory() as folder,
        timed(Learner, "training_step", "validation_step", "test_step") as spent,
    ):
        whole = seconds(lambda: [*tune(budget, [cell], [f"paths.runs={folder}"], 1, Console(quiet=True))], 1)
    steps, *evaluation = spent.values()
    parts = {
        "the whole trial": whole,
        "its training steps": steps,
        "its validation and test": sum(evaluation),
        "all else": whole - sum(spent.values()),
    }
    measure = f"a trial of one epoch in a search of {TRIALS} on MNIST"
    return [
        {"measure": measure, "what": name, "value": each / TRIALS, "unit": "s", "ratio": each / whole}
        for name, each in parts.items()
    ]


@contextmanager
def timed(owner: type, *names: str) -> Iterator[dict[str, float]]:
    """Within, sums up the seconds in these methods of a class."""
    before, spent = {name: getattr(owner, name) for name in names}, dict.fromkeys(names, 0.0)

    def replaced(name: str) -> Callable[..., Any]:
        @wraps(before[name])
        def method(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return before[name](*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return method

    for name in names:
        setattr(owner, name, replaced(name))
    try:
        yield spent
    finally:
        for name, method in before.items():
            setattr(owner, name, method)


def whole_run(folder: Path, *overrides: str) -> float:
    """Seconds that a run of LRA-E on MNIST takes, all included."""
    fixed = ["rule=lra_e", "dataset=mnist", "arch.hidden=[256,256,256,256]", "batch_size=50"]
    cfg = composed([*fixed, f"paths.runs={folder}/{time.monotonic_ns()}", *overrides])
    return seconds(partial(train, prepare(cfg), Console(quiet=True)), 1)


def run_overhead(rounds: int) -> list[dict[str, Any]]:
    """A whole run from its second epoch on, validation and all else included, against its bare training steps."""
    net, loss = MLP(hidden=[256] * 4, outputs=10), cross_entropy(10)
    bare = our_step(net, LRAE(), loss, ADAMW, *mini_batches(net, 10, 50), replay=True)
    steps_an_epoch, epochs = 54_000 // 50, 3
    measured: dict[str, list[float]] = {"the bare step": [], "the whole run": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "running in turn"):
            before = seconds(bare, steps_an_epoch)
            first, all_epochs = (whole_run(Path(folder), f"max_epochs={n}") for n in (1, 1 + epochs))
            measured["the whole run"].append((all_epochs - first) / (epochs * steps_an_epoch))
            measured["the bare step"].append(mean((before, seconds(bare, steps_an_epoch))))
    return _rates("LRA-E on MNIST", measured, 50)


def many_seeds(rounds: int) -> list[dict[str, Any]]:
    """Ten seeds in worker processes, one a core, against one after another."""
    measured: dict[str, list[float]] = {"in turn, on one core": [], f"side by side, on {machine.cores()} cores": []}
    epochs = 3
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "training in turn"):
            for each, choice in zip(measured.values(), ("workers=1", "workers=null"), strict=True):
                each.append(whole_run(Path(folder), "seeds=10", f"max_epochs={epochs}", "logger=none", choice))
    return _rates("ten seeds of LRA-E on MNIST", measured, 10 * epochs * 54_000)


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "steps": partial(steps, jax=None),
    "rules": rules,
    "memory": memory,
    "images": images,
    "startup": startup,
    "sweeps": sweeps,
    "search": search,
    "run_overhead": run_overhead,
    "many_seeds": many_seeds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark.csv"))
    parser.add_argument("--jax", type=Path, metavar="PYTHON", help="an interpreter that has jax and optax")
    options = parser.parse_args()
    PARTS["steps"] = partial(steps, jax=options.jax)
    torch.set_num_threads(1)
    hardware.prepare(torch.device("cpu"))
    here = machine.machine(torch.device("cpu"))
    rows = pd.DataFrame([row for part in options.only for row in PARTS[part](options.rounds)])
    table = Table("what", "value", "ratio to the first", title=f"{here.processor}, one thread unless said")
    for measure, part in rows.groupby("measure", sort=False):
        table.add_section()
        table.add_row(f"[bold]{measure}")
        for row in part.to_dict("records"):
            ratio = f"{row['ratio']:.2f}x" if row.get("ratio", 0) > 0 else ""
            table.add_row(row["what"], f"{row['value']:,.{0 if row['value'] > 100 else 2}f} {row['unit']}", ratio)
    Console().print(table)
    commit, dirty = provenance.source_state()
    stamp = {"processor": here.processor, "threads": 1, "commit": commit, "dirty": dirty, **provenance.versions()}
    rows = rows.assign(**stamp)
    if options.output.exists():  # parts that were not measured now stay
        before = pd.read_csv(options.output)
        new = set(rows.measure.str.partition(":")[0])
        rows = pd.concat([before.loc[~before.measure.str.partition(":")[0].isin(new)], rows])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.output, index=False, float_format="%.6g")
    picture = options.output.with_suffix(".svg")
    draw(rows.loc[rows.measure.str.startswith("step: ")], picture)
    print(f"written: {options.output}, {picture}")


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Bars of training steps, relative to plain PyTorch backprop: ours, JAX's better form, and compiled PyTorch.

    A line marks the bound that a rule's products set.
    """
    if rows.empty:
        return
    parts = {str(measure).removeprefix("step: "): part for measure, part in rows.groupby("measure", sort=False)}
    figure, axes = plt.subplots(1, len(parts), figsize=(9.5, 3), sharey=True, squeeze=False)
    for ax, (title, part) in zip(axes[0], parts.items(), strict=True):
        ratio = dict(zip(part.what, part.ratio, strict=True))
        for at, rule in enumerate(("bp", "dfa", "lra_e")):
            jax = [value for what, value in ratio.items() if what.startswith(f"JAX, {rule},")]
            bars = {"here": ratio.get(rule), "JAX": max(jax, default=None)}
            bars |= {"plain PyTorch, torch.compile": ratio.get(f"{PLAIN}, torch.compile")} if rule == "bp" else {}
            for i, (name, value) in enumerate(bars.items()):
                if value is not None:
                    drawn = ax.bar(at + 0.27 * (i - 1), value, 0.25, color=SHADES[name], label=name if at == 0 else "")
                    ax.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
            if (bound := ratio.get(f"{rule}, its products alone")) is not None:
                ax.hlines(
                    bound, at - 0.42, at + 0.42, color="0.3", ls=":", label="its products alone" if at == 0 else ""
                )
        ax.set_xticks(range(3), ["backprop", "DFA", "LRA-E"])
        ax.set_title(title, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("steps, relative to\nplain PyTorch backprop", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{rows.processor.iloc[0]}, one core", fontsize=9)
    figure.set_layout_engine("constrained")
    with plt.rc_context({"svg.hashsalt": "benchmark"}):  # so that the same figures give the same file
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
