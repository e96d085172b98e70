"""Trains four rules on bundled images of digits, compares them with backprop seed by seed, and plots what differs.

    python examples/compare_rules.py [FOLDER]

It takes half a minute. Started again it trains nothing, since all runs are recorded in FOLDER (runs/example).
"""

import sys
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

import nobackprop

RULES = ["bp", "fa", "dfa", "lra_e"]


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
    runs = nobackprop.train(
        f"rule={','.join(RULES)}",
        dataset="digits",
        seeds=3,
        max_epochs=15,
        logger="none",
        diagnostics="alignment",  # angles of the updates to backprop's gradient
        paths={"runs": folder},
    )

    table = runs.table()  # a row for each rule and seed
    table["rule"] = table["name"].str.removesuffix("_mlp_digits")
    accuracy = table.pivot(index="seed", columns="rule", values="test.accuracy")[RULES]
    ahead = accuracy.sub(accuracy["bp"], axis=0)  # seed by seed: the same split, order and first weights
    print(pd.DataFrame({"test accuracy, %": 100 * accuracy.mean(), "points to backprop": 100 * ahead.mean()}).round(2))

    epochs = pd.concat(pd.DataFrame(record.epochs) for record in runs)
    epochs["rule"] = table["rule"].repeat([len(record.epochs) for record in runs]).to_numpy()
    means: Any = epochs.groupby(["rule", "epoch"]).mean()
    figure, (curves, angles) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule in RULES:
        (line,) = curves.semilogy(100 - 100 * means.loc[rule, "val/accuracy"])
        angle = means.loc[rule, "angle/update_W1"]
        angles.plot(angle, color=line.get_color())
        angles.annotate(f" {rule}", (angle.index[-1], angle.iloc[-1]), color=line.get_color(), va="center")
    curves.set(xlabel="epoch", ylabel="validation error, %")
    curves.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    curves.minorticks_off()
    angles.set(xlabel="epoch", ylabel="layer 1's update to the gradient, degrees", ylim=(-3, 93))
    figure.savefig(f"{folder}/compare_rules.png", dpi=150)
    print(f"figure: {folder}/compare_rules.png")


if __name__ == "__main__":
    main()
