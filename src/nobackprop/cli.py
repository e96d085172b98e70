"""The command `nobackprop`: a Hydra application. It imports little, so that --help and mistakes answer at once."""

import os
import re
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nobackprop import usage
from nobackprop.composing import COMPOSING, check, composing, home, leaves
from nobackprop.mistakes import Mistake, Notice, about_files, answering, close
from nobackprop.places import CONF

if TYPE_CHECKING:
    from nobackprop.training.config import Settings

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


def answered(work: Callable[..., Any]) -> Callable[..., Any]:
    """Ends the command where `work`, which Hydra calls, fails: with a sentence for a Mistake, else with a traceback.

    So all errors that Hydra itself raises are about the command line and the yaml files.
    """

    @wraps(work)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if FULL_ERROR:
            return work(*args, **kwargs)
        try:
            return work(*args, **kwargs)
        except (Mistake, ChildProcessError) as e:  # ChildProcessError: a process that trained a seed was killed
            sys.exit(f"nobackprop: {e}")
        except Exception as e:
            sys.excepthook(type(e), e, e.__traceback__)
            sys.exit(1)

    return wrapper


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@answered
def run(cfg: DictConfig) -> None:
    """Trains one config and prints its summary. (The jobs of a multirun go to sweep.py.)"""
    runtime: Any = HydraConfig.get().runtime
    choices = runtime.choices
    if choices.launcher != "basic":
        raise Mistake(f"launcher={choices.launcher} is for several jobs: add --multirun")
    if "sweep" in choices:
        raise Mistake(f"+sweep={choices.sweep} is for several jobs: add --multirun")
    if Path.cwd() != Path(runtime.cwd):
        raise Mistake("hydra.job.chdir: paths are those of the folder where the command was typed; use paths.runs=...")
    tuned = tuned_files(runtime)
    with about_files(cfg):
        _train(_settings(cfg, runtime), cfg, tuned)


def _settings(cfg: DictConfig, runtime: Any) -> "Settings":
    """Raises Mistake for what can be found without torch. For a file that can't be a choice it names the file."""
    from nobackprop.training.config import Settings

    try:
        settings = Settings.of(cfg)
    except Mistake as e:
        group = str(e).partition(":")[0]
        file = _files(runtime, group).get(runtime.choices.get(group))
        typed = any(text.lstrip("+~").startswith(f"{group}.") for text in HydraConfig.get().overrides.task)
        raise Mistake(f"{file}: {e}" if file and not typed else e) from None
    settings.check_writable()
    return settings


def _train(settings: "Settings", cfg: DictConfig, tuned: Mapping[str, Path]) -> None:
    from nobackprop import quick_start

    quick_start.start()  # before anything imports Lightning
    from nobackprop.training.build import configure

    run = configure(settings)  # finds the other mistakes before Lightning is imported
    from pytorch_lightning.utilities import rank_zero_only
    from rich.console import Console

    from nobackprop.training.run import summary, train

    console = Console(quiet=rank_zero_only.rank > 0)  # started by srun or torchrun, as one of several
    announce_tuned(tuned, cfg, console)
    announce_mode(cfg, console)
    if cfg.dry_run:
        from nobackprop.sweeps import jobs, local, sweep

        (outcome,) = sweep.run([jobs.Job("this run", cfg)], local.Basic(), console, dry_run=True)
        if outcome.state == "failed":
            sys.exit(1)
        return
    console.print(summary(train(run, console)))
    console.print(f"records and weights: {run.folder}", markup=False, highlight=False, soft_wrap=True)


def _files(runtime: Any, group: str) -> dict[str, Path]:
    """The yaml files of a group by their names. Files in the user's own folders replace ours."""
    folders = [Path(source.path) / group for source in runtime.config_sources if source.schema == "file"]
    return {str(path.relative_to(f).with_suffix("")): path for f in reversed(folders) for path in f.rglob("*.yaml")}


