"""Turns what Hydra, YAML and the system say of a user's mistake into a sentence with a remedy. It imports little."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from nobackprop.mistakes import Mistake, close
from nobackprop.places import CONF

# The errors that Hydra raises while it composes a config. All are about the command line or a yaml file.
COMPOSING = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)


# Overrides


def home(text: str) -> str:
    """An argument with the home folder in place of a ~ after its first =, which no shell replaces."""
    return re.sub(r"^([^=]*=)~(?=/|$)", lambda match: f"{match[1]}{Path.home()}", text)


def check(overrides: Iterable[str]) -> None:
    """Raises Mistake for an override that can't be read, and for one that leaves a group without exactly one choice."""
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise Mistake(_unreadable(text)) from None
        group, value = override.key_or_group, override.value()
        if not (CONF / group).is_dir() or isinstance(value, dict):
            continue
        if override.is_delete():
            choices = options(group)
            instead = f"{group}=none" if "none" in choices else f"{group}=..., one of {', '.join(choices)}"
            raise Mistake(f"{text}: {group} can't be taken out of a run; write {instead}")
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            if isinstance(choice, list):
                several = ",".join(map(str, choice))
                raise Mistake(f"{text}: a run has one {group}; for a run of each write --multirun {group}={several}")
            if choice in (None, "", "???"):
                raise Mistake(f"{text}: a run needs a {group}; choose one of {', '.join(options(group))}")
            if isinstance(choice, bool | int | float):
                raise Mistake(f"{text}: {choice} is no {group}; choose one of {', '.join(options(group))}")


def _unreadable(text: str) -> str:
    """The sentence on an argument that is no override."""
    key, equals, value = text.partition("=")
    if wrong := re.search(r"[\u2010-\u2015\u2018-\u201f\u00a0\uff1d]", text):
        return f"{text!r} has the character {wrong[0]!r} (U+{ord(wrong[0]):04X}): type a plain - ' \" or space"
    if not equals or " " in key:
        return f"{text!r} is no key=value: write it without spaces, as in rule=bp (--help shows the keys)"
    if value.startswith("="):
        return f"{text!r} has one = too many: write {key}={value[1:]}"
    if not re.fullmatch(r"[~+]*[\w./@:$-]+", key):
        return f"{text!r}: {key!r} is no key; an element of a list is written as in optimizer.betas.0=0.5"
    if value[:1] in {"[", "{"} and value[-1:] not in {"]", "}"}:
        return f"{text!r} has no closing bracket; with spaces it needs quotes around all of it: '{key}=[1, 2]'"
    for opening, closing in ("[]", "{}"):
        if value.count(opening) != value.count(closing):
            return f"{text!r} has {value.count(opening)} {opening} and {value.count(closing)} {closing}: close each"
    if value.endswith(","):
        return f"{text!r} ends in a comma: take it away, or write what follows it"
    return f"""{text!r} can't be read: a text with such characters needs quotes of its own, '{key}="{value}"'"""


def options(group: str, folders: Iterable[Path] = (CONF,)) -> list[str]:
    """The choices of a group. Those in folders within it are named like `lra_e/deviation`."""
    files = {path.relative_to(f / group).with_suffix("") for f in folders for path in (f / group).rglob("*.yaml")}
    return sorted(map(str, files))


def first(override: Override) -> str:
    """An override; if a multirun sweeps over several choices, the override with the first of them."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


# Composing


def composed(overrides: Sequence[str]) -> tuple[DictConfig, Any]:
    """As `compose`. Raises Mistake where overrides make no config."""
    try:
        return compose(overrides)
    except COMPOSING as e:
        raise Mistake(composing(e, overrides, [CONF])) from e


def compose(overrides: Iterable[str], folders: Sequence[Path] = (), config: str = "train") -> tuple[DictConfig, Any]:
    """The config that overrides make, also of the configs in these folders, and Hydra's own `runtime` of it.

    Raises one of `COMPOSING` where they make no config.
    """
    main = next((f for f in folders if (f / f"{config}.yaml").exists()), CONF)
    others = ",".join(repr(f"file://{f}") for f in folders if f != main)
    with hydra.initialize_config_dir(str(main), version_base="1.3"):
        cfg = hydra.compose(config, [*overrides, f"hydra.searchpath=[{others}]"], return_hydra_config=True)
    runtime = cfg.hydra.runtime
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, runtime


def composing(error: Any, overrides: Sequence[str], folders: Sequence[Path], config: str = "train") -> str:
    """The sentence on one of `COMPOSING`; `folders` are those of the configs, the user's own first."""
    message = str(error)
    if told := _of_a_file(error.__cause__ or error, message, overrides, folders):
        return told
    if option := re.search(r"Could not find '(.*)'\s*Available options in '(.*)'", message):
        path, group = option.groups()
        name, names = path.removeprefix(f"{group}/"), sorted({*options(group, folders), *error.options})
        return f"there is no {group}={name}; choose one of {', '.join(names)}{close(name, names)}"
    if several := re.match(r"Ambiguous value for argument '([^=]*)=(.*)'", message):
        key, values = several.groups()
        instead = "" if (CONF / key).is_dir() else f"; a list is written {key}=[{values}]"
        return f"{key}={values}: several values are for a sweep, with --multirun{instead}"
    if re.search(r"does not support sweep type|Can only enumerate", message):
        return "an interval is for a search, as in +sweep=rates; a sweep takes values, as in optimizer.lr=0.1,0.01"
    if absent := re.match(r"Could not delete from config. '(.*?)'", message):
        return f"~{absent[1]}: {absent[1]} is not there, or null already"
    if "'hydra/sweeper/optuna'" in message:
        return f"{message}\nIt comes with: pip install hydra-optuna-sweeper"
    if appended := re.search(r"To append to your default list use \+(\S+)", message):
        return f"{appended[1]}: only some runs have one, so write +{appended[1]}"
    if there := re.search(r"An item is already at '(.*?)'", message):
        return f"{there[1]} is there already: write {there[1]}=..., without +"
    if missing := re.search(r"Could not override '(?:\w+@)?([\w./]+)'", message):
        return _no_such_key(missing[1], overrides, folders, config) or message
    if within := re.match(r"In '(.*)': \w+ raised while composing config:\n(.*)", message):
        return f"{within[1]}.yaml: {within[2]}; it must hold keys with values, as in seeds: 3"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    told = [re.split(r"\s*Config search path:", message)[0]]
    if isinstance(error.__cause__, OmegaConfBaseException):
        told.append(str(error.__cause__).splitlines()[0])
    return ": ".join(filter(None, told))


