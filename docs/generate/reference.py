"""The reference: keys from conf/ and its comments, rules from their docstrings and from running them, the interface."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import nobackprop
from generate.results import COMPARED, cell, element, raw, sortable
from nobackprop import usage
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.layers import Dense
from nobackprop.core.losses import Loss, SoftmaxCrossEntropy
from nobackprop.core.network import Network, mlp
from nobackprop.core.rule import FAMILIES, Batch, Rule
from nobackprop.mistakes import Mistake
from nobackprop.papers.figures import within_a_page
from nobackprop.papers.results import Cost, Findings, Row
from nobackprop.places import CONF, RESULTS
from nobackprop.training.work import passes


def pages(every: Sequence[Findings], drawn: Mapping[str, Mapping[str, bytes]]) -> dict[str, str]:
    """The pages by name; `drawn` are the figures by paper and name."""
    return {
        "keys": keys(),
        "rules": rules(every, drawn),
        "interface": interface(),
        "costs": costs(RESULTS / "benchmark.csv"),
    }


# Keys


def keys() -> str:
    """Every group and key, with the files of conf/ as they are: their comments say what each key means."""
    train = (CONF / "train.yaml").read_text()
    groups, _ = usage._commented(train)
    parts = [
        "# Keys",
        "Every run is composed of the files below. A group is chosen by `group=choice`, a key is set by `key=value`, "
        "and a key of a group by `group.key=value`, as in `optimizer.lr=0.01`. `nobackprop --help` shows the same in "
        "two screens, `nobackprop rule=dtp --help` the keys of a choice, and `nobackprop --cfg job` the whole config.",
        "## train.yaml",
        _yaml(train.partition("\nhydra:")[0]),
    ]
    for group, (choice, comment) in groups.items():
        name = group.lstrip("+")
        parts += [f"## {group}=", f"What it chooses: {comment}. If you say nothing: `{choice}`."]
        paths = sorted((CONF / name).rglob("*.yaml"))
        if name == "tuned":
            parts.append(
                f"There are {len(paths)} files of settings that were searched; `tuned=none` takes none of them."
            )
        else:
            named = [(str(path.relative_to(CONF / name).with_suffix("")), path.read_text()) for path in paths]
            parts += [f"`{group}={each}`\n\n{_yaml(text)}" for each, text in named]
        if name == "dataset":
            parts += ["For every data set:", _yaml((CONF / "dataset_options.yaml").read_text())]
    return "\n\n".join(parts) + "\n"


def _yaml(text: str) -> str:
    return f"```yaml\n{text.strip()}\n```"


# Rules


FAR = 100.0  # biases of the outputs, so that these are far from 0, and what heads of other layers say is not


@dataclass(frozen=True)
class Given(Loss):
    """A loss whose error at the output is given: where z is far from 0, neither the net nor the label changes it.

    Its value, too, is the same whatever the net says, unless it `follows`.
    """

    follows: bool = False

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return int(self.follows) * (z * self.error(z, y)).sum(1)

    def error(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.tensor([0.3, -0.2, -0.4, 0.3], dtype=z.dtype) + y * (z.abs() < FAR / 2)


@dataclass(frozen=True)
class Counted(Dense):
    """A dense layer that notes how many samples go up through its weights."""

    seen: list[int] = field(default_factory=list, compare=False)

    def forward(self, W: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
        self.seen.append(len(r))
        return super().forward(W, b, r)


@dataclass(frozen=True)
class Needs:
    """What a rule needs, found by running it on small nets."""

    derivative: str  # of f
    above: str  # what it uses of the weights above a layer
    label: str  # whether hidden layers get it beside the output's error
    own: str  # weights
    noise: str
    refuses: str  # kinds of parts of a net
    updates: int  # of a step
    up: int  # how often a sample goes up through a layer in a step
    work: float  # of a step, in forward passes


def needs(rule: Rule) -> Needs:
    return Needs(
        derivative=_derivative(rule),
        above=_above(rule),
        label=_label(rule),
        own=_own(rule),
        noise="yes" if rule.noise(_net("tanh"), 6) else "no",
        refuses=", ".join(rule.refuses) or "nothing",
        updates=len(rule.phases()),
        up=_up(rule),
        work=passes(rule, mlp((784,), 10, hidden=[256] * 4, activation="tanh"), SoftmaxCrossEntropy(10)),
    )


WIDTHS = {12: "inputs", 8: "units", 7: "units", 6: "units", 5: "units", 4: "outputs"}  # of the small nets


def _net(activation: str) -> Network:
    inputs, *hidden, outputs = WIDTHS
    return mlp((inputs,), outputs, hidden=hidden, activation=activation)


def _batch(rule: Rule, net: Network, loss: Loss, samples: int = 6) -> Batch:
    numbers = torch.Generator().manual_seed(0)
    x = torch.rand(samples, *net.in_shape, dtype=torch.float64, generator=numbers)
    noise = {
        name: torch.randn(shape, dtype=torch.float64, generator=numbers)
        for name, shape in rule.noise(net, samples).items()
    }
    return Batch(x, loss.target(torch.arange(samples) % loss.classes, x.dtype), loss, noise)


def _weights(rule: Rule, net: Network) -> dict[str, Tensor]:
    normal = Normal(0.3)
    drawn = initial_weights(net, rule, forward=normal, backward=normal, seed=0)
    w = {name: tensor.detach().double() for name, tensor in drawn.items()}
    w[f"b{net.L}"] += FAR
    w[f"b{net.L}"][-1] += FAR  # a rule that chooses an output chooses the last
    return w


def _derivative(rule: Rule) -> str:
    """Whether it needs f': sign has none, and says so when it is asked."""
    net = _net("sign")
    try:
        rule.check(net)
        rule.all_grads(net, _weights(rule, net), _batch(rule, net, SoftmaxCrossEntropy(net.units(net.L))))
    except Mistake:
        return "yes"
    return "no"


