"""Records: written whole, checked when read, and honest about the source they come from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_config
from recorded import CONFIG, RECORD, format_1, made

from nobackprop.mistakes import Mistake
from nobackprop.records import files, machine, provenance
from nobackprop.records.files import checksum
from nobackprop.records.identity import digest
from nobackprop.records.record import Record
from nobackprop.training.config import Settings


def test_every_recorded_run_has_the_signature_of_its_config_and_is_valid() -> None:
    files = [path for folder in ("records", "trials") for path in sorted((ROOT / "results" / folder).glob("*.jsonl"))]
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    assert len(lines) >= 3085
    for line in lines:
        record, content = Record.parse(line, "here", "mend it"), json.loads(line)
        assert digest(content["config"]) == content["signature"] == record.signature


BIG = 2**53


def test_one_number_is_one_config_and_no_two_integers_are() -> None:
    assert digest({"beta": 1}) == digest({"beta": 1.0}) == digest({"beta": 1}) != digest({"beta": True})
    assert digest({"seeds": [BIG - 1]}) == digest({"seeds": [float(BIG - 1)]})
    integers = [*range(BIG - 2, BIG + 5), 10**17, 10**17 + 1, -BIG, -BIG - 1, 10**400]
    assert len({digest({"seeds": [n]}) for n in integers}) == len(integers)
    of = [Settings.of(run_config("dataset.classes=2", f"dataset.classes_seed={n}")) for n in (BIG, BIG + 1)]
    assert of[0].signature != of[1].signature


def test_an_integer_that_no_float_holds_survives_its_record() -> None:
    record = made(seed=BIG + 1, config=CONFIG | {"classes_seed": BIG + 3})
    read = Record.parse(record.line(), "here", "mend it")
    assert (read.seed, read.config["classes_seed"]) == (BIG + 1, BIG + 3)
    assert read == record


# Files


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = Record(**RECORD)
    record.write(tmp_path / "a" / "record.json")
    assert Record.read(tmp_path / "a" / "record.json") == record
    (line,) = (tmp_path / "a" / "record.json").read_bytes().splitlines()
    start, rest = line[:42], line[42:]
    assert start.decode() == f'{{"format":2,"checksum":"{checksum(rest)}",'
    assert json.loads(line)["seed"] == 3
    assert os.listdir(tmp_path / "a") == ["record.json"]


def test_a_record_of_before_checksums_is_read() -> None:
    assert Record.parse(format_1(), "here", "mend it") == Record(**RECORD)
    assert Record.parse(json.dumps({"format": 1} | RECORD).encode(), "here", "mend it") == Record(**RECORD)


def test_a_result_that_is_not_finite_leaves_a_record_that_can_be_read() -> None:
    """What was trained is not lost for a loss on test images that overflows."""
    record = made(test={"accuracy": 0.5, "loss": inf, "top5": nan})
    assert record.test == {"accuracy": 0.5}
    assert Record.parse(record.line(), "here", "mend it") == record


def epochs(**changes: Any) -> dict[str, Any]:
    return {"epochs": [RECORD["epochs"][0] | changes]}


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def configured(config: dict[str, Any]) -> dict[str, Any]:
    return {"config": config, "signature": digest(config)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: .*"),
        ({"seed": "3"}, "seed: .*"),
        ({"wall_s": None}, "wall_s: .*"),
        ({"wall_s": inf}, "wall_s: .*"),
        ({"stacked": 10**400}, "stacked: .*"),
        ({"note": "edited"}, "note: .*"),
        ({"commit": "[red]"}, "commit: .*"),
        ({"commits": ["a b"]}, r"commits\.0: .*"),
        ({"data": RECORD["data"] | {"classes": []}}, r"data\.classes: .*"),
        (epochs(epoch="one"), r"epochs\.0\.epoch.*"),
        ({"epochs": []}, "epochs: .*"),
        (epochs(epoch=2), "epochs: the numbers are not 1 to 1"),
        (epochs(step=0), "epochs: the steps do not grow up to epoch 1"),
        (epochs(step=11), "1 epochs and 11 steps do not fit max_epochs=9, steps=10"),
        (epochs(**{"val/accuracy": None}), "epochs: number 1 lacks val/loss, or a val/accuracy between 0 and 1"),
        (epochs(**{"val/accuracy": 1.5}), "epochs: number 1 lacks val/loss, or a val/accuracy between 0 and 1"),
        ({"epochs": [without(RECORD["epochs"][0], "val/loss")]}, "epochs: number 1 lacks val/loss.*"),
        ({"best_epoch": 2}, "best_epoch is 2 of 1 epochs, test is .*"),
        ({"best_epoch": None}, "best_epoch is None of 1 epochs, test is .*"),
        ({"test": None}, "best_epoch is 1 of 1 epochs, test is None"),
        ({"diverged_epoch": 3}, "diverged_epoch is 3, the last epoch is 1"),
        ({"test": {"loss": 0.5}}, "test lacks an accuracy between 0 and 1"),
        ({"test": {"accuracy": 2.0}}, "test lacks an accuracy between 0 and 1"),
        ({"signature": "0123456789ab"}, "the signature is 0123456789ab, that of the config is [0-9a-f]{12}"),
        ({"name": "bp"}, "the name is bp, that of the config is bp_mlp_digits"),
        (configured(without(CONFIG, "rule")), "config: rule: Field required"),
        (configured(CONFIG | {"rule": {"_target_": "BP"}}), r"config: rule\._target_: .*"),
        (configured(CONFIG | {"rule": None}), "config: rule: .*"),
        (configured(without(CONFIG, "arch")), "config: arch: Field required"),
        (configured(CONFIG | {"dataset": {"name": "digits"}}), r"config: dataset\.classes: Field required"),
        (configured(CONFIG | {"dataset": {"name": "a/b", "classes": 2}}), r"config: dataset\.name: .*"),
        (configured(CONFIG | {"batch_size": 0}), "config: batch_size: .*"),
        (configured(without(CONFIG, "max_epochs")), "config: max_epochs: Field required"),
        ({"\x1b[31mred": 1}, r"\\x1b\[31mred: .*"),
    ],
    ids=str,
)
def test_a_record_that_is_not_valid_as_a_whole_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(format_1(**change))
    with pytest.raises(
        Mistake, match=rf"record\.json is no valid run record \({message}\): delete it to run this seed"
    ):
        Record.read(path)


def test_a_record_of_before_a_setting_was_added_is_valid() -> None:
    assert made(config=without(CONFIG, "update", "trainer")).config.keys() == CONFIG.keys() - {"update", "trainer"}


def test_a_seed_that_diverged_has_a_valid_record() -> None:
    first = {"epoch": 1, "step": 10, "train/loss": None, "val/loss": None, "val/accuracy": 0.5}
    assert made(epochs=[first], diverged_epoch=1, test=None).best == {}
    second = first | {"epoch": 2, "step": 20}
    assert made(epochs=[*RECORD["epochs"], second], diverged_epoch=2).best == RECORD["epochs"][0]


@pytest.mark.parametrize(
    "epochs",
    [
        {"val/accuracy": {"of": 0, "counts": [1]}},
        {"val/accuracy": {"of": 2.5, "counts": [1]}},
        {"val/accuracy": {"of": 2}},
        {"val/accuracy": {"of": 2, "counts": [None]}},
        {"val/accuracy": {"of": 2, "counts": 1}},
        {"val/accuracy": {"of": 1, "counts": [10**400]}},
        {"val/accuracy": {"range": [1, 10**10, 1]}},
        {"val/accuracy": [0.5], "epoch": {"range": [1, 10**10, 1]}},
        {"val/accuracy": [0.5], "epoch": {"range": [1, 10**30, 1]}},
        {"epoch": {"range": [1, 10**10, 1]}, "step": {"range": [1, 10**10, 1]}},
        {"val/accuracy": [1], "b": []},
        {"val/accuracy": [1], "a": {"range": [1, 2, 0]}},
        {"val/accuracy": [1], "a": {"range": [1, 2]}},
        {"val/accuracy": [1], "a": {"range": ["1", 2, 1]}},
        {"val/accuracy": 3},
        {},
    ],
)
def test_damaged_columns_are_refused_before_they_fill_the_memory(epochs: dict[str, Any]) -> None:
    with pytest.raises(Mistake, match=r"here is no valid run record .*damaged columns.*: mend it"):
        Record.parse(format_1(epochs=epochs), "here", "mend it")


def test_what_fills_the_memory_is_not_written_either() -> None:
    epochs = [RECORD["epochs"][0] | {"epoch": i + 1, "step": step} for i, step in enumerate([1, 2, BIG - 1])]
    record = made(epochs=epochs)
    assert Record.parse(record.line(), "here", "mend it") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda line: line.replace(b'"seed":3', b'"seed":4'),
            r"here is damaged \(its checksum does not fit\): mend it",
        ),
        (
            lambda line: line.replace(b'"seed":3', b'"seed": 3'),
            r"here is damaged \(its checksum does not fit\): mend it",
        ),
        (lambda line: line.replace(b"checksum", b"checksun"), "here is no valid run record .*: mend it"),
        (
            lambda line: line.replace(b'"format":2', b'"format":1'),
            r"here is no valid run record \(checksum: .*: mend it",
        ),
        (lambda line: line[:-30], r"here is damaged \(its checksum does not fit\): mend it"),
        (lambda line: line[:30], "here is no valid run record .*: mend it"),
        (lambda line: b"", "here is no valid run record .*: mend it"),
        (lambda line: b"[1]", "here is no valid run record .*: mend it"),
        (lambda line: b"\xff", "here is no valid run record .*: mend it"),
        (
            lambda line: line.replace(b'"format":2', b'"format":3'),
            "is of record format 3, which this version does not know",
        ),
    ],
)
def test_a_damaged_line_names_its_place_and_the_remedy(change: Callable[[bytes], bytes], message: str) -> None:
    for line in (Record(**RECORD).line(), Record(**RECORD).line().rstrip()):
        with pytest.raises(Mistake, match=message):
            Record.parse(change(line), "here", "mend it")


def test_a_line_whose_end_was_changed_by_git_is_read() -> None:
    assert Record.parse(Record(**RECORD).line().rstrip() + b"\r\n", "here", "mend it") == Record(**RECORD)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    files.write_atomically(path, b"old")

    def no_space(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


SECRET = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("nobackprop rule=bp paths.runs=/r seeds=3", "nobackprop rule=bp seeds=3"),
        ("nobackprop ++paths.data=d hydra.run.dir=h hydra.sweeper.n_trials=9", "nobackprop hydra.sweeper.n_trials=9"),
        ("nobackprop --config-dir mine rule=my_rule", "nobackprop rule=my_rule"),
        ("nobackprop --config-dir=mine -cd mine rule=my_rule", "nobackprop rule=my_rule"),
        ("nobackprop dataset=folder dataset.source.root=d +dataset.source.cache=c", "nobackprop dataset=folder"),
        ("nobackprop dataset=folder dataset.source={root:d} seeds=2", "nobackprop dataset=folder seeds=2"),
        ("tune.py compare --runs r --set paths.data=d --jobs 2", "tune.py compare --jobs 2"),
        ("reproduce.py mdfa --set=paths.data=d --set=max_epochs=3", "reproduce.py mdfa --set=max_epochs=3"),
        ("nobackprop +hydra.job.env_set.WANDB_API_KEY=k logger=wandb", "nobackprop logger=wandb"),
        ("nobackprop +hydra.job.env_set={WANDB_API_KEY:k} seeds=3", "nobackprop seeds=3"),
        ("nobackprop +hydra={job:{env_set:{A:k}}} hydra/sweeper=optuna", "nobackprop hydra/sweeper=optuna"),
        ("nobackprop hydra.sweeper.storage=postgresql://me:pw@host/db seeds=3", "nobackprop seeds=3"),
        ("nobackprop logger.tags=[a,b] logger.entity=me ~logger.group logger.mode=online", "nobackprop"),
        ("nobackprop logger={entity:me} paths={runs:r} launcher={account:me}", "nobackprop"),
        ("nobackprop launcher=slurm launcher.account=me launcher.options={mail-user:me}", "nobackprop launcher=slurm"),
        (f"nobackprop +rule.key={SECRET} seeds=3", "nobackprop seeds=3"),
        ("nobackprop +x.api_key=k +x={apikey:k} +y.access_token=t +z.password=p seeds=3", "nobackprop seeds=3"),
        ("nobackprop dataset.source.train=/home/me/t.parquet +x=[/a,b] +y={a:/b} seeds=3", "nobackprop seeds=3"),
        ("mine.py /home/me/data ~/data file:///x rule=bp", "mine.py rule=bp"),
        ("nobackprop rule=monkey init.forward=U1 arch.filters=[[3,3,1],[4,3,2,1]] ~tuned", None),
        ("nobackprop +experiment=compare/mlp rule=fa +tuned@_global_=compare/mlp_fa optimizer.lr=1e-3", None),
    ],
)
def test_the_command_leaves_out_secrets_and_where_things_are(
    monkeypatch: pytest.MonkeyPatch, given: str, kept: str | None
) -> None:
    monkeypatch.setattr("sys.argv", given.split())
    assert provenance.command().replace("'", "") == (kept or given)


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_packages_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool
) -> None:
    file = tmp_path / "__init__.py"
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    if tracked:
        file.write_text("")
        git(tmp_path, "add", "__init__.py")
    git(tmp_path, "commit", "-qm", "x")
    file.write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    monkeypatch.setattr(provenance, "source_state", provenance.source_state.__wrapped__)
    assert provenance.source_state() == ((git(tmp_path, "rev-parse", "HEAD"), False) if tracked else (None, None))
    if tracked:
        file.write_text("changed")
        assert provenance.source_state()[1] is True


@pytest.mark.parametrize(
    ("path", "dirty"),
    [
        ("src/nobackprop/rules/mine.py", True),
        ("src/nobackprop/records/record.py", True),
        ("src/hydra_plugins/mine.py", True),
        ("conf/rule/mine.yaml", True),
        ("conf/train.yaml", True),
        ("requirements.lock", True),
        ("pyproject.toml", True),
        ("README.md", False),
        ("train.log", False),
        ("results/records/a.jsonl", False),
    ],
)
def test_edits_are_those_of_what_can_change_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, dirty: bool
) -> None:
    package = tmp_path / "src" / "nobackprop" / "__init__.py"
    for file in (package, tmp_path / "conf" / "train.yaml", tmp_path / "README.md"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    monkeypatch.setattr(provenance, "PACKAGE", package.parent)
    assert provenance.source_state.__wrapped__() == (git(tmp_path, "rev-parse", "HEAD"), False)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("changed")
    assert provenance.source_state.__wrapped__()[1] is dirty


A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("now", "made_by", "told"),
    [
        ((A, False), [{"commit": A, "dirty": False}], ""),
        ((A, False), [{"commit": A, "dirty": False}, {"commit": B, "dirty": False}], "commit bbbbbbb"),
        ((A, True), [{"commit": A, "dirty": True}] * 2, "commit aaaaaaa with edits"),
        ((None, None), [{"commit": None, "dirty": None}], ""),
        ((A, False), [{"commit": None, "dirty": None}], "no commit"),
        ((A, False), [{"commit": A, "dirty": False, "commits": [A]}], ""),
        ((A, False), [{"commit": A, "dirty": False, "commits": [B, A]}], "commit bbbbbbb"),
        (
            (A, False),
            [{"commit": A, "dirty": False, "commits": ["unknown", f"{A}+edits", A]}],
            "commit aaaaaaa with edits, no commit",
        ),
    ],
)
def test_other_code_that_trained_any_part_of_records_is_told(
    monkeypatch: pytest.MonkeyPatch, now: Any, made_by: list[dict[str, Any]], told: str
) -> None:
    monkeypatch.setattr(provenance, "source_state", lambda: now)
    assert provenance.other_code([made(**fields) for fields in made_by]) == told


def test_who_reads_records_waits_for_no_torch_pandas_or_scipy() -> None:
    code = "import sys, nobackprop.records.gathering; print({'torch', 'pandas', 'scipy', 'hydra'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def test_the_machine_is_described() -> None:
    here = machine.machine(torch.device("cpu"))
    assert here.device == "cpu"
    assert here.threads == torch.get_num_threads()
    assert 1 <= here.cores <= (os.cpu_count() or 1)
