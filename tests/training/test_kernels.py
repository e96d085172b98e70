"""This program's own kernels, against torch's in float64, and on machines that can't build them."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, interrupt, own_kernels, started, train
from torch import Tensor

import nobackprop
from nobackprop.core import optimizers
from nobackprop.mistakes import Mistake
from nobackprop.training import kernels

pytestmark = own_kernels


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processor", lambda: "AMD EPYC")  # where products are replaced, too
    kernels.use(True)
    assert kernels.used()


# Products


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    """Standard normal numbers, which lie in memory as `layout` says."""
    if layout == "turned":
        return torch.randn(columns, rows).mT
    if layout == "apart":
        return torch.randn(2 * rows, 3 * columns)[::2, ::3]
    return torch.randn(rows, columns)


SIZES = [(1, 1, 1), (3, 5, 2), (13, 17, 15), (50, 784, 10), (50, 50, 200), (29, 300, 33), (64, 10, 31), (100, 513, 47)]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layouts", [(a, b) for a in ("rows", "turned", "apart") for b in ("rows", "turned", "apart")])
def test_products(size: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    m, depth, n = size
    a, b, bias = matrix(m, depth, layouts[0]), matrix(depth, n, layouts[1]), torch.randn(n)
    exact = a.double() @ b.double()
    near = {"rtol": 0, "atol": 2e-6 * float(exact.abs().max() + bias.abs().max())}
    torch.testing.assert_close(a @ b, exact.float(), **near)
    torch.testing.assert_close(torch.addmm(bias, a, b), (exact + bias).float(), **near)
    for out in (torch.empty(m, n), torch.empty(n, m).mT, torch.empty(m, 2 * n)[:, :n], torch.empty(m, 2 * n)[:, ::2]):
        torch.testing.assert_close(torch.mm(a, b, out=out), exact.float(), **near)
        torch.testing.assert_close(torch.addmm(bias, a, b, out=out), (exact + bias).float(), **near)


@pytest.mark.usefixtures("own")
def test_products_are_the_same_on_any_number_of_threads() -> None:
    a, b, before = torch.randn(200, 600), torch.randn(600, 330), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(a @ b)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


THREADS = """
import os, torch
from nobackprop.training import kernels
kernels.use(True)
kernels.processor = lambda: "AMD EPYC"
kernels.use(True)
torch.set_num_threads(2)
a, before = torch.randn(800, 800), len(os.listdir("/proc/self/task"))
torch.mm(a, a, out=torch.empty(800, 800))
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_products_use_the_threads_that_there_are(tmp_path: Path) -> None:
    ended = started("-c", THREADS, cwd=tmp_path)
    assert ended.stdout.split() == ["1"], ended.stderr


@pytest.mark.usefixtures("own")
def test_what_the_kernels_do_not_know_is_left_to_torch() -> None:
    """Other types, factors, empty matrices, and sizes that do not fit; and derivatives are those of torch."""
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64), torch.full((2, 2), 3))
    torch.testing.assert_close(torch.addmm(torch.ones(5), a, b, beta=2, alpha=3), 2 + 3 * (a @ b))
    torch.testing.assert_close(torch.addmm(torch.ones(3, 5), a, b), 1 + a @ b)
    assert torch.equal(torch.ones(2, 0) @ torch.ones(0, 3), torch.zeros(2, 3))
    square, bias = torch.randn(40, 40), torch.randn(40)
    product = square @ square
    assert torch.equal(torch.mm(square, square.clone(), out=square), product)
    square[3] = bias
    assert torch.equal(torch.addmm(square[3], product, product, out=square), torch.addmm(bias, product, product))
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.mm(a, b, out=torch.zeros(5).expand(3, 5))
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.tanh(bias[1:], out=bias[:-1])
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x4 and 3x4\)"):
        _ = a @ a
    a.requires_grad_()
    (gradient,) = torch.autograd.grad((a @ b).tanh().sum(), a)
    torch.testing.assert_close(gradient, (1 - (a @ b).tanh() ** 2) @ b.mT)


# tanh


def units(y: Tensor, exact: Tensor) -> float:
    """The largest error, in units in the last place."""
    near = exact.float().abs()
    return float(((y.double() - exact).abs() / (near.nextafter(torch.tensor(torch.inf)) - near)).max())


@pytest.mark.usefixtures("own")
def test_tanh() -> None:
    """Within 1.5 units in the last place, on numbers of each size, and exact where there is nothing between."""
    sizes = torch.arange(0, 0x7F800000, 4001, dtype=torch.int32).view(torch.float32)
    for x in (sizes, -sizes, torch.linspace(-10, 10, 200_001)):
        assert units(torch.tanh(x), torch.tanh(x.double())) < 1.5
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 20.0, -20.0])
    assert torch.equal(torch.tanh(ends).view(torch.int32), torch.tensor([0.0, -0.0, 1, -1, 1, -1]).view(torch.int32))
    assert torch.tanh(torch.tensor(torch.nan)).isnan()


