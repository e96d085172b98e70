"""Claims: the statistics against known values, and the verdicts that follow."""

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import PAPERS
from scipy import stats

from nobackprop.papers import results as findings
from nobackprop.papers.claims import (
    Accuracies,
    Claims,
    Conditions,
    Labels,
    Score,
    holm,
    interval,
    judge,
    of_images,
    p_above,
    trials,
)

A = [0.95, 0.97, 0.96, 0.99, 0.94]
B = [0.93, 0.96, 0.96, 0.95, 0.93]


def test_the_p_value_is_that_of_scipys_paired_t_test() -> None:
    differences = [a - b for a, b in zip(A, B, strict=True)]
    assert p_above(differences, 0) == pytest.approx(stats.ttest_rel(A, B, alternative="greater")[1])
    assert p_above(A, 0.95) == pytest.approx(stats.ttest_1samp(A, 0.95, alternative="greater")[1])
    assert p_above([1, 2, 3], 1) == pytest.approx(0.1127017)  # t = sqrt(3) with 2 degrees of freedom: by hand
    assert p_above([1, 3], 1) == pytest.approx(0.25)  # t = 1 with 1 degree of freedom


def test_the_p_value_where_there_is_no_spread_or_one_seed() -> None:
    assert [p_above([0.5, 0.5], bound) for bound in (0.4, 0.5, 0.6)] == [1, 1, 1]  # equal numbers show no spread
    alike = [(correct + 33) / 10_000 - correct / 10_000 for correct in (9773, 9097, 9633)]
    assert len(set(alike)) > 1
    assert p_above(alike, 0) == 1  # neither do those that differ by rounding
    assert p_above([0.5], 0) == 1
    assert p_above([], 0) == 1


def test_the_interval_is_students() -> None:
    expected = stats.t.interval(0.95, 4, loc=np.mean(A), scale=stats.sem(A))
    assert interval(A) == pytest.approx(expected)
    assert interval([0.5]) == (-inf, inf)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_holms_adjustment() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.02, 0.001, 0.02]) == pytest.approx([0.04, 0.003, 0.04])
    assert holm([]) == []


def one(test: str, **fields: Any) -> Claims:
    claim = {"name": "n", "text": "t", "source": "s", "test": test, "cells": [{"rule": "a"}], "than": [{"rule": "b"}]}
    content = {"alpha": 0.05, "margin": 1.0, "relative": 0.4, "readings": {"r": {}}, "claims": [claim | fields]}
    return Claims.model_validate(content)


TEN = Conditions(own_images=True, epochs=10)


def on(accuracies: Sequence[float] | dict[int, float], images: float = inf) -> dict[int, Score]:
    """Accuracies by seed, on so many test images: without a number so many that they leave no chance."""
    by_seed = accuracies if isinstance(accuracies, dict) else dict(enumerate(accuracies))
    return {seed: Score(accuracy, images) for seed, accuracy in by_seed.items()}


def after_10(accuracies: Sequence[float], images: float = inf) -> Accuracies:
    return {TEN: on(accuracies, images)}


def verdict(file: Claims, cells: dict[str, list[float]]) -> str:
    (result,) = judge(file, lambda labels: after_10(cells[labels["rule"] + labels.get("classes", "")]))
    return result.verdict


NOISE = np.array([-0.001, 0.0, 0.001, 0.0005, -0.0005])


@pytest.mark.parametrize(
    ("test", "difference", "expected"),
    [
        ("better", 0.01, "holds"),
        ("better", -0.01, "fails"),
        ("better", 0.0, "undecided at 5 seeds"),
        ("not_worse", 0.05, "holds"),
        ("not_worse", -0.005, "holds"),
        ("not_worse", -0.01, "undecided at 5 seeds"),
        ("not_worse", -0.02, "fails"),
        ("matches", 0.0, "holds"),
        ("matches", 0.005, "holds"),
        ("matches", -0.005, "holds"),
        ("matches", 0.01, "undecided at 5 seeds"),
        ("matches", 0.02, "fails"),
        ("matches", -0.02, "fails"),
    ],
)
def test_verdicts(test: str, difference: float, expected: str) -> None:
    b = np.array(B)
    assert verdict(one(test), {"a": list(b + difference + NOISE), "b": list(b)}) == expected


