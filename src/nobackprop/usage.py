"""What `nobackprop --help` shows: two screens, made from the comments of conf/train.yaml and the files beside it."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from nobackprop.composing import compose, first, options
from nobackprop.places import CONF

WIDTH, COLUMN, INDENT = 100, 23, 6

HEAD = "nobackprop [group=choice] [key=value] [option] trains a net. Groups, each with its default choice:"
TAIL = """\
Options: --dry-run, --multirun, --cfg job (the whole config), --version, --hydra-help (all others)
  nobackprop --multirun rule=bp,fa,dfa --dry-run; nobackprop rule=dtp --help   # the keys of dtp
Read on: docs/tutorial.md, docs/how_to/ (sweeps, nets, ...), CONTRIBUTING.md (a rule of your own)
"""


def text(overrides: Sequence[str], folders: Sequence[Path] = (CONF,)) -> str:
    """The help. With choices of groups among the overrides, it is the help on the keys of these choices.

    `folders` are those of the configs. Raises what Hydra raises for overrides that can't be composed.
    """
    overrides = [first(override) for override in OverridesParser.create().parse_overrides(list(overrides))]
    parsed = OverridesParser.create().parse_overrides(overrides)
    if chosen := {o.key_or_group: o.value() for o in parsed if (CONF / o.key_or_group).is_dir()}:
        return "\n".join(_choices(overrides, folders, chosen))
    groups, keys = _commented((CONF / "train.yaml").read_text())
    lines = [HEAD]
    for group, (choice, comment) in groups.items():
        names = ", ".join(_short(options(group.lstrip("+"), folders)))
        lines += _row(f"{group}={choice}", f"{comment}: {names}")
    lines.append("Keys, each with its default:")
    for key, (value, comment) in keys.items():
        lines += _row(f"{key}={value}", comment)
    return "\n".join(lines) + "\n" + TAIL


Commented = dict[str, tuple[str, str]]  # a group or key: its value, and the comment behind it


def _commented(yaml: str) -> tuple[Commented, Commented]:
    """The groups and keys of conf/train.yaml in its order, without Hydra's own."""
    groups, keys, within = {}, {}, ""
    for line in yaml.partition("\nhydra:")[0].splitlines():
        if group := re.fullmatch(r"  (?:- (?:optional )?|# )(\+?\w+): (.*?)  +# (.*)", line):
            groups[group[1]] = ("..." if "$" in group[2] else group[2], group[3])
        elif key := re.fullmatch(r"( *)(\w+):(?: +(.*?))?(?: +# (.*))?", line):
            if not key[1]:
                within = f"{key[2]}."
            if key[3]:
                keys[within * bool(key[1]) + key[2]] = (_default(key[3]), key[4] or "")
    return groups, keys


def _default(value: str) -> str:
    """The default value, without the variable of the environment that may replace it."""
    return re.sub(r"\$\{oc\.env:\w+,(.*)\}", r"\1", value)


def _row(left: str, right: str) -> list[str]:
    start = f"  {left}".ljust(COLUMN - 1) + " "
    return wrap(start + right, WIDTH, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False)


def _short(names: Sequence[str]) -> Iterator[str]:
    """Names; of several in one folder how many there are, as in mdfa/(6)."""
    within = defaultdict(list)
    for name in names:
        folder, _, own = name.partition("/") if "/" in name else ("", "", name)
        within[folder].append(own)
    yield from within.pop("", [])
    for folder, own in within.items():
        yield f"{folder}/{own[0] if len(own) == 1 else f'({len(own)})'}"


def _choices(overrides: Sequence[str], folders: Sequence[Path], chosen: Mapping[str, object]) -> Iterator[str]:
    """The first comment of each chosen file, and the keys that it sets."""
    cfg, _ = compose(overrides, folders)
    for group, choice in chosen.items():
        (path, *_) = [path for f in folders if (path := f / group / f"{choice}.yaml").exists()]
        comments = [line for line in path.read_text().splitlines() if re.match("#(?! @package)", line)]
        node = OmegaConf.to_yaml(cfg[group]) if group in cfg else path.read_text()
        keys = [f"  {line}" for line in node.splitlines() if not line.startswith(("#", "_"))]
        yield "\n".join([f"{group}={choice}", *comments, *keys, ""])
