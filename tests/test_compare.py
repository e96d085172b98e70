"""scripts/compare.py: what it shows of the records in a folder."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import pytest
from rich.console import Console
from test_records import RECORD

from nobackprop.collecting import collect
from nobackprop.records import Record

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def record(signature: str, seed: int, **fields: Any) -> None:
        made = Record(**RECORD | {"signature": signature, "seed": seed} | fields)
        made.write(tmp_path / f"{made.name}-{signature}" / f"seed{seed}" / "record.json")

    return record


def shown(folder: Path) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(compare.table(compare.read(folder)))
    return console.export_text()


def test_the_table_has_mean_and_standard_deviation_best_first(write: Write, tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.90, 0.92, 0.94]):
        write("a" * 12, seed, name="bp_mlp_digits", test={"accuracy": accuracy})
    write("b" * 12, 0, name="fa_mlp_digits", test={"accuracy": 0.95}, stacked=3, wall_s=6.0)
    rows = [line for line in shown(tmp_path).splitlines() if "_mlp_" in line]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")] == ["fa_mlp_digits", "1", "95.00%", "2.0"]
    assert [c.strip() for c in rows[1].strip("│").split("│")] == ["bp_mlp_digits", "3", "92.00% ± 2.00%", "4.5"]


def test_runs_of_one_name_are_told_apart_and_diverged_seeds_counted(write: Write, tmp_path: Path) -> None:
    update = {name: {"arch": {"hidden": [9]}, "update": name} for name in ("mean", "sum")}
    write("a" * 12, 0, config=update["mean"])
    write("a" * 12, 1, config=update["mean"], test=None, diverged_epoch=1)
    write("b" * 12, 0, config=update["sum"], test=None, diverged_epoch=1)
    text = shown(tmp_path)
    (mean,) = [line for line in text.splitlines() if "bp_mlp_digits update=mean " in line]
    (total,) = [line for line in text.splitlines() if "bp_mlp_digits update=sum " in line]
    assert "50.00% (1 diverged)" in mean
    assert "- (1 diverged)" in total


def test_a_file_of_records_is_compared_too(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a" * 12, 0)
    collect([tmp_path], tmp_path / "a.jsonl")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "a.jsonl")])
    compare.main()
    assert (tmp_path / "learning_curves.png").exists()
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "a.jsonl"), "--figure", str(tmp_path / "a.xyz")])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    assert "compare.py: Format 'xyz' is not supported" in capsys.readouterr().err


def test_differences_to_a_rule_are_paired_over_common_seeds(write: Write, tmp_path: Path) -> None:
    rules = {rule: {"rule": {"_target_": f"nobackprop.rules.{rule}.X"}, "max_epochs": 9} for rule in ("bp", "fa")}
    for seed, (bp, fa) in enumerate([(0.90, 0.91), (0.80, 0.84), (0.10, None)]):
        write("a" * 12, seed, config=rules["bp"], test={"accuracy": bp})
        if fa is not None:
            write("b" * 12, seed, name="fa_mlp_digits", config=rules["fa"], test={"accuracy": fa})
    runs = compare.read(tmp_path)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(compare.table(runs, "bp"))
    assert "+2.50 ± 19.06" in console.export_text()  # 12.706 sqrt(4.5 / 2), by hand
    with pytest.raises(
        ValueError, match=r"--against dfa: 0 runs here have this rule, one is needed; rules here: bp, fa"
    ):
        compare.table(runs, "dfa")
    assert compare.differences(runs) == "not only the rule differs: seeds (0,1,2; 0,1)"


def test_what_else_differs_is_said(write: Write, tmp_path: Path) -> None:
    for signature, (rule, lr) in {"a" * 12: ("bp", 0.1), "b" * 12: ("fa", 0.1)}.items():
        write(signature, 0, config={"rule": {"_target_": f"nobackprop.rules.{rule}.X"}, "optimizer": {"lr": lr}})
    assert not compare.differences(compare.read(tmp_path))
    write("c" * 12, 0, config={"rule": {"_target_": "nobackprop.rules.fa.X"}, "optimizer": {"lr": 0.5}})
    assert compare.differences(compare.read(tmp_path)) == "not only the rule differs: optimizer.lr (0.1; 0.5)"


def test_a_key_that_one_run_lacks_or_has_as_null_differs(write: Write, tmp_path: Path) -> None:
    rule = {"_target_": "nobackprop.rules.bp.BP"}
    configs = {"classes": None}, {"classes": 2}, {"classes": 3, "crop": 4}
    for signature, data in zip(("a" * 12, "b" * 12, "c" * 12), configs, strict=True):
        write(signature, 0, config={"rule": rule, "dataset": data})
    runs = compare.read(tmp_path)
    differ = "not only the rule differs: dataset.classes (None; 2; 3), dataset.crop (-; 4)"
    assert compare.differences(runs) == differ
    assert "bp_mlp_digits dataset.classes=3 dataset.crop=4" in compare.labels(runs).values()


def test_the_figure_is_written_where_it_says(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a" * 12, 0)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path)])
    compare.main()
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"learning curves: {tmp_path}/learning_curves.png" in capsys.readouterr().out


def test_a_folder_without_records_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    assert f"no run records in {tmp_path}" in capsys.readouterr().err
