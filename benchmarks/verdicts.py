"""How often the tests of claims.py are wrong: simulated comparisons of two nets whose true accuracies are known.

    python benchmarks/verdicts.py --draws 10000 --into results/verdict_errors.csv

A draw is `seeds` accuracies of a and of b on the same test images. The images are a sample: each net's accuracy on them
differs from its true one by a number that all seeds share, binomial, and as correlated between a and b as `--together`
says. A seed adds its own deviation, with the standard deviation `--spread`. `before` is the test as it was: a margin of
one point alone, seeds as the only source of chance, and p-values for and against a claim in two families. The share of
draws is given that end in each verdict. A verdict is wrong where the truth does not have it: at a difference of 0,
`better` neither holds nor fails; at the smaller margin, `matches` neither holds nor fails.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtr

from nobackprop.papers.claims import Claims, Conditions, Score, Trial, evidence, p_values, trials

ALPHA, MARGIN, RELATIVE = 0.05, 0.01, 0.25
AT = Conditions(True, 1)


def trial_of(test: str) -> Trial:
    claim = {"name": "", "text": "", "source": "", "test": test, "cells": [{"rule": "a"}], "than": [{"rule": "b"}]}
    content = {"alpha": ALPHA, "margin": 100 * MARGIN, "relative": RELATIVE, "readings": {"": {}}, "claims": [claim]}
    (trial,) = trials(Claims.model_validate(content))
    return trial


def p_above_each(x: np.ndarray, bound: float, images: np.ndarray | float = 0.0) -> np.ndarray:
    """`claims.p_above` for every row of x at once."""
    distance, seeds = x.mean(1) - bound, x.var(1, ddof=1) / x.shape[1]
    seeds = np.maximum(seeds, 1e-30)
    df = np.minimum((x.shape[1] - 1) * ((seeds + images) / seeds) ** 2, 1e6)
    over_seeds = stdtr(x.shape[1] - 1, -distance / np.sqrt(seeds))
    p = np.maximum(over_seeds, stdtr(df, -distance / np.sqrt(seeds + images)))
    return np.where(seeds * x.shape[1] < 1e-18, 1.0, p)


def each_p(contrasts: Sequence[tuple[float, float, float]], a: np.ndarray, b: np.ndarray, images: float) -> np.ndarray:
    """The p-values for and against of every draw: contrasts are the weights of a and b, and the bound."""
    above, below = [], []
    variances = [each.mean(1) * (1 - each.mean(1)) / images for each in (a, b)]
    for of_a, of_b, bound in contrasts:
        x, v = of_a * a + of_b * b, of_a**2 * variances[0] + of_b**2 * variances[1]
        above.append(p_above_each(x, bound, v))
        below.append(p_above_each(-x, -bound, v))
    return np.stack([np.max(above, 0), np.minimum(1, len(contrasts) * np.min(below, 0))])


def simulate(
    test: str, error: float, difference: float, seeds: int, images: int, spread: float, together: float, draws: int
) -> dict[str, float]:
    """The share of draws that hold and fail, now and before. `error` is b's; `difference` is a - b."""
    rng = np.random.default_rng([seeds, round(1e6 * error), round(1e6 * (difference + 1))])
    true = np.array([1 - error + difference, 1 - error])
    deviations = np.sqrt(true * (1 - true) / images)
    correlated = np.linalg.cholesky([[1, together], [together, 1]])
    shared = true + rng.standard_normal((draws, 2)) @ correlated.T * deviations
    a, b = np.rint(images * (shared.T[:, :, None] + spread * rng.standard_normal((2, draws, seeds)))) / images
    trial = trial_of(test)
    contrasts = [(c.terms[0][0], c.terms[1][0], c.bound) for c in trial.contrasts]
    contrasts = [
        (x, y, bound) if c.terms[0][1]["rule"] == "a" else (y, x, bound)
        for c, (x, y, bound) in zip(trial.contrasts, contrasts, strict=True)
    ]
    now = each_p(contrasts, a, b, images)
    for i in range(20):  # the same as the tests themselves give
        cells = {
            name: {AT: {k: Score(x, images) for k, x in enumerate(rows[i])}} for name, rows in (("a", a), ("b", b))
        }
        found = evidence(trial, lambda labels, cells=cells: cells[labels["rule"]])
        assert not isinstance(found, str)
        np.testing.assert_allclose(now[:, i], p_values(found), rtol=1e-6, atol=1e-12)
    plain = {"better": [(1.0, -1.0, 0.0)], "matches": [(1.0, -1.0, -MARGIN), (-1.0, 1.0, -MARGIN)]}[test]
    then = each_p(plain, a, b, np.inf)
    adjusted = np.maximum(np.minimum(1, 2 * now.min(0)), now)  # Holm, of two
    adjusted = np.where(now == now.min(0), np.minimum(1, 2 * now.min(0)), adjusted)
    shares = {"holds": adjusted[0], "fails": adjusted[1], "held before": then[0], "failed before": then[1]}
    return {name: round(float((p <= ALPHA).mean()), 4) for name, p in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--spread", type=float, default=0.001, help="of a seed's accuracy, as a fraction")
    parser.add_argument(
        "--together",
        type=float,
        nargs="+",
        default=[0.0, 0.5],
        help="correlations of the nets' accuracies on the images",
    )
    parser.add_argument("--into", type=Path, required=True, metavar="FILE.csv")
    options = parser.parse_args()
    lines = []
    for together, error in product(
        options.together, (0.10, 0.02, 0.008)
    ):  # Fashion-MNIST, MNIST after a few epochs, and near the ceiling
        further = {"images": options.images, "spread": options.spread, "together": together}
        smaller = min(MARGIN, RELATIVE * error)
        cases = [("better", 0.0), ("matches", 0.0), ("matches", -smaller), ("matches", -MARGIN)]
        for (test, difference), seeds in ((case, n) for case in dict.fromkeys(cases) for n in (3, 5, 10)):
            if difference < -error:
                continue
            shares = simulate(test, error, difference, seeds, draws=options.draws, **further)
            lines.append(
                {"test": test, "error of b, %": 100 * error, "a - b, points": round(100 * difference, 3)}
                | {"margin, points": round(100 * smaller, 3), "seeds": seeds, **shares}
                | {"draws": options.draws, **further}
            )
            print(lines[-1], flush=True)
    pd.DataFrame(lines).to_csv(options.into, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
