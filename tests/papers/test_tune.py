"""scripts/tune.py: the same trials each time, chosen by validation alone, written as settings that a cell then uses."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import CONF, PAPERS
from omegaconf import OmegaConf
from recorded import RECORD, made
from rich.console import Console
from scipy.stats import spearmanr

from nobackprop import composing
from nobackprop.papers import grid, tune
from nobackprop.records.record import Record
from nobackprop.sweeps.jobs import Outcome
from nobackprop.training.config import Settings

SEARCHES = sorted(path.parent.name for path in PAPERS.glob("*/search.yaml"))
SEARCH: dict[str, Any] = {
    "trials": 8,
    "epochs": 1,
    "seed": 1000,
    "draw": "alike",
    "space": {"optimizer.lr": {"low": 1e-4, "high": 1.0}},
}
QUICK = ["dataset=digits", "dataset.validation=100", "arch.hidden=[6]"]


def record(accuracy: float, **fields: Any) -> Record:
    first = RECORD["epochs"][0] | {"val/accuracy": accuracy}
    epochs = [first, first | {"epoch": 2, "step": 20}]
    return made(epochs=epochs[: fields.get("diverged_epoch", 1)], **fields)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_trial_of_a_search_is_a_valid_config(name: str) -> None:
    search = tune.Search.read(name)
    assert search.trials >= 20
    every = search.cells(name)
    assert len({cell.tuned for cell in every}) == len(every) > 0
    for cell in every:
        points = search.points(cell)
        assert len({str(point) for point in points}) == search.trials
        assert all("optimizer.lr" in point for point in points)
        config = grid.composed(search.overrides(cell, points[0], []))
        trial = Settings.of(config)
        assert trial.optimizer["lr"] == points[0]["optimizer.lr"]
        assert trial.seeds == search.seeds_of(0)
        if search.epochs:
            assert search.length(cell, 0, config) == {"max_epochs": search.epochs}


@pytest.mark.parametrize("name", SEARCHES)
def test_no_experiment_uses_the_seed_of_the_trials(name: str) -> None:
    seed = tune.Search.read(name).seed
    for experiment in {cell.overrides[0] for cell in grid.cells(name)}:
        assert seed not in Settings.of(grid.composed([experiment])).seeds


@pytest.mark.parametrize("name", SEARCHES)
def test_settings_that_are_compared_were_searched_with_one_budget(name: str) -> None:
    files = sorted((CONF / "tuned" / name).glob("*.yaml"))
    nets = {cell.tuned: cell.labels.get("net") for cell in grid.cells(name)}
    assert set(files) <= nets.keys()
    budgets = {(nets[path], path.read_text().split(" --trials ")[1].split(" --only ")[0]) for path in files}
    assert len(budgets) == len({nets[path] for path in files})


def test_points_are_the_same_each_time_for_every_rule_and_go_on() -> None:
    space = {"rule.beta": {"low": 0.01, "high": 1.0, "when": {"rule": ["lra_e"]}}} | SEARCH["space"]
    few, more = (tune.Search.of(SEARCH | {"space": space, "trials": n}, "test") for n in (8, 20))
    bp, lra_e = (grid.Cell({"rule": rule}, []) for rule in ("bp", "lra_e"))
    assert few.points(lra_e) == few.points(lra_e) == more.points(lra_e)[:8]
    assert [{"optimizer.lr": point["optimizer.lr"]} for point in few.points(lra_e)] == few.points(bp)
    assert all(0.01 <= float(point["rule.beta"]) <= 1 for point in more.points(lra_e))
    rates = [float(point["optimizer.lr"]) for point in more.points(bp)]
    per_decade = [sum(10.0**e <= rate < 10.0 ** (e + 1) for rate in rates) for e in range(-4, 0)]
    assert sum(per_decade) == 20
    assert min(per_decade) >= 4


def test_of_several_ranges_of_a_key_a_cell_searches_the_last_that_fits_it() -> None:
    ranges = [{"low": 0.01, "high": 0.1}, {"low": 0.01, "high": 1.0, "when": {"rule": ["lra_e"]}}]
    search = tune.Search.of(SEARCH | {"space": {"optimizer.lr": ranges}, "trials": 20}, "test")
    highest = {
        rule: max(float(point["optimizer.lr"]) for point in search.points(grid.Cell({"rule": rule}, [])))
        for rule in ("bp", "lra_e")
    }
    assert 0.05 < highest["bp"] <= 0.1
    assert 0.5 < highest["lra_e"] <= 1


def test_each_rule_has_points_of_its_own_and_its_rate_fixes_no_other_parameter() -> None:
    search = tune.Search.read("compare")
    found = [cell for cell in search.cells("compare") if cell.labels["net"] == "mnist_mlp"]
    of = {cell.labels["rule"]: search.points(cell) for cell in found}
    rates = {rule: [float(point["optimizer.lr"]) for point in points] for rule, points in of.items()}
    assert all(set(rates["bp"]).isdisjoint(rates[rule]) for rule in ("fa", "lra_e", "pepita"))
    for rule, key in (("lra_e", "rule.beta"), ("pepita", "rule.scale"), ("dtp", "rule.eta"), ("dtp", "rule.sigma")):
        own = [float(point[key]) for point in of[rule]]
        correlation: Any = spearmanr(rates[rule], own)
        assert abs(correlation.statistic) < 0.35
    assert search.points(found[-1]) == of[found[-1].labels["rule"]]  # the same each time


def test_a_bracket_trains_the_best_of_a_rung_longer_and_the_finalists_with_more_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of points with rates in order, a trial's accuracy is its rate; one that diverged counts as 0."""
    change = {"epochs": None, "rungs": [10, 30, 90], "trials": 9, "seeds": 2, "draw": "for each rule"}
    search = tune.Search.of(SEARCH | change, "test")
    cell = grid.Cell({"rule": "bp"}, ["rule=bp", *QUICK])
    trained = []

    class Launcher:
        def run(self, jobs: Any, say: Any, console: Any, wait_for_others: bool) -> Any:
            for k, job in jobs.items():
                s = job.settings
                trained.append((s.max_steps, s.seeds, s.optimizer["lr"]))
                lost = {"diverged_epoch": 2} if s.optimizer["lr"] > 0.5 else {}
                yield k, Outcome("finished", records=[record(s.optimizer["lr"], **lost) for _ in s.seeds])

    monkeypatch.setattr(tune, "Basic", Launcher)
    (found,) = tune.tune(search, [cell], [], 1, Console(quiet=True))
    rates = sorted((float(point["optimizer.lr"]) for point in search.points(cell)), key=lambda lr: (lr > 0.5, -lr))
    assert [len(rung) for rung in found.rungs] == [9, 3, 1]
    assert [lr for steps, _, lr in trained if steps == 30] == rates[:3]
    assert [(seeds, lr) for steps, seeds, lr in trained if steps == 90] == [([1000, 1001], rates[0])]
    assert found.best.point == {"optimizer.lr": rates[0]}
    (first, n), (second, _) = found.correlations()
    assert (first, n) == (pytest.approx(1), 3)
    assert second != second  # one trial has no order


