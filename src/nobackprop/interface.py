"""Training from Python: what the command `nobackprop` does, for notebooks and scripts."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from nobackprop.cli import announce_mode, announce_tuned, tuned_files
from nobackprop.composing import check, composed, composing, home
from nobackprop.data.given import held
from nobackprop.mistakes import Mistake, about_files
from nobackprop.places import CONF
from nobackprop.records.gathering import collect, table
from nobackprop.records.literal import plain
from nobackprop.records.record import Record, tested
from nobackprop.training import kernels

if TYPE_CHECKING:  # they take a while to import
    import pandas as pd
    from matplotlib.figure import Figure


class Runs(Sequence[Record]):
    """The records of some runs, one for each seed, in the order in which they were asked for.

    A terminal and a notebook show their `summary`. `plot` draws their learning curves. `folders` has the folder of each
    run, by `record.run`.
    """

    def __init__(self, records: Sequence[Record], folders: Mapping[str, Path]) -> None:
        self.records, self.folders = tuple(records), folders

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def folder(self, record: Record) -> Path:
        """The folder of a seed, as `nobackprop.load` takes it."""
        return self.folders[record.run] / f"seed{record.seed}"

    @property
    def by_run(self) -> dict[str, list[Record]]:
        """The records of each run (one config with all its seeds), by the name of its folder."""
        return {run: [record for record in self.records if record.run == run] for run in self.folders}

    def table(self) -> "pd.DataFrame":
        """A row for each seed: its settings (`config.<key>`), where it was trained, its result. Times are seconds."""
        return table(self.records)

    def summary(self) -> "pd.DataFrame":
        """A row for each run: the number of seeds, their mean validation and test accuracy (fractions), and seconds.

        `deviation` is the standard deviation of the test accuracy over seeds. A value that does not exist is NaN. Runs
        are named by the settings in which they differ. `seconds` is the sum over all seeds.
        """
        import pandas as pd

        from nobackprop.papers.compare import labels

        rows = {}
        names = labels(self.by_run)
        for run, records in self.by_run.items():
            test = pd.Series(tested(records), dtype=float)
            rows[names[run]] = {
                "seeds": len(records),
                "validation": fmean(r.validation for r in records),
                "test": test.mean(),
                "deviation": test.std(),
                "seconds": sum(r.seconds for r in records),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def plot(self) -> "Figure":
        """The validation error of each run against epochs, and the test accuracy of its seeds, the best run first.

        A curve is the mean over seeds, in a band from the lowest to the highest. It is a matplotlib Figure, which a
        notebook shows; `.savefig("curves.png")` writes it.
        """
        from nobackprop.papers.compare import curves

        return curves(self.by_run)

    def __rich__(self) -> Table:
        from nobackprop.papers.compare import table

        return table(self.by_run)

    def __repr__(self) -> str:
        return self.summary().to_string(formatters=FORMATS, na_rep="-")

    def _repr_html_(self) -> str:
        return self.summary().to_html(formatters=FORMATS, na_rep="-")


FORMATS: Any = dict.fromkeys(("validation", "test", "deviation"), "{:.2%}".format) | {"seconds": "{:.1f}".format}


def train(*overrides: str, data: Any = None, test: Any = None, **settings: Any) -> Runs:
    """Trains what the command `nobackprop` trains when it is given the same, and gives the records.

        runs = nobackprop.train("rule=lra_e,bp", "dataset=digits", seeds=3, max_epochs=20)
        runs = nobackprop.train("rule=dfa", data=(x, y), test=(x2, y2), seeds=3)

    An override is a text as the command takes it. Of several values, as in `rule=lra_e,bp`, each makes a run. Runs are
    trained one after another. A setting by keyword is a Python value: `max_epochs=20`, `seeds=[0, 4, 7]`,
    `paths={"runs": "my runs"}`, `**{"optimizer.lr": 0.1}`. Seeds and files are those of the command. So runs recorded
    in `paths.runs` (by default `./runs`) are not trained again, and an interrupted run goes on from its checkpoint.
    Files of tuned settings are used, too, and named on the screen (`tuned="none"` keeps the defaults). Progress is
    shown in a terminal, and in a notebook if ipywidgets is installed.

    `data` and `test` are images to train on and to test with: a pair (x, y) of tensors or arrays, or a torch Dataset of
    such pairs. x is (N, D), (N, H, W) or (N, C, H, W), uint8 (divided by 255) or floats (float32, taken as they are);
    y (N,) are class numbers from 0. Validation images are held out of `data`, as always (`dataset.validation`). The
    content of the images identifies the runs.

    Raises Mistake for whatever can't work, before anything is trained. Raises KeyboardInterrupt when it is interrupted,
    after it has written a checkpoint.
    """
    from nobackprop.training.build import prepare
    from nobackprop.training.run import train as train_one
    from nobackprop.training.stopping import Stopped

    if wrong := [each for each in overrides if not isinstance(each, str)]:
        raise Mistake(
            f"{wrong[0]!r} is of type {type(wrong[0]).__name__}: an override is a text, such as 'optimizer.lr=0.1'; "
            "write a dict as **{'optimizer.lr': 0.1}"
        )
    texts = [*map(home, overrides), *(_override(key, value) for key, value in settings.items())]
    console = Console()
    with nullcontext() if data is None and test is None else held(data, test) as fingerprint, _as_found():
        if fingerprint is not None:
            texts = [*_own_data(texts), "dataset=given", f"dataset.source.fingerprint='{fingerprint}'"]
        jobs = [(each, _config(each, console)) for each in _jobs(texts)]
        prepared, records = [], {}
        for _, cfg in jobs:  # all of them before any is trained
            with about_files(cfg):
                prepared.append(run := prepare(cfg))
                run.settings.check_writable()
            if fingerprint is not None and run.parallel:
                raise Mistake("trainer=ddp starts processes of their own, which can't see data=...: leave one out")
        try:
            for (each, cfg), run in zip(jobs, prepared, strict=True):
                with about_files(cfg), _as_command(each):
                    records |= {(r.signature, r.seed): r for r in train_one(run, console)}
        except Stopped as e:
            raise KeyboardInterrupt from e
    return Runs([*records.values()], {run.folder.name: run.folder for run in prepared})


def runs(folder: str | Path = "runs") -> "pd.DataFrame":
    """All records below a folder of runs, or in a file of records, as one table with a row for each seed.

    The columns are the settings (`config.<key>`), where the seed was trained, and what it reached: `test.accuracy` and
    `best.val/accuracy` are fractions, `wall_s` is in seconds. The table is empty where there is no record yet. Records
    that can't be read, or that contradict others, are left out with a warning. Raises Missing where there is no such
    folder.
    """
    found = collect([folder])
    for problem in found.unreadable + found.conflicts:
        warn(plain(problem), stacklevel=2)
    return table(found.records.values())


def _override(key: str, value: Any) -> str:
    """A setting by keyword as the command takes it. Raises Mistake for a value that no setting can have."""
    if (CONF / key).is_dir() and isinstance(value, str | list | tuple):  # one choice, or several
        return f"{key}={value if isinstance(value, str) else ','.join(map(str, value))}"
    if not isinstance(value, str | Path):
        return f"{key}={_word(key, value)}"
    override = home(f"{key}={value}")
    text = override.partition("=")[2]
    with suppress(HydraException):
        read = OverridesParser.create().parse_override(override)
        if not read.is_sweep_override() and read.value() == text:  # needs no quotes
            return override
    return f"{key}={_word(key, text)}"


def _word(key: str, value: Any) -> str:
    """A Python value in the command's grammar."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return QuotedString(str(value), Quote.single).with_quotes()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_word(key, each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(_word(key, each) for each in value) + "]"
    raise Mistake(
        f"{key} is of type {type(value).__name__}; allowed: a text, a number, True, False, None, and lists and dicts "
        "of them"
    )


