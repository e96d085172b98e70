"""The settings of a run: what may be set, checked at once; and what identifies its result."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import formatannotation, isabstract, signature
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError as PydanticError,
    ValidationInfo,
    field_validator,
)

from nobackprop.mistakes import Mistake, check_writable, close
from nobackprop.records.identity import before, current_name, digest, recorded_name, run_name

MOST_SEEDS = 100_000  # more are taken for a typing error


def _component(node: Any) -> Any:
    if isinstance(node, dict) and re.fullmatch(r"\w+(\.\w+)+", str(node.get("_target_"))):
        return node | {"_target_": current_name(node["_target_"])}
    if isinstance(node, dict) and isinstance(name := node.get("_target_"), str) and name.isidentifier():
        raise Mistake(f"_target_ is {name}: write its module before it, as in my_module.{name}")
    raise Mistake("write keys with values, of which _target_ names a class, as in _target_: nobackprop.rules.bp.BP")


def _component_or_none(node: Any) -> Any:
    return node if node == {} else _component(node)


def _with_interval(node: dict[str, Any]) -> dict[str, Any]:
    if node.get("interval", "epoch") not in ("epoch", "step"):
        raise Mistake("write interval: epoch, or interval: step for a schedule that steps after each mini-batch")
    return node


def _start(spec: Any) -> Any:
    if isinstance(spec, str | int | float) and not isinstance(spec, bool):
        return spec
    if isinstance(spec, dict):
        return _component(spec)
    raise Mistake("write a string such as U1 or N0.1, or keys of which _target_ names a class")


Component = Annotated[dict[str, Any], BeforeValidator(_component)]  # a mapping with Hydra's `_target_`
ComponentOrNone = Annotated[dict[str, Any], BeforeValidator(_component_or_none)]  # empty: none
Start = Annotated[dict[str, Any] | str | int | float, BeforeValidator(_start)]


def _seed_list(seeds: Any) -> Any:
    if isinstance(seeds, list) and seeds:
        return seeds
    if isinstance(seeds, int) and not isinstance(seeds, bool) and 0 < seeds <= MOST_SEEDS:
        return list(range(seeds))
    raise Mistake(f"write how many, 1 to {MOST_SEEDS}, or a list such as [0,4,7]")


def _held_out(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "test" or (number and (0 < value < 1 or (isinstance(value, int) and value > 0))):
        return value
    raise Mistake("write a fraction between 0 and 1, or how many images, or test for the test images themselves")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatasetSettings(_Strict):
    """conf/dataset: where images come from and which of them a seed trains on."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # a part of the run's folder
    source: Component
    classes: int | None
    classes_seed: NonNegativeInt | None
    validation: Annotated[float | int | Literal["test"], BeforeValidator(_held_out)]
    split: Literal["random", "first", "last"]
    normalize: bool
    flip: bool
    crop: NonNegativeInt


class InitSettings(_Strict):
    """conf/init: for W and for the rule's own weights, a `_target_` or one of the mDFA program's strings."""

    forward: Start
    backward: Start