def _above(rule: Rule) -> str:
    """What W1's gradient in a linear net takes of the weights above, where the error at the output is given."""
    net = _net("identity")
    w = _weights(rule, net)

    def changed(name: str, factor: int, follows: bool = False) -> bool:
        batch, other = _batch(rule, net, Given(net.units(net.L), follows)), w | {name: factor * w[name]}
        before, after = (rule.all_grads(net, each, batch)[0]["W1"] for each in (w, other))
        return not torch.allclose(before, after, rtol=1e-6)

    if changed("W2", 2):
        return "values"
    if changed("W2", -1):
        return "signs"
    if changed(f"W{net.L}", 2):
        return "values, at the output"
    return "values, forward alone" if changed("W2", 2, follows=True) else "nothing"


def _label(rule: Rule) -> str:
    """Whether a hidden W's gradient changes with the label where the error at the output is given."""
    net = _net("tanh")
    w, batch = _weights(rule, net), _batch(rule, net, Given(net.units(net.L)))
    other = replace(batch, y=batch.y[:, [1, 2, 0, 3]])  # the chosen output is as right as before
    before, after = (rule.all_grads(net, w, each)[0] for each in (batch, other))
    same = (torch.allclose(before[f"W{l}"], after[f"W{l}"], rtol=1e-6) for l in range(1, net.L))
    return "no" if all(same) else "yes"


def _up(rule: Rule) -> int:
    """How often a sample goes up through the weights of a layer in a step, in the layer where this is most often."""
    net = _net("tanh")
    layers = [Counted(net.units(l)) for l in range(1, net.L + 1)]
    net = replace(net, layers=tuple(layers))
    w, batch = _weights(rule, net), _batch(rule, net, SoftmaxCrossEntropy(net.units(net.L)))
    for phase in rule.phases():
        given, _ = phase(net, w, batch)
        _, batch = batch.after(given, w)
    return max(sum(layer.seen) for layer in layers) // len(batch.x)


def _own(rule: Rule) -> str:
    """Its own weights by letter: fixed or learned, and of which shape."""
    net = _net("tanh")
    w = _weights(rule, net)
    grads, _ = rule.all_grads(net, w, _batch(rule, net, SoftmaxCrossEntropy(net.units(net.L))))
    told = {}
    for name in w:
        letter, layer = name.rstrip("0123456789"), int(re.sub(r"\D", "", name) or 0)
        if letter in ("W", "b") or letter in told:
            continue
        shape = w[name].shape
        as_w = layer and tuple(shape) == tuple(net.weight_shape(layer)) and layer < net.L
        kind = "as W" if as_w else " x ".join(WIDTHS.get(n, str(n)) for n in shape)
        told[letter] = f"{'learned' if name in grads else 'fixed'} {letter}, {kind}"
    return "; ".join(told.values()) or "none"


