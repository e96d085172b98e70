"""This program's own kernels, against torch's in float64, and on machines that can't build them."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, interrupt, started, train
from torch import Tensor

import nobackprop
from nobackprop.core import optimizers
from nobackprop.mistakes import Mistake
from nobackprop.training import kernels

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or torch.backends.cpu.get_cpu_capability() not in kernels.INSTRUCTIONS,
    reason="no g++ here, or another kind of processor",
)


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


@pytest.mark.usefixtures("own")
def test_what_the_kernels_do_not_know_is_left_to_torch() -> None:
    """Other types, factors, empty matrices, and sizes that do not fit; and derivatives are those of torch."""
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    torch.testing.assert_close(a.double() @ b.double(), a.double().matmul(b.double()), rtol=0, atol=0)
    assert torch.equal(torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64), torch.full((2, 2), 3))
    torch.testing.assert_close(torch.addmm(torch.ones(5), a, b, beta=2, alpha=3), 2 + 3 * (a @ b))
    torch.testing.assert_close(torch.addmm(torch.ones(3, 5), a, b), 1 + a @ b)
    assert torch.equal(torch.ones(2, 0) @ torch.ones(0, 3), torch.zeros(2, 3))
    square = torch.randn(6, 6)
    product = square @ square
    assert torch.equal(torch.mm(square, square, out=square), product)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(3x4 and 3x4\)"):
        _ = a @ a
    inputs = a.double().requires_grad_(), b.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: (a @ b).tanh(), inputs)


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


FAILING = "#!/bin/sh\necho 'kernels.cpp:9:10: fatal error: ATen/Parallel.h: No such file' >&2\nexit 1\n"


def test_without_a_compiler_torchs_are_used(
    unbuilt: Callable[[str], None], config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    unbuilt("")
    (record,) = train(config("seeds=[0]", "max_steps=2"))
    assert not record.machine.kernels
    assert not caplog.records
    with pytest.raises(Mistake, match=r"kernels is true, and none can be built here \(.*g\+\+.*\): mend"):
        train(config("seeds=[1]", "max_steps=2", "kernels=true"))


def test_a_compiler_that_fails_is_told(unbuilt: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    unbuilt(FAILING)
    with caplog.at_level(logging.WARNING):
        kernels.use(None)
    assert not kernels.used()
    assert "since this program's can't be built (kernels.cpp:9:10: fatal error: ATen/Parallel.h" in caplog.text
    with pytest.raises(Mistake, match=r"ATen/Parallel\.h: No such file"):
        kernels.use(True)


def test_they_are_built_once(unbuilt: Callable[[str], None], tmp_path: Path) -> None:
    """By the first process; what a compiler would make is at hand here."""
    kernels.use(True)
    (library, *_) = kernels.user_cache().glob("kernels-*.so")
    unbuilt(f'#!/bin/sh\necho >>{tmp_path}/calls\nfor out; do :; done\ncp {library} "$out"\n')
    code = "from nobackprop.training import kernels; kernels.use(True); assert kernels.used()"
    for _ in range(2):
        ended = started("-c", code, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "calls").read_text().count("\n") == 1


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
    assert (exact.machine.kernels, other.machine.kernels) == (False, True)


def test_a_call_from_python_leaves_torchs_in_place(tmp_path: Path) -> None:
    kernels.use(False)
    nobackprop.train(rule="bp", max_steps=2, logger="none", paths={"runs": str(tmp_path)})
    assert not kernels.used()
