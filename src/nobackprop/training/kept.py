"""`config.yaml` in a run's folder: its settings, from which one command makes the same run again."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from nobackprop.records import provenance
from nobackprop.records.files import write_atomically
from nobackprop.training.config import Settings

ELSEWHERE = {"paths", "launcher", "logger", "dry_run"}  # they say where, not what; the new command has its own

NUMERIC = {*"+-.0123456789"}  # a number begins with one of them

HEAD = """\
# What was run here, but for paths, logger and launcher. This makes the same run again, with any other key=value:
#   nobackprop --config-dir THIS_FOLDER --config-name config
# It was: {command}
"""


class _Quoting(yaml.SafeDumper):
    """Writes plain data in a third of the time of OmegaConf, which reads more texts as numbers than YAML does: 1e5."""


_Quoting.add_representer(
    str, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", text, "'" if text[:1] in NUMERIC else None)
)


def write(settings: Settings) -> None:
    """Writes the settings of a run into its folder, in place of those from before.

    Folders below paths.data are written relative to it. Other places on this machine, and texts that may be a secret,
    are written as `???`, and Hydra asks for them.
    """
    content = settings.model_dump(exclude=ELSEWHERE)
    source = content["dataset"]["source"]
    source |= {key: _place(str(source[key]), settings.paths.data) for key in ("root", "cache") if key in source}
    groups = [key for key, value in content.items() if isinstance(value, dict)]
    defaults = ["train", "_self_", *({f"override {group}": None} for group in groups), {"override tuned": "none"}]
    text = yaml.dump({"defaults": defaults} | _public(content), Dumper=_Quoting, sort_keys=False, allow_unicode=True)
    told = HEAD.format(command=provenance.command()) + text
    with suppress(OSError):  # such as a full disk; the record has all that identifies the run
        write_atomically(settings.folder / "config.yaml", told.encode())


def _place(path: str, data: str) -> str:
    """A folder, written relative to paths.data."""
    if not Path(path).is_relative_to(data):
        return "???"
    return "/".join(["${paths.data}", *Path(path).relative_to(data).parts])


def _public(tree: dict[str, Any]) -> dict[str, Any]:
    """The same settings without texts that name a place on this machine, or may hold a secret."""

    def public(key: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return _public(value)
        if isinstance(value, list):
            return [public(key, element) for element in value]
        return "???" if isinstance(value, str) and provenance.HIDDEN.search(f"{key}={value}") else value

    return {key: public(key, value) for key, value in tree.items()}
