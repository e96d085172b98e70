"""The identity of a run: a hash of its config, which is a part of its records' key, and its name."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

EXACT = 2**53  # a float can hold every integer below it

# Classes and functions that have moved since the first records, with the module under which records name them. New
# records use the old names, too, so that no record loses its run. Add a line when something moves or is renamed, and
# never change one.
RECORDED = {
    "nobackprop.core.initializers": "nobackprop.initializers",
    "nobackprop.core.losses": "nobackprop.losses",
    "nobackprop.core.network": "nobackprop.network",
    "nobackprop.core.optimizers": "nobackprop.optimizers",
    "nobackprop.data.folders": "nobackprop.imagenet",
    "nobackprop.data.sources": "nobackprop.data",
}
CURRENT = {recorded: current for current, recorded in RECORDED.items()}
# Keys that functions got after the first records, with what the code computed before. Classes have them in metadata.
BEFORE = {"nobackprop.core.architectures.vit": {"own_feedback": True}}


def recorded_name(name: str) -> str:
    """The name in records of a class or function, given by its full name of today."""
    module, _, own = name.rpartition(".")
    return f"{RECORDED.get(module, module)}.{own}"


def current_name(name: str) -> str:
    """The full name of today of a class or function, given by its name in records or old configs."""
    module, _, own = name.rpartition(".")
    return f"{CURRENT.get(module, module)}.{own}"


def digest(config: Mapping[str, Any]) -> str:
    """A hash of a config in which 1 and 1.0 are one number, and no two integers are."""
    return sha256(json.dumps(_numbers(config), sort_keys=True).encode()).hexdigest()[:12]


def _numbers(tree: Any) -> Any:
    """The same with integers as floats, where floats can hold them: rule.beta=1 and rule.beta=1.0 are one config."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    integer = isinstance(tree, int) and not isinstance(tree, bool)
    return float(tree) if integer and abs(tree) < EXACT else tree


def rule_name(rule: Mapping[str, Any]) -> str:
    """The name of a config's rule in conf/rule, which is that of its module."""
    return rule["_target_"].split(".")[-2]


def run_name(rule: Mapping[str, Any], arch: Mapping[str, Any], dataset: str) -> str:
    """`rule_arch_dataset`, such as `lra_e_mlp_mnist`."""
    return f"{rule_name(rule)}_{arch['_target_'].split('.')[-1]}_{dataset}"


def before(target: Any) -> dict[str, Any]:
    """The value of each later key of a component where a record or a file of weights lacks it.

    It says what the code computed before the key existed. A key that came after the first records has it in its
    metadata, where it never changes, whatever the default:
    `difference: str = field(default="exact", metadata={"before": "plain"})`. A function has it in BEFORE.
    """
    if is_dataclass(target):
        return {f.name: f.metadata["before"] for f in fields(target) if "before" in f.metadata}
    return BEFORE.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}", {})
