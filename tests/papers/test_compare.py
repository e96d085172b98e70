"""scripts/compare.py: what it shows of the records in a folder."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from recorded import CONFIG, made
from rich.console import Console

from nobackprop.papers import compare
from nobackprop.records.gathering import gather

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(seed, **fields)` writes a record; settings go into its config, and accuracy is its test accuracy."""

    def record(seed: int, accuracy: float | None = 0.5, rule: str = "bp", config: Any = (), **fields: Any) -> None:
        config = CONFIG | {"rule": {"_target_": f"nobackprop.rules.{rule}.X"}} | dict(config)
        made_of = made(seed=seed, config=config, test=None if accuracy is None else {"accuracy": accuracy}, **fields)
        made_of.write(tmp_path / made_of.run / f"seed{seed}" / "record.json")

    return record


def shown(folder: Path) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(compare.table(compare.read(folder)))
    return console.export_text()


def test_the_table_has_mean_and_standard_deviation_best_first(write: Write, tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.90, 0.92, 0.94]):
        write(seed, accuracy)
    write(0, 0.95, "fa", stacked=3, wall_s=6.0)
    rows = [line for line in shown(tmp_path).splitlines() if "_mlp_" in line]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")] == ["fa_mlp_digits", "1", "95.00%", "2.0"]
    assert [c.strip() for c in rows[1].strip("│").split("│")] == ["bp_mlp_digits", "3", "92.00% ± 2.00%", "4.5"]


def test_runs_of_one_name_are_told_apart_and_diverged_seeds_counted(write: Write, tmp_path: Path) -> None:
    write(0)
    write(1, None, diverged_epoch=1)
    write(0, None, diverged_epoch=1, config={"update": "sum"})
    text = shown(tmp_path)
    (mean,) = [line for line in text.splitlines() if "bp_mlp_digits update=mean " in line]
    (total,) = [line for line in text.splitlines() if "bp_mlp_digits update=sum " in line]
    assert "50.00% (1 diverged)" in mean
    assert "- (1 diverged)" in total


def test_a_file_of_records_is_compared_too(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(0)
    gather([tmp_path], tmp_path / "a.jsonl")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "a.jsonl")])
    compare.main()
    assert (tmp_path / "learning_curves.png").exists()
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "a.jsonl"), "--figure", str(tmp_path / "a.xyz")])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    assert re.search(r"compare\.py: .*a\.xyz: a figure is written as one of .*\.png", capsys.readouterr().err)


def test_differences_to_a_rule_are_paired_over_common_seeds(write: Write, tmp_path: Path) -> None:
    for seed, (bp, fa) in enumerate([(0.90, 0.91), (0.80, 0.84), (0.10, None)]):
        write(seed, bp)
        if fa is not None:
            write(seed, fa, "fa")
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
    for rule in ("bp", "fa"):
        write(0, rule=rule, config={"optimizer": {"lr": 0.1}})
    assert not compare.differences(compare.read(tmp_path))
    write(0, rule="fa", config={"optimizer": {"lr": 0.5}})
    assert compare.differences(compare.read(tmp_path)) == "not only the rule differs: optimizer.lr (0.1; 0.5)"


def test_a_key_that_one_run_lacks_or_has_as_null_differs(write: Write, tmp_path: Path) -> None:
    for classes, more in ((None, {}), (2, {}), (3, {"crop": 4})):
        write(0, config={"dataset": {"name": "digits", "classes": classes, **more}})
    runs = compare.read(tmp_path)
    differ = compare.differences(runs)
    assert sorted(re.findall(r"dataset\.classes \((.*?)\)", differ)[0].split("; ")) == ["2", "3", "None"]
    assert sorted(re.findall(r"dataset\.crop \((.*?)\)", differ)[0].split("; ")) == ["-", "4"]
    assert "bp_mlp_digits dataset.classes=3 dataset.crop=4" in compare.labels(runs).values()


ODD = "[red]x[/red] :smile: $\\alpha$ $ \x1b[31m\u202e\n=1"
TOLD = ODD.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\n", "\\n")


def test_names_are_shown_as_they_are(write: Write, tmp_path: Path) -> None:
    """They are of records that may come from anywhere, and can't colour, blink or be typeset."""
    write(0, rule="_a", config={"init": {"forward": ODD, ODD: 1}})
    write(0, rule="_a", config={"init": {"forward": "U1"}})
    runs = compare.read(tmp_path)
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(compare.table(runs))
    (line,) = [line for line in console.export_text().splitlines() if "forward=[red]" in line]
    assert f"_a_mlp_digits init.forward={TOLD} init.{TOLD}=1 " in line
    assert ODD in compare.differences(runs)
    shown: list[Any] = []

    def show(figure: Figure, *_: Any, **options: Any) -> None:
        shown.extend(figure.findobj(Text))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", show)
        compare.figure(runs, tmp_path / "a.png")
    assert {text.get_text().strip() for text in shown} >= {f"_a_mlp_digits init.forward={TOLD} init.{TOLD}=1"}
    assert not any(text.get_parse_math() for text in shown)
    compare.figure(runs, tmp_path / "a.png")  # an odd number of $ would be an error
    assert mpl.rcParams["text.parse_math"]


def test_a_record_that_is_not_valid_is_told_and_the_others_are_compared(write: Write, tmp_path: Path) -> None:
    write(0)
    write(1)
    (path,) = tmp_path.glob("*/seed1/record.json")
    path.write_bytes(path.read_bytes().replace(b'"accuracy":0.5', b'"accuracy":0.9'))
    with pytest.warns(UserWarning, match=r"seed1/record\.json is damaged .*: delete it to run this seed again"):
        (records,) = compare.read(tmp_path).values()
    assert [r.seed for r in records] == [0]


def test_ten_runs_are_compared_without_waiting_for_torch_or_pandas(write: Write, tmp_path: Path) -> None:
    write(0)
    code = "import sys; from nobackprop.papers import compare; compare.main()\n"
    code += "print({'torch', 'pandas', 'hydra', 'scipy.stats'} & set(sys.modules))"
    command = [sys.executable, "-c", code, str(tmp_path), "--against", "bp"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("set()\n")


def test_the_figure_is_written_where_it_says(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(0)
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
