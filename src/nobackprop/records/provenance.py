"""Where a record comes from: the command, the commit and the versions that made it."""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nobackprop.places import PACKAGE
from nobackprop.records.identity import current_name
from nobackprop.records.record import EDITS, OWN, Record, code

# Options whose value, in the same argument or the next, names a place on this machine.
LOCAL_OPTIONS = ("--runs", "--config-dir", "--config-path", "-cd", "-cp")

# Settings that change no result, and name places or people. A choice, such as logger=none, may be recorded.
PRIVATE = re.compile(r"[+~]*((paths|logger|launcher|hydra)(=\{|\.(?!sweeper\.))|(.*\.)?(root|cache)=)")

# Patterns of places and secrets anywhere in an argument: an absolute path, an address, a key of W&B.
HIDDEN = re.compile(
    r"(^|[=,:[({\s'\"])~?/|://|\b(root|cache):|(api_?key|token|secret|passw\w*|credential)\w*[=:]|\b[0-9a-f]{40}\b",
    re.IGNORECASE,
)

# The folders, besides this package, that can change a result.
SOURCE = (":/src/hydra_plugins", ":/conf", ":/requirements.lock", ":/pyproject.toml")


def command() -> str:
    """The command of this process, without arguments that name a place on this machine or may hold a secret."""
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    kept = [text for before, text in pairs if not _is_private(text) and before not in LOCAL_OPTIONS]
    followed = zip(kept, [*kept[1:], "--"], strict=False)
    kept = [text for text, after in followed if text != "--set" or not after.startswith("--")]
    name = Path(sys.argv[0]).name
    return shlex.join(["nobackprop" if name == "__main__.py" else name, *kept])


def _is_private(argument: str) -> bool:
    """Whether a command's argument must not be recorded."""
    local = argument.partition("=")[0] in LOCAL_OPTIONS
    return local or bool(HIDDEN.search(argument) or PRIVATE.match(argument.removeprefix("--set=")))


@cache
def source_state() -> tuple[str | None, bool | None]:
    """The commit of this package's checkout, and whether files that can change a result are edited there.

    Both are None outside a checkout. A sweep's copy of the package has them in a file.
    """
    if (copied := PACKAGE / "source.json").exists():
        state = json.loads(copied.read_text())
        return state["commit"], state["dirty"]

    def git(*args: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(PACKAGE), *args], capture_output=True, text=True, check=True, timeout=30
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a package inside somebody else's repository is not ours
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", *SOURCE))
    except (OSError, subprocess.SubprocessError):
        return None, None


def code_of(config: Mapping[str, Any]) -> str:
    """The code that trains a config now, as an entry of `Record.commits`.

    It is this program's commit, and a checksum of the files of those modules from elsewhere that the config's targets
    are in.
    """
    modules = sorted({_module(target) for target in _targets(config)} - {""})
    files = [Path(str(getattr(sys.modules[name], "__file__", None))) for name in modules]
    own = [file.read_bytes() for file in files if file.is_file()]
    return code(*source_state()) + (OWN + sha256(b"".join(own)).hexdigest()[:8] if own else "")


def _targets(tree: Any) -> Iterator[str]:
    """All that a config names by `_target_`."""
    for key, node in tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ():
        if key == "_target_":
            yield current_name(node)
        yield from _targets(node)


def _module(target: str) -> str:
    """The module that a target is in; empty for those of this package and of the libraries in `versions`."""
    while target and target not in sys.modules:
        target = target.rpartition(".")[0]
    return "" if target.partition(".")[0] in {"nobackprop", "torch", "pytorch_lightning"} else target


def other_code(records: Iterable[Record]) -> str:
    """The other code that made records, such as `commit 1a2b3c4 with edits`; empty if this code made all of them.

    A record's key is its config and seed, and says nothing of the code. Edits can't be compared, so they always count.
    """
    pairs = ((code, code_of(r.config)) for r in records for code in r.code)
    return ", ".join(sorted({_told(then, now) for then, now in pairs if then != now or EDITS in then}))


def _told(then: str, now: str) -> str:
    program, _, own = then.partition(OWN)
    commit = program.removesuffix(EDITS)
    told = "no commit" if program == "unknown" else f"commit {commit[:7]}{' with edits' if program != commit else ''}"
    return told if own == now.partition(OWN)[2] else f"{told} and your own code as it was then"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    packages = ("nobackprop", "torch", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