class TrainerSettings(_Strict):
    """conf/trainer: the settings of Lightning's Trainer that may be changed. Others would break the count of steps."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"]
    strategy: Literal["auto", "ddp"]
    devices: PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)] | Literal["auto"]
    num_nodes: PositiveInt
    precision: Literal["64-true", "32-true", "bf16-mixed"]

    @field_validator("devices", "num_nodes")
    @classmethod
    def _several_only_with_ddp(cls, value: Any, info: ValidationInfo) -> Any:
        one = value == 1 or (isinstance(value, list) and len(value) == 1)
        if one or info.data.get("strategy") != "auto":
            return value
        raise Mistake("use 1 (or a list of one device), or trainer=ddp to train on several")


def _folder(path: Any) -> Any:
    if isinstance(path, str) and path:
        return os.path.expanduser(path)
    raise Mistake("write the folder's name, with ./ before one that looks like a number, as in paths.runs=./1e5")


Folder = Annotated[str, BeforeValidator(_folder)]


class Paths(_Strict):
    data: Folder
    runs: Folder


class Settings(_Strict):
    """Every top-level key of conf/train.yaml, in its order. Unknown keys are refused."""

    rule: Component
    dataset: DatasetSettings
    arch: Component
    init: InitSettings
    loss: Component
    optimizer: Component
    schedule: Annotated[ComponentOrNone, AfterValidator(_with_interval)]
    trainer: TrainerSettings
    logger: ComponentOrNone
    diagnostics: ComponentOrNone
    launcher: Component
    seeds: Annotated[list[NonNegativeInt], BeforeValidator(_seed_list)]  # how many, or a list
    max_epochs: PositiveInt
    max_steps: PositiveInt | None
    batch_size: PositiveInt
    update: Literal["mean", "sum", "unit_norm", "unit_norm_relative"]
    l2: NonNegativeFloat
    patience: PositiveInt | None
    stack: bool | None
    threads: PositiveInt
    compile: Annotated[bool, BeforeValidator(lambda value: value or False)]  # null in configs kept by earlier versions
    kernels: bool | None
    recompute: bool | None
    workers: PositiveInt | None
    checkpoint_minutes: NonNegativeFloat
    dry_run: bool
    paths: Paths

    @classmethod
    def of(cls, cfg: DictConfig) -> "Settings":
        """The settings in a composed config. Raises Mistake, which names every wrong key and what is allowed.

        Of the processes of a data-parallel run the first raises it; the others end.
        """
        with told_once(OmegaConf.select(cfg, "trainer.strategy")):
            return cls._of(cfg)

    @classmethod
    def _of(cls, cfg: DictConfig) -> "Settings":
        try:
            content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            _check_finite(content)
            settings = cls.model_validate(content)
        except MissingMandatoryValue as e:
            raise Mistake(f"{e.full_key} must be given: add {e.full_key}=...") from None
        except OmegaConfBaseException as e:  # an interpolation of a key that does not exist
            raise Mistake(f"{e.full_key}: {str(e).splitlines()[0]}") from None
        except PydanticError as e:
            raise Mistake("; ".join(dict.fromkeys(_sentence(error) for error in e.errors()))) from None
        if len(set(settings.seeds)) < len(settings.seeds):
            raise Mistake(f"seeds: {settings.seeds} names a seed twice; seeds=3 means [0,1,2], seeds=[0,4,7] a list")
        return settings

    @property
    def name(self) -> str:
        """`rule_arch_dataset`, such as `lra_e_mlp_mnist`."""
        return run_name(self.rule, self.arch, self.dataset.name)

    @property
    def schedule_interval(self) -> Literal["epoch", "step"]:
        """After what the schedule steps: each epoch, or each mini-batch."""
        return self.schedule.get("interval", "epoch")

    @property
    def folder(self) -> Path:
        """The folder of the run: it has a folder for each seed, and checkpoints while the run trains."""
        return Path(self.paths.runs) / f"{self.name}-{self.signature}"

    def check_writable(self) -> None:
        """Raises OSError where records can't be written, unless there is one of every seed already."""
        runs = Path(self.paths.runs)
        try:
            check_writable(runs)
        except OSError:
            if not runs.is_dir() or not all((self.folder / f"seed{s}" / "record.json").exists() for s in self.seeds):
                raise

    def identity(self) -> dict[str, Any]:
        """All settings that can change a seed's result. Seeds, loggers, paths, devices and kernels are left out.

        Devices, the compiler, kernels and threads change float32 rounding, and a record states them beside its config.
        A key of a component is left out where it has the value that records without it mean. So these keep their
        signatures.
        """
        how = {"stack", "compile", "kernels", "recompute", "threads", "workers", "launcher", "checkpoint_minutes"}
        config = self.model_dump(exclude={"seeds", "logger", "diagnostics", "paths", "dry_run", *how})
        for key in ("root", "download", "cache", "verify"):
            config["dataset"]["source"].pop(key, None)
        config["trainer"] = {"precision": self.trainer.precision}
        return {key: _as_recorded(node, key) for key, node in config.items()}

    @property
    def signature(self) -> str:
        """A hash of `identity`. Together with the seed it is the key of a record."""
        return digest(self.identity())


@contextmanager
def told_once(strategy: str | None) -> Iterator[None]:
    """Lets only the first process of a data-parallel run raise a Mistake. The others end with status 1."""
    try:
        yield
    except Mistake:
        rank = os.environ.get("RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID", "0")
        if strategy == "ddp" and rank != "0":
            raise SystemExit(1) from None
        raise


def _check_finite(tree: Any, *path: Any) -> None:
    """Raises Mistake for an infinite number and for NaN, since no record could hold it."""
    if isinstance(tree, float) and not isfinite(tree):
        raise Mistake(f"{'.'.join(map(str, path))}: write a finite number, got {tree}")
    nodes = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, node in nodes:
        _check_finite(node, *path, key)


