"""The settings of a run: what may be set, checked at once; and what identifies its result."""

import json
from collections.abc import Mapping
from hashlib import sha256
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
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
    ValidationInfo,
    field_validator,
)
from pydantic import ValidationError as PydanticError

from nobackprop.mistakes import Mistake
from nobackprop.rule import before

MOST_SEEDS = 100_000  # when counted; more are a slip of the pen
Component = dict[str, Any]  # a mapping with Hydra's `_target_`


def _seed_list(seeds: Any) -> Any:
    if isinstance(seeds, list):
        return seeds
    if isinstance(seeds, int) and not isinstance(seeds, bool) and 0 < seeds <= MOST_SEEDS:
        return list(range(seeds))
    raise Mistake(f"write how many, 1 to {MOST_SEEDS}, or a list such as [0,4,7]")


def _fraction_or_count(value: float) -> float:
    if 0 < value < 1 or (isinstance(value, int) and value > 0):
        return value
    raise Mistake("write a fraction between 0 and 1, or how many images")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatasetSettings(_Strict):
    """conf/dataset: where images come from and which of them a seed trains on."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # a part of the run's folder
    source: Component
    classes: int | None
    classes_seed: NonNegativeInt | None
    validation: Annotated[float | int, AfterValidator(_fraction_or_count)]
    split: Literal["random", "first", "last"]
    normalize: bool
    flip: bool
    crop: NonNegativeInt


class InitSettings(_Strict):
    """conf/init: a `_target_` or one of the mDFA program's strings, for W and for the rule's own weights."""

    forward: Component | str | int | float
    backward: Component | str | int | float


class TrainerSettings(_Strict):
    """conf/trainer: what of Lightning's Trainer may be set; all else would break the count of epochs and steps."""

    accelerator: str
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


class Paths(_Strict):
    data: str
    runs: str


class Settings(_Strict):
    """Every top-level key of conf/train.yaml, in its order; unknown keys are refused."""

    rule: Component
    dataset: DatasetSettings
    arch: Component
    init: InitSettings
    loss: Component
    optimizer: Component
    schedule: Component  # empty: none
    trainer: TrainerSettings
    logger: Component  # empty: none
    diagnostics: Component  # empty: none
    launcher: Component
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1), BeforeValidator(_seed_list)]  # how many, or a list
    max_epochs: PositiveInt
    max_steps: PositiveInt | None
    batch_size: PositiveInt
    update: Literal["mean", "sum", "unit_norm", "unit_norm_relative"]
    l2: NonNegativeFloat
    patience: PositiveInt | None
    stack: bool | None
    threads: PositiveInt
    compile: bool | None
    recompute: bool | None
    workers: PositiveInt | None
    checkpoint_minutes: NonNegativeFloat
    dry_run: bool
    paths: Paths

    @classmethod
    def of(cls, cfg: DictConfig) -> "Settings":
        """The settings in a composed config. Raises Mistake, naming every key at fault and what it may be."""
        try:
            content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            _check_finite(content)
            settings = cls.model_validate(content)
        except MissingMandatoryValue as e:
            raise Mistake(f"{e.full_key} must be given: add {e.full_key}=...") from None
        except PydanticError as e:
            raise Mistake("; ".join(_sentence(error) for error in e.errors())) from None
        if len(set(settings.seeds)) < len(settings.seeds):
            raise Mistake(f"seeds: {settings.seeds} names a seed twice; seeds=3 means [0,1,2], seeds=[0,4,7] a list")
        return settings

    @property
    def name(self) -> str:
        """`rule_arch_dataset`, as in `lra_e_mlp_mnist`."""
        return f"{rule_name(self.rule)}_{self.arch['_target_'].split('.')[-1]}_{self.dataset.name}"

    @property
    def folder(self) -> Path:
        """Where the run keeps everything: one folder a seed, and checkpoints while it trains."""
        return Path(self.paths.runs) / f"{self.name}-{self.signature}"

    def identity(self) -> dict[str, Any]:
        """All that can change a seed's result, not what cannot: no seeds, loggers, paths, devices or compiler.

        The last two, and threads, change float32 rounding; a record states them beside its config. A component's key is
        left out where it has the value that records without it mean, so that these keep their signatures.
        """
        how = {"stack", "compile", "recompute", "threads", "workers", "launcher", "checkpoint_minutes", "dry_run"}
        config = self.model_dump(exclude={"seeds", "logger", "diagnostics", "paths", *how})
        for key in ("root", "download", "cache", "verify"):
            config["dataset"]["source"].pop(key, None)
        config["trainer"] = {"precision": self.trainer.precision}
        return _as_recorded(config)

    @property
    def signature(self) -> str:
        """A hash of `identity`: with the seed it is the key of a record."""
        return digest(self.identity())