def test_tost_is_the_larger_of_two_one_sided_p_values() -> None:
    (result,) = judge(one("matches"), lambda labels: after_10(A if labels["rule"] == "a" else B))
    differences = np.array(A) - np.array(B)
    sides: list[Any] = [
        stats.ttest_1samp(differences, bound, alternative=side)[1]
        for bound, side in ((-0.01, "greater"), (0.01, "less"))
    ]
    assert result.p_holds == pytest.approx(min(1, 2 * max(sides)))  # one family with the p against it


@pytest.mark.parametrize("sign", [1, -1])
def test_against_a_match_speaks_the_smallest_p_value_times_their_number(sign: int) -> None:
    differences = sign * (0.0125 + 2 * NOISE)
    (result,) = judge(one("matches"), lambda at: after_10(B if at["rule"] == "b" else list(np.array(B) + differences)))
    beyond: Any = stats.ttest_1samp(sign * differences, 0.01, alternative="greater")
    assert result.p_fails == pytest.approx(2 * 4 * beyond.pvalue)  # two margins, two sides, and one family of two
    assert beyond.pvalue < 0.05
    assert result.verdict == "undecided at 5 seeds"


@pytest.mark.parametrize(("growth", "expected"), [(0.03, "holds"), (0.0, "undecided at 5 seeds"), (-0.03, "fails")])
def test_a_gap_that_grows(growth: float, expected: str) -> None:
    claim = one("gap_grows", start={"classes": 2}, end={"classes": 10})
    b = np.array(B)
    cells = {"a2": list(b + 0.02), "b2": list(b), "a10": list(b - 0.3 + growth + 0.02 + NOISE), "b10": list(b - 0.3)}
    assert verdict(claim, cells) == expected


def test_being_best_means_better_than_each_and_one_that_is_better_refutes_it() -> None:
    file = one("better", than=[{"rule": "b"}, {"rule": "c"}])
    b = np.array(B)
    a = list(b + 0.02 + NOISE)
    assert verdict(file, {"a": a, "b": list(b), "c": list(b)}) == "holds"
    assert verdict(file, {"a": a, "b": list(b), "c": [*a[:4], a[4] + 0.001]}) == "undecided at 5 seeds"
    assert verdict(file, {"a": a, "b": list(b), "c": list(b + 0.04)}) == "fails"
    (result,) = judge(file, lambda labels: after_10({"a": a, "b": list(b), "c": list(b + 0.03)}[labels["rule"]]))
    assert result.mean == pytest.approx(-0.01)  # what decides is shown


def test_seeds_are_paired_and_those_not_in_all_cells_are_left_out() -> None:
    cells = {"a": {7: 0.9, 1: 0.8, 2: 0.7}, "b": {2: 0.6, 7: 0.8, 5: 0.0}}
    (result,) = judge(one("better"), lambda labels: {TEN: on(cells[labels["rule"]])})
    assert (result.seeds, result.mean) == (2, pytest.approx(0.1))
    (result,) = judge(one("better"), lambda labels: {TEN: on({"a": {0: 0.9}, "b": {1: 0.9}}[labels["rule"]])})
    missing = "no seed was run in all of its cells on the same images with the same number of epochs"
    assert (result.verdict, result.missing) == ("not run", missing)


def test_the_longest_training_counts_that_all_cells_have_with_three_seeds() -> None:
    a, b = (
        {Conditions(True, epochs): on([accuracy] * seeds) for epochs, seeds, accuracy in runs}
        for runs in ([(10, 5, 0.5), (100, 3, 0.9)], [(10, 5, 0.6), (100, 3, 0.8)])
    )
    hundred = Conditions(True, 100)

    def of(a: Any, b: Any) -> tuple[int | None, int, Any]:
        (result,) = judge(one("better"), lambda labels: a if labels["rule"] == "a" else b)
        return result.epochs, result.seeds, result.mean

    assert of(a, b) == (100, 3, pytest.approx(0.1))
    assert of(a, {TEN: b[TEN]}) == (10, 5, pytest.approx(-0.1))
    assert of(a, b | {hundred: on([0.8, 0.8])}) == (10, 5, pytest.approx(-0.1))
    assert of({hundred: a[hundred]}, b | {hundred: on({1: 0.8})}) == (100, 1, pytest.approx(0.1))
    assert of({hundred: a[hundred]}, {TEN: b[TEN]}) == (None, 0, None)


