"""Measures speed, side by side in one run on one thread: training steps against plain PyTorch, and reading images.

    python scripts/benchmark.py [--only steps images startup ...] [--rounds 9] [--output results/benchmark.csv]

Everything is timed in turn, round after round, and medians are shown; a ratio is the median of the rounds' ratios, so a
machine whose speed drifts does not bend it. Writes what it prints, with the machine, as CSV.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from nobackprop import hardware, records
from nobackprop.batches import TrainBatches, task
from nobackprop.cli import CONF
from nobackprop.imagenet import ImageNet
from nobackprop.initializers import Uniform, initial_weights
from nobackprop.learner import Learner
from nobackprop.losses import Loss, cross_entropy
from nobackprop.network import Network, allconv, mlp
from nobackprop.pixels import Pixels
from nobackprop.rule import Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.train import train
from nobackprop.workers import cores

RULES: dict[str, Rule] = {"bp": BP(), "fa": FA(), "dfa": DFA(), "mdfa": MDFA(), "lra_e": LRAE()}
MLP = partial(mlp, (1, 28, 28), activation="tanh")
CONV = partial(allconv, (3, 32, 32), filters=[[96, 5, 2], [96, 3, 2], [96, 3, 1]], activation="tanh")
ADAMW, RMSPROP = partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.RMSprop, lr=1e-4)
# name: net, classes, batch, optimizer, and the same with one kernel a step where torch has it
STEPS = {
    "784-256x4-10, batch 50, AdamW": (partial(MLP, hidden=[256] * 4), 10, 50, ADAMW, partial(ADAMW, fused=True)),
    "784-200-200-10, batch 64, RMSprop": (partial(MLP, hidden=[200, 200]), 10, 64, RMSPROP, RMSPROP),
    "all-convolutional, 2 classes, batch 64, AdamW": (CONV, 2, 64, ADAMW, partial(ADAMW, fused=True)),
}
SIZE, IMAGES, BATCH = 224, 512, 64


def seconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, one list entry a round; a round takes about half a second for each."""
    times = {name: max(1, round(0.5 / seconds(run, 3))) for name, run in runs.items()}
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), "timing in turn"):
        for name, run in runs.items():
            measured[name].append(seconds(run, times[name]))
    return measured


def plain_step(
    net: Network, loss: Loss, optimizer: Any, pixels: Tensor, labels: Tensor, matmul: str
) -> Callable[[], Any]:
    """Backpropagation as one writes it in PyTorch: modules, autograd and an optimizer."""
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
    y = loss.target(labels, torch.float32)
    criterion = F.cross_entropy if loss.outputs > 1 else F.binary_cross_entropy_with_logits

    def step() -> None:
        torch.set_float32_matmul_precision(matmul)
        stepper.zero_grad()
        criterion(model(pixels / 255), labels if loss.outputs > 1 else y).backward()
        stepper.step()

    return step


def our_step(
    net: Network, rule: Rule, loss: Loss, optimizer: Any, pixels: Tensor, labels: Tensor, compile: bool = False
) -> Callable[[], Any]:
    """One step of the learner, as in training: pixels to floats, the rule, the optimizer, the constraint."""
    w = initial_weights(net, rule, Uniform(), Uniform(), 0)
    data = dict.fromkeys(("batches", "validation", "test"), partial(dict))
    learner = Learner(net, rule, loss, {0: w}, pixels=Pixels(), optimizer=optimizer, compile=compile, **data)  # pyright: ignore
    learner.configure_optimizers()
    hardware.choose_matmul(torch.device("cpu"))
    matmul = torch.get_float32_matmul_precision()

    @torch.no_grad()
    def step() -> None:
        torch.set_float32_matmul_precision(matmul)
        learner.step(learner.inputs(pixels[None]), loss.target(labels, torch.float32)[None])

    return step


def steps(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for title, (make, classes, batch, default, fused) in STEPS.items():
        loss = cross_entropy(classes)
        net = make(outputs=loss.outputs)
        pixels = torch.randint(256, (batch, *net.in_shape), dtype=torch.uint8)
        labels = torch.randint(classes, (batch,))
        runs = {
            "plain PyTorch backprop": plain_step(net, loss, default, pixels, labels, "highest"),
            "the same, oneDNN and fused": plain_step(net, loss, fused, pixels, labels, "medium"),
        }
        runs |= {name: our_step(net, rule, loss, fused, pixels, labels) for name, rule in RULES.items()}
        measured = in_turn(runs, rounds)
        first = measured["plain PyTorch backprop"]
        for name, each in measured.items():
            ratio = median(a / b for a, b in zip(first, each, strict=True))
            rate = {"value": batch / median(each), "unit": "samples/s"}
            rows.append({"measure": f"step: {title}", "what": name, **rate, "ratio": ratio})
    return rows


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
            train = dataset.train if mapped else type(dataset.train)(dataset.train.pixels.clone(), dataset.train.labels)
            source = type(dataset)(dataset.name, train, dataset.test, dataset.num_classes)
            batches = TrainBatches(source, tasks, BATCH, lambda: 0, "cpu")

            def epoch() -> None:
                for _ in batches:
                    pass

            return epoch

        number = len(tasks[0].train) // BATCH * BATCH
        measured = in_turn({"in memory": read(False), "read ahead from the file": read(True)}, rounds)
    rows = [
        {
            "measure": f"images at {SIZE}x{SIZE}",
            "what": "making the cache from JPEGs of 500x375",
            "value": IMAGES / median(made),
        }
    ]
    rows += [
        {
            "measure": f"images at {SIZE}x{SIZE}",
            "what": f"mini-batches of {BATCH}, {name}",
            "value": number / median(each),
        }
        for name, each in measured.items()
    ]
    return [row | {"unit": "images/s"} for row in rows]


def startup(rounds: int) -> list[dict[str, Any]]:
    """From the command to its help, and to the end of a run of one step on digits."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "--help": ["--help"],
            "one step, without a logger": ["max_steps=1", "logger=none"],
            "one step, Weights & Biases offline": ["max_steps=1"],
        }

        def command(name: str) -> None:
            runs = f"paths.runs={folder}/{time.monotonic_ns()}"
            call = [sys.executable, "-m", "nobackprop.cli", *commands[name], *([] if name == "--help" else [runs])]
            subprocess.run(call, check=True, capture_output=True)

        measured: dict[str, list[float]] = {name: [] for name in commands}
        for _ in track(range(rounds), "starting in turn"):
            for name, each in measured.items():
                each.append(seconds(partial(command, name), 1))
    return [
        {"measure": "the command nobackprop", "what": name, "value": median(each), "unit": "s"}
        for name, each in measured.items()
    ]


def whole_run(folder: Path, *overrides: str) -> float:
    """Seconds that a run of LRA-E on MNIST takes, all included."""
    fixed = ["rule=lra_e", "dataset=mnist", "arch.hidden=[256,256,256,256]", "batch_size=50"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*fixed, f"paths.runs={folder}/{time.monotonic_ns()}", *overrides])
    return seconds(partial(train, cfg, Console(quiet=True)), 1)


def run_overhead(rounds: int) -> list[dict[str, Any]]:
    """A whole run from its second epoch on, validation and all else included, against its bare training steps."""
    net, loss = MLP(hidden=[256] * 4, outputs=10), cross_entropy(10)
    pixels, labels = torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (50,))
    bare = our_step(net, LRAE(), loss, partial(ADAMW, fused=True), pixels, labels)
    steps_an_epoch, epochs = 54_000 // 50, 3
    rates: dict[str, list[float]] = {"the bare step": [], "the whole run": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "running in turn"):
            rates["the bare step"].append(50 / seconds(bare, steps_an_epoch))
            first, all_epochs = (whole_run(Path(folder), f"max_epochs={n}") for n in (1, 1 + epochs))
            rates["the whole run"].append(50 * steps_an_epoch * epochs / (all_epochs - first))
            rates["the bare step"].append(50 / seconds(bare, steps_an_epoch))
    ratio = median(rates["the whole run"]) / median(rates["the bare step"])
    ratios = {"the bare step": 1.0, "the whole run": ratio}
    return [
        {"measure": "LRA-E on MNIST", "what": name, "value": median(each), "unit": "images/s", "ratio": ratios[name]}
        for name, each in rates.items()
    ]


def many_seeds(rounds: int) -> list[dict[str, Any]]:
    """Ten seeds in worker processes, one a core, against one after another."""
    rates: dict[str, list[float]] = {"in turn, on one core": [], f"side by side, on {cores()} cores": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in track(range(rounds), "training in turn"):
            for each, choice in zip(rates.values(), ("workers=1", "workers=null"), strict=True):
                each.append(10 * 54_000 / whole_run(Path(folder), "seeds=10", "max_epochs=1", choice))
    alone = next(iter(rates.values()))
    return [
        {
            "measure": "ten seeds of LRA-E on MNIST",
            "what": name,
            "value": median(each),
            "unit": "images/s",
            "ratio": median(rate / other for rate, other in zip(each, alone, strict=True)),
        }
        for name, each in rates.items()
    ]


def main() -> None:
    parts = {
        "steps": steps,
        "images": images,
        "startup": startup,
        "run_overhead": run_overhead,
        "many_seeds": many_seeds,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("results/benchmark.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = records.machine(torch.device("cpu"))
    rows = pd.DataFrame([row for part in options.only for row in parts[part](options.rounds)])
    table = Table("", "what", "rate", "against plain PyTorch", title=f"{machine.processor}, one thread")
    for row in rows.to_dict("records"):
        ratio = f"{row['ratio']:.2f}x" if row.get("ratio", 0) > 0 else ""
        table.add_row(
            row["measure"], row["what"], f"{row['value']:,.{0 if row['value'] > 100 else 2}f} {row['unit']}", ratio
        )
    Console().print(table)
    commit, dirty = records.source_state()
    stamp = {"processor": machine.processor, "threads": 1, "commit": commit, "dirty": dirty, **records.versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows.assign(**stamp).to_csv(options.output, index=False, float_format="%.6g")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
