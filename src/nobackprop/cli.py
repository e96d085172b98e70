"""The command `nobackprop`: a Hydra application. It imports little, so that --help and mistyped keys answer at once."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from nobackprop.mistakes import Mistake

_here = Path(__file__).parent
# A wheel carries the configs inside the package, a checkout beside src/.
CONF = _here / "conf" if (_here / "conf").is_dir() else _here.parents[1] / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def run(cfg: DictConfig) -> None:
    """Trains one config and prints its summary. (The jobs of a multirun go to sweeps.py.)"""
    from nobackprop import lean
    from nobackprop.preparation import configure

    if not cfg.dry_run:
        configure(cfg)  # so that a wrong value is answered at once
    lean.start()  # before all that imports Lightning
    from pytorch_lightning.utilities import rank_zero_only
    from rich.console import Console

    from nobackprop.train import summary, train

    console = Console(quiet=rank_zero_only.rank > 0)  # started by srun or torchrun, as one of several
    runtime: Any = HydraConfig.get().runtime
    announce_tuned(runtime, cfg, console)
    choices = runtime.choices
    if choices.launcher != "basic":
        raise Mistake(f"launcher={choices.launcher} is for several jobs: add --multirun")
    if "sweep" in choices:
        raise Mistake(f"+sweep={choices.sweep} is for several jobs: add --multirun")
    if cfg.dry_run:
        from nobackprop import launchers, sweeps

        (outcome,) = sweeps.run([launchers.Job("this run", cfg)], launchers.Basic(), console, dry_run=True)
        if outcome.state == "failed":
            sys.exit(1)
        return
    recorded = train(cfg, console)
    console.print(summary(recorded))
    folder = Path(cfg.paths.runs) / recorded[0].run
    console.print(f"records and weights: {folder}", markup=False, highlight=False, soft_wrap=True)


def announce_tuned(runtime: Any, cfg: DictConfig, console: Any) -> bool:
    """Says which tuned files are in use, and what of them is not in effect; whether `tuned` is one.

    Raises Mistake for a name that is no file's: to Hydra it is optional.
    """
    choices = runtime.choices
    folders = [Path(source.path) / "tuned" for source in runtime.config_sources if source.schema == "file"]
    files = {str(path.relative_to(f).with_suffix("")): path for f in reversed(folders) for path in f.rglob("*.yaml")}
    used = choices.tuned in files and choices.tuned != "none"
    default = f"{choices.rule}_{choices.arch}_{choices.dataset}_{choices.optimizer}"
    if not used and choices.tuned not in {"none", default}:
        raise Mistake(f"no such tuned settings, {choices.tuned!r}: choose one of {', '.join(sorted(files))}")
    for name in [choices.tuned] * used + [choices[key] for key in choices if key == "tuned@_global_"]:
        set_there = _leaves(OmegaConf.to_container(OmegaConf.load(files[name])))
        others = [key for key, value in set_there if OmegaConf.select(cfg, key) != value]
        but = f", but for {', '.join(others)}, set by an experiment or the command" if others else ""
        instead = "; tuned=none keeps the defaults" if name == choices.tuned else ""
        console.print(f"with the settings in {files[name]}{but}{instead}", highlight=False, soft_wrap=True)
    return used


def main() -> None:
    """The command. A user's mistake ends in a sentence, all else in a traceback (with HYDRA_FULL_ERROR=1 both do)."""
    command, *rest = ["dry_run=true" if text == "--dry-run" else text for text in sys.argv]
    several = {"-m", "--multirun"}  # argparse takes no overrides on both sides of an option
    sys.argv = [command, *(text for text in rest if text in several), *(text for text in rest if text not in several)]
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        run()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra leaves errors to the lines below
    try:
        run()
    except HydraException as e:
        sys.exit(f"nobackprop: {e}{_choices(str(e))}")
    except (ValueError, OSError) as e:  # a worker that was killed is an OSError, too
        sys.exit(f"nobackprop: {e}")
    except KeyboardInterrupt:
        sys.stderr.write("nobackprop: interrupted; the same command goes on\n")
        sys.exit(130)
    launcher: Any = sys.modules.get("hydra_plugins.nobackprop_launcher")  # where a multirun has counted
    if launcher and launcher.SweepLauncher.failed:
        sys.exit(1)


def _choices(message: str) -> str:
    """For Hydra's message on a key that does not exist, the keys that do; for a plugin that does not, how to get it."""
    if "'hydra/sweeper/optuna'" in message:
        return "\nIt comes with: pip install hydra-optuna-sweeper"
    if "append to your default list" in message:  # which says how
        return ""
    if experiment := re.search(r"Could not find 'experiment/(.+?)'", message):
        folder = CONF / "experiment"
        files = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
        return f"\nChoose from: {', '.join(files)}{_close(experiment[1], files)}"
    match = re.search(r"Could not override '(?:\w+@)?([\w.]+)'", message)
    if match is None:
        return ""
    *parents, key = match[1].split(".")
    others = [text for text in sys.argv[1:] if "=" in text and not re.match(rf"[~+]*{re.escape(match[1])}=", text)]
    try:
        others = [_first(override) for override in OverridesParser.create().parse_overrides(others)]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", others)
    except HydraException:
        return ""  # another mistake comes first
    node = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
    names = [str(name) for name in node or ()] + ([] if parents else ["tuned"])
    text = f"\nThere is no {key!r} here" + (f"; choose from: {', '.join(names)}{_close(key, names)}" if names else "")
    if same := [path for path, _ in _leaves(OmegaConf.to_container(cfg)) if path.endswith(f".{key}") and not parents]:
        return f"{text}. Did you mean {', '.join(same)}?"
    files = sorted((CONF / "/".join(parents)).glob("*.yaml")) if parents else []
    if having := [f"{'.'.join(parents)}={path.stem}" for path in files if key in OmegaConf.load(path)]:
        return f"{text}. It is a key of {', '.join(having)}"
    return text


def _leaves(tree: Any, *parents: str) -> Iterator[tuple[str, Any]]:
    """The keys of a nested mapping that are none themselves, as `optimizer.lr`, with their values."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, *parents, name)
        else:
            yield ".".join([*parents, name]), value


def _first(override: Override) -> str:
    """An override; of one that a multirun sweeps over its first choice."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _close(name: str, names: Sequence[str]) -> str:
    return "".join(f". Did you mean {close}?" for close in get_close_matches(name, names, 1))