def test_only_runs_on_the_same_images_are_paired_and_the_papers_own_are_preferred() -> None:
    own, others = TEN, Conditions(own_images=False, epochs=100)
    cells = {"a": {own: on(A), others: on(B)}, "b": {others: on(A)}}

    def of() -> Any:
        (result,) = judge(one("better"), lambda labels: cells[labels["rule"]])
        return result

    assert (of().epochs, of().mean) == (100, pytest.approx(np.mean(B) - np.mean(A)))
    cells["b"][own] = on(B)
    assert (of().epochs, of().mean) == (10, pytest.approx(np.mean(A) - np.mean(B)))
    cells["b"] = {own._replace(own_images=False): on(B)}
    assert (of().verdict, of().seeds) == ("not run", 0)


def test_one_seed_decides_nothing_and_its_worst_difference_is_shown() -> None:
    assert verdict(one("better"), {"a": [0.9], "b": [0.1]}) == "undecided at 1 seed"
    file = one("better", than=[{"rule": "b"}, {"rule": "c"}])
    (result,) = judge(file, lambda labels: after_10([{"c": 0.95}.get(labels["rule"], 0.9)]))
    assert result.mean == pytest.approx(-0.05)


@pytest.mark.parametrize("difference", [-0.02, 0.02])
def test_a_difference_is_shown_as_a_minus_b_whichever_side_is_harder(difference: float) -> None:
    a = list(np.array(B) + difference + NOISE)
    (result,) = judge(one("matches"), lambda labels: after_10(a if labels["rule"] == "a" else B))
    assert result.mean == pytest.approx(difference)
    assert result.interval is not None
    assert result.interval[0] < difference < result.interval[1]


def test_holm_counts_every_test_of_a_paper() -> None:
    """Alone p is 0.0080: of two tests that is below 0.05 adjusted, of four it is not, whether or not the others ran.

    Each test has a p for the claim and one against it.
    """
    a, b = [0.92, 0.935, 0.911], [0.90, 0.91, 0.895]
    single = p_above([x - y for x, y in zip(a, b, strict=True)], 0)

    def of(run: str) -> Callable[[Labels], Any]:
        return lambda at: after_10(a if at["rule"] == "a" else b) if at["dataset"] in run else "not at hand"

    assert [r.verdict for r in judge(one("better", each={"dataset": ["k", "l"]}), of("kl"))] == ["holds", "holds"]
    file = one("better", each={"dataset": ["k", "l", "m", "n"]})
    for run in ("k", "kl", "klmn"):
        results = judge(file, of(run))
        assert [r.verdict for r in results if r.verdict != "not run"] == ["undecided at 3 seeds"] * len(run)
        assert results[0].p_holds == pytest.approx(8 * single)
    a, b = b, a  # what speaks against the claim is adjusted alike
    results = judge(file, of("kl"))
    assert [r.verdict for r in results[:2]] == ["undecided at 3 seeds"] * 2
    assert results[0].p_fails == pytest.approx(8 * single)
    assert judge(file, of("k"))[2].missing == "not at hand"


@pytest.mark.parametrize(("error", "expected"), [(0.04, "holds"), (0.008, "fails")])
def test_a_ceiling_makes_no_match(error: float, expected: str) -> None:
    """Half a point is less than the margin, but nearly twice the error where that is 0.8 %."""
    b = 1 - error + NOISE / 5
    assert verdict(one("matches"), {"a": list(b - 0.005 + NOISE[::-1] / 5), "b": list(b)}) == expected
    assert verdict(one("not_worse"), {"a": list(b - 0.005 + NOISE[::-1] / 5), "b": list(b)}) == expected
    (result,) = judge(one("matches"), lambda at: after_10(list(b)))
    assert result.margin == pytest.approx(min(0.01, 0.4 * error))


