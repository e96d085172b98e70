"""The papers' grids: every cell is a config that can run, and the script runs the part it is asked for."""

import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import CONF, PAPERS
from rich.console import Console

from nobackprop.papers import grid, reproduce
from nobackprop.papers.results import Composer
from nobackprop.records.identity import digest
from nobackprop.training.build import prepare
from nobackprop.training.config import Settings

GRIDS = sorted(path.parent.name for path in PAPERS.glob("*/grid.yaml"))
QUICK = ["dataset=digits", "arch.hidden=[6]", "max_epochs=1", "logger=none"]


def without_value(override: str) -> str:
    """An override without its value, unless it chooses one of a group."""
    key = override.partition("=")[0]
    return override if (CONF / key.lstrip("+")).is_dir() else key


@pytest.mark.parametrize("paper", GRIDS)
def test_every_cell_is_another_valid_config(paper: str) -> None:
    every = list(grid.cells(paper))
    assert len({str(cell) for cell in every}) == len(every)
    searched = [cell for cell in every if cell.tuned is None or cell.tuned.exists()]
    composer = Composer()
    settings = [composer.identity(cell.overrides) for cell in searched]
    kinds = {tuple(map(without_value, cell.overrides)): i for i, cell in enumerate(searched)}
    for i in kinds.values():  # Hydra takes long. It tells whether there are such keys, which hangs on groups alone.
        assert Settings.of(searched[i].config()).identity() == settings[i]
    # Within a setting, how a rule's batch becomes an update does not depend on the number of classes or the start.
    for cell, s in zip(searched, settings, strict=True):
        if paper == "mdfa":
            summed = cell.labels["net"].startswith("allconv") or cell.labels["rule"] == "bp"
            assert s["update"] == ("sum" if summed else "mean"), cell
    # Two searches may find the same settings, so that their cells share runs.
    pairs = zip(searched, settings, strict=True)
    twice = [pair for pair, n in Counter((digest(s), cell.tuned) for cell, s in pairs).items() if n > 1]
    assert not twice
    named = {name for cell in every for name in cell.overrides if name.startswith("+experiment=")}
    files = {f"+experiment={paper}/{path.stem}" for path in (CONF / "experiment" / paper).glob("*.yaml")}
    assert named == files - {f"+experiment={paper}/base"}


@pytest.mark.parametrize("paper", GRIDS)
def test_one_cell_of_each_setting_makes_a_net(paper: str) -> None:
    """All else in a grid is a rule, a rate, an initializer or a number of classes, which other tests cover."""
    seen = set()
    for cell in grid.cells(paper):
        key = (cell.overrides[0], cell.labels.get("rule"))
        if "imagenet" not in str(cell) and key not in seen:
            seen.add(key)
            own = [text for text in cell.overrides if not text.startswith(grid.TUNED)]
            prepare(grid.Cell(cell.labels, own).config())
    assert seen


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_says_what_it_reproduces_and_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    name = f"{path.parent.name}/{path.stem}"
    assert len(header) >= 3
    assert path.stem == "base" or f"nobackprop +experiment={name}" in header[-1]