def rules(every: Sequence[Findings], drawn: Mapping[str, Mapping[str, bytes]]) -> str:
    """Every rule that has a file in conf/rule, in families."""
    every_rule = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted((CONF / "rule").glob("*.yaml"))}
    families = list(FAMILIES)
    found = dict(sorted(every_rule.items(), key=lambda each: families.index(each[1].family)))
    experiment, costs = _costs(every)
    paper, table = COMPARED
    compared = next(each.tables[table] for each in every if each.paper == paper)
    parts = [RULES.format(experiment=f"`{experiment}`"), raw(_table(found, costs, compared)), *_field(drawn)]
    for family, told in FAMILIES.items():
        if members := [_rule(name, rule) for name, rule in found.items() if rule.family == family]:
            parts += [f"## {family[0].upper()}{family[1:]}", told, *members]
    return "\n\n".join(parts) + "\n"


RULES = """# Rules

A learning rule says which error reaches each layer. The layer turns its input and that error into the gradient of its
weights, and does so in the same way for every rule. So a rule is one short file, to be read beside its paper. Families
of rules differ in how a layer learns what it did wrong.

The table says what each rule needs, with the rules of a family together. It is made by running each rule with its
default settings on small nets with four hidden layers when this page is built. *f'* says whether the rule needs the
derivative of the activation. *Uses of W above* says what a layer's error takes of the weights above it, where the error
at the output is given: backprop needs their values. *Forward alone* means that a change goes up through them, and that
nothing comes down. *Label at hidden layers* says whether these get the label itself, beside the output's error or
instead of it. *Own weights* are those besides W and b; "as W" means that they have the shapes of W. *Refuses* names the
parts of nets for which the rule has no form; below it says why.

*Updates* is how often weights move in a step of training. *Passes up* is how often a sample goes up through the weights
of a layer in a step, in the layer where this is most often. A second forward pass counts, and so does each step in
which the states of a net relax. *Work* is the arithmetic of a step, where a forward pass is 1. *Time* and *memory* are
those of a step of {experiment} (`results/benchmark.csv`), where backprop has 1. *Accuracy* is on test images, in %, and
*angle* that of the updates to backprop's gradient, in degrees, in the [second comparison](../results/compare.md): a
fully connected net on MNIST, and a convolutional net, LeNet and a small residual net on Fashion-MNIST, after 3 epochs
with a falling rate and settings that were searched.

What the table does not say: equilibrium propagation has a free phase and nudged ones within its update, and predictive
coding relaxes before any weight moves. Incremental predictive coding has no such phases, since weights move at every
step of its relaxation. Weight mirrors and difference reconstruction train their feedback in updates of its own, before
that of W. In all other rules feedback that learns does so beside W. Forward-forward writes the label into the images.
Rules that perturb something bring every layer one number, how the loss changes."""


def _costs(every: Sequence[Findings]) -> tuple[str, Mapping[str, Cost]]:
    """The experiment in which the most rules were measured, and what they cost there."""
    known = {experiment: costs for found in every for experiment, costs in found.costs.items()}
    return max(known.items(), key=lambda each: (len(each[1]), each[0]), default=("", {}))


def _table(found: Mapping[str, Rule], costs: Mapping[str, Cost], compared: Sequence[Row]) -> str:
    rows = []
    for name, rule in found.items():
        n, cost = needs(rule), costs.get(name)
        reached = [row.cells.get(name) for row in compared]
        texts = [
            element("a", name, href=f"#{name.replace('_', '-')}"),
            rule.family,
            n.derivative,
            n.above,
            n.label,
            escape(n.own),
            n.noise,
            n.refuses,
        ]
        numbers = [str(n.updates), str(n.up), f"{n.work:.1f}"]
        numbers += ["-", "-"] if cost is None else [f"{1 / cost.speed:.2f}", f"{cost.memory:.2f}"]
        numbers += ["-" if each is None or each.mean is None else f"{100 * each.mean:.1f}" for each in reached]
        numbers += ["-" if each is None or each.angle is None else f"{each.angle:.0f}" for each in reached]
        rows.append([*map(cell, texts), *(cell(text, True) for text in numbers)])
    head = ["rule", "family", "f'", "uses of W above", "label at hidden layers", "own weights", "noise", "refuses"]
    head += ["updates", "passes up", "work", "time", "memory"]
    nets = [row.labels["net"].replace("_", " ") for row in compared]
    head += [*(f"accuracy, {net}" for net in nets), *(f"angle, {net}" for net in nets)]
    return sortable(head, rows, 5 + 2 * len(compared))


