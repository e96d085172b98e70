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

from hydra.utils import get_object

from nobackprop.places import PACKAGE
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

# Packages of which a record says the version or the commit.
OURS = ("nobackprop", "torch", "pytorch_lightning")

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

    It is this program's commit, and a checksum of the files from elsewhere that the config's targets are in.
    """
    own = sorted({_source(get_object(target)) for target in _targets(config)} - {""})
    return code(*source_state()) + (OWN + sha256("".join(own).encode()).hexdigest()[:8] if own else "")


def _targets(tree: Any) -> Iterator[str]:
    """All that a config names by `_target_`, but for what OURS hold."""
    for key, node in tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ():
        if key == "_target_" and node.partition(".")[0] not in OURS:
            yield node
        yield from _targets(node)


@cache
def _source(target: Any) -> str:
    """A checksum of the file that a target is in, when this was first asked: it was imported, and may be edited since.

    It is empty for what is in no file.
    """
    file = Path(str(getattr(sys.modules.get(target.__module__), "__file__", None)))
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


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