def test_trials_and_the_run_of_a_search_at_equal_compute_cost_the_same_whatever_a_step_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step of evolution costs more with a greater population."""
    change = {
        "epochs": None,
        "rungs": [40, 120],
        "compute": 900,
        "equal_compute": {"step": 2.5, "where": {"rule": ["evolution"]}},
        "space": {"rule.population": {"values": [1, 3]}},
    }
    search = tune.Search.of(SEARCH | change, "test")
    cell = grid.Cell({"rule": "evolution"}, ["rule=evolution", *QUICK])
    trained = set()

    class Launcher:
        def run(self, jobs: Any, say: Any, console: Any, wait_for_others: bool) -> Any:
            for k, job in jobs.items():
                n = job.settings.rule["population"]
                trained.add((n, job.settings.max_steps))
                yield k, Outcome("finished", records=[record(0.5 + n / 10) for _ in job.settings.seeds])

    monkeypatch.setattr(tune, "Basic", Launcher)
    (found,) = tune.tune(search, [cell], [], 1, Console(quiet=True))
    cost = {n: tune._cost(grid.composed([*cell.overrides, f"rule.population={n}"])) for n in (1, 3)}
    assert cost[3] > 2 * cost[1]
    assert trained == {(1, round(100 / cost[1])), (3, round(100 / cost[3])), (3, round(300 / cost[3]))}
    tune.write(found, "compare", search, [], tmp_path / "x.yaml")
    assert OmegaConf.load(tmp_path / "x.yaml") == {"rule": {"population": 3}, "max_steps": round(900 / cost[3])}
    assert " 100, 300 forward passes" in " ".join((tmp_path / "x.yaml").read_text().replace("#", "").split())
    assert not (tmp_path / "compute").exists()
    assert list(tune.rows(search, [found])["rungs"]) == ["100 300"]


def test_a_search_with_a_budget_of_compute_writes_the_length_of_such_a_run(tmp_path: Path) -> None:
    change = {"epochs": None, "rungs": [10, 30], "compute": 500}
    search = tune.Search.of(SEARCH | change, "test")
    cell = grid.Cell({"rule": "bp"}, ["rule=bp", *QUICK])
    found = tune.Searched(cell, [[tune.Trial({"optimizer.lr": 1.2e-4}, [record(0.5)])]])
    tune.write(found, "compare", search, [], tmp_path / "x.yaml")
    text = (tmp_path / "x.yaml").read_text()
    assert "Near an end of its range: optimizer.lr (low)." in " ".join(text.replace("#", "").split())
    plain, at_equal = (OmegaConf.load(path) for path in (tmp_path / "x.yaml", tmp_path / "compute" / "x.yaml"))
    inputs, outputs = 64 * 6, 6 * 10
    cost = (2 * (inputs + outputs) + outputs) / (inputs + outputs)
    assert at_equal == OmegaConf.merge(plain, {"max_steps": round(500 / cost)})


def test_a_winner_near_an_end_of_its_range_is_named() -> None:
    within = {"lr": tune.Range(low=1e-4, high=1.0), "f": tune.Choice(values=["tanh", "relu"])}
    for lr, expected in ((1.2e-4, {"lr": "low"}), (0.9, {"lr": "high"}), (0.01, {})):
        trial = tune.Trial({"lr": lr, "f": "relu"}, [record(0.5)])
        assert tune.Searched(grid.Cell({}, []), [[trial]]).edges(within) == expected


def test_a_choice_takes_every_value() -> None:
    search = tune.Search.of(SEARCH | {"space": {"update": {"values": ["mean", "sum", "unit_norm"]}}}, "test")
    assert {point["update"] for point in search.points(grid.Cell({}, []))} == {"mean", "sum", "unit_norm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": [10]}, "test: give epochs or rungs"),
        ({"epochs": None, "rungs": [30, 10]}, "rungs: each has more mini-batches than the one before"),
        ({"equal_compute": {"step": 2, "where": {}}, "compute": 9}, "test: equal_compute: give rungs and compute, too"),
        ({"equal_compute": {"step": 2}}, r"test: equal_compute\.where: Field required"),
        ({"where": {"rule": "bp"}}, r"test: where\.rule: Input should be a valid list"),
        ({"trials": 0}, "test: trials: Input should be greater than 0"),
        ({"budget": 3}, "test: budget: Extra inputs are not permitted"),
        ({"space": {}}, "test: space: Dictionary should have at least 1 item"),
        ({"space": {"optimizer.lr": {"low": 0.1, "high": 0.01}}}, "test: optimizer.lr goes from 0.1 to 0.01: low must"),
        (
            {"space": {"optimizer.lr": {"low": 0.0, "high": 0.01}}},
            r"test: space\.optimizer\.lr\.low: Input should be greater than 0 \(write",
        ),
        (
            {"space": {"optimizer.lr": [{"low": 0.1, "high": 1}, {"low": 0.1}]}},
            r"test: space\.optimizer\.lr\.1\.high: Field required \(write",
        ),
        ({"space": {"optimizer.lr": []}}, r"test: space\.optimizer\.lr: List should have at least 1 item"),
        ({"space": {"update": {"values": ["mean"]}}}, r"values: List should have at least 2 items.*two or more\)"),
    ],
)
def test_a_search_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune.Search.of(SEARCH | change, "test")


def test_a_key_that_is_there_twice_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (PAPERS / "compare" / "search.yaml").read_text() + "  rule.scale: {low: 0.1, high: 1}\n"
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "search.yaml").write_text(text)
    monkeypatch.setattr(tune, "PAPERS", tmp_path)
    with pytest.raises(ValueError, match=r"^\S*search\.yaml, line \d+: found duplicate key rule\.scale$"):
        tune.Search.read("compare")


def test_a_search_or_a_choice_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no search 'akrout': choose one of compare, lra_e, mdfa"):
        tune.Search.read("akrout")
    with pytest.raises(ValueError, match=r"no search 'lrae': .*\. Did you mean lra_e\?"):
        tune.Search.read("lrae")
    space = SEARCH["space"] | {"rule.beta": {"low": 0.1, "high": 1.0, "when": {"rule": ["lra_e", "lra"]}}}
    (tmp_path / "lra_e").mkdir()
    OmegaConf.save(SEARCH | {"space": space}, tmp_path / "lra_e" / "search.yaml")
    monkeypatch.setattr(tune, "PAPERS", tmp_path)
    with pytest.raises(ValueError, match=r"rule\.beta: no cell of the grid has rule=lra$"):
        tune.Search.read("lra_e")


def test_validation_decides_and_a_trial_that_diverged_counts_as_zero() -> None:
    trials = [
        record(0.6, test={"accuracy": 0.9}),
        record(0.8),
        record(0.9, diverged_epoch=2),
        record(0.0, test=None, diverged_epoch=1),
        record(0.8, test={"accuracy": 1.0}),
    ]
    assert [trial.validation for trial in trials] == [0.6, 0.8, 0.0, 0.0, 0.8]
    found = tune.Searched(grid.Cell({}, []), [[tune.Trial({"lr": i}, [trial]) for i, trial in enumerate(trials)]])
    assert found.best == tune.Trial({"lr": 1}, [trials[1]])
    assert found.best.validation == 0.8


def test_what_is_found_is_written_and_used_and_nothing_runs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    shutil.rmtree(conf / "tuned" / "lra_e", ignore_errors=True)
    for place in (grid, composing):
        monkeypatch.setattr(place, "CONF", conf)
    only = ["setting=tuned", "dataset=mnist", "hidden_layers=3", "rule=bp"]
    (cell,) = grid.select(list(grid.cells("lra_e")), only)
    with pytest.raises(FileNotFoundError, match=r"mnist_3_bp\.yaml is not there yet: scripts/tune.py makes it"):
        cell.config()
    runs = tmp_path / "runs"
    command = ["lra_e", "--only", *only, "--trials", "3", "--epochs", "1", "--jobs", "1", "--set", *QUICK]
    table = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", ["tune.py", *command, "--runs", str(runs), "--table", str(table)])
    for content, message in (
        ("", "it is no table"),
        ("rungs,trials,runs,rule,dataset\n", "no column hidden_layers and"),
    ):
        table.write_text(content)
        with pytest.raises(SystemExit, match=rf"table\.csv: .*{message}"):
            tune.main()
    assert not runs.exists()
    lines = ["fa,,3,3,7", "bp,,20,20,8", "bp,,3,3,9"]
    table.write_text(
        "\n".join(
            [
                "setting,dataset,hidden_layers,rule,rungs,trials,runs,seconds",
                *(f"tuned,mnist,3,{line}" for line in lines),
            ]
        )
    )
    with pytest.raises(SystemExit, match="0"):
        tune.main()
    written = pd.read_csv(table)
    assert written[["rule", "trials"]].to_numpy().tolist() == [["fa", 3], ["bp", 20], ["bp", 3]]
    fa, other, new = written["seconds"]
    assert (fa, other) == (7, 8)
    assert new != 9
    trials = {path: Record.read(path) for path in runs.glob("*/seed1000/record.json")}
    assert len(trials) == 3
    times = {path: path.stat().st_mtime_ns for path in trials}
    chosen = max(trials, key=lambda path: trials[path].validation)
    best = trials[chosen]
    shown = capsys.readouterr().out
    assert f"{best.validation:.2%}" in shown
    text = (conf / "tuned" / "lra_e" / "mnist_3_bp.yaml").read_text()
    assert f"{best.validation:.2%}, of 3 trials: seed 1000" in text
    assert "--trials 3 --epochs 1 --only setting=tuned dataset=mnist hidden_layers=3 rule=bp --set dataset=" in text
    settings = Settings.of(cell.config([*QUICK, "max_epochs=1"]))
    assert settings.identity() == best.config
    assert settings.init.backward == settings.init.forward

    monkeypatch.setattr(sys, "argv", ["tune.py", *command, "batch_size=20", "--runs", str(runs)])
    with pytest.raises(
        SystemExit, match=r"^tune\.py: .*bp\.yaml was found by `python scripts/tune\.py lra_e --trials 3"
    ):
        tune.main()
    assert len([*runs.glob("*/seed1000/record.json")]) == 3

    monkeypatch.setattr(sys, "argv", ["tune.py", *command, "--runs", str(runs)])
    for path, trial in trials.items():  # the figures of the test images play no part
        trial.model_copy(update={"test": {"accuracy": 1 - trial.validation}}).write(path)
        times[path] = path.stat().st_mtime_ns
    with pytest.raises(SystemExit, match="0"):
        tune.main()
    assert (conf / "tuned" / "lra_e" / "mnist_3_bp.yaml").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/seed1000/record.json")} == times

    look = [*command, "--seeds", "2", "--table", str(tmp_path / "look.csv")]
    monkeypatch.setattr(sys, "argv", ["tune.py", *look, "--runs", str(runs)])
    with pytest.raises(SystemExit, match="0"):
        tune.main()
    assert (conf / "tuned" / "lra_e" / "mnist_3_bp.yaml").read_text() == text
    second = {path: Record.read(path.parents[1] / "seed1001" / "record.json") for path in trials}
    means = {path: (Record.read(path).validation + second[path].validation) / 2 for path in trials}
    place = 1 + sorted(means.values(), reverse=True).index(means[chosen])
    (line,) = pd.read_csv(tmp_path / "look.csv")["in use"]
    assert line == f"{place} of 3, {means[chosen]:.2%}"
