"""Records made for tests."""

import json
from typing import Any

from nobackprop.records.identity import digest, run_name
from nobackprop.records.record import Record

CONFIG: dict[str, Any] = {
    "rule": {"_target_": "nobackprop.rules.bp.BP"},
    "dataset": {"name": "digits", "source": {"_target_": "nobackprop.data.sources.Digits"}, "classes": 2},
    "arch": {"_target_": "nobackprop.core.network.mlp", "hidden": [9], "activation": "tanh"},
    "trainer": {"precision": "32-true"},
    "max_epochs": 9,
    "batch_size": 5,
    "update": "mean",
}
RECORD: dict[str, Any] = {
    "signature": digest(CONFIG),
    "seed": 3,
    "name": "bp_mlp_digits",
    "config": CONFIG,
    "command": "nobackprop rule=bp",
    "commit": None,
    "dirty": None,
    "versions": {"torch": "2.15.0"},
    "data": {"name": "digits", "fingerprint": "f", "classes": [4, 2], "train": 9, "validation": 1, "test": 2},
    "machine": {
        "system": "Linux",
        "processor": "p",
        "cores": 2,
        "device": "cpu",
        "threads": 1,
        "matmul": "highest",
        "compiled": False,
        "devices": 1,
    },
    "precision": "32-true",
    "stacked": 1,
    "finished": "2026-01-01T00:00:00+00:00",
    "wall_s": 1.5,
    "steps": 10,
    "epochs": [{"epoch": 1, "step": 10, "train/loss": None, "val/loss": 0.25, "val/accuracy": 0.5}],
    "best_epoch": 1,
    "diverged_epoch": None,
    "test": {"loss": 0.5, "accuracy": 0.5},
}


def made(**fields: Any) -> Record:
    """A record with these parts, and what follows from them."""
    values: dict[str, Any] = RECORD | fields
    rule, arch, dataset = (values["config"][name] for name in ("rule", "arch", "dataset"))
    values |= {"signature": digest(values["config"]), "name": run_name(rule, arch, dataset["name"])}
    values |= {"steps": values["epochs"][-1]["step"], "best_epoch": values["best_epoch"] if values["test"] else None}
    return Record(**values)


def format_1(**fields: Any) -> bytes:
    """A line as earlier versions wrote it, without a checksum."""
    return json.dumps({"format": 1} | RECORD | fields, separators=(",", ":")).encode() + b"\n"


# Identity
