"""Measures what float32 leaves of each layer's gradient in deep nets, and of the step that is made of it.

    python benchmarks/precision.py [--only lra_e] [--hidden 3 8 30] [--activation tanh sigmoid relu]

The nets and settings are those of conf/experiment/lra_e/deviation.yaml with unit_norm: MNIST, hidden layers of 256
units, tanh, sigmoid or relu. Each rule's gradient on a mini-batch is computed in float32 and, from the same weights, in
float64: at the start, and after 500 steps of training in float32. Forms that subtract are measured at the same weights
and against float64 of the form that does not. MNIST is read from NOBACKPROP_DATA, or downloaded to ./data. Rows of what
was not asked for stay. One line of the CSV is a layer:

| column | what |
| --- | --- |
| `gradient` | the largest entry of the gradient of W, in float64 |
| `error` | the largest error of float32's, in units of that entry: 1 is nothing but noise |
| `angle` | degrees from float32's gradient to that of the loss of what the rule predicts, in float64 |
| `unit_norm`, `unit_norm_relative` | the norm of the update that these make of it: 1, or less where it is too small |
| `adamw` | the largest entry of AdamW's first step, over its rate: 1, or less where its epsilon swallows the gradient |
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor

from nobackprop.core.initializers import initial_weights
from nobackprop.core.optimizers import AdamW
from nobackprop.core.rule import Batch, Rule
from nobackprop.core.updates import UPDATES
from nobackprop.data.batches import TrainBatches, task
from nobackprop.data.pixels import Pixels
from nobackprop.papers.grid import composed
from nobackprop.records import files
from nobackprop.training import hardware
from nobackprop.training.build import Run, prepare
from nobackprop.training.diagnostics import angle, loss_gradient
from nobackprop.training.learner import Learner

# The forms of a rule that are measured beside its default one, and the settings of what each is measured against.
FORMS: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "lra_e": {("difference=plain",): ()},
    "equilibrium_propagation": {("difference=plain", "beta=0.5"): ("beta=0.5",)},
    "predictive_coding": {("form=errors",): ("form=errors",), ("form=subtracted", "variance=1"): ("variance=1",)},
}
STEPS = 500


def overrides(rule: str, hidden: int, activation: str) -> list[str]:
    """The config of a rule on a net."""
    net = [f"arch.hidden={[256] * hidden}", f"arch.activation={activation}"]
    return ["+experiment=lra_e/deviation", f"rule={rule}", "update=unit_norm", "logger=none", *net]


def trained(run: Run, dataset: Any) -> Iterator[tuple[str, dict[str, Tensor], Tensor, Tensor]]:
    """The weights at the start and after training, each with pixels and targets of the mini-batch that comes next."""
    w = initial_weights(run.net, run.rule, run.forward, run.backward, seed=0)
    batches = partial(TrainBatches, dataset, [task(dataset, 0, validation=2000)], run.settings.batch_size)
    unused: Any = dict
    learner = Learner(
        run.net,
        run.rule,
        run.loss,
        {0: w},
        batches=batches,
        validation=unused,
        test=unused,
        pixels=Pixels(),
        optimizer=run.optimizer,
        update=run.settings.update,
    )
    learner.configure_optimizers()
    step = 0
    for pixels, labels in batches(position=lambda: 0, device=torch.device("cpu"), rank=0, ranks=1):
        for p, t in zip(pixels, labels, strict=True):
            if step in (0, STEPS):
                y = run.loss.target(t[0], torch.float32)
                yield f"after {step} steps", {n: v[0].clone() for n, v in learner.w.items()}, learner.inputs(p)[0], y
            if step == STEPS:
                return
            learner.step(learner.inputs(p), run.loss.target(t[0], torch.float32)[None])
            step += 1


def layers(
    run: Run, rule: Rule, reference: Rule, w: dict[str, Tensor], x: Tensor, y: Tensor
) -> Iterator[dict[str, Any]]:
    """The numbers of each layer: of a rule in float32, and of its reference in float64."""
    found, _ = rule.all_grads(run.net, w, Batch(x, y, run.loss))
    longer = {name: t.double() for name, t in w.items()}
    exact, _ = reference.all_grads(run.net, longer, Batch(x.double(), y.double(), run.loss))
    descent = loss_gradient(run.net, reference, longer, Batch(x.double(), y.double(), run.loss))
    for l in range(1, run.net.L + 1):
        g, expected = found[f"W{l}"], exact[f"W{l}"]
        size = float(expected.abs().max())
        line: dict[str, Any] = {"layer": l, "gradient": size, "error": float((g - expected).abs().max()) / size}
        line["angle"] = float(angle(g.double(), descent[f"W{l}"]))
        for update in ("unit_norm", "unit_norm_relative"):
            line[update] = float(UPDATES[update](g[None], len(x)).norm())
        p = torch.nn.Parameter(torch.zeros_like(g), requires_grad=False)
        p.grad = g.clone()
        AdamW([p], lr=1.0, weight_decay=0.0).step()
        yield line | {"adamw": float(p.abs().max())}


def measured(rule: str, hidden: int, activation: str) -> Iterator[dict[str, Any]]:
    """The lines of one rule on one net, all its forms."""
    config = overrides(rule, hidden, activation)

    def made(keys: Iterable[str]) -> Run:
        return prepare(composed([*config, *(f"rule.{key}" for key in keys)]))

    run = made(())
    forms = {(): (run.rule, run.rule)}
    forms |= {form: (made(form).rule, made(reference).rule) for form, reference in FORMS.get(rule, {}).items()}
    for when, w, x, y in trained(run, run.source.load()):
        for form, (each, reference) in forms.items():
            about = {"rule": rule, "form": " ".join(form), "activation": activation, "hidden_layers": hidden}
            yield from (about | {"weights": when} | line for line in layers(run, each, reference, w, x, y))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["lra_e"], metavar="RULE", help="of conf/rule")
    parser.add_argument("--hidden", nargs="+", type=int, default=[3, 8, 30], help="how many hidden layers")
    parser.add_argument("--activation", nargs="+", default=["tanh", "sigmoid", "relu"])
    parser.add_argument("--output", type=Path, default=Path("results/precision.csv"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hardware.prepare(torch.device("cpu"))
    cells = list(product(options.only, options.hidden, options.activation))
    with torch.no_grad():
        frame = pd.DataFrame([line for cell in track(cells, "measuring") for line in measured(*cell)])
    if options.output.exists():
        before = pd.read_csv(options.output, keep_default_na=False)
        asked = before[["rule", "hidden_layers", "activation"]].apply(tuple, axis=1).isin(cells)
        frame = pd.concat([before[~asked], frame])
    text = frame.to_csv(index=False, lineterminator="\n", float_format="%.2g")
    files.write_atomically(options.output, text.encode())
    error = frame.groupby(["rule", "form", "activation", "hidden_layers", "weights"], sort=False).error
    print(error.agg(bottom="first", worst="max").to_string(float_format="{:.1e}".format))


if __name__ == "__main__":
    main()
