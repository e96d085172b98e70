"""What a run is called: a hash of its config, which is a part of its records' key, and a name."""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any

EXACT = 2**53  # a float holds every integer below it

# What moved since the first records, and the module under which these name it. New records do so too, so that moving
# code orphans none. A line is added where something moves or is renamed, and never changed.
RECORDED = {
    "nobackprop.core.initializers": "nobackprop.initializers",
    "nobackprop.core.losses": "nobackprop.losses",
    "nobackprop.core.network": "nobackprop.network",
    "nobackprop.core.optimizers": "nobackprop.optimizers",
    "nobackprop.data.folders": "nobackprop.imagenet",
    "nobackprop.data.sources": "nobackprop.data",
}
CURRENT = {recorded: current for current, recorded in RECORDED.items()}


def recorded_name(name: str) -> str:
    """What records call a class or function, given by its full name of today."""
    module, _, own = name.rpartition(".")
    return f"{RECORDED.get(module, module)}.{own}"


def current_name(name: str) -> str:
    """The full name of today of what records, or configs of before, call by this name."""
    module, _, own = name.rpartition(".")
    return f"{CURRENT.get(module, module)}.{own}"


def digest(config: Mapping[str, Any]) -> str:
    """A hash of a config in which 1 and 1.0 are one number, and no two integers are."""
    return sha256(json.dumps(_numbers(config), sort_keys=True).encode()).hexdigest()[:12]


def _numbers(tree: Any) -> Any:
    """With integers as floats, as far as floats hold them: rule.beta=1 and rule.beta=1.0 are one config."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    integer = isinstance(tree, int) and not isinstance(tree, bool)
    return float(tree) if integer and abs(tree) < EXACT else tree


def rule_name(rule: Mapping[str, Any]) -> str:
    """What a config's rule is called in conf/rule: the name of its module."""
    return rule["_target_"].split(".")[-2]


def run_name(rule: Mapping[str, Any], arch: Mapping[str, Any], dataset: str) -> str:
    """`rule_arch_dataset`, as in `lra_e_mlp_mnist`."""
    return f"{rule_name(rule)}_{arch['_target_'].split('.')[-1]}_{dataset}"


def before(target: Any) -> dict[str, Any]:
    """What each key of a component means where a record or a file of weights lacks it: what the code of then computed.

    A key that came after the first records says it beside itself, and never changes it, whatever its default:
    `difference: str = field(default="exact", metadata={"before": "plain"})`.
    """
    return (
        {f.name: f.metadata["before"] for f in fields(target) if "before" in f.metadata} if is_dataclass(target) else {}
    )
