"""What torch is told about a machine."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Config, train

from nobackprop.data.sources import Digits
from nobackprop.mistakes import Mistake
from nobackprop.training import hardware


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc here")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class Libc:
        def mallopt(self, option: int, value: int) -> int:
            asked[option] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    hardware.prepare(torch.device("cpu"))
    assert asked == {-1: 2**30, -3: 2**30}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


@pytest.mark.parametrize(("processor", "library"), [("Intel(R) Xeon(R)", "highest"), ("AMD EPYC", "medium")])
def test_which_library_multiplies_matrices(monkeypatch: pytest.MonkeyPatch, processor: str, library: str) -> None:
    monkeypatch.setattr(hardware, "processor", lambda: processor)
    hardware.choose_matmul(torch.device("cpu"), tolerance=1)
    assert torch.get_float32_matmul_precision() == library


def test_matrix_products_stay_as_accurate_as_float32() -> None:
    hardware.choose_matmul(torch.device("cpu"))
    a, b = torch.rand(300, 300), torch.rand(300, 300)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=1e-5, atol=0)
    hardware.choose_matmul(torch.device("cpu"), tolerance=0)
    assert torch.get_float32_matmul_precision() == "highest"


GCC = """C++ compile error

Command:
g++ /tmp/a b/c.cpp -o /tmp/a b/c.so

Output:
In file included from /tmp/a:
/tmp/a:5:10: fatal error: Python.h: No such file or directory
compilation terminated.
"""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Python's headers."""

    def fail(*_: Any) -> Any:
        raise RuntimeError(GCC)

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)


@pytest.mark.usefixtures("broken")
def test_compiling_that_is_asked_for_and_impossible_is_a_mistake(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "load", lambda _: pytest.fail("data was loaded"))
    told = r"compile is true, and torch's compiler does not work here \(.*Python\.h: No such file or directory\): mend"
    with pytest.raises(Mistake, match=told):
        train(config("compile=true"))


def test_the_record_says_that_a_rule_was_compiled(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert train(config("max_steps=2", "seeds=[0]", "compile=true"))[0].machine.compiled
    assert not train(config("max_steps=3", "seeds=[0]"))[0].machine.compiled


@pytest.mark.slow  # imports torch's compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here that could have another name")
def test_a_compiler_that_torch_does_not_find_or_cannot_use(tmp_path: Path) -> None:
    """Only `c++` in the path; a compiler that fails; a cache whose path has a space; one that can't be written."""
    gcc = shutil.which("g++")
    assert gcc is not None
    for name in ("other_name", "failing", "fine"):
        (tmp_path / name).mkdir()
    (tmp_path / "other_name" / "c++").symlink_to(gcc)
    (tmp_path / "failing" / "g++").write_text("#!/bin/sh\necho 'Python.h: fatal error: not here' >&2\nexit 1\n")
    (tmp_path / "failing" / "g++").chmod(0o755)
    path = os.environ["PATH"]
    (tmp_path / "file").touch()
    machines = {
        "other_name": (str(tmp_path / "other_name"), tmp_path / "cache1"),
        "failing": (f"{tmp_path}/failing{os.pathsep}{path}", tmp_path / "cache2"),
        "space": (path, tmp_path / "a cache"),
        "unwritable": (path, tmp_path / "file" / "cache"),
    }
    for name, (path, cache) in machines.items():
        environment = {**os.environ, "PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        options = [*SMALL, "rule=bp", "max_steps=3", "compile=true", f"paths.runs={tmp_path}/{name}"]
        ended = subprocess.run(
            [sys.executable, "-m", "nobackprop", *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in ended.stderr, name
        assert ended.returncode == 1
        assert "nobackprop: compile is true, and torch's compiler does not work here (" in ended.stderr
