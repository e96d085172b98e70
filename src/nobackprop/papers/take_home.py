"""What a reader takes home: the sentences that results/README.md opens with, each with its test, and three figures.

papers/take_home.yaml holds them. A sentence is tested as a paper's claim is, on cells of any paper's grid. All are one
family.
"""

from collections.abc import Sequence

from pydantic import Field

from nobackprop.papers.claims import Accuracies, Claims, Labels, Result, Strict, judge
from nobackprop.papers.results import Findings, read
from nobackprop.places import PAPERS


class Drawing(Strict):
    """A figure of a paper, and what to see in it."""

    paper: str
    figure: str
    shows: str


class TakeHome(Claims):
    """papers/take_home.yaml. Among the labels of each cell, `paper` names the grid that the others are of."""

    figures: list[Drawing] = Field(max_length=3)


def take_home(every: Sequence[Findings]) -> tuple[TakeHome, list[Result]]:
    """The file, and the verdict on each sentence."""
    content: TakeHome = read(TakeHome, PAPERS / "take_home.yaml")
    papers = {found.paper: found for found in every}

    def accuracies(labels: Labels) -> Accuracies | str:
        paper, rest = labels.get("paper", "none"), {axis: choice for axis, choice in labels.items() if axis != "paper"}
        return papers[paper].accuracies(rest) if paper in papers else f"no paper {paper}"

    return content, judge(content, accuracies)