def _own_data(texts: Sequence[str]) -> Sequence[str]:
    """The same overrides. Raises Mistake where they choose a data set, too."""
    for text in texts:
        if text.lstrip("+").partition("=")[0] == "dataset":
            raise Mistake(f"{text}: the images are those of data=... and test=...: leave one of both out")
    return texts


def _jobs(texts: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of each run: one for every combination of the values that overrides list.

    Raises Mistake for an override that can't be read.
    """
    check(texts)
    choices = []
    for override in OverridesParser.create().parse_overrides(list(texts)):
        each = [override.input_line]
        if override.is_sweep_override():
            try:
                each = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            except HydraException as e:
                raise Mistake(composing(e, texts, [CONF])) from e
        choices.append(each)
    yield from (list(each) for each in product(*choices))


def _config(overrides: Sequence[str], console: Console) -> DictConfig:
    """The run that overrides make. It prints what the command prints. Raises Mistake for what only the command does."""
    cfg, runtime = composed(overrides)
    used = tuned_files(runtime)
    if runtime.choices.launcher != "basic" or "sweep" in runtime.choices or cfg.get("dry_run"):
        raise Mistake(
            "launcher, +sweep and dry_run are the command's alone, as in nobackprop --multirun --dry-run: train() "
            "trains one run after another"
        )
    announce_tuned(used, cfg, console)
    announce_mode(cfg, console)
    return cfg


@contextmanager
def _as_command(overrides: Sequence[str]) -> Iterator[None]:
    """Within, records name the command that does the same, not the command that started a notebook."""
    before, sys.argv = sys.argv, ["nobackprop", *overrides]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _as_found() -> Iterator[None]:
    """Restores torch's settings afterwards, since a run chooses its own."""
    threads, products, own = torch.get_num_threads(), torch.get_float32_matmul_precision(), kernels.used()
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = tf32
        kernels.use(own)
