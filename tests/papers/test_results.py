"""Tables, figures, verdicts and pages: found by config, comparable, the same bytes every time, and up to date."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import CONF, PAPERS, ROOT
from generate import results as site
from hydra.utils import get_object
from recorded import RECORD, made

from nobackprop import composing
from nobackprop.papers import colours, figures, grid, results as module, tables
from nobackprop.papers.claims import Score
from nobackprop.papers.grid import Cell, cells
from nobackprop.papers.results import Composer, Figure, Findings, Found, Row, Table, findings, published
from nobackprop.papers.take_home import take_home
from nobackprop.records.gathering import collect
from nobackprop.records.identity import before
from nobackprop.records.record import Record
from nobackprop.training.config import Settings


class Cached(Composer):
    @cache  # noqa: B019 the one instance lives as long as the tests
    def _cached(self, overrides: tuple[str, ...]) -> dict[str, Any]:
        return super().identity(overrides)

    def identity(self, overrides: Iterable[str]) -> dict[str, Any]:
        return self._cached(tuple(overrides))


COMPOSER = Cached()
RULE = "lra_e_plain"  # whose runs the claims are tested on
LRA = {"setting": "variance", "update": "mean", "dataset": "mnist", "hidden_layers": "3", "rule": RULE}


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Composer", lambda: COMPOSER)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder without records, tables or figures, and beside it `papers/`."""
    folder = tmp_path / "results"
    shutil.copytree(PAPERS, tmp_path / "papers")
    for place in (module, grid):
        monkeypatch.setattr(place, "PAPERS", tmp_path / "papers")
    (folder / "records").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "not_run.yaml", folder / "not_run.yaml")
    return folder


def cell(paper: str, labels: dict[str, str]) -> Cell:
    (found,) = (c for c in cells(paper) if dict(c.labels) == labels)
    return found


def record(
    paper: str, labels: dict[str, str], seed: int, accuracy: float | None, epochs: int = 2, further: Sequence[str] = ()
) -> Record:
    config: Any = COMPOSER.identity([*cell(paper, labels).overrides, *further]) | {"max_epochs": epochs}
    angles = {"angle/update_W1": 60.0, "angle/update_W2": 10.0}  # layer 2 is the output
    rows = [{"epoch": e, "step": e, "val/loss": 1.0, "val/accuracy": 0.5} | angles for e in range(1, epochs + 1)]
    tested = None if accuracy is None else {"accuracy": accuracy}
    return made(config=config, seed=seed, epochs=rows, test=tested, data=RECORD["data"] | {"test": 10**9})


def lra(seed: int, accuracy: float | None, **labels: str) -> Record:
    return record("lra_e", LRA | labels, seed, accuracy)


def shown(found: Findings, table: str, **labels: str) -> Row:
    (row,) = (r for r in found.tables[table] if labels.items() <= r.labels.items())
    return row


def first_row(records: Iterable[Record], results: Path) -> Row:
    return shown(findings("lra_e", records, results), "mnist", setting="variance", update="mean", hidden_layers="3")


@pytest.mark.parametrize("paper", module.papers())
def test_configs_with_further_settings_are_composed_as_hydra_does(paper: str) -> None:
    """Those without them are compared in test_reproduce.py, with all cells at hand."""
    first = next(cells(paper))
    plain = Cell(first.labels, [text for text in first.overrides if not text.startswith(grid.TUNED)])
    further = ["dataset=cifar10_jpeg", "l2=0.1"]
    further += ["arch.activation=relu"] if "activation" in plain.config().arch else []  # not of a list of layers
    slow = plain.config(further)
    assert COMPOSER.identity([*plain.overrides, *further]) == Settings.of(slow).identity()


def test_an_element_of_a_list_is_set_as_hydra_does() -> None:
    cell = next(c for c in cells("biotorch") if "+experiment=biotorch/cifar10" in c.overrides)
    further = ["arch.layers.0.conv.0=8", "arch.layers.1=tanh"]
    assert COMPOSER.identity([*cell.overrides, *further]) == Settings.of(cell.config(further)).identity()