def tuned_files(runtime: Any) -> dict[str, Path]:
    """The files of tuned settings in use, by the key that chooses each.

    Raises Mistake for a name without a file, since Hydra does not: to it, `tuned` is optional.
    """
    choices, files = runtime.choices, _files(runtime, "tuned")
    default = f"{choices.rule}_{choices.arch}_{choices.dataset}_{choices.optimizer}"
    if choices.tuned not in {*files, "none", default}:
        folders = Counter(name.rpartition("/")[0] for name in files)
        there = ", ".join(f"{folder or '.'} ({count})" for folder, count in sorted(folders.items()))
        told = f"no such tuned settings, {choices.tuned!r}; the folders of conf/tuned have: {there}"
        raise Mistake(told + close(choices.tuned, files))
    chosen = {key: choices[key] for key in ("tuned", "tuned@_global_") if choices.get(key, "none") != "none"}
    return {key: files[name] for key, name in chosen.items() if name in files}


def announce_tuned(used: Mapping[str, Path], cfg: DictConfig, console: Any) -> None:
    """Says which files of tuned settings are in use, and which of their settings are overridden."""
    for key, path in used.items():
        set_there = leaves(OmegaConf.to_container(OmegaConf.load(path)))
        others = [key for key, value in set_there if OmegaConf.select(cfg, key) != value]
        but = f", but for {', '.join(others)}, set by an experiment or the command" if others else ""
        instead = "; tuned=none keeps the defaults" if key == "tuned" else ""
        text = f"with the settings in {path}{but}{instead}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def announce_mode(cfg: DictConfig, console: Any) -> None:
    """Tells the user where the environment, not the command, chooses whether W&B is online."""
    if "WANDB_MODE" in os.environ and "mode" in cfg.logger and OmegaConf.is_interpolation(cfg.logger, "mode"):
        text = f"W&B is {cfg.logger.mode} by WANDB_MODE; logger.mode=... overrides it"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """The command. It ends with a sentence for a user's mistake, and with a traceback for any other error.

    With HYDRA_FULL_ERROR=1 a mistake gives a traceback, too. The exit status is 0 if all went well, 1 for a mistake or
    a job that failed, 2 for an unknown option, 130 for Ctrl-C and 143 for SIGTERM.
    """
    warnings.formatwarning = _told
    texts = [home("dry_run=true" if text == "--dry-run" else text) for text in sys.argv[1:]]
    if "--version" in texts:
        print(_version())
        return
    args, sys.argv[1:] = _in_order(texts)
    folders = [Path(args.config_dir).absolute(), CONF] if args.config_dir else [CONF]
    if FULL_ERROR:
        _do(args, folders)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra leaves errors to the lines below
    with answering("nobackprop"):
        try:
            if not args.shell_completion:
                check(args.overrides)
            _do(args, folders)
        except Mistake:
            raise
        except COMPOSING as e:
            raise Mistake(composing(e, args.overrides, folders, args.config_name or "train")) from e
    launcher: Any = sys.modules.get("hydra_plugins.nobackprop_launcher")  # the multirun has counted its failures
    if launcher and launcher.SweepLauncher.failed:
        sys.exit(1)


def _told(message: Warning | str, category: type[Warning], *place: Any, formatted: Any = warnings.formatwarning) -> str:
    """A warning as it is shown. One for the user is shown without its place in the code."""
    return f"nobackprop: {message}\n" if issubclass(category, Notice) else formatted(message, category, *place)


def _do(args: Namespace, folders: Sequence[Path]) -> None:
    if args.help:
        print(usage.text(args.overrides, folders), end="")
    else:
        run()


def _in_order(texts: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The parsed arguments, and the arguments with all overrides first, since Hydra wants them together."""
    parser = get_args_parser()
    wrong = [text for text in texts if re.match(r"-\w{3,}=", text)]  # argparse would take -rule=bp as -r
    if not wrong:
        args, wrong = parser.parse_known_intermixed_args(texts)
    if wrong:
        known = [name for action in parser._actions for name in action.option_strings if len(name) > 3]
        key, equals, value = wrong[0].lstrip("-").partition("=")
        hint = f": write {key.replace('-', '_')}={value}" if equals else close(key, ["--dry-run", *known])
        hint = hint or ": there are --multirun, --dry-run, --help, --cfg job and --hydra-help, which shows the others"
        parser.exit(2, f"nobackprop: there is no option {wrong[0]}{hint}\n")
    others = list(texts)
    for text in args.overrides:
        others.remove(text)
    return args, [*args.overrides, *others]


def _version() -> str:
    from nobackprop.records.provenance import source_state

    commit, edited = source_state()
    of = f", commit {commit[:7]}{' with edits' * bool(edited)}" if commit else ""
    return f"nobackprop {version('nobackprop')}{of}"