def _as_recorded(node: Any, name: str) -> Any:
    """A config's node as it identifies a run, with respect to keys that components got after the first records.

    Such a key is added where the config leaves it at its default. It is left out where it has the value that records
    without it mean. Raises Mistake for an unknown target.
    """
    if not isinstance(node, dict):
        return node
    target = _target(node["_target_"], name) if "_target_" in node else None
    old = before(target)
    given = dict(node)
    if target is not None:
        left_out = [key for key in old if key not in node]
        given |= {key: signature(target).parameters[key].default for key in left_out}
        given["_target_"] = recorded_name(node["_target_"])
    return {key: _as_recorded(value, key) for key, value in given.items() if key not in old or value != old[key]}


def build(node: Component, key: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiates a config node, called `key` in messages.

    Raises Mistake for an unknown target, key or value. Any other error of the target's own code becomes the cause of an
    InstantiationException.
    """
    target = _target(node["_target_"], key)
    takes = signature(target)
    known = {name: p for name, p in takes.parameters.items() if name not in ("params", "optimizer")}
    given = {name: value for name, value in node.items() if not name.startswith("_")}
    for name, value in given.items():
        if name not in known:
            raise Mistake(f"{key}: unknown key {name}; choose from: {', '.join(known) or 'none'}{close(name, known)}")
        ours = target.__module__.startswith("nobackprop.")
        _check_type(f"{key}.{name}", value, known[name].annotation if ours else _least(known[name].annotation))
    if not node.get("_partial_"):
        try:
            takes.bind(*args, **given, **kwargs)
        except TypeError as e:
            if missing := re.match(r"missing a required .*argument: '(\w+)'", str(e)):
                told = f"{key}.{missing[1]} must be given: add {key}.{missing[1]}=..."
            else:
                told = f"{key}: {node['_target_']}{takes} can't take {args}: {e}"
            raise Mistake(told) from None
    if isabstract(target):
        lacks = ", ".join(sorted(target.__abstractmethods__))
        raise Mistake(f"{key}: {node['_target_']} lacks {lacks}: write what is missing, or check how it is spelt there")
    try:
        return instantiate(node, *args, **kwargs, _convert_="all")
    except InstantiationException as e:
        cause = e.__cause__
        of_torch = target.__module__.split(".")[0] == "torch" and isinstance(cause, TypeError | ValueError)
        if cause is None or isinstance(cause, Mistake) or of_torch:
            raise Mistake(f"{key}: {cause or e}") from e
        raise


def _least(annotation: Any) -> Any:
    """The kind of value that a parameter of others' code takes: flag, number, list, or any.

    Such code often takes more than its annotations say. The annotations of torch's schedules are text.
    """
    text = annotation if isinstance(annotation, str) else formatannotation(annotation)
    text = re.sub(r"\w+\.", "", text)  # without modules
    if text in {"int", "float", "Union[float, Tensor]", "float | Tensor"}:
        return float
    if text.startswith("Iterable["):
        return list
    return annotation if annotation in (bool, bool | None) else Any


def _target(name: str, key: str) -> Any:
    """What a `_target_` names. Raises Mistake where it does not exist. Other errors of its module pass through."""
    found, path = None, ""
    for part in name.split("."):
        within, path = path, f"{path}.{part}".removeprefix(".")
        try:
            found = getattr(found, part) if hasattr(found, part) else import_module(path)
        except ModuleNotFoundError as e:
            if not f"{path}.".startswith(f"{e.name}."):
                raise
            there = [text for text in dir(found) if not text.startswith("_")] if within else []
            lacks = f"{within} has no {part}{close(part, there)}" if within else f"there is no module {part}"
            hint = "" if within else ": put its folder on PYTHONPATH, or check the name"
            raise Mistake(f"{key}: _target_ is {name}, but {lacks}{hint}") from None
    if not callable(found):
        raise Mistake(f"{key}: _target_ is {name}, which is neither a class nor a function")
    return found


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises Mistake where a value from a config is not of the annotated type. (`no` is a string, not false.)"""
    try:
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except PydanticError as e:
        first, *others = dict.fromkeys(error["msg"] for error in e.errors())  # one for each type that is allowed
        allowed = " or ".join([first, *(text.removeprefix("Input should be ") for text in others)])
        raise Mistake(f"{key}: {allowed}, got {value!r}") from None


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if str(part).isalnum() or str(part).isidentifier())  # no types
    if error["type"] == "missing":
        return f"{where} must be given: add {where}=..."
    if error["type"] == "extra_forbidden":
        model: Any = Settings if len(error["loc"]) == 1 else Settings.model_fields[error["loc"][0]].annotation
        names = list(model.model_fields)
        return f"unknown key {where!r}; choose from: {', '.join(names)}{close(str(error['loc'][-1]), names)}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"
