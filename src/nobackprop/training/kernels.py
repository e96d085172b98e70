"""This program's own kernels for a CPU, `kernels.cpp`: products, tanh, max pooling and Adam's step in float32.

They are built once for each kind of processor and version of torch, where there is GCC's compiler, and kept in the
user's cache. There they are found without a compiler, too.
"""

import logging
import os
import subprocess
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import torch

from nobackprop.data.checksums import locked
from nobackprop.mistakes import Mistake
from nobackprop.records.files import checksum, user_cache, write_atomically
from nobackprop.records.machine import processor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ["-std=c++20", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"]
END = 16  # bytes of a checksum, behind what the linker reads
INSTRUCTIONS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512dq", "-mfma"]}  # by torch's names


def use(wanted: bool | None) -> None:
    """Has this process compute with these kernels, or with torch's where `wanted` is false.

    With None they are used where they can be had. On Intel's processors MKL goes on to multiply. Raises Mistake where
    they are wanted and can't be had.
    """
    missing = _load() if wanted is not False else "not wanted"
    if wanted and missing:
        raise Mistake(f"kernels is true, and there are none here ({missing}): mend that, or use kernels=false")
    if _loaded():
        torch.ops.nobackprop.use(not missing and "Intel" not in processor(), not missing)


def used() -> bool:
    """Whether this process computes with these kernels."""
    return _loaded() and torch.ops.nobackprop.used()


def _loaded() -> bool:
    return hasattr(torch.ops.nobackprop, "used")


@cache
def _load() -> str | None:
    """Loads the library, which is built if it is not there or damaged. Gives why it can't be, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        return f"torch names this processor's instructions {capability}, and they are for {', '.join(INSTRUCTIONS)}"
    options = [*INSTRUCTIONS[capability], *OPTIONS]
    try:
        library = _library(options)
        if not _whole(library):
            if not which("g++"):
                return "g++ is not there"
            library.parent.mkdir(parents=True, exist_ok=True)
            with locked(library.with_suffix(".lock"), "building kernels"):
                if not _whole(library):  # another process may have built it meanwhile
                    write_atomically(library, _built(options))
        if not _loaded():
            torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        told = getattr(e, "stderr", None) or str(e.__cause__ or e)
        told = told.decode(errors="replace") if isinstance(told, bytes) else told
        why = next((line for line in told.splitlines() if "error: " in line), told.strip())
        logger.warning(f"torch's own kernels are used, since this program's can't be built or loaded ({why})")
        return why
    return None


def _library(options: list[str]) -> Path:
    made_of = f"{SOURCE.read_text()} {torch.__version__} {options}"
    return user_cache() / f"kernels-{checksum(made_of.encode())}.so"


def _whole(library: Path) -> bool:
    """Whether the library is there and ends with the checksum of what comes before it."""
    content = library.read_bytes() if library.is_file() else b""
    return content[-END:] == checksum(content[:-END]).encode()


def _built(options: list[str]) -> bytes:
    logger.warning("building kernels for this kind of processor, once: some seconds")
    home = Path(torch.__file__).parent
    headers = [f"-isystem{home / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    with TemporaryDirectory() as folder:
        built = Path(folder, "kernels.so")
        command = ["g++", *options, *headers, SOURCE, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-o", built]
        english = os.environ | {"LC_ALL": "C"}
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300, env=english)
        content = built.read_bytes()
    return content + checksum(content).encode()
