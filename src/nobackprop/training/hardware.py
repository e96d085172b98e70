"""Which device a run uses, and what torch is told about it before it trains."""

import ctypes
import sys

import torch

from nobackprop.core.random import stream
from nobackprop.mistakes import Mistake
from nobackprop.records.machine import processor
from nobackprop.training import kernels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

# What torch.compile raises: its own, all of them RuntimeErrors, and those of a cache folder or a missing package.
COMPILER_ERRORS = (RuntimeError, OSError, ImportError)


def prepare(device: torch.device, own_kernels: bool | None = None) -> None:
    """Chooses this process's kernels and how it keeps memory, once for all that it trains."""
    kernels.use(False)  # while torch's are tested
    choose_matmul(device)
    if device.type == "cpu":
        kernels.use(own_kernels)
        keep_freed_memory()


def choose_matmul(device: torch.device, tolerance: float = 2e-6) -> None:
    """Sends a CPU's float32 matrix products to oneDNN, where that is as accurate as torch's default, MKL.

    MKL runs at half the speed on AMD's processors, and on Intel's takes a third less time for small products. torch's
    name for oneDNN is "medium", under which some processors compute in bf16: hence the test against float64. The choice
    is in the record. On a GPU float32 means float32.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        return
    if "Intel" in processor():
        torch.set_float32_matmul_precision("highest")
        return
    a, b = (torch.randn(256, 256, generator=stream(0, "matmul", name)) for name in "ab")
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    if ((a @ b - exact).abs().max() / exact.abs().max()).item() > tolerance:
        torch.set_float32_matmul_precision("highest")


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor: by default it gives feature maps back to the system.

    Each page of a tensor would then be mapped and cleared anew at every step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def on_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` stands for a GPU (of CUDA's): `auto` does where torch finds one.

    Raises Mistake where a GPU is asked for and there is none.
    """
    there = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not there:
        raise Mistake(
            f"trainer.accelerator is {accelerator}, and torch {torch.__version__} finds no GPU here: use cpu, or mend "
            "the driver, or install the torch that is made for this GPU"
        )
    return accelerator != "cpu" and there


def check_gpu(device: torch.device) -> None:
    """Raises Mistake where a GPU that was found can't compute, as one that is too old or taken by another process."""
    try:
        torch.zeros(2, device=device).sum().item()
    except RuntimeError as e:
        raise Mistake(
            f"trainer.accelerator: {device} is there and can't be used ({first_line(e)}): mend that, or use "
            "trainer.accelerator=cpu"
        ) from e


def check_compiler(device: torch.device) -> None:
    """Raises Mistake where torch.compile does not work on this machine: compiles a small function to see."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(2, device=device))
    except COMPILER_ERRORS as e:
        raise Mistake(
            f"compile is true, and torch's compiler does not work here ({first_line(e)}): mend that, or use "
            "compile=false"
        ) from e


def first_line(error: Exception) -> str:
    """What an error says, in a line: of a compiler's output the first line that names an error."""
    lines = str(getattr(error, "inner_exception", error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


def too_little_memory(error: BaseException) -> bool:
    """Whether memory was asked for and not given. torch has no exception of its own for that on a CPU."""
    out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return out or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
