"""Whether recorded runs show what a paper claims: the tests, fixed in papers/<paper>/claims.yaml before the runs.

Every test compares test accuracies seed by seed. It consists of one or more *contrasts*: a sum of accuracies with
signs, one number per seed, whose mean over seeds should lie above a bound. With `a` one of `cells`, `b` one of `than`,
m the margin:

| test | contrasts, for every pair of a and b | the claim |
| --- | --- | --- |
| `better` | a - b > 0 | each a is better than each b |
| `not_worse` | a - b > -m | no a is worse than a b by the margin or more |
| `matches` | a - b > -m and b - a > -m | they differ by less than the margin (two one-sided tests, TOST) |
| `gap_grows` | (a - b at `end`) - (a - b at `start`) > 0 | a is ahead of b by more at the end |

Each contrast is tested by a one-sided t-test on its n numbers. The claim needs all of its contrasts (an
intersection-union test), so its p is the largest of theirs. One contrast whose mean lies *below* its bound is enough
against the claim. The p against it is the smallest of the opposite tests, times their number (Bonferroni). Both p are
adjusted over all tests of the file (Holm). Tests without runs count, too, with p = 1, so that no verdict depends on
which others were run. The verdict is `holds` or `fails` where the adjusted p is at most alpha, and otherwise `undecided
at n seeds`. It is `not run` where records are missing.

All runs of a test are of the same images and have the same number of epochs. Conditions under which its cells have
three seeds in common come first, and of these the paper's own images, then the most epochs. If there are none, those
with the most seeds are taken. Seeds that one of the cells lacks are left out. A seed that diverged before it could be
tested counts at chance level, one over the number of classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, sqrt
from statistics import mean, stdev
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from scipy.special import stdtr, stdtrit

from nobackprop.mistakes import Mistake

Labels = dict[
    str, Annotated[str, BeforeValidator(str)]
]  # a choice on each axis of a grid, such as {rule: bp, classes: 2}


class Conditions(NamedTuple):
    """The conditions that compared runs have in common. Of two, the larger is preferred."""

    own_images: bool  # the paper's, not others in their place
    epochs: int


Accuracies = Mapping[Conditions, Mapping[int, float]]  # by seed, as fractions


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(_Strict):
    """One claim of a paper and its test, made once for each combination of `each`. Labels name cells of the grid."""

    name: str
    text: str
    source: str
    test: Literal["better", "not_worse", "matches", "gap_grows"]
    cells: list[Labels] = Field(min_length=1)
    than: list[Labels] = Field(min_length=1)
    at: Labels = {}
    each: dict[str, list[Annotated[str, BeforeValidator(str)]]] = {}
    start: Labels | None = None
    end: Labels | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Claim":
        if {self.start is not None, self.end is not None} != {self.test == "gap_grows"}:
            raise Mistake("start and end belong to the test gap_grows, which needs both")
        return self


class Claims(_Strict):
    """A paper's claims.yaml. A reading is one way to take the paper's settings; every claim is tested under each."""

    alpha: float = Field(gt=0, lt=0.5)
    margin: float = Field(gt=0, description="percentage points")
    readings: dict[str, Labels] = Field(min_length=1)
    claims: list[Claim] = Field(min_length=1)


@dataclass(frozen=True)
class Contrast:
    """A sum of cells' accuracies with signs whose mean over seeds should lie above a bound (both as fractions)."""

    terms: Sequence[tuple[int, Labels]]
    bound: float
    reversed: bool = False  # b - a


@dataclass(frozen=True)
class Trial:
    """One test of a claim, under one reading and at one combination of `each`."""

    claim: Claim
    reading: str
    at: Labels
    contrasts: Sequence[Contrast]


def trials(claims: Claims) -> list[Trial]:
    """Every test of a file."""
    found = []
    for claim, (reading, labels) in product(claims.claims, claims.readings.items()):
        for choices in product(*claim.each.values()):
            at = dict(zip(claim.each, choices, strict=True))
            common = labels | claim.at | at
            pairs = [(common | a, common | b) for a in claim.cells for b in claim.than]
            contrasts = [contrast for a, b in pairs for contrast in _contrasts(claim, a, b, claims.margin / 100)]
            found.append(Trial(claim, reading, at, contrasts))
    return found


def _contrasts(claim: Claim, a: Labels, b: Labels, margin: float) -> list[Contrast]:
    if claim.test == "better":
        return [Contrast([(1, a), (-1, b)], 0)]
    if claim.test == "gap_grows":
        assert claim.start is not None
        assert claim.end is not None
        gap = [(1, a | claim.end), (-1, b | claim.end), (-1, a | claim.start), (1, b | claim.start)]
        return [Contrast(gap, 0)]
    above = Contrast([(1, a), (-1, b)], -margin)
    return [above] if claim.test == "not_worse" else [above, Contrast([(1, b), (-1, a)], -margin, reversed=True)]