def test_a_cell_of_searched_settings_is_found_and_one_not_searched_says_so(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    for place in (module, grid, composing):
        monkeypatch.setattr(place, "CONF", tmp_path / "conf")
    monkeypatch.setattr(module, "Composer", Composer)
    shutil.rmtree(tmp_path / "conf" / "tuned" / "compare", ignore_errors=True)
    searched = tmp_path / "conf" / "tuned" / "compare" / "mlp_bp.yaml"
    searched.parent.mkdir()
    searched.write_text("# @package _global_\noptimizer: {lr: 0.123}\n")
    identity = Settings.of(cell("compare", {"net": "mlp", "rule": "bp"}).config()).identity()
    assert identity["optimizer"]["lr"] == 0.123
    run = made(config=identity)
    row = shown(findings("compare", [run], results), "accuracy", net="mlp")
    assert row.cells["bp"].records == [run]
    assert row.cells["lra_e"].reason == "settings not searched yet"


def test_a_record_counts_more_than_a_reason_not_to_have_any(results: Path) -> None:
    entry = {"cells": {"rule": [RULE, "bp"]}, "reason": "too slow"}
    (results / "not_run.yaml").write_text(yaml.safe_dump({"lra_e": [entry]}))
    row = first_row([lra(0, 0.9)], results)
    assert row.cells[RULE].mean == 0.9
    assert [row.cells[rule].reason for rule in ("bp", "fa")] == ["too slow", "not run yet"]
    reasons = tables.missing([row])
    assert reasons[0].endswith(" rule=bp (too slow)")
    assert reasons[1].endswith(" rule=fa,dfa,dtp,equilibrium_propagation,lra_e (not run yet)")


def test_a_cell_shows_mean_deviation_and_interval_of_its_records(results: Path) -> None:
    row = first_row([lra(0, 0.90), lra(1, 0.92), lra(2, 0.94)], results)
    found = row.cells[RULE]
    assert tables.spread(found) == "92.00 ± 2.00"
    assert found.interval == pytest.approx(
        (0.92 - 0.0496828, 0.92 + 0.0496828)
    )  # t = 4.302653 with 2 degrees of freedom
    assert (row.seeds, row.epochs, row.fewer_epochs) == ("3", "2", True)
    assert row.cells["bp"].reason == "not run yet"


def test_fewer_seeds_than_the_paper_are_marked(results: Path) -> None:
    publish(results, seeds=2)
    assert first_row([lra(0, 0.9)], results).cells[RULE].marks == ["fewer seeds than the paper"]
    assert first_row([lra(0, 0.9), lra(1, 0.9)], results).cells[RULE].marks == []


def test_runs_are_found_whose_rate_falls_to_the_end_of_fewer_epochs() -> None:
    """A schedule's length follows max_epochs, and so belongs to the number of epochs."""
    of = cell("forward_gradient", {"dataset": "mnist", "rule": "bp"})
    shorter = made(config=COMPOSER.identity([*of.overrides, "max_epochs=20"]))
    other = made(config=COMPOSER.identity([*of.overrides, "max_epochs=20", "schedule.total_iters=10"]))
    assert shorter.config["schedule"]["total_iters"] == 20
    assert module.Runs([shorter, other]).of(of.overrides)[1] == [shorter]


def test_rules_are_compared_at_the_same_epochs_and_seeds(results: Path) -> None:
    both = [record("lra_e", LRA | {"rule": r}, s, 0.5, epochs=3) for r in ("bp", RULE) for s in (0, 1, 2)]
    longer = [record("lra_e", LRA, seed, 0.9, epochs=50) for seed in range(5)]
    one_more = [record("lra_e", LRA, 3, 0.7, epochs=3)]
    row = first_row([*longer, *both, *one_more], results)
    for rule in ("bp", RULE):
        assert row.cells[rule].epochs == 3
        assert list(row.cells[rule].accuracies) == [0, 1, 2]
    row = first_row([*longer, *both, *[record("lra_e", LRA | {"rule": "bp"}, 4, 0.8, epochs=50)]], results)
    assert (row.epochs, list(row.cells["bp"].accuracies), list(row.cells[RULE].accuracies)) == ("50", [4], [4])
    alone = record("lra_e", LRA | {"rule": "fa"}, 0, 0.5, epochs=7)
    assert first_row([*both, alone], results).cells["fa"].reason == "trained for 7 epochs, not for 3"
    apart = [record("lra_e", LRA | {"rule": "bp"}, seed, 0.8, epochs=50) for seed in (7, 8)]
    assert first_row([*longer, *both, *apart], results).epochs == "3"  # at 50 they have no seed in common
    deeper = [lra(s, 0.5, rule=r, hidden_layers="5") for r in ("bp", RULE) for s in (0, 1)]
    shallow = [lra(s, 0.5, rule=r) for r in ("bp", RULE) for s in (0, 1)]
    assert first_row([*deeper, *both], results).epochs == "3"
    assert first_row([*deeper, *both, *shallow], results).epochs == "2"  # all rows of a group alike
    planned = [record("lra_e", LRA, 5, 0.9, epochs=100)]
    found = findings("lra_e", [*both, *planned], results)
    row = shown(found, "mnist_long", setting="variance", update="mean", hidden_layers="3")
    assert (row.epochs, list(row.cells[RULE].accuracies)) == ("100", [5])
    assert row.cells["bp"].reason == "trained for 3 epochs, not for 100"
    other = record("lra_e", LRA | {"rule": "fa"}, 9, 0.5, epochs=3)
    assert first_row([*both, other], results).cells["fa"].reason == "no seed in common with the other rules"


def test_a_record_counts_where_a_later_key_has_the_value_that_it_means_and_nowhere_else(results: Path) -> None:
    exact, plain = lra(0, 0.9, rule="lra_e"), lra(1, 0.8, rule="lra_e_plain")
    assert exact.config["rule"]["difference"] == "exact"
    assert "difference" not in plain.config["rule"]
    for one, records in (("lra_e", [exact]), ("lra_e_plain", [plain])):
        row = first_row(records, results)
        assert [rule for rule, cell in row.cells.items() if cell.records] == [one]
    (first, second) = (cell("lra_e", LRA | {"rule": rule}).overrides for rule in ("lra_e", "lra_e_plain"))
    assert COMPOSER.identity([*first, "rule.difference=plain"]) == COMPOSER.identity(second)


@pytest.mark.parametrize("paper", ["lra_e", "compare"])
def test_all_recorded_runs_are_in_cells_that_compute_what_they_did(paper: str) -> None:
    records = collect([ROOT / "results" / "records" / f"{paper}.jsonl"]).records.values()
    runs, placed = module.Runs(records), set()
    for c in cells(paper):
        if c.tuned is None or c.tuned.exists():
            identity, found = runs.of(c.overrides)
            later = before(get_object(identity["rule"]["_target_"])).keys()
            for record in found:
                assert all(record.config["rule"].get(key) == identity["rule"].get(key) for key in later)
                placed.add(record.signature)
    assert placed == {record.signature for record in records}


def test_a_seed_that_diverged_is_left_out_of_the_mean_and_counts_at_chance_for_claims(results: Path) -> None:
    found = first_row([lra(0, 0.9), lra(1, None)], results).cells[RULE]
    assert (found.mean, found.diverged) == (0.9, 1)
    assert found.marks == ["some seeds diverged before they could be tested and are left out of the mean"]
    later = lra(2, 0.8).model_copy(update={"diverged_epoch": 2})
    (mark,) = first_row([lra(0, 0.9), later], results).cells[RULE].marks
    assert mark == "some seeds diverged and were tested with their best weights from before"
    classes = (4, 2)  # of these records
    assert found.for_claims == {(True, 2): {0: Score(0.9, 10**9, classes), 1: Score(0.5, 10**9, classes)}}
    assert any("diverged" in mark for mark in found.marks)


def test_claims_count_seeds_that_a_rule_of_the_row_outside_the_claim_lacks(results: Path) -> None:
    records = [lra(s, 0.9 + s / 1000, hidden_layers=layers) for layers in ("3", "5", "8") for s in range(3)]
    found = findings("lra_e", [*records, lra(0, 0.8, rule="dtp")], results)
    assert [row.seeds for row in found.tables["mnist"] if row.run] == ["1", "3", "3"]
    assert [r.seeds for r in found.verdicts if r.mean is not None] == [3]


def test_angles_and_pace_are_those_of_all_seeds_of_a_cell(results: Path) -> None:
    def run(seed: int, wall_s: float, measured: bool) -> Record:
        one = lra(seed, 0.9)
        epochs = [{name: v for name, v in epoch.items() if measured or "angle" not in name} for epoch in one.epochs]
        return one.model_copy(update={"wall_s": wall_s, "epochs": epochs})

    runs = [run(0, 30, measured=False), run(1, 10, measured=True), lra(0, 0.8, rule="dtp")]
    found = first_row(runs, results).cells[RULE]
    assert list(found.accuracies) == [0]
    assert (found.layers, found.seconds) == ([1, 2], 5)


def test_every_kind_of_departure_has_a_sign_in_markdown_and_latex() -> None:
    kinds = ["fewer seeds", "another dataset", "diverged", "tested from before"]
    row: Any = SimpleNamespace(fewer_epochs=True, cells={"bp": SimpleNamespace(marks=kinds)})
    signs = tables.marks([row])
    assert list(signs) == [tables.FEWER, *kinds]
    assert len(set(signs.values())) == len(signs)
    assert all(ord(sign) in tables.TEX for sign in signs.values())


def test_a_stand_in_is_taken_where_the_papers_images_have_no_runs_and_marked(results: Path) -> None:
    labels = {"net": "mlp_cifar10", "classes": "2", "init": "documented", "rule": "mdfa"}
    jpeg = record("mdfa", labels, 0, 0.7, epochs=10, further=["dataset=cifar10_jpeg"])
    figure = PUBLISHED | {"cell": {"net": "mlp_cifar10", "rule": "mdfa"}}
    publish(results, figure, paper="mdfa")
    found = findings("mdfa", [jpeg], results)
    row = shown(found, "documented", net="mlp_cifar10", classes="2")
    assert row.cells["mdfa"].marks == ["cifar10_jpeg in place of the paper's images"]
    assert "| 70.00‡; published 91.50 |" in tables.accuracy_table(found, found.layout.tables[0])  # of other images
    assert row.cells["bp"].overrides == cell("mdfa", labels | {"rule": "bp"}).overrides
    row = shown(
        findings("mdfa", [jpeg, record("mdfa", labels, 0, 0.8, epochs=10)], results),
        "documented",
        net="mlp_cifar10",
        classes="2",
    )
    assert (row.cells["mdfa"].mean, row.cells["mdfa"].marks) == (0.8, [])
    assert [f.value for f in row.cells["mdfa"].figures] == [8.5]


def test_runs_on_other_images_are_not_compared_with_runs_on_the_papers_own(results: Path) -> None:
    labels = {"net": "mlp_cifar10", "classes": "2", "init": "documented"}

    def runs(rule: str, accuracy: float, *further: str) -> list[Record]:
        every = [accuracy + s * (1 + len(rule)) / 10_000 for s in range(4)]
        return [record("mdfa", labels | {"rule": rule}, s, a, 10, further) for s, a in enumerate(every)]

    jpeg = [*runs("bp", 0.7, "dataset=cifar10_jpeg"), *runs("mdfa", 0.7, "dataset=cifar10_jpeg")]
    for records, own in ((jpeg + runs("mdfa", 0.8), False), (jpeg + runs("mdfa", 0.8) + runs("bp", 0.8), True)):
        found = findings("mdfa", records, results)
        row = shown(found, "documented", net="mlp_cifar10", classes="2")
        assert [row.cells[rule].stand_in for rule in ("bp", "mdfa")] == [None if own else "cifar10_jpeg"] * 2
        assert row.cells["mdfa"].mean == pytest.approx(0.80075 if own else 0.70075)
        assert ("dataset=cifar10_jpeg" in row.cells["mdfa"].overrides) is not own
        (matches,) = (r for r in found.verdicts if r.mean is not None)
        assert (matches.seeds, matches.mean) == (4, pytest.approx(2 * 1.5 / 10_000))
    alone = findings("mdfa", jpeg[:4] + runs("mdfa", 0.8), results)
    assert all(r.mean is None for r in alone.verdicts)
    row = shown(alone, "documented", net="mlp_cifar10", classes="2")
    assert (row.cells["mdfa"].mean is None) != (row.cells["bp"].mean is None)
    assert "trained on other images" in [cell.reason for cell in row.cells.values()]


def test_a_table_whose_rows_leave_out_an_axis_is_refused(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "papers" / "lra_e" / "tables.yaml"
    path.write_text(
        path.read_text().replace("rows: [setting, update, hidden_layers]", "rows: [setting, hidden_layers]")
    )
    with pytest.raises(ValueError, match=r"table mnist: variance, mean, .* have one place; add to its rows: update"):
        findings("lra_e", [], results)


def test_a_reason_for_a_paper_that_is_not_there_is_refused(results: Path) -> None:
    (results / "not_run.yaml").write_text("mdfaa: []\n")
    with pytest.raises(ValueError, match=r"not_run\.yaml: no paper mdfaa; choose from compare, lra_e, mdfa, attention"):
        findings("lra_e", [], results)


def test_a_papers_page_says_what_is_not_published_and_what_its_runs_took(results: Path) -> None:
    records = [lra(seed, 0.9).model_copy(update={"wall_s": 1800.0}) for seed in range(4)]
    found = findings("lra_e", records, results)
    unpublished, took = tables.about(found)
    assert unpublished == "No published figure is at hand, so no cell is checked against one: only claims are tested."
    day = records[0].finished[:10]
    assert took == f"The 4 runs behind the tables took 2.0 core hours; they finished on {day}."
    assert f"{unpublished} {took}" in tables.page(found, [])
    assert not tables.about(findings("akrout", [], results))
    (not_comparable,) = tables.about(findings("soft_hebb", [], results))
    assert not_comparable == "No published figure is comparable, so no cell is checked against one."


def test_a_single_reading_without_choices_has_no_sentence_of_its_own(results: Path) -> None:
    assert tables.readings(findings("attention", [], results)) == ""


def test_a_papers_page_shows_each_figure_once_under_its_own_table(results: Path) -> None:
    page = tables.page(findings("lra_e", [], results), ["mnist_error", "mnist_long_error", "mnist_long_curves"])
    own, longer = (page.index(f"\n\n### {title}\n") for title in ("MNIST", "MNIST, 100 epochs"))
    places = [[m.start() for m in re.finditer(f"!\\[{name}]", page)] for name in ("mnist_error", "mnist_long_error")]
    assert [len(each) for each in places] == [1, 1]
    assert own < places[0][0] < longer < places[1][0]


def test_verdicts_follow_from_the_records(results: Path) -> None:
    records = []
    for layers, rule, accuracy in [
        *[(layers, RULE, 0.95) for layers in ("3", "5", "8")],
        *[("3", rule, 0.9) for rule in ("bp", "fa", "dfa")],
    ]:
        by_seed = {seed: accuracy + seed / 1000 + seed % 2 * (int(layers) + len(rule) % 6) / 10000 for seed in range(4)}
        records += [lra(seed, each, hidden_layers=layers, rule=rule) for seed, each in by_seed.items()]
    found = findings("lra_e", records, results)
    verdicts = {
        (r.trial.claim.name, *r.trial.at.values()): (r.verdict, r.missing)
        for r in found.verdicts
        if r.trial.reading == "as quoted"
    }
    assert verdicts["stable over depth", "mnist"] == ("holds", "")
    assert verdicts["stable over depth", "fashion_mnist"] == ("not run", "not run yet")
    best = "best against backprop and feedback alignment"
    assert verdicts[best, "mnist", "3"] == ("holds", "")
    assert verdicts[best, "mnist", "5"] == ("not run", "not run yet")
    shown = tables.verdict_table(found)
    line = "| stable over depth | as quoted | mnist | 2 | 4 | +0.02 (-0.02 to +0.07) | 1.00 | < 0.001 | 1.000 | "
    assert f"{line}**holds** | - |" in shown
    assert "- These runs depart from the paper: fewer epochs than planned" in shown
    stable, *_, target = tables.verdict_summary(found).splitlines()[2:-3]
    assert stable == "| stable over depth | as quoted | dataset=mnist |  |  | dataset=fashion_mnist |"
    nowhere = "dataset=mnist,fashion_mnist hidden_layers=3,5,8"
    assert target == f"| best against target and equilibrium propagation | as quoted |  |  |  | {nowhere} |"
    assert f"{best} (as quoted, mnist, 5 hidden layers); " in shown[shown.index("- Not tested, not run yet: ") :]


def test_verdicts_of_before_stay_beside_those_of_now(results: Path) -> None:
    (results / "verdicts_before.csv").write_text(
        "paper,date,claim,reading,where,verdict\n"
        "lra_e,2026-01-31,stable over depth,as quoted,mnist,fails\n"
        "mdfa,2026-01-31,stable over depth,as quoted,mnist,holds\n"
    )
    runs = [lra(seed, 0.95 + seed / 1000, hidden_layers=n) for seed in range(2) for n in ("3", "5", "8")]
    found = findings("lra_e", runs, results)
    assert "| **undecided at 2 seeds** | not known without a spread | fails (2026-01-31) |" in tables.verdict_table(
        found
    )
    differs = "stable over depth (as quoted, mnist): undecided at 2 seeds, before fails (2026-01-31)"
    assert tables.changed(found) == f"Verdicts that differ from those of the tests before: {differs}."
    (told,) = [v for v in tables.verdicts_of(found).to_dict("records") if v["before"]]
    assert (told["before"], told["would_decide"]) == ("fails (2026-01-31)", "not known without a spread")
    assert all("fails (2026-01-31)" in "".join(row) for row in [site.verdict(found.verdicts[0], told["before"])])


def test_a_claim_with_one_test_has_its_verdict_without_a_place() -> None:
    trial = SimpleNamespace(claim=SimpleNamespace(name="c"), reading="r", at={})
    found: Any = SimpleNamespace(verdicts=[SimpleNamespace(trial=trial, verdict="holds")])
    assert tables.summary(found)[1] == ["c", "r", "yes", "", ""]


def test_why_cells_have_no_runs_is_said_once_for_each_reason(results: Path) -> None:
    found = findings("mdfa", [], results)
    reasons = tables.missing(found.tables["documented"])
    assert "net=mlp_imagenet,allconv_imagenet classes=2,3,4,5,10,20,50,100 (ImageNet is not at hand)" in reasons
    assert len(reasons) == 3


HALF = 12.7062 * 1.0  # of the 95 % interval of 90 and 92: t with 1 degree of freedom, times the standard error


def drawn(found: Findings, draw: Any, *arguments: Any) -> list[Any]:
    """The panels of a figure of a paper's rows with runs in its first table."""
    table = found.layout.tables[0]
    rows = [row for row in found.tables[table.name] if row.run]
    return draw(*(table if each is Table else rows if each is Row else each for each in arguments)).axes


@pytest.mark.parametrize(("what", "expected"), [("error", 9.0), ("accuracy", 91.0)])
def test_a_figure_against_depth_has_the_means_and_their_intervals(results: Path, what: str, expected: float) -> None:
    found = findings("lra_e", [lra(0, 0.90), lra(1, 0.92)], results)
    table = found.layout.tables[0].model_copy(update={"drawn": what})
    (ax,) = drawn(found, figures._against, table, Row)
    (bars,) = ax.containers
    line, _, (spread,) = bars.lines
    assert line.get_ydata() == pytest.approx([expected])
    assert spread.get_segments()[0][:, 1] == pytest.approx([expected - HALF, expected + HALF], rel=1e-4)


def test_curves_have_the_mean_over_seeds_its_band_and_the_pace_of_the_fastest_seed(results: Path) -> None:
    def run(seed: int, *accuracies: float, wall_s: float) -> Record:
        epochs = [{"epoch": e, "step": e, "val/accuracy": a} for e, a in enumerate(accuracies, 1)]
        return lra(seed, 0.9).model_copy(update={"epochs": epochs, "wall_s": wall_s})

    found = findings("lra_e", [run(0, 0.5, 0.7, wall_s=20.0), run(1, 0.6, 0.9, wall_s=8.0)], results)
    (ax,) = drawn(found, figures._panels, Row, figures._curve, "")
    assert ax.lines[0].get_xdata() == pytest.approx([1, 2])
    assert ax.lines[0].get_ydata() == pytest.approx([45, 20])
    (band,) = ax.collections
    assert {(round(x), round(y)) for x, y in band.get_paths()[0].vertices} == {(1, 50), (1, 40), (2, 30), (2, 10)}
    (ax,) = drawn(found, figures._panels, Row, figures._time, "")
    assert ax.lines[0].get_xdata() == pytest.approx([4, 8])
    assert ax.lines[0].get_ydata() == pytest.approx([45, 20])


def test_angles_are_means_and_say_of_how_many_seeds_each_layer_is(results: Path) -> None:
    def run(seed: int, first: float | None) -> Record:
        epochs = [{"epoch": e, "step": e, "val/accuracy": 0.5, "angle/update_W2": 10.0 * e} for e in (1, 2)]
        epochs[1] |= {} if first is None else {"angle/update_W1": first}
        return lra(seed, 0.9).model_copy(update={"epochs": epochs})

    found = findings("lra_e", [run(0, 60.0), run(1, 80.0), run(2, None)], results)
    cell = first_row([run(0, 60.0), run(1, 80.0), run(2, None)], results).cells[RULE]
    assert (cell.layers, cell.angle) == ([1, 2], 70)
    (ax,) = drawn(found, lambda rows: figures._angles([(rows[0], RULE, rows[0].cells[RULE])]), Row)
    assert ax.get_title(loc="left").startswith(f"{RULE}, 2 to 3 seeds\n")
    assert ax.lines[0].get_ydata()[1] == pytest.approx(70)
    assert ax.lines[1].get_ydata() == pytest.approx([10, 20])


def test_the_figure_of_all_rules_has_error_angle_time_and_memory(results: Path) -> None:
    costs = ["every rule: compare/mlp,bp,1", "every rule: compare/mlp,dfa,1.25"]
    costs += ["memory of every rule: compare/mlp,bp,1", "memory of every rule: compare/mlp,dfa,0.25"]
    (results / "benchmark.csv").write_text("\n".join(["measure,what,ratio", *costs]))
    runs = [record("compare", {"net": "mlp", "rule": "dfa"}, s, a) for s, a in ((0, 0.90), (1, 0.92))]
    found = findings("compare", runs, results)
    panels = drawn(found, figures._by_rule, found, Row)
    shown = {ax.get_title(loc="left").removeprefix("mlp: "): ax.containers[0].lines[0].get_xdata() for ax in panels}
    values = {name: float(x[0]) for name, x in shown.items()}
    assert values == pytest.approx(
        {
            "test error, %": 9.0,
            "angle, degrees": 60.0,
            "time (bp = 1)": 0.8,
            "memory (bp = 1)": 0.25,
        }
    )


def test_the_files_of_cells_and_verdicts_have_every_number(results: Path) -> None:
    accuracies = {"3": (0.95, 0.952), "5": (0.96, 0.9621), "8": (0.95, 0.9526)}
    runs = [lra(seed, a, hidden_layers=n) for n, each in accuracies.items() for seed, a in enumerate(each)]
    found = findings("lra_e", runs, results)
    lines = tables.rows_of(found).to_dict("records")
    (line,) = [line for line in lines if line["mean"] == "95.1300"]  # 8 layers: 95 and 95.26
    names = "seeds", "epochs", "planned_epochs", "standard_deviation", "low_95", "high_95", "diverged"
    assert [line[name] for name in names] == [2, 2, 100, "0.1838", "93.4782", "96.7818", 0]
    (told,) = [v for v in tables.verdicts_of(found).to_dict("records") if v["verdict"] != "not run"]
    (tested,) = [r for r in found.verdicts if r.mean is not None]
    assert (told["difference"], told["seeds"], told["epochs"]) == ("0.0300", 2, 2)
    assert [float(told[f"p_{side}"]) for side in ("holds", "fails")] == pytest.approx(
        [tested.p_holds, tested.p_fails], rel=1e-5
    )
    assert tested.p_holds != tested.p_fails


def test_the_page_marks_the_best_cell_and_says_how_to_run_it_and_what_was_decided(results: Path) -> None:
    runs = [lra(s, a + s / 100, rule=rule) for rule, a in (("bp", 0.95), (RULE, 0.9)) for s in (0, 2)]
    runs += [lra(s, 0.9 + s / 90, hidden_layers=n) for n in ("5", "8") for s in (0, 2)]
    found = findings("lra_e", runs, results)
    text = site.accuracies(found, found.layout.tables[0])
    best = re.findall(r'<td class="n best" data-value="([\d.]+)"', text)
    assert best == ["0.96000000"]  # deeper nets were trained under one rule alone
    told = re.findall(r"<code>(nobackprop .*?)</code>", "".join(site.runs(found)))
    assert any(
        command.endswith("hidden=[256,256,256]&#x27; rule=bp max_epochs=2 &#x27;seeds=[0,2]&#x27;") for command in told
    )
    (tested,) = [r for r in found.verdicts if r.mean is not None]
    cells = re.findall(r'data-value="([\d.e-]+)"', "".join(site.verdict(tested)))
    assert cells[-2:] == [f"{p:.8f}" for p in (tested.p_holds, tested.p_fails)]


PUBLISHED = {"table": "T", "row": "r", "column": "c", "value": 8.5, "unit": "error, %", "source": "p. 1"}


def publish(results: Path, *figures: dict[str, Any], seeds: int | None = None, paper: str = "lra_e") -> None:
    content = {"paper": "a paper", "link": None, "seeds": seeds, "figures": list(figures)}
    (results.parent / "papers" / paper / "published.yaml").write_text(yaml.safe_dump(content))


def test_a_published_figure_is_shown_beside_ours(results: Path) -> None:
    labels = {"dataset": "mnist", "hidden_layers": 3, "rule": RULE}
    publish(results, PUBLISHED | {"cell": labels, "spread": 0.2, "seeds": 5})
    found = findings("lra_e", [lra(0, 0.9)], results)
    text = tables.accuracy_table(found, found.layout.tables[0])
    assert "| 90.00; published 91.50 ± 0.20, n = 5 (-1.50) |" in text
    assert "| 90.00; published 91.50 $\\pm$ 0.20, n = 5 (-1.50) &" in tables.latex(found).replace(" & 90", " | 90")
    assert "published" not in tables.accuracy_table(found, found.layout.tables[2])
    (line,) = [line for line in tables.rows_of(found).to_dict("records") if line["mean"] == "90.0000"]
    names = "published", "published_spread", "published_seeds", "difference"
    assert [line[name] for name in names] == ["91.5", "0.2", "5", "-1.50"]


def test_a_published_figure_is_shown_where_nothing_was_run(results: Path) -> None:
    publish(results, PUBLISHED | {"cell": {"dataset": "mnist", "hidden_layers": 3, "rule": RULE}})
    found = findings("lra_e", [], results)
    text = tables.accuracy_table(found, found.layout.tables[0])
    assert text.count("| -; published 91.50 |") == 4  # of every reading
    assert tables.accuracy_table(found, found.layout.tables[2]).startswith("### Fashion-MNIST\n\nNo runs yet.")
    assert "published 91.50" in site.accuracies(found, found.layout.tables[0])


def test_a_table_by_rule_has_a_line_a_rule_with_its_angle_and_cost(results: Path) -> None:
    costs = ["every rule: compare/mlp,bp,1", "every rule: compare/mlp,dfa,1.1"]
    costs += ["memory of every rule: compare/mlp,bp,1", "memory of every rule: compare/mlp,dfa,0.25", "memory: x,bp,2"]
    (results / "benchmark.csv").write_text("\n".join(["measure,what,ratio", *costs]))
    runs = [record("compare", {"net": "mlp", "rule": rule}, 0, 0.9) for rule in ("bp", "dfa", "drtp")]
    found = findings("compare", [*runs, record("compare", {"net": "mlp", "rule": "dfa"}, 1, 0.8)], results)
    table, *_ = found.layout.tables
    text = tables.accuracy_table(found, table)
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    head = "mlp, 2 of 10† epochs, 1 seed | mlp: angle | mlp: speed (bp = 1) | mlp: memory (bp = 1)"
    assert lines["| rule"] == f"| rule | {head} |"
    assert lines["| dfa"] == "| dfa | 90.00 | 60° | 1.10 | 0.25 |"
    assert lines["| drtp"] == "| drtp | 90.00 | 60° | - | - |"
    assert r"dfa & 90.00 & 60$^\circ$ & 1.10 & 0.25 \\" in tables.latex(found)
    drawn = tables.figures(found)["accuracy_rules"].decode()
    assert set(re.findall(r'class="rule-(\w+)"', drawn)) == {"bp", "dfa", "drtp"}


def test_a_ranking_has_the_best_rule_first_and_mini_batches_where_they_differ(results: Path) -> None:
    """The order is that of the first row in which all rules have run."""
    runs = [record("compare", {"net": "mlp", "rule": "bp"}, 0, 0.9)]
    for rule, accuracy, steps in (("bp", 0.5, 7), ("dfa", 0.6, 9)):
        constant = {"net": "mnist_mlp", "budget": "epochs", "schedule": "constant", "rule": rule}
        compute = record("compare", {**constant, "budget": "compute"}, 0, accuracy)
        falling = record("compare", {**constant, "budget": "compute", "schedule": "cosine"}, 0, accuracy + 0.2)
        runs += [run.model_copy(update={"steps": steps}) for run in (compute, falling)]
        runs.append(record("compare", constant, 0, accuracy + 0.1))
    found = findings("compare", runs, results)
    (table,) = (table for table in found.layout.tables if table.name == "mnist")
    head, _, *lines = tables.ranking(found, table).splitlines()
    nets = "mnist mlp, epochs, constant | mnist mlp, compute, constant | mini-batches | mnist mlp, compute, cosine"
    assert head == f"| rule | mlp | {nets} |"
    assert lines == ["| dfa | - | 70.00 | 60.00 | 9 | 80.00 |", "| bp | 90.00 | 60.00 | 50.00 | 7 | 70.00 |"]


def test_a_file_of_costs_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.csv"
    assert module.costs(path) == {}
    path.write_text("measure,what\n")
    with pytest.raises(ValueError, match=r"benchmark\.csv has no column ratio: benchmarks/benchmark\.py makes it anew"):
        module.costs(path)
    path.write_text("measure,what,ratio\nmemory: a net,dfa,5\n")
    assert module.costs(path) == {}


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ([PUBLISHED, PUBLISHED], "published.yaml: table 'T', row 'r', column 'c' is there twice"),
        ([PUBLISHED | {"value": None}], "published.yaml: figures.0.value: Input should be a valid number"),
        ([PUBLISHED | {"unit": "%"}], "published.yaml: figures.0.unit: Input should be 'accuracy, %' or 'error, %'"),
        ([PUBLISHED | {"note": 1}], "published.yaml: figures.0.note: Extra inputs are not permitted"),
        (
            [PUBLISHED | {"cell": {"depth": 3}}],
            "published figure T, r, c: depth=3 is not in the grid; there is no such axis",
        ),
        (
            [PUBLISHED | {"cell": {"rule": "bpp"}}],
            "rule=bpp is not in the grid; choose from bp, fa, dfa, dtp, equilibrium_propagation, lra_e, lra_e_plain",
        ),
        (
            [PUBLISHED | {"cell": {"setting": "tuned", "update": "mean"}}],
            "published figure T, r, c: no cell of the grid is tuned, mean; its choices do not occur together",
        ),
    ],
    ids=["twice", "value", "unit", "extra", "axis", "choice", "together"],
)
def test_a_published_figure_that_is_not_valid_is_refused(
    results: Path, figures: list[dict[str, Any]], message: str
) -> None:
    publish(results, *figures)
    with pytest.raises(ValueError, match=re.escape(message)):
        findings("lra_e", [], results)


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*/published.yaml")), ids=lambda path: path.parent.name)
def test_every_published_file_is_valid(path: Path) -> None:
    module.read(module.Published, path)


def filled(results: Path) -> None:
    """Adds records."""
    lines = [
        lra(s, 0.9 + s / 1000, hidden_layers=n, rule=r).line() for s in (0, 1) for n in "358" for r in ("bp", RULE)
    ]
    (results / "records" / "a.jsonl").write_bytes(b"".join(lines))


def generated(results: Path) -> dict[Path, bytes]:
    return tables.generated(tables.every_paper(results), results)


def test_all_that_is_generated_comes_back_byte_for_byte(results: Path) -> None:
    filled(results)
    files = generated(results)
    tables.replace_with(files, results)
    kinds = {path.suffix for path in files}
    assert kinds == {".md", ".csv", ".tex", ".svg"}
    names = {path.name for path in files}
    assert {"mnist_error.svg", "mnist_curves.svg", "mnist_time.svg", "mnist_angles.svg"} <= names
    readme = (results.parent / "papers" / "lra_e" / "README.md").read_text()
    assert "<!-- verdicts: lra_e -->\n| claim | settings |" in readme
    assert readme.startswith("# LRA-E")
    left_over = results / "figures" / "lra_e" / "old.svg"
    left_over.write_text("")
    own = [results / "figures" / "lra_e" / "mine.png", results / "tables" / "notes.md"]
    for path in own:
        path.write_text("mine")
    (results / "tables" / ".ipynb_checkpoints").mkdir()
    for path in files:
        if path.name != "README.md":
            path.unlink()
    again = generated(results)
    assert again == files
    tables.replace_with(again, results)
    assert not left_over.exists()
    assert [path.read_text() for path in own] == ["mine", "mine"]
    for path, content in files.items():
        assert path.read_bytes() == content
        assert b"/tmp" not in content