def _field(drawn: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """The figure of the whole field, error against cost; nothing without runs."""
    paper, table = COMPARED
    svg = drawn[paper].get(f"{table}_cost")
    if svg is None:
        return []
    return [FIELD, raw(element("figure", within_a_page(svg), _class="drawn"))]


FIELD = """## Error against cost

The best rules are at the bottom left. Errors are those of settings that were searched, in the
[second comparison](../results/compare.md), and times are those of steps with default settings: where the search chose
another number of steps, a run costs more or less."""


def _rule(name: str, rule: Rule) -> str:
    module = type(rule).__module__.replace(".", "/")
    told = inspect.getdoc(type(rule)) or ""
    chosen = _yaml((CONF / "rule" / f"{name}.yaml").read_text())
    parts = [f"### {name}", told]
    if rule.refuses:
        parts.append("Nets that it refuses:")
        parts.append("\n".join(f"- with {kind}: {reason}." for kind, reason in rule.refuses.items()))
    return "\n\n".join([*parts, f"The file is `src/{module}.py`; `rule={name}` has these keys:", chosen])


# Costs


def costs(path: Path) -> str:
    """What benchmarks/benchmark.py measured: its figure of training steps, and a table for each measure."""
    frame = pd.read_csv(path)
    drawn = path.with_suffix(".svg").read_bytes()
    parts = [COSTS, raw(element("figure", within_a_page(drawn), _class="drawn"))]
    for measure, rows in frame.groupby("measure", sort=False):
        body = [
            [
                cell(escape(what)),
                cell(f"{value:,.4g}", True),
                cell(escape(unit)),
                cell(_ratio(ratio), True),
            ]
            for what, value, unit, ratio in rows[["what", "value", "unit", "ratio"]].itertuples(index=False)
        ]
        threads = " and ".join(f"{n:g}" for n in rows.threads.unique())
        title = str(measure)[0].upper() + str(measure)[1:]
        parts += [f"## {title}", f"{rows.processor.iloc[0]}, threads: {threads}."]
        parts.append(raw(sortable(["what", "value", "unit", "ratio"], body, 0)))
    return "\n\n".join(parts) + "\n"


def _ratio(ratio: float) -> str:
    return "" if pd.isna(ratio) else f"{ratio:.2f}"


COSTS = """# Speed and memory

All figures are those of `results/benchmark.csv`, which `python benchmarks/benchmark.py` makes. What is compared is
measured in turn on one machine, so the ratio of two figures says more than a figure alone. The ratio is to the first
line of a table, or to backprop. *Plain PyTorch* is backprop by modules, autograd and torch's optimizer, not compiled
unless a line says so. *JAX* is the same step in JAX and optax, jitted (`step`), or a hundred of them in one call
(`scan`).

A step here has no autograd graph. The optimizer is one kernel. On a CPU a step's kernels are noted once and replayed in
memory that is kept, to the same bits; *as written* is a step without that. A rule's *products alone* are its matrix
products and convolutions, with nothing between them. On a GPU nothing has been measured yet."""


# Interface


def interface() -> str:
    """All public names, from their docstrings."""
    parts = [
        "# Interface",
        "`import nobackprop` gives all these names, and imports torch when the first of them that needs it is used. "
        "Learning rules are public too, as `nobackprop.LRAE`; the [rules](rules.md) have a page of their own.",
    ]
    parts += ["```{py:module} nobackprop\n```"]
    known = nobackprop._PUBLIC  # what one starts with comes first
    for module in sorted(known, key=lambda name: name.startswith(("core.", "data."))):
        title = (inspect.getdoc(import_module(f"nobackprop.{module}")) or module).partition("\n")[0].rstrip(".")
        parts += [
            f"## {re.split('[:;,]', title)[0]}",
            *(_member(name, getattr(nobackprop, name)) for name in known[module].split()),
        ]
    return "\n\n".join(parts) + "\n"


def _member(name: str, member: Any) -> str:
    kind = "class" if inspect.isclass(member) else "function" if callable(member) else "data"
    inner = []
    if kind == "class":
        for own, each in vars(member).items():
            function = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
            told = inspect.getdoc(getattr(member, own)) if inspect.isfunction(function) and own[0] != "_" else None
            if told:
                directive = "property" if isinstance(each, property) else "method"
                text = f"{own}{'' if directive == 'property' else _signature(function, bound=True)}"
                inner.append(f":::{{py:{directive}}} {text}\n{told}\n:::")
    signature = "" if kind == "data" else _signature(member)
    return "\n".join([f"::::{{py:{kind}}} {name}{signature}", inspect.getdoc(member) or "", "", *inner, "::::"])


def _signature(function: Any, bound: bool = False) -> str:
    """Names and default values; of a method without `self`."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return "()"
    parameters = list(signature.parameters.values())[bound:]
    shown = [p.replace(annotation=p.empty) for p in parameters]
    return str(signature.replace(parameters=shown, return_annotation=signature.empty))