def rule_name(rule: Mapping[str, Any]) -> str:
    """What a config's rule is called in conf/rule: the name of its module."""
    return rule["_target_"].split(".")[-2]


def _check_finite(tree: Any, *path: Any) -> None:
    """Raises Mistake for a number that is infinite or none: no record could say what was run."""
    if isinstance(tree, float) and not isfinite(tree):
        raise Mistake(f"{'.'.join(map(str, path))}: write a finite number, got {tree}")
    nodes = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, node in nodes:
        _check_finite(node, *path, key)


def digest(config: dict[str, Any]) -> str:
    """A hash of a config in which 1 and 1.0 are one number."""
    return sha256(json.dumps(_as_floats(config), sort_keys=True).encode()).hexdigest()[:12]


def _as_recorded(tree: Any) -> Any:
    """With the later keys of components, also where a config leaves them to their defaults, and without those that have
    the value which records without them mean.
    """
    if not isinstance(tree, dict):
        return tree
    target = get_object(tree["_target_"]) if "_target_" in tree else None
    old = before(target)
    given = {key: getattr(target, key) for key in old} | tree
    return {key: _as_recorded(value) for key, value in given.items() if key not in old or value != old[key]}


def _as_floats(tree: Any) -> Any:
    """With every number a float: rule.beta=1 and rule.beta=1.0 are one config."""
    if isinstance(tree, dict):
        return {key: _as_floats(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_as_floats(value) for value in tree]
    return float(tree) if isinstance(tree, int) and not isinstance(tree, bool) else tree


def build(node: Component, key: str, *args: Any, **kwargs: Any) -> Any:
    """Instantiates a config node, called `key` in messages. Raises Mistake for an unknown target, key or value."""
    try:
        target = get_object(node["_target_"])
    except (KeyError, ValueError, ImportError, AttributeError) as e:
        raise Mistake(f"{key}: no such _target_, {node.get('_target_')!r}: {e}") from None
    if not callable(target):
        raise Mistake(f"{key}: _target_ {node['_target_']!r} must name a class or a function")
    known = {name: p for name, p in signature(target).parameters.items() if name not in ("params", "optimizer")}
    for name in node:
        if name.startswith("_"):
            continue
        if name not in known:
            raise Mistake(f"{key}: unknown key {name}; choose from: {', '.join(known) or 'none'}")
        annotation = known[name].annotation  # others', but for flags, promise less than they take
        if target.__module__.startswith("nobackprop.") or annotation in (bool, bool | None):
            _check_type(f"{key}.{name}", node[name], annotation)
    try:
        return instantiate(node, *args, **kwargs, _convert_="all")
    except InstantiationException as e:
        raise Mistake(f"{key}: {e.__cause__ or e}") from e


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises Mistake where a value read from a config is not of the annotated type; `no` is a string, not false."""
    try:
        TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except PydanticError as e:
        raise Mistake(f"{key}: {e.errors()[0]['msg']}, got {value!r}") from None


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        model: Any = Settings if len(error["loc"]) == 1 else Settings.model_fields[error["loc"][0]].annotation
        return f"unknown key {where!r}; choose from: {', '.join(model.model_fields)}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"
