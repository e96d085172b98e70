"""Whether recorded runs show what a paper claims: the tests, fixed in papers/<paper>/claims.yaml.

Every test compares test accuracies seed by seed. It consists of one or more *contrasts*: a weighted sum of accuracies,
one number per seed, whose mean should lie above a bound. With `a` one of `cells`, `b` one of `than`, m the margin and r
the relative margin:

| test | contrasts, for every pair of a and b | the claim |
| --- | --- | --- |
| `better` | a - b > 0 | each a is better than each b |
| `not_worse` | a - b > -m and a - b > -r (1 - b) | no a is worse than a b by the smaller margin or more |
| `matches` | these two, and b - a > -m and b - a > -r (1 - b) | they differ by less than the smaller margin |
| `gap_grows` | (a - b at `end`) - (a - b at `start`) > 0 | a is ahead of b by more at the end |

1 - b is an error. Where it is small, r (1 - b) is the smaller margin. So two nets do not match because both are near
100 %. `matches` is made of one-sided tests both ways (TOST).

Each contrast is tested by a one-sided t-test. The variance of its mean has two parts. One is that over seeds, by their
number. The other one is of the test images, which are a sample, too, and the same for all seeds. It is the sum of the
binomial variances of the accuracies, times their weights squared. That is an upper bound, since nets err on the same
images more often than by chance. Degrees of freedom are Satterthwaite's. The p is the larger one of this and the
t-test over seeds alone, so that the images never make it smaller. Where seeds draw their own classes, the images are
those of all classes drawn.

The claim needs all of its contrasts (an intersection-union test), so its p is the largest of theirs. One contrast whose
mean lies *below* its bound is enough against the claim. The p against it is the smallest of the opposite tests, times
their number (Bonferroni). All p for and against all claims of the file are one family and are adjusted together (Holm).
So the probability that any verdict is wrong is at most alpha. Tests without runs count, too, with p = 1, so that no
verdict depends on which others were run. The verdict is `holds` or `fails` where the adjusted p is at most alpha, and
otherwise `undecided at n seeds`, with the number of seeds that would decide it. It is `not run` where records are
missing.

All runs of a test are of the same images and have the same number of epochs. Conditions under which its cells have
three seeds in common come first, and of these the paper's own images, then the most epochs. If there are none, those
with the most seeds are taken. Seeds that one of the cells lacks are left out. A seed that diverged before it could be
tested counts at chance level, one over the number of classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, sqrt
from statistics import mean, stdev, variance
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from scipy.special import stdtr, stdtrit

from nobackprop.mistakes import Mistake

POWER, MOST = 0.8, 1000  # of a further run that is to decide, and the most seeds that it may have
Labels = dict[
    str, Annotated[str, BeforeValidator(str)]
]  # a choice on each axis of a grid, such as {rule: bp, classes: 2}


class Conditions(NamedTuple):
    """The conditions that compared runs have in common. Of two, the larger is preferred."""

    own_images: bool  # the paper's, not others in their place
    epochs: int


class Score(NamedTuple):
    """A seed's accuracy, as a fraction, on so many test images of these classes."""

    accuracy: float
    images: float
    classes: tuple[int, ...] = ()


Place = tuple[tuple[str, str], ...]  # labels in order
Accuracies = Mapping[Conditions, Mapping[int, Score]]  # by seed


class Strict(BaseModel):
    """A part of a YAML file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(Strict):
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


class Claims(Strict):
    """A file of claims. A reading is one way to take a paper's settings; every claim is tested under each."""

    alpha: float = Field(gt=0, lt=0.5)
    margin: float = Field(gt=0, description="percentage points")
    relative: float = Field(gt=0, lt=1, description="margin as a share of the error of what is compared with")
    readings: dict[str, Labels] = Field({"": {}}, min_length=1)
    claims: list[Claim] = Field(min_length=1)


Terms = Sequence[tuple[float, Labels]]  # cells with the weights of their accuracies


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of cells' accuracies whose mean over seeds should lie above a bound (both as fractions)."""

    terms: Terms
    bound: float
    difference: Terms  # what is shown of it: a - b

    @property
    def reference(self) -> Labels:
        """The cell b."""
        return self.difference[1][1]


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
            contrasts = [contrast for a, b in pairs for contrast in _contrasts(claim, a, b, claims)]
            found.append(Trial(claim, reading, at, contrasts))
    return found


