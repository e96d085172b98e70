"""Records: written whole, checked when read, and honest about the source they come from."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nobackprop import records
from nobackprop.records import Record

RECORD: dict[str, Any] = {
    "signature": "0123456789ab",
    "seed": 3,
    "name": "bp_mlp_digits",
    "config": {"rule": {"_target_": "nobackprop.rules.bp.BP"}},
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
    "epochs": [{"epoch": 1, "step": 10, "train/loss": None, "val/accuracy": 0.5}],
    "best_epoch": 1,
    "diverged_epoch": None,
    "test": {"accuracy": 0.5},
}


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = Record(**RECORD)
    record.write(tmp_path / "a" / "record.json")
    assert Record.read(tmp_path / "a" / "record.json") == record
    (line,) = (tmp_path / "a" / "record.json").read_text().splitlines()
    assert json.loads(line)["format"] == 1
    assert os.listdir(tmp_path / "a") == ["record.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"wall_s": None}, "wall_s"),
        ({"note": "edited"}, "note"),
        ({"epochs": [{"epoch": "one"}]}, r"epochs\.0\.epoch.*"),
    ],
    ids=["seed", "wall_s", "extra", "epochs"],
)
def test_a_wrong_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD | {"format": 1} | change))
    with pytest.raises(ValueError, match=rf"record\.json is no valid run record \({message}: .*\): delete it"):
        Record.read(path)


def test_a_record_of_another_format_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD | {"format": 2, "more": 1}))
    with pytest.raises(ValueError, match="is of record format 2, which this version does not know"):
        Record.read(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    records.write_atomically(path, b"old")

    def no_space(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        records.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("nobackprop rule=bp paths.runs=/r seeds=3", "nobackprop rule=bp seeds=3"),
        ("nobackprop ++paths.data=/d hydra.run.dir=/h hydra.sweeper.n_trials=9", "nobackprop hydra.sweeper.n_trials=9"),
        ("nobackprop --config-dir /mine rule=my_rule", "nobackprop rule=my_rule"),
        ("nobackprop --config-dir=/mine -cd /mine rule=my_rule", "nobackprop rule=my_rule"),
        ("nobackprop dataset=folder dataset.source.root=/d dataset.source.cache=/c", "nobackprop dataset=folder"),
        ("tune.py compare --runs /r --set paths.data=/d --jobs 2", "tune.py compare --jobs 2"),
    ],
)
def test_the_command_leaves_out_where_things_are_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    monkeypatch.setattr("sys.argv", given.split())
    assert records.command() == kept


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_packages_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool
) -> None:
    file = tmp_path / "records.py"
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    if tracked:
        file.write_text("")
        git(tmp_path, "add", "records.py")
    git(tmp_path, "commit", "-qm", "x")
    file.write_text("")
    monkeypatch.setattr(records, "__file__", str(file))
    monkeypatch.setattr(records, "source_state", records.source_state.__wrapped__)
    assert records.source_state() == ((git(tmp_path, "rev-parse", "HEAD"), False) if tracked else (None, None))
    if tracked:
        file.write_text("changed")
        assert records.source_state()[1] is True


def test_records_of_other_code_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "source_state", lambda: ("a" * 40, False))
    made = [Record(**RECORD | {"commit": c and c * 40, "dirty": dirty}) for c, dirty in (("a", False), ("b", False))]
    assert not records.other_code(made[:1])
    assert records.other_code(made) == "commit bbbbbbb"
    edited = Record(**RECORD | {"commit": "a" * 40, "dirty": True})
    monkeypatch.setattr(records, "source_state", lambda: ("a" * 40, True))
    assert records.other_code([edited, edited]) == "commit aaaaaaa with edits"


def test_the_machine_is_described() -> None:
    machine = records.machine(torch.device("cpu"))
    assert machine.device == "cpu"
    assert machine.threads == torch.get_num_threads()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