@pytest.mark.usefixtures("own")
def test_tanh_of_any_shape() -> None:
    """Each number is the same wherever it lies, and the result lies as torch's would."""
    x = torch.randn(3, 5, 7)
    y = torch.stack([torch.tanh(number) for number in x.flatten()]).view(3, 5, 7)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.mT,
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:, ::2],
        lambda t: t[:, ::2].permute(2, 0, 1),
        lambda t: t[0, 0, 0],
        lambda t: t[:0],
        lambda t: t.expand(2, 3, 5, 7),
    ]
    for view in views:
        kernels.use(False)
        torchs = torch.tanh(view(x))
        kernels.use(True)
        assert torch.tanh(view(x)).stride() == torchs.stride()
        assert torch.equal(torch.tanh(view(x)), view(y))
        assert torch.equal(torch.tanh(view(x), out=torch.full_like(view(x), torch.nan)), view(y))
        assert torch.equal(view(x).clone().tanh_(), view(y))
    assert torch.equal(torch.tanh(x, out=torch.empty(7, 5, 3).permute(2, 1, 0)), y)
    torch.testing.assert_close(torch.tanh(x.double()), x.double().tanh(), rtol=0, atol=0)


# Max pooling


# The arguments of torch's: size, stride, padding, dilation, and whether windows may be partly outside.
WINDOWS: list[tuple[Any, ...]] = [([2, 2], []), ([3, 3], [1, 1]), ([2, 2], [3, 3])]
TORCHS: list[tuple[Any, ...]] = [
    ([2, 1], [2, 2]),
    ([2, 2], [2, 1]),
    ([2, 2], [2, 2], [1, 1]),
    ([2, 2], [2, 2], [0, 0], [2, 2]),
    ([2, 2], [2, 2], [0, 0], [1, 1], True),
]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("shape", [(3, 2, 28, 28), (130, 16, 10, 10), (2, 1, 40, 33), (5, 7, 9), (1, 1, 3, 3)])
@pytest.mark.parametrize("windows", WINDOWS + TORCHS)
def test_max_pooling(shape: tuple[int, ...], windows: tuple[Any, ...]) -> None:
    """Values and places are torch's to the bit, also of numbers that are equal, infinite or not a number."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()
    x[x == -2] = -torch.inf
    x.view(-1)[::17] = torch.nan
    pool = torch.ops.aten.max_pool2d_with_indices
    for images in (x, x.mT.contiguous().mT, x.double()):
        kernels.use(False)
        torchs = pool(images, *windows)
        kernels.use(True)
        outs = [torch.full_like(t, 7) for t in torchs]
        pool.out(images, *windows, out=outs[0], indices=outs[1])
        for expected, given, into in zip(torchs, pool(images, *windows), outs, strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(into, expected, rtol=0, atol=0, equal_nan=True)
            assert given.stride() == expected.stride()


@pytest.mark.usefixtures("own")
def test_errors_of_max_pooling_are_torchs() -> None:
    x = torch.randn(2, 3, 4, 4)
    wrong = ([5, 5],), ([0, 0],), ([],), ([2, 2, 2],), ([2, 2], [2, 2, 2]), ([2, 2], [2**40, 2**40])
    wrong += ([2, 2], [2, 2], []), ([2, 2], [2, 2], [0, 0], [1, 1, 1])
    for windows in wrong:
        with pytest.raises(RuntimeError):
            torch.ops.aten.max_pool2d_with_indices(x, *windows)
    with pytest.raises(RuntimeError, match="Expected out tensor to have dtype float"):
        torch.ops.aten.max_pool2d_with_indices.out(
            x, [2, 2], out=torch.empty(0, dtype=torch.double), indices=torch.empty(0, dtype=torch.long)
        )


# Adam

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adam with weight decay": (torch.optim.Adam, {"fused": True, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "adamw": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1, "eps": 0.01}),
    "amsgrad": (torch.optim.Adam, {"fused": True, "amsgrad": True}),  # torch's own
    "maximize": (torch.optim.AdamW, {"fused": True, "maximize": True}),
    "rmsprop": (optimizers.RMSprop, {}),
}


def stepped(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Weights of several shapes and layouts after ten steps."""
    numbers = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=numbers) for shape in ((37,), (5, 7), (64, 48), (3, 2, 5, 5))]
    weights[2] = weights[2].mT
    weights = [w.to(dtype).requires_grad_() for w in weights]
    make, options = OPTIMIZERS[name]
    optimizer = make(weights, lr=0.01, **options)  # pyright: ignore[reportCallIssue]
    for _ in range(10):
        for w in weights:
            w.grad = torch.empty_like(w).copy_(torch.randn(w.shape, generator=numbers))
        optimizer.step()
    return [w.detach().float() for w in weights]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_adam(name: str) -> None:
    """Against torch's in float64."""
    torch.testing.assert_close(stepped(name, torch.float32), stepped(name, torch.float64), rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("decay", "gradients"), [(0.0, [1.0, 1e-5]), (0.9, [1.0, 1e-5]), (0.9, [1.0, 3e19, 1.0])])