def _of_a_file(error: Any, message: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """The sentence, with file and line, on a yaml file that can't be read; empty where it is not that."""
    header = re.match(r"(?:Expected header format|Too many components).*'(.*)'", message)
    if not header and not isinstance(error, UNREADABLE) and type(error) is not OSError:
        return ""
    named = getattr(getattr(error, "problem_mark", error), "name", None)  # by YAML
    files = [
        path for folder in folders for path in sorted(folder.rglob("*.yaml")) if named in (None, str(path.resolve()))
    ]
    for path in sorted(files, key=lambda path: not any(path.stem in text for text in overrides)):
        try:
            load(path)
        except Mistake as e:
            if type(e.__cause__) is type(error):
                return str(e)
            continue
        for number, line in enumerate(path.read_text().splitlines() if header else (), 1):
            if header and line.lstrip("# ").strip() == header[1]:
                return f"{path}, line {number}: write # @package and one name, as in # @package _global_"
    return ""


def _no_such_key(path: str, overrides: Iterable[str], folders: Sequence[Path], config: str) -> str:
    """The sentence on a key that does not exist, such as `rule.bta`; empty where another mistake comes first."""
    *parents, key = path.split(".")
    others = [text for text in overrides if not re.match(rf"[~+]*{re.escape(path)}[.=]", text)]
    try:
        others = [first(override) for override in OverridesParser.create().parse_overrides(others)]
        cfg, _ = compose(others, folders, config)
    except COMPOSING:
        return ""
    node = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
    if node is None:
        if parents[0] == "hydra":  # Hydra's own
            return ""
        return _no_such_key(".".join(parents), overrides, folders, config)
    if not OmegaConf.is_dict(node):
        return f"there is no key {path}: {'.'.join(parents)} is {node!r}, without keys of its own"
    names = [str(name) for name in node] + ([] if parents else ["tuned"])
    same = [leaf for leaf, _ in leaves(OmegaConf.to_container(cfg)) if leaf.endswith(f".{key}") and not parents]
    text = f"there is no key {path}" + f"; choose from: {', '.join(names)}" * bool(names)
    if same:
        return f"{text}. Did you mean {' or '.join(same)}?"
    files = sorted((CONF / "/".join(parents)).glob("*.yaml")) if parents else []
    if having := [f"{'.'.join(parents)}={path.stem}" for path in files if key in OmegaConf.load(path)]:
        return f"{text}. It is a key of {', '.join(having)}"
    return text + close(key, names)


def leaves(tree: Any, *parents: str) -> Iterator[tuple[str, Any]]:
    """The keys of a nested mapping whose values are no mappings, such as `optimizer.lr`, with their values."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *parents, name)
        else:
            yield ".".join([*parents, name]), value


# Files


UNREADABLE = (UnicodeDecodeError, yaml.YAMLError, GrammarParseError)


def load(path: Path) -> Any:
    """A YAML file's content. Raises Mistake, naming file and line, where it is not YAML or has a key twice."""
    try:
        content = path.read_bytes()
        content.decode()
        return OmegaConf.to_container(OmegaConf.load(path))
    except UNREADABLE as e:
        line, told = _fault(e, content)
        raise Mistake(f"{path}, line {line + 1}: {told}") from e
    except OSError as e:
        told = f": {e.strerror}" if e.errno else ", line 1: write keys with values, as in seeds: 3"  # OmegaConf's own
        raise Mistake(f"{path}{told}") from e


def _fault(error: Any, content: bytes) -> tuple[int, str]:
    """The line of a YAML file in which something is wrong, counted from 0, and what is wrong."""
    if isinstance(error, UnicodeDecodeError):
        return content[: error.start].count(b"\n"), "this is no UTF-8; save the file in that encoding"
    text = content.decode()
    if isinstance(error, GrammarParseError):
        wrong = next(scalar for scalar in _scalars(yaml.compose(text, yaml.SafeLoader)) if not _interpolates(scalar))
        told = f"{wrong.value!r} is no interpolation: write ${{key}}, or \\${{ where the text itself is meant"
        return wrong.start_mark.line, told
    if isinstance(error, yaml.reader.ReaderError):
        return text[: error.position].count("\n"), f"take out the character U+{error.character:04X}"
    told = "indent by spaces, not by tabs" if "'\\t'" in error.problem else error.problem
    return error.problem_mark.line, told


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """All texts and numbers in a YAML document."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif node is not None:
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):
                yield from _scalars(child)


def _interpolates(scalar: yaml.ScalarNode) -> bool:
    """Whether everything in a text that looks like an interpolation is one."""
    try:
        OmegaConf.create([scalar.value])
    except GrammarParseError:
        return False
    return True