@dataclass(frozen=True)
class Result:
    """The outcome of a trial. p-values are adjusted. Mean and interval are of the contrast hardest to show, a - b."""

    trial: Trial
    epochs: int | None
    seeds: int
    mean: float | None
    interval: tuple[float, float] | None
    p_holds: float | None
    p_fails: float | None
    verdict: str
    missing: str = ""  # why it was not run


def judge(claims: Claims, accuracies: Callable[[Labels], Accuracies | str]) -> list[Result]:
    """The verdict on every test of a file. `accuracies` gives those of a cell, or says why there are none."""
    every = trials(claims)
    found = [_samples(trial, accuracies) for trial in every]
    for_it, against = [1.0] * len(every), [1.0] * len(every)
    for i, (trial, samples) in enumerate(zip(every, found, strict=True)):
        if isinstance(samples, str):
            continue
        values = [(x, contrast.bound) for x, contrast in zip(samples.numbers, trial.contrasts, strict=True)]
        for_it[i] = max(p_above(x, bound) for x, bound in values)
        against[i] = min(1.0, len(values) * min(p_above([-v for v in x], -bound) for x, bound in values))
    results = []
    for trial, samples, p_holds, p_fails in zip(every, found, holm(for_it), holm(against), strict=True):
        if isinstance(samples, str):
            results.append(Result(trial, None, 0, None, None, None, None, "not run", samples))
            continue
        n = len(samples.numbers[0])
        undecided = f"undecided at {n} seed{'s' if n > 1 else ''}"
        verdict = "holds" if p_holds <= claims.alpha else "fails" if p_fails <= claims.alpha else undecided
        x = _hardest(trial, samples.numbers)
        results.append(Result(trial, samples.epochs, n, mean(x), interval(x), p_holds, p_fails, verdict))
    return results


def _hardest(trial: Trial, numbers: Sequence[Sequence[float]]) -> list[float]:
    """The numbers, as a - b, of the contrast that is hardest to show. Of equally hard ones it is the lowest."""
    pairs = zip(trial.contrasts, numbers, strict=True)
    contrast, x = max(pairs, key=lambda pair: (p_above(pair[1], pair[0].bound), pair[0].bound - mean(pair[1])))
    return [-number if contrast.reversed else number for number in x]


@dataclass(frozen=True)
class Samples:
    """The numbers that decide a trial: those of each contrast for each seed, after that many epochs."""

    epochs: int
    numbers: Sequence[Sequence[float]]


def _samples(trial: Trial, accuracies: Callable[[Labels], Accuracies | str]) -> Samples | str:
    """The evidence of the longest training with several seeds in common, or the reason why there is none."""
    found = {}
    for contrast in trial.contrasts:
        for _, labels in contrast.terms:
            cell = accuracies(labels)
            if isinstance(cell, str):
                return cell
            found[tuple(sorted(labels.items()))] = cell
    in_common = {
        at: seeds
        for at in set.intersection(*(set(cell) for cell in found.values()))
        if (seeds := sorted(set.intersection(*(set(cell[at]) for cell in found.values()))))
    }
    if not in_common:
        return "no seed was run in all of its cells on the same images with the same number of epochs"
    at = max(in_common, key=lambda at: (min(len(in_common[at]), 3), at))
    numbers = [
        [
            sum(sign * found[tuple(sorted(labels.items()))][at][seed] for sign, labels in contrast.terms)
            for seed in in_common[at]
        ]
        for contrast in trial.contrasts
    ]
    return Samples(at.epochs, numbers)


def p_above(x: Sequence[float], bound: float) -> float:
    """The p-value of a one-sided t-test that the mean lies above a bound.

    It is 1 for fewer than two numbers. It is 1, too, for numbers that are equal up to rounding, such as those of nets
    that learned nothing, since they have no spread to compare the distance with.
    """
    if len(x) < 2 or stdev(x) < 1e-9:
        return 1.0
    return float(stdtr(len(x) - 1, (bound - mean(x)) / (stdev(x) / sqrt(len(x)))))


def interval(x: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. It is infinite for fewer than two numbers."""
    if len(x) < 2:
        return -inf, inf
    half = float(stdtrit(len(x) - 1, 0.975)) * stdev(x) / sqrt(len(x))
    return mean(x) - half, mean(x) + half


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method, in the order given."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