def test_test_images_are_part_of_the_uncertainty_and_make_no_p_smaller() -> None:
    a = list(np.array(B) + 0.004 + NOISE / 10)
    few, many, all_there_are = (
        judge(one("better"), lambda at, n=n: after_10(a if at["rule"] == "a" else B, n))[0] for n in (2000, 10**7, inf)
    )
    assert [result.verdict for result in (few, many, all_there_are)] == ["undecided at 5 seeds", "holds", "holds"]
    assert few.would_decide == "none on these test images"
    widths = [result.interval[1] - result.interval[0] for result in (few, many, all_there_are) if result.interval]
    assert widths == sorted(widths, reverse=True)
    for distance in (0.001, 0.01, 0.1):
        x = list(distance + NOISE)
        assert p_above(x, 0) <= p_above(x, 0, 1e-7) <= p_above(x, 0, 1e-4)


def test_the_variance_of_test_images_is_binomial_by_the_number_of_different_images() -> None:
    assert of_images([Score(0.9, 1000, (0, 1)), Score(0.9, 1000, (0, 1))]) == pytest.approx(0.09 / 1000)
    assert of_images([Score(0.9, 1000, (0, 1)), Score(0.9, 1000, (2, 3))]) == pytest.approx(0.09 / 2000)
    assert of_images([Score(0.9, 1000), Score(0.7, 1000)]) == pytest.approx(0.16 / 1000)


def test_an_undecided_claim_says_how_many_seeds_would_decide_it() -> None:
    b = np.array(B)
    (result,) = judge(one("better"), lambda at: after_10(list(b + 0.0008 + NOISE) if at["rule"] == "a" else list(b)))
    assert result.verdict == "undecided at 5 seeds"
    needed, shows = result.would_decide.split()
    assert shows == "(holds)"
    power = stats.nct.sf(
        stats.t.ppf(1 - 0.025, int(needed) - 1), int(needed) - 1, 0.0008 / 0.00079 * np.sqrt(int(needed))
    )
    assert 0.75 < power < 0.9
    (result,) = judge(one("better"), lambda at: after_10(list(b - 0.0008 + NOISE) if at["rule"] == "a" else list(b)))
    assert result.would_decide == f"{needed} (fails)"
    (result,) = judge(one("better"), lambda at: after_10(list(b + 1e-5 + NOISE) if at["rule"] == "a" else list(b)))
    assert result.would_decide == "over 1000"


@pytest.mark.parametrize("paper", sorted(path.parent.name for path in PAPERS.glob("*/claims.yaml")))
def test_the_claims_of_a_paper_name_cells_of_its_grid(paper: str) -> None:
    """All axes of a part of it are given, in its terms; choices may be of rules that are still to come."""
    grid = yaml.safe_load((PAPERS / paper / "grid.yaml").read_text())
    choices: dict[str, set[str]] = {}
    for part in grid:
        for axis, named in part.items():
            choices.setdefault(axis, set()).update(str(choice) for choice in named)
    file = findings.read(Claims, PAPERS / paper / "claims.yaml")
    every = trials(file)
    assert len(every) == {"lra_e": 28, "mdfa": 18, "attention": 2, "compare": 58}[paper]
    for trial in every:
        for contrast in trial.contrasts:
            for _, labels in contrast.terms:
                assert set(labels) in map(set, grid)
                for axis, choice in labels.items():
                    assert axis == "rule" or choice in choices[axis], f"{axis}={choice}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "best"}, r"claims\.0\.test: Input should be 'better', 'not_worse', 'matches' or 'gap_grows'"),
        ({"start": {"classes": 2}}, r"claims\.0: start and end belong to the test gap_grows"),
        ({"test": "gap_grows"}, r"claims\.0: start and end belong to the test gap_grows"),
        ({"margin": 1}, r"claims\.0\.margin: Extra inputs are not permitted"),
        ({"than": []}, r"claims\.0\.than: List should have at least 1 item"),
    ],
    ids=["test", "start", "gap", "extra", "than"],
)
def test_a_file_that_is_not_valid_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = yaml.safe_load((PAPERS / "lra_e" / "claims.yaml").read_text())
    content["claims"][0] |= change
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"x\.yaml: " + message):
        findings.read(Claims, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: 0.05\nmargin: 1\nalpha: 0.1\n", "line 3: found duplicate key alpha"),
        ("alpha: [0.05\n", "line 2: "),
        ("0.05\n", "line 1: write keys with values"),
    ],
    ids=["twice", "open", "number"],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.yaml, {message}"):
        findings.read(Claims, path)
