"""This program's own kernels for a CPU, `kernels.cpp`: products, tanh and Adam's step in float32, for torch's.

They are built once for each kind of processor and version of torch, where there is GCC's compiler, and kept in the
user's cache.
"""

import logging
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import torch

from nobackprop.mistakes import Mistake
from nobackprop.records.files import user_cache, write_atomically
from nobackprop.records.machine import processor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
INSTRUCTIONS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512dq", "-mfma"]}  # by torch's names


def use(wanted: bool | None) -> None:
    """Has this process compute with these kernels, or with torch's where `wanted` is false.

    With None they are used where they can be had. On Intel's processors MKL goes on to multiply.
    Raises Mistake where they are wanted and can't be had.
    """
    own = wanted is not False and _had(needed=wanted is True)
    if _loaded():
        torch.ops.nobackprop.use(own and "Intel" not in processor(), own)


def used() -> bool:
    """Whether this process computes with these kernels."""
    return _loaded() and torch.ops.nobackprop.used()


def _loaded() -> bool:
    return _load.cache_info().currsize > 0


def _had(needed: bool) -> bool:
    """Whether they are loaded. Raises Mistake where they can't be and are needed."""
    try:
        _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        told = (getattr(e, "stderr", None) or str(e)).strip()
        why = next((line for line in told.splitlines() if "error: " in line), told)
        if needed:
            raise Mistake(
                f"kernels is true, and none can be built here ({why}): mend that, or use kernels=false"
            ) from e
        if not isinstance(e, FileNotFoundError):  # there is a compiler
            logger.warning(f"torch's own kernels are used, since this program's can't be built ({why})")
        return False
    return True


@cache
def _load() -> None:
    """Loads the library, which is built if it is not there. Raises OSError or SubprocessError."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        raise FileNotFoundError(f"for a processor with {capability} there are none")
    key = sha256(f"{SOURCE.read_text()} {torch.__version__} {capability}".encode()).hexdigest()[:16]
    library = user_cache() / f"kernels-{key}.so"
    if not library.is_file():
        write_atomically(library, _built(INSTRUCTIONS[capability]))
    torch.ops.load_library(library)


def _built(instructions: list[str]) -> bytes:
    if not which("g++"):
        raise FileNotFoundError("g++ is not there")
    logger.warning("building kernels for this kind of processor, once: some seconds")
    home = Path(torch.__file__).parent
    headers = (f"-isystem{home / folder}" for folder in ("include", "include/torch/csrc/api/include"))
    with TemporaryDirectory() as folder:
        built = Path(folder, "kernels.so")
        command = ["g++", "-std=c++20", "-O3", "-fno-math-errno", *instructions, "-fPIC", "-shared", *headers, SOURCE]
        command += [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-o", built]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        return built.read_bytes()