def test_gradients_that_change_much(decay: float, gradients: list[float]) -> None:
    weights = [torch.ones(20, dtype=dtype).requires_grad_() for dtype in (torch.float32, torch.float64)]
    steppers = [optimizers.RMSprop([w], lr=0.01, decay=decay) for w in weights]
    for gradient in gradients:
        for w, stepper in zip(weights, steppers, strict=True):
            w.grad = torch.full_like(w, gradient)
            stepper.step()
    torch.testing.assert_close(weights[0].double(), weights[1], rtol=1e-4, atol=1e-4)


# Which are used


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`unbuilt(script)`: as on a machine where nothing is built yet, and g++ is that script; "" for none."""

    def with_compiler(script: str) -> None:
        if script:
            (tmp_path / "g++").write_text(script)
            (tmp_path / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) + (f"{os.pathsep}{os.defpath}" if script else ""))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(kernels, "_load", cache(kernels._load.__wrapped__))

    return with_compiler


def test_without_a_compiler_torchs_are_used(
    unbuilt: Callable[[str], None], config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    unbuilt("")
    (record,) = train(config("seeds=[0]", "max_steps=2"))
    assert not record.machine.kernels
    assert not caplog.records
    with pytest.raises(Mistake, match=r"kernels is true, and there are none here \(g\+\+ is not there\): mend"):
        train(config("seeds=[1]", "max_steps=2", "kernels=true"))


FAILING = {
    "an error": (
        "echo 'kernels.cpp:9:10: fatal error: ATen/Parallel.h: not here' >&2; exit 1",
        "fatal error: ATen",
    ),
    "no words that can be read": (r"printf '\377 error: \377' >&2; exit 1", "error: "),
    "nothing": ("exit 1", "returned non-zero exit status 1"),
    "no library": ('for out; do :; done; echo >"$out"', "file too short"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_compiler_that_fails_is_told(
    unbuilt: Callable[[str], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    script, why = FAILING[case]
    unbuilt(f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(kernels, "_loaded", lambda: False)  # by another test
    with caplog.at_level(logging.WARNING):
        kernels.use(None)
        kernels.use(None)  # which does not try again
    assert not kernels.used()
    (_, told) = caplog.messages
    assert "torch's own kernels are used, since this program's can't be built or loaded (" in told
    assert why in told
    with pytest.raises(Mistake, match=re.escape(why)):
        kernels.use(True)


def test_they_are_built_once(unbuilt: Callable[[str], None], tmp_path: Path) -> None:
    """By one process, and again where the file is damaged; what a compiler would make is at hand here."""
    kernels.use(True)
    options = [*kernels.INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()], *kernels.OPTIONS]
    library = kernels._library(options)
    unbuilt(f'#!/bin/sh\necho >>{tmp_path}/calls\nfor out; do :; done\nhead -c -{kernels.END} {library} >"$out"\n')
    code = "from nobackprop.training import kernels; kernels.use(True); assert kernels.used()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, told = process.communicate()
        assert process.returncode == 0, told
    assert (tmp_path / "calls").read_text().count("\n") == 1
    copy = tmp_path / "cache/nobackprop" / library.name
    copy.write_bytes(copy.read_bytes()[:5000])
    assert started("-c", code, cwd=tmp_path).returncode == 0
    assert (tmp_path / "calls").read_text().count("\n") == 2
    assert copy.read_bytes() == library.read_bytes()


def test_a_library_that_was_built_is_used_without_a_compiler(unbuilt: Callable[[str], None], tmp_path: Path) -> None:
    kernels.use(True)
    built = kernels._library([*kernels.INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()], *kernels.OPTIONS])
    unbuilt("")
    (tmp_path / "cache/nobackprop").mkdir(parents=True)
    (tmp_path / "cache/nobackprop" / built.name).write_bytes(built.read_bytes())
    assert started("-c", "from nobackprop.training import kernels; kernels.use(True)", cwd=tmp_path).returncode == 0


def test_the_record_says_which_were_used(config: Config) -> None:
    assert train(config("seeds=[0]", "max_steps=2"))[0].machine.kernels
    assert not train(config("seeds=[1]", "max_steps=2", "kernels=false"))[0].machine.kernels
    assert not kernels.used()


def test_a_run_goes_on_with_the_kernels_that_it_began_with(config: Config) -> None:
    """Unless the user says others."""
    interrupt(config("seeds=[0]", "kernels=false"))
    told = r"000000261\.ckpt was trained with kernels=false, and here kernels=true is the default.*say kernels=false to"
    with pytest.raises(Mistake, match=told):
        train(config("seeds=[0]"))
    (exact,) = train(config("seeds=[0]", "kernels=false"))
    interrupt(config("seeds=[1]", "kernels=false"))
    (other,) = train(config("seeds=[1]", "kernels=true"))
    assert (exact.machine.kernels, other.machine.kernels) == (False, "in part")


def test_a_call_from_python_leaves_torchs_in_place(tmp_path: Path) -> None:
    kernels.use(False)
    nobackprop.train(rule="bp", max_steps=2, logger="none", paths={"runs": str(tmp_path)})
    assert not kernels.used()
