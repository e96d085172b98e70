"""Monotone direct feedback alignment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.mistakes import Mistake
from nobackprop.rules.dfa import DFA


@dataclass(frozen=True)
class MDFA(DFA):
    """Monotone DFA: direct feedback alignment with non-negative weights above the first layer, and non-negative B.

    Lechner, "Learning representations for binary-classification without backpropagation", ICLR 2020. With one output
    unit and a non-decreasing activation, every sample's update of a fully connected net then has a non-negative inner
    product with its gradient.

    Weights above the first layer, and all B, start at the absolute value of their draw. After each step every weight
    matrix except the first is clamped to at least `floor`, as in the paper's program. Biases may have any sign. Raises
    Mistake for a `floor` below 0.
    """

    refuses: ClassVar[Mapping[str, str]] = {
        "normalization": "it subtracts a mean, so that a larger activation lowers the others. Then weights above 0 no "
        "longer make every derivative 0 or more, which the paper's theorem 1 needs",
        "attention": "a larger query or key may lower an output, so that the paper's theorem 1 does not hold",
    }

    floor: float = 1e-6

    def __post_init__(self) -> None:
        if self.floor < 0:
            raise Mistake(f"rule.floor is {self.floor}: mDFA needs non-negative weights, so 0 or more")

    def nonnegative(self, net: Network) -> frozenset[str]:
        return frozenset([f"W{l}" for l in range(2, net.L + 1)] + [f"B{l}" for l in range(1, net.L)])

    def constrain(self, net: Network, w: Weights) -> dict[str, Tensor]:
        return {f"W{l}": w[f"W{l}"].clamp(min=self.floor) for l in range(2, net.L + 1)}