def _contrasts(claim: Claim, a: Labels, b: Labels, claims: Claims) -> list[Contrast]:
    difference = [(1.0, a), (-1.0, b)]
    if claim.test == "better":
        return [Contrast(difference, 0, difference)]
    if claim.test == "gap_grows":
        assert claim.start is not None
        assert claim.end is not None
        gap = [(1.0, a | claim.end), (-1.0, b | claim.end), (-1.0, a | claim.start), (1.0, b | claim.start)]
        return [Contrast(gap, 0, gap)]
    found = []
    for sign in (1, -1) if claim.test == "matches" else (1,):
        found.append(Contrast([(sign, a), (-sign, b)], -claims.margin / 100, difference))
        found.append(Contrast([(sign, a), (-sign - claims.relative, b)], -claims.relative, difference))
    return found


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
    margin: float | None = None  # the smaller one, at the error seen, as a fraction
    would_decide: str = ""  # of an undecided trial: how many seeds, and what they would show
    missing: str = ""  # why it was not run


def judge(claims: Claims, accuracies: Callable[[Labels], Accuracies | str]) -> list[Result]:
    """The verdict on every test of a file. `accuracies` gives those of a cell, or says why there are none."""
    every = trials(claims)
    found = [evidence(trial, accuracies) for trial in every]
    raw = [(1.0, 1.0) if isinstance(samples, str) else p_values(samples) for samples in found]
    adjusted = holm([p for both in raw for p in both])
    results = []
    for trial, samples, p_holds, p_fails in zip(every, found, adjusted[::2], adjusted[1::2], strict=True):
        if isinstance(samples, str):
            results.append(Result(trial, None, 0, None, None, None, None, "not run", missing=samples))
            continue
        n = len(samples.contrasts[0].numbers)
        undecided = f"undecided at {n} seed{'s' if n > 1 else ''}"
        verdict = decided(p_holds, p_fails, claims.alpha) or undecided
        more = would_decide(samples, claims.alpha / len(adjusted)) if verdict == undecided else ""
        hardest = max(samples.contrasts, key=lambda sample: (sample.p(), sample.bound - mean(sample.numbers)))
        margin = None
        if trial.claim.test in ("matches", "not_worse"):
            margin = min(claims.margin / 100, claims.relative * (1 - hardest.reference))
        x, v = hardest.differences, hardest.difference_variance
        results.append(
            Result(trial, samples.epochs, n, mean(x), interval(x, v), p_holds, p_fails, verdict, margin, more)
        )
    return results


def decided(p_holds: float, p_fails: float, alpha: float) -> str:
    """The verdict by adjusted p-values, or an empty text."""
    return "holds" if p_holds <= alpha else "fails" if p_fails <= alpha else ""


@dataclass(frozen=True)
class Sample:
    """The numbers that decide a contrast, one for each seed, and the variance that the test images give their mean."""

    numbers: Sequence[float]
    bound: float
    variance: float = 0.0
    differences: Sequence[float] = ()  # a - b
    difference_variance: float = 0.0
    reference: float = 0.0  # b's mean accuracy

    def p(self) -> float:
        """That the mean lies above the bound."""
        return p_above(self.numbers, self.bound, self.variance)

    def opposite(self) -> float:
        """That the mean lies below the bound."""
        return p_above([-number for number in self.numbers], -self.bound, self.variance)


@dataclass(frozen=True)
class Samples:
    """The evidence on a trial, after that many epochs."""

    epochs: int
    contrasts: Sequence[Sample]


def p_values(samples: Samples) -> tuple[float, float]:
    """The p-value for a claim, and that against it, not adjusted."""
    each = samples.contrasts
    return max(sample.p() for sample in each), min(1.0, len(each) * min(sample.opposite() for sample in each))


def evidence(trial: Trial, accuracies: Callable[[Labels], Accuracies | str]) -> Samples | str:
    """The evidence of the longest training with several seeds in common, or the reason why there is none."""
    found = {}
    for contrast in trial.contrasts:
        for _, labels in contrast.terms:
            cell = accuracies(labels)
            if isinstance(cell, str):
                return cell
            found[place_of(labels)] = cell
    in_common = {
        at: seeds
        for at in set.intersection(*(set(cell) for cell in found.values()))
        if (seeds := sorted(set.intersection(*(set(cell[at]) for cell in found.values()))))
    }
    if not in_common:
        return "no seed was run in all of its cells on the same images with the same number of epochs"
    at = max(in_common, key=lambda at: (min(len(in_common[at]), 3), at))
    tested = {place: [cell[at][seed] for seed in in_common[at]] for place, cell in found.items()}
    contrasts = []
    for contrast in trial.contrasts:
        numbers, images = _sum(contrast.terms, tested)
        differences, images_of_difference = _sum(contrast.difference, tested)
        reference = mean(seed.accuracy for seed in tested[place_of(contrast.reference)])
        contrasts.append(Sample(numbers, contrast.bound, images, differences, images_of_difference, reference))
    return Samples(at.epochs, contrasts)


