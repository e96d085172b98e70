"""Every run in golden/ (see its README), step by step: the same gradients and weights as the original programs'."""

from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import own_kernels
from torch import Tensor

from nobackprop.core.layers import Shape
from nobackprop.core.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.optimizers import TFRMSprop
from nobackprop.core.rule import Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA
from nobackprop.training import kernels

RUNS = sorted((Path(__file__).parent / "golden").glob("*.npz"))
RULES: dict[str, Rule] = {"bp": BP(), "fa": FA(), "dfa": DFA(), "mdfa": MDFA()}


class Run(NamedTuple):
    """A recorded run in our terms. `arrays(when)` gives the weights or gradients of that moment, by our names."""

    steps: int
    net: Network
    rule: Rule
    loss: Loss
    optimizer: Callable[..., Any]
    options: dict[str, Any]  # of the learner
    x: Tensor  # (steps, N, *in_shape)
    y: Tensor  # (steps, N, outputs)
    arrays: Callable[[str], dict[str, Tensor]]
    losses: Tensor | None = None  # (steps,), means over the batch, before each step
    logits: Tensor | None = None  # (steps, N, outputs), before each step


def _read(path: Path) -> Run:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = literal_eval(str(arrays.pop("meta")))
    return _read_lra_e(meta, arrays) if "beta" in meta else _read_mdfa(meta, arrays)


def _read_lra_e(meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Run:
    sizes = meta["sizes"]
    net = mlp((sizes[0],), sizes[-1], hidden=sizes[1:-1], activation=meta["activation"], bias=False)
    loss = SoftmaxCrossEntropy(sizes[-1])

    def ours(when: str) -> dict[str, Tensor]:
        """Layer i is our layer i+1: W is alike, and E, [size_i, size_{i+1}], is stored in the shape of W."""
        found = {}
        for letter, i, array in _moment(arrays, when):
            found[f"{letter}{int(i) + 1}"] = _tensor(array.T if letter == "E" else array)
        return found

    return Run(
        meta["steps"],
        net,
        LRAE(beta=meta["beta"], gamma=meta["gamma"], difference="plain"),
        loss,
        partial({"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[meta["optimizer"]], lr=meta["lr"]),
        {},
        _tensor(arrays["x"]),
        _targets(loss, arrays["y"]),
        ours,
        logits=_tensor(arrays["logits"]),
    )


def _read_mdfa(meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Run:
    convolutional = meta["kind"] == "conv"
    outputs = meta["output_dim"]
    loss = SigmoidCrossEntropy(2) if outputs == 1 else SoftmaxCrossEntropy(outputs)
    if convolutional:
        size, filters = meta["input_dim"], meta["layer_dims"]
        in_shape = (meta["input_channels"], size, size)
        net = allconv(in_shape, outputs, filters=filters, activation=meta["activation"])
    else:
        net = mlp((meta["input_dim"],), outputs, hidden=meta["layer_dims"], activation=meta["activation"])
    direct = meta["rule"] in ("dfa", "mdfa")

    def ours(when: str) -> dict[str, Tensor]:
        """Layer i is our layer i+1, and `out` is layer L."""
        found = {}
        for letter, i, array in _moment(arrays, when):
            l = net.L if i == "out" else int(i) + 1
            if letter == "b":
                t = array
            elif letter == "B" and direct:  # [outputs, units]
                t = _nchw_columns(array, net.shapes[l]).T
            elif array.ndim == 4:  # HWIO
                t = array.transpose(3, 2, 0, 1)
            else:  # [in, out], but FA's B is [out, in]
                t = _nchw_columns(array if letter == "B" else array.T, net.shapes[l - 1])
            found[f"{letter}{l}"] = _tensor(t)
        if meta["rule"] == "fa":
            found.pop("B1", None)  # drawn there, but no error goes below layer 1
        return found

    summed = convolutional or meta["rule"] == "bp"
    x = arrays["x"].transpose(0, 1, 4, 2, 3) if convolutional else arrays["x"]  # NHWC
    return Run(
        meta["steps"],
        net,
        RULES[meta["rule"]],
        loss,
        partial({"sgd": torch.optim.SGD, "rmsprop": TFRMSprop}[meta["optimizer"]], lr=meta["learning_rate"]),
        {"update": "sum" if summed else "mean", "l2": meta["l2_coeff"]},
        _tensor(x),
        _targets(loss, arrays["y"]),
        ours,
        losses=_tensor(arrays["loss"]),
    )


def _moment(arrays: Mapping[str, np.ndarray], when: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Letter, layer and array of each weight recorded `when`: `W_out_init` is `W`, `out`, and `E3_init` `E`, `3`."""
    for name, array in arrays.items():
        if name.endswith(f"_{when}"):
            key = name.removesuffix(f"_{when}")
            yield key[0], key[1:].removeprefix("_"), array


def _nchw_columns(matrix: np.ndarray, shape: Shape) -> np.ndarray:
    """The columns of (rows, units), units flattened as HWC, in the order of CHW; `shape` is ours, (C, H, W)."""
    if len(shape) == 1:
        return matrix
    channels, height, width = shape
    return matrix.reshape(-1, height, width, channels).transpose(0, 3, 1, 2).reshape(len(matrix), -1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _targets(loss: Loss, y: np.ndarray) -> Tensor:
    labels = torch.from_numpy(y).long()
    return loss.target(labels.flatten(), torch.float32).unflatten(0, labels.shape)


def _assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor | None], atol: float = 1e-6) -> None:
    for name, tensor in expected.items():
        if tensor is not None:
            message = partial("{}: {}".format, name)
            torch.testing.assert_close(actual[name].view_as(tensor), tensor, rtol=1e-4, atol=atol, msg=message)


# AdamW's first steps are about lr, 1e-3, times the sign of the gradient, so that rounding moves a weight whose gradient
# is all but zero: another processor's a little; that of our tanh, whose last bit may be another, and that of
# subtracting, which exact differences do without, more (2 of 320 weights).
BY_ROUNDING = {"torch": 2e-5, "own": 2e-4, "exact": 2e-4}


@pytest.fixture(params=["torch", pytest.param("own", marks=own_kernels)])
def computed_by(request: pytest.FixtureRequest) -> str:
    """Whose kernels compute."""
    kernels.use(request.param == "own")
    return request.param


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_original_programs_run(path: Path, learner: Callable[..., Any], computed_by: str) -> None:
    _follow(_read(path), learner, BY_ROUNDING[computed_by] if path.stem == "lra_e_torch_adamw" else 1e-6)


@pytest.mark.usefixtures("computed_by")
@pytest.mark.parametrize("path", [path for path in RUNS if "lra_e" in path.stem], ids=lambda path: path.stem)
def test_lra_e_with_exact_differences_runs_as_the_original_program(path: Path, learner: Callable[..., Any]) -> None:
    run = _read(path)
    assert isinstance(run.rule, LRAE)
    run = run._replace(rule=replace(run.rule, difference="exact"))
    _follow(run, learner, BY_ROUNDING["exact"] if path.stem == "lra_e_torch_adamw" else 1e-6)


def _follow(run: Run, learner: Callable[..., Any], atol: float) -> None:
    """Asserts that the learner does what was recorded, from the first step's weights on to within `atol`."""
    trained = learner(run.net, run.rule, run.loss, run.arrays("init"), run.optimizer, **run.options)
    scores = []
    for step, (x, y) in enumerate(zip(run.x, run.y, strict=True), 1):
        (z,) = trained.step(x.unsqueeze(0), y.unsqueeze(0))
        scores.append((run.loss.value(z, y).mean(), z))
        if step == 1:
            trains = {name for name, p in trained.w.items() if p.grad is not None}
            assert trains == run.arrays("grad_step1").keys()
            _assert_same({name: trained.w[name].grad for name in trains}, run.arrays("grad_step1"))
            _assert_same(trained.w, run.arrays("after1"), atol)
    assert len(scores) == run.steps
    losses, logits = (torch.stack(s) for s in zip(*scores, strict=True))
    _assert_same({"loss": losses, "logits": logits}, {"loss": run.losses, "logits": run.logits}, atol)
    _assert_same(trained.w, run.arrays(f"after{run.steps}"), atol)


def test_all_runs_are_there() -> None:
    assert len(RUNS) == 15
