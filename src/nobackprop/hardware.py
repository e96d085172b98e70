"""What this machine grants, and what torch is told about it before it trains."""

import ctypes
import importlib.util
import os
import shutil
import sys

import torch

from nobackprop.streams import stream

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def cores() -> int:
    """The cores granted to this process: by affinity, a container's quota, SLURM, or LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # here, since a run of one seed does not ask

    if "SLURM_JOB_ID" in os.environ:
        return min(cpu_count(), int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
    return cpu_count()


def prepare(device: torch.device) -> None:
    """Chooses how this process computes matrix products and keeps memory, once for all that it trains."""
    choose_matmul(device)
    if device.type == "cpu":
        keep_freed_memory()


def choose_matmul(device: torch.device, tolerance: float = 2e-6) -> None:
    """Sends a CPU's float32 matrix products to oneDNN, where that is as accurate as torch's default, MKL.

    MKL runs at half the speed on AMD's processors. torch's name for oneDNN is "medium", under which some processors
    compute in bf16: hence the test against float64. The choice is in the record. On a GPU float32 means float32.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
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


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler it needs: one for C++ on a CPU, Triton on a GPU."""
    if device.type == "cpu":
        return any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))
    return importlib.util.find_spec("triton") is not None
