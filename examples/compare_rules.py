"""Trains three rules on bundled images of digits, compares them with backprop seed by seed, and plots what differs.

    python examples/compare_rules.py [FOLDER]

It takes half a minute. Started again it trains nothing, since all runs are recorded in FOLDER (runs/example).
"""

import sys
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

import nobackprop

RULES = ["bp", "fa", "dfa", "lra_e"]


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
    settings: dict[str, Any] = {"dataset": "digits", "seeds": 3, "max_epochs": 15, "logger": "none"}
    settings |= {"diagnostics": "alignment", "paths.runs": folder}  # alignment: angles of updates to the gradient
    by_rule = {rule: list(nobackprop.train(f"rule={rule}", **settings)) for rule in RULES}

    backprop = {record.seed: record.test["accuracy"] for record in by_rule["bp"]}
    for rule, records in by_rule.items():
        reached = mean(record.test["accuracy"] for record in records)
        ahead = mean(record.test["accuracy"] - backprop[record.seed] for record in records)
        print(f"{rule:6} {reached:.2%} on the test images, {100 * ahead:+.2f} points to backprop")

    figure, (curves, angles) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule, records in by_rule.items():
        epochs = range(1, len(records[0].epochs) + 1)
        errors = [mean(100 - 100 * record.epochs[e - 1]["val/accuracy"] for record in records) for e in epochs]
        (line,) = curves.semilogy(epochs, errors)
        curves.annotate(rule, (epochs[-1], errors[-1]), color=line.get_color())
        first = [mean(record.epochs[e - 1]["angle/update_W1"] for record in records) for e in epochs]
        angles.plot(epochs, first, color=line.get_color())
        angles.annotate(rule, (epochs[-1], first[-1]), color=line.get_color())
    curves.set(xlabel="epoch", ylabel="validation error, %")
    angles.set(xlabel="epoch", ylabel="angle of layer 1's update to the gradient, degrees", ylim=(-3, 93))
    figure.savefig(f"{folder}/compare_rules.png", dpi=150)
    print(f"figure: {folder}/compare_rules.png")


if __name__ == "__main__":
    main()
