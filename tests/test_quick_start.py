"""What the command's process does without, and that all of it is there when it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import started

HEAVY = ["scipy", "torchvision", "matplotlib", "sympy", "pandas", "sklearn", "torch._dynamo.utils"]


def in_the_command(code: str, folder: Path) -> str:
    """What code prints where the command has started and imported what trains."""
    ended = started("-c", code, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_lightning_waits_until_it_is_asked_for() -> None:
    code = "import sys\nfrom nobackprop import quick_start\nquick_start.start()\n"
    code += "loaded = [name for name in sys.modules if 'lightning' in name or 'torchmetrics' in name]\n"
    code += "import lightning_fabric, torchmetrics, pytorch_lightning\n"
    code += f"print(loaded, {{*sys.modules}} & {{*{HEAVY}}})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[] set()"


def test_a_run_needs_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys, torch
from nobackprop.data.sources import Digits
import nobackprop.training.run
Digits().load()
p = torch.nn.Parameter(torch.ones(3), requires_grad=False)
p.grad = torch.ones(3)
optimizer = torch.optim.AdamW([p])
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print({{*sys.modules}} & {{*{HEAVY}}})"""
    assert in_the_command(code, tmp_path) == "set()"


@pytest.mark.parametrize(
    "asks",
    [
        "torch.compile(torch.sin, backend='eager')(torch.zeros(2)); utils = torch._dynamo.utils",
        "import torch._dynamo.utils as utils",
        "import torchvision, scipy.signal, matplotlib; from torch._dynamo import utils",
    ],
    ids=["torch.compile", "one of its modules", "torchvision"],
)
def test_the_compiler_comes_when_it_is_asked_for(tmp_path: Path, asks: str) -> None:
    code = (
        "assert utils is sys.modules['torch._dynamo.utils'] is torch._dynamo.utils; print(type(torch._dynamo).__name__)"
    )
    assert in_the_command(f"import sys, torch\n{asks}\n{code}", tmp_path) == "module"


def test_who_has_lightning_already_keeps_the_compiler() -> None:
    code = "import pytorch_lightning\nfrom nobackprop import quick_start\nquick_start.start()\nimport sys\n"
    code += "print('torch._dynamo.utils' in sys.modules, 'torchvision' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "True True"