def test_a_part_runs_then_is_skipped_and_a_failure_does_not_end_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = grid.select(
        list(grid.cells("lra_e")),
        ["setting=variance", "update=mean", "dataset=mnist", "hidden_layers=3", "rule=bp,fa"],
    )
    assert [cell.labels["rule"] for cell in chosen] == ["bp", "fa"]
    further = [*QUICK, "seeds=2", f"paths.runs={tmp_path}", "dataset.validation=100"]
    console = Console(width=200)
    broken = grid.Cell({"rule": "none"}, ["rule=mdfa", "init=orthogonal"])
    assert not reproduce.run([chosen[0], broken, chosen[1]], further, console, dry=False)
    shown = capsys.readouterr().out
    assert "2/3 rule=none: failed: rule MDFA needs non-negative weights" in shown
    assert re.search(r"rule=bp: finished, .*; about 0:\d\d:\d\d for the other 1", shown)
    assert "2 finished, 1 failed" in shown
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed*/record.json")}
    assert len(written) == 4
    assert reproduce.run(chosen, further, console, dry=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed*/record.json")} == written
    assert reproduce.run(chosen, [*further, "seeds=3"], console, dry=True)
    assert "0 recorded, 3 to run" not in (shown := capsys.readouterr().out)
    assert shown.count("2 recorded, 1 to run") == 2
    assert len(list(tmp_path.glob("*/seed*/record.json"))) == 4


def test_cells_whose_settings_are_not_searched_yet_are_named_and_passed_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cell = grid.Cell({"rule": "bp"}, ["rule=bp"])
    tuned = grid.Cell({"rule": "fa"}, ["rule=fa", f"{grid.TUNED}none/there"])
    further = [*QUICK, f"paths.runs={tmp_path}"]
    assert reproduce.run([tuned, cell], further, Console(width=200), dry=True)
    shown = capsys.readouterr().out
    assert "passed over until scripts/tune.py has searched their settings, 1 cells: rule=fa" in shown
    assert "1 of 1 would run" in shown
    with pytest.raises(FileNotFoundError, match=r"there\.yaml is not there yet: scripts/tune\.py makes it"):
        reproduce.run([tuned], further, Console(), dry=True)


def test_an_option_that_comes_again_adds_to_what_it_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only = ["--only", "setting=variance", "update=mean", "dataset=mnist", "--only", "hidden_layers=3"]
    rules = ["--only", "rule=bp", "rule=fa"]
    further = ["--set", "dataset=digits", "logger=none", "--set", f"paths.runs={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["reproduce.py", "lra_e", *only, *rules, *further, "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        reproduce.main()
    assert "2 of 2 would run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["depth=3"], "--only depth=...: no such axis; choose from setting, update, dataset, hidden_layers, rule"),
        (["rule=bp,hebb"], "--only rule=hebb: choose from bp, dfa, dtp, equilibrium_propagation, fa, lra_e"),
        (["setting=tf1", "rule=bp"], "no cell fits --only setting=tf1 rule=bp"),
    ],
)
def test_a_choice_that_is_not_there_is_named(only: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("...", r"\.\.\.")):
        grid.select(list(grid.cells("lra_e")), only)
    with pytest.raises(ValueError, match=f"no grid for paper 'none': choose one of {', '.join(GRIDS)}"):
        list(grid.cells("none"))
    with pytest.raises(ValueError, match=r"Did you mean mdfa\?$"):
        list(grid.cells("MDFA"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lrae"], "no grid for paper 'lrae': .* Did you mean lra_e\\?"),
        (
            ["lra_e", "--only", "rule=lrae"],
            "--only rule=lrae: choose from .*lra_e, lra_e_plain\\. Did you mean lra_e\\?",
        ),
        (["lra_e", "--only", "rul=bp"], "--only rul=...: no such axis; .*\\. Did you mean rule\\?"),
        (
            ["mdfa", "--only", "rule=bp", "net=mlp_mnist", "classes=2", "--set", "optimizer.lrr=1"],
            "there is no key optimizer.lrr; .* Did you mean lr\\?",
        ),
        (
            ["mdfa", "--only", "rule=bp", "net=mlp_mnist", "classes=2", "--set", "dataset=MNIST"],
            "there is no dataset=MNIST; .* Did you mean mnist\\?",
        ),
        (
            ["mdfa", "--only", "rule=bp", "net=mlp_mnist", "classes=2", "--set", "~logger"],
            "~logger: logger can't be taken out of a run; write logger=none",
        ),
        (
            ["mdfa", "--only", "rule=bp", "net=mlp_mnist", "classes=2", "--jobs", "0"],
            "launcher.workers: Input should be greater than 0",
        ),
    ],
)
def test_a_mistake_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch, given: list[str], told: str) -> None:
    monkeypatch.setattr("sys.argv", ["reproduce.py", *given, "--dry-run"])
    with pytest.raises(SystemExit, match=f"^reproduce.py: {told}"):
        reproduce.main()


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def slip(*_: object) -> None:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(reproduce, "run", slip)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "mdfa"])
    with pytest.raises(ValueError, match="too many values"):
        reproduce.main()