@pytest.fixture(scope="module")
def every_paper() -> list[Findings]:
    return tables.every_paper(ROOT / "results")


def test_what_is_generated_is_up_to_date(every_paper: list[Findings]) -> None:
    """`make results` makes it so."""
    files = tables.generated(every_paper, ROOT / "results")
    assert [str(path) for path, content in files.items() if not path.exists() or path.read_bytes() != content] == []
    made = {path for folder in ("tables", "figures") for path in (ROOT / "results" / folder).rglob("*.*")}
    assert made <= set(files)


def test_a_published_figure_that_ours_is_not_near_has_a_reason(every_paper: list[Findings]) -> None:
    """And so has one without ours."""
    table, *told = tables.beside_published(every_paper).split("\n\n")
    lines = [[text.strip() for text in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    apart = {line[0] for line in lines if line[-1] != "yes"}
    known = published()
    assert apart
    assert {paper for paper in apart if not known[paper].differs} == set()
    assert [text for text in told if text.startswith("-")] == told[1::2]
    longest: dict[tuple[str, str], int] = {}
    for found in every_paper:
        for cell in (cell for cell in found.cells_shown if cell.mean is not None):
            for place in ((found.paper, ", ".join(figure.place)) for figure in cell.figures):
                longest[place] = max(longest.get(place, 0), cell.epochs or 0)
    assert {(line[0], line[1]): int(line[5].split()[0]) for line in lines} == longest
    papers = {line.partition(":")[0].removeprefix("- ") for line in told[-1].splitlines()}
    assert {paper for paper in papers if not known[paper].note} == set()
    compared = Counter(line[0] for line in lines)
    assert papers == {paper for paper, every in known.items() if compared[paper] < len(every.figures)}


@pytest.mark.parametrize(
    ("ours", "spread", "expected"),
    [
        ([0.97, 0.98], None, "yes"),
        ([0.97, 0.971], None, "no"),
        ([0.97], 0.6, "yes"),
        ([0.97], 0.4, "no"),
        ([0.97], None, "-"),
    ],
)
def test_a_figure_is_near_ours_within_two_standard_deviations(
    ours: list[float], spread: float | None, expected: str
) -> None:
    figure = Figure(table="t", row="r", column="c", value=98, unit="accuracy, %", spread=spread, source="here", cell={})
    records = [lra(seed, accuracy) for seed, accuracy in enumerate(ours)]
    assert tables.near(Found({}, "lra_e", (), records), figure) == expected


def test_every_sentence_to_take_home_holds(every_paper: list[Findings]) -> None:
    content, verdicts = take_home(every_paper)
    assert {(r.trial.claim.text, r.verdict) for r in verdicts} == {(claim.text, "holds") for claim in content.claims}
    assert len(content.claims) == 10
    assert all((ROOT / "results" / "figures" / d.paper / f"{d.figure}.svg").exists() for d in content.figures)


def test_a_sentence_without_runs_says_so_and_shows_no_number(results: Path) -> None:
    lines = tables.sentences([findings("lra_e", [], results)]).splitlines()[2:12]
    assert all(line.endswith(" | - | - | - | not run |") for line in lines)


def test_what_further_seeds_would_decide_is_listed_with_its_cost_the_cheapest_first(results: Path) -> None:
    """Of two tests with the same numbers, the one of slower runs costs more."""
    records = []
    for depth, wall in (("3", 3600.0), ("5", 360.0)):
        for seed, noise in enumerate((-0.05, 0.0, 0.06)):
            runs = [lra(seed, 0.5 + noise, hidden_layers=depth)]
            runs += [lra(seed, 0.8, hidden_layers=depth, rule=rule) for rule in ("bp", "fa", "dfa")]
            records += [run.model_copy(update={"wall_s": wall}) for run in runs]
    found = findings("lra_e", records, results)
    told, _, *rows = tables.what_is_next([found]).splitlines()
    lines = [[text.strip() for text in row.strip("| ").split("|")] for row in rows[2:]]
    assert [line[3] for line in lines] == ["mnist, 5 hidden layers", "mnist, 3 hidden layers"]
    for line, hours in zip(lines, (0.4, 4.0), strict=True):  # of one more seed of four rules
        assert line[5:] == ["3", line[6], "fails", f"{(int(line[6]) - 3) * hours:.1f}"]
    assert "further seeds would decide 2, at the mean" in told


def test_cells_that_lack_epochs_or_seeds_are_counted_with_what_they_would_cost(results: Path) -> None:
    """A cell has its three seeds, another lacks one, and a third has all of them with a tenth of the epochs."""
    given = [(RULE, seed, 100, 720.0) for seed in range(3)] + [("bp", seed, 100, 720.0) for seed in range(2)]
    given += [("fa", seed, 10, 360.0) for seed in range(3)]
    records = [
        record("lra_e", LRA | {"rule": rule}, seed, 0.8, epochs).model_copy(update={"wall_s": wall})
        for rule, seed, epochs, wall in given
    ]
    (line,) = tables.incomplete([findings("lra_e", records, results)]).splitlines()[2:]
    counts = [text.strip() for text in line.strip("| ").split("|")][2:]
    assert counts == ["1", "2", "51", "3.2"]  # hours: one seed of 0.2, and three of one


def test_a_place_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tables: lra --> names nothing that is made here; choose from tables: lra_e"):
        tables.with_sections("<!-- tables: lra -->\n<!-- end -->", {"tables: lra_e": ""})


def test_records_that_differ_are_refused(results: Path) -> None:
    for name, accuracy in (("a", 0.9), ("b", 0.8)):
        (results / "records" / f"{name}.jsonl").write_bytes(lra(0, accuracy).line())
    with pytest.raises(ValueError, match="another record of seed 0"):
        tables.read_records(results)


def test_every_cell_of_a_page_leads_to_its_command_its_config_and_its_records(results: Path) -> None:
    filled(results)
    found = findings("lra_e", tables.read_records(results), results)
    page, files = site.page(found, {}), site.files(found)
    links, ids = set(re.findall(r'<a href="#([^"]+)"', page)), re.findall(r' id="(cell-[^"]+)"', page)
    assert len(links) == 6
    assert links == set(ids)
    named = re.findall(r'<a href="\.\./(cells/[^"]+)"', page)
    assert set(named) == set(files)
    assert len(named) == 12
    for name, content in files.items():
        if name.endswith("config.yaml"):
            run = files[name.replace("config.yaml", "records.jsonl")].splitlines()[0]
            assert json.loads(run)["config"] == yaml.safe_load(content)
    assert "<!-- verdicts: lra_e -->" in page
    assert page.index("What we find") < page.index("Every verdict") < page.index("### MNIST, 2 epochs, 2 seeds")


def test_a_figure_takes_the_colours_of_its_page_and_has_each_name_at_its_line(results: Path) -> None:
    filled(results)
    drawn = figures.figures(findings("lra_e", tables.read_records(results), results))
    svg = drawn["mnist_curves"].decode()
    assert "prefers-color-scheme:dark" in svg
    assert "currentColor" in svg
    assert svg.count(f">{RULE}</text>") == svg.count(">bp</text>") == 3  # a panel for each depth
    assert "<style>svg" not in figures.within_a_page(drawn["mnist_curves"])


def test_a_new_rule_has_a_colour_of_its_own() -> None:
    assert re.fullmatch("#[0-9a-f]{6}", colours.colour("my_rule"))
    assert colours.colour("my_rule") == colours.colour("my_rule") != colours.colour("another_rule")
    assert len({*colours.COLOURS.values()}) == len(colours.COLOURS)


def test_names_beside_a_panel_keep_apart_and_within_it() -> None:
    canvas, (ax,) = figures._axes(1, "", "", ["a"] * 5)
    ax.set_ylim(0, 10)
    figures._names(ax, [(str(i), (1.0, 0.1 * i), "red") for i in range(5)])
    heights = [text.get_position()[1] for text in ax.texts]
    gap = figures.LINE / (ax.get_position().height * canvas.get_figheight())
    assert heights[0] >= 0
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(heights))
    assert [text.get_text() for text in ax.texts] == list("01234")
