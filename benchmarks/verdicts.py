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
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from nobackprop.papers.claims import Claims, Conditions, Score, decided, evidence, holm, p_above, p_values, trials

ALPHA, MARGIN, RELATIVE = 0.05, 0.01, 0.25
AT = Conditions(True, 1)


def claims(test: str) -> Claims:
    claim = {"name": "", "text": "", "source": "", "test": test, "cells": [{"rule": "a"}], "than": [{"rule": "b"}]}
    content = {"alpha": ALPHA, "margin": 100 * MARGIN, "relative": RELATIVE, "readings": {"": {}}, "claims": [claim]}
    return Claims.model_validate(content)


def before(test: str, differences: list[float]) -> str:
    """The verdict of the tests as they were."""
    bounds = {"better": [(1, 0.0)], "matches": [(1, -MARGIN), (-1, -MARGIN)]}[test]
    each = [([sign * d for d in differences], bound) for sign, bound in bounds]
    p_holds = max(p_above(x, bound) for x, bound in each)
    p_fails = min(1.0, len(each) * min(p_above([-d for d in x], -bound) for x, bound in each))
    return decided(p_holds, p_fails, ALPHA)


def simulate(
    test: str, error: float, difference: float, seeds: int, images: int, spread: float, together: float, draws: int
) -> dict[str, float]:
    """The share of draws that hold and fail, now and before. `error` is b's; `difference` is a - b."""
    rng = np.random.default_rng([seeds, round(1e6 * error), round(1e6 * (difference + 1))])
    true = np.array([1 - error + difference, 1 - error])
    deviations = np.sqrt(true * (1 - true) / images)
    correlated = np.linalg.cholesky([[1, together], [together, 1]])
    (trial,), counts = trials(claims(test)), dict.fromkeys(("holds", "fails", "held before", "failed before"), 0)
    for _ in range(draws):
        shared = true + deviations * (correlated @ rng.standard_normal(2))
        a, b = (np.rint(images * (shared[:, None] + spread * rng.standard_normal((2, seeds)))) / images).tolist()
        cells = {name: {AT: {i: Score(x, images) for i, x in enumerate(every)}} for name, every in (("a", a), ("b", b))}
        found = evidence(trial, lambda labels, cells=cells: cells[labels["rule"]])
        assert not isinstance(found, str)
        p_holds, p_fails = holm(p_values(found))
        now = decided(p_holds, p_fails, ALPHA)
        then = before(test, [x - y for x, y in zip(a, b, strict=True)])
        counts["holds"] += now == "holds"
        counts["fails"] += now == "fails"
        counts["held before"] += then == "holds"
        counts["failed before"] += then == "fails"
    return {name: count / draws for name, count in counts.items()}


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
        for (test, difference), seeds in ((case, n) for case in dict.fromkeys(cases) for n in (3, 10)):
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
