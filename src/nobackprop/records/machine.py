"""The machine that trains: what a record says of it, and which of its cores are granted."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # takes seconds to import, and reading records does not need it
    import torch

from nobackprop.records.record import Machine


def machine(
    device: "torch.device", compiled: bool = False, devices: int = 1, kernels: bool | Literal["in part"] = False
) -> Machine:
    """This machine, as it trains on that device, which is one of `devices`, with this program's kernels or without."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=platform.system(),
        processor=processor(),
        cores=cores,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        matmul=torch.get_float32_matmul_precision(),
        compiled=compiled,
        devices=devices,
        kernels=kernels,
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """How many cores this process may use, by its affinity, a container's quota, SLURM, or LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # here, since a run of one seed does not ask

    if "SLURM_JOB_ID" in os.environ:
        return min(cpu_count(), int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
    return cpu_count()