def place_of(labels: Mapping[str, str]) -> Place:
    """What labels are found by, in whatever order they stand."""
    return tuple(sorted(labels.items()))


def _sum(terms: Terms, tested: Mapping[Place, Sequence[Score]]) -> tuple[list[float], float]:
    """A weighted sum of accuracies for each seed, and the variance that the test images give its mean."""
    cells = [(weight, tested[place_of(labels)]) for weight, labels in terms]
    numbers = [0.0] * len(cells[0][1])
    for weight, seeds in cells:
        numbers = [number + weight * seed.accuracy for number, seed in zip(numbers, seeds, strict=True)]
    return numbers, sum((weight**2 * of_images(seeds) for weight, seeds in cells), 0.0)


def of_images(seeds: Sequence[Score]) -> float:
    """The binomial variance of a cell's mean accuracy, by the number of different test images that its seeds saw."""
    accuracy, images = mean(seed.accuracy for seed in seeds), mean(seed.images for seed in seeds)
    if drawn := {each for seed in seeds for each in seed.classes}:
        images *= len(drawn) / mean(len(seed.classes) for seed in seeds)
    return accuracy * (1 - accuracy) / images


def p_above(x: Sequence[float], bound: float, images: float = 0.0) -> float:
    """The p-value of a one-sided t-test that the mean lies above a bound. `images` is the test images' variance.

    It is 1 for fewer than two numbers. It is 1, too, for numbers that are equal up to rounding, such as those of nets
    that learned nothing, since they have no spread to compare the distance with.
    """
    if len(x) < 2 or (spread := variance(x)) < 1e-18:
        return 1.0
    distance = mean(x) - bound
    return max(float(stdtr(df, -distance / error)) for error, df in _errors(spread, len(x), images))


def _errors(spread: float, n: float, images: float) -> list[tuple[float, float]]:
    """Standard errors of a mean over n seeds and their degrees of freedom: over seeds alone, and with the images."""
    seeds = spread / n
    df = min((n - 1) * ((seeds + images) / seeds) ** 2, 1e6)  # Satterthwaite's
    return [(sqrt(seeds), n - 1), (sqrt(seeds + images), df)]


def would_decide(samples: Samples, level: float) -> str:
    """How many seeds would decide a trial at this level, with 80 % power at the mean and the spread seen."""
    if any(len(sample.numbers) < 2 or stdev(sample.numbers) < 1e-9 for sample in samples.contrasts):
        return "not known without a spread"
    needed = [_seeds(sample, level) for sample in samples.contrasts]
    opposite = [_seeds(sample, -level / len(needed)) for sample in samples.contrasts]
    n, verdict = min((max(needed), "holds"), (min(opposite), "fails"))
    if n == inf:
        return "none on these test images"
    return f"over {MOST}" if n > MOST else f"{n:.0f} ({verdict})"


def _seeds(sample: Sample, level: float) -> float:
    """How many seeds would show that a mean lies above its bound, or with a negative level below it.

    It is infinite where no number of seeds would, since the test images are too few or the mean lies on the other side.
    """
    distance = (mean(sample.numbers) - sample.bound) * (1 if level > 0 else -1)
    if distance <= 0:
        return inf

    def shows(n: float) -> bool:  # by the usual approximation of a t-test's power
        errors = _errors(variance(sample.numbers), n, sample.variance)
        return all(distance >= error * float(stdtrit(df, [1 - abs(level), POWER]).sum()) for error, df in errors)

    if not shows(1e9):
        return inf
    low, high = 1, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def interval(x: Sequence[float], images: float = 0.0) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. `images` is the variance of the test images, where it counts.

    It is infinite for fewer than two numbers.
    """
    if len(x) < 2:
        return -inf, inf
    if stdev(x) < 1e-9:  # no spread, and only the images are left
        half = float(stdtrit(1e6, 0.975)) * sqrt(images)
    else:
        half = max(float(stdtrit(df, 0.975)) * error for error, df in _errors(variance(x), len(x), images))
    return mean(x) - half, mean(x) + half


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method, in the order given."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted
