"""The experiments of a paper, as cells of its grid, papers/<paper>/grid.yaml."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from omegaconf import DictConfig

from nobackprop import composing
from nobackprop.composing import load
from nobackprop.mistakes import Missing, Mistake, close
from nobackprop.places import CONF, PAPERS

TUNED = "+tuned@_global_="  # comes after an experiment, whose settings it replaces; plain tuned=... comes before


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid: its choice on each axis, and the overrides that these choices mean."""

    labels: Mapping[str, str]
    overrides: Sequence[str]

    def __str__(self) -> str:
        return " ".join(f"{axis}={choice}" for axis, choice in self.labels.items())

    @property
    def tuned(self) -> Path | None:
        """The file of tuned settings that this cell takes, or None."""
        return tuned(self.overrides)

    def config(self, further: Sequence[str] = ()) -> DictConfig:
        """The composed config, with further overrides.

        Raises Missing where its tuned settings were not searched yet.
        """
        if self.tuned is not None and not self.tuned.exists():
            raise Missing(f"{self.tuned} is not there yet: scripts/tune.py makes it")
        return composed([*self.overrides, *further])


def fits(labels: Mapping[str, str], where: Mapping[str, Sequence[str]]) -> bool:
    """Whether a cell's choice on each of these axes is one of those named."""
    return all(labels.get(axis) in choices for axis, choices in where.items())


def tuned(overrides: Iterable[str]) -> Path | None:
    """The file of tuned settings that overrides take, or None. Of several the last one counts."""
    names = [text.removeprefix(TUNED) for text in overrides if text.startswith(TUNED)]
    return CONF / "tuned" / f"{names[-1]}.yaml" if names else None


def composed(overrides: Iterable[str]) -> DictConfig:
    """The config that these overrides make. Raises Mistake where they make none."""
    return composing.composed(list(by_key(overrides).values()))[0]


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides by their keys. Of several with one key the last one counts."""
    return {text.split("=", 1)[0]: text for text in overrides}


def cells(paper: str) -> Iterator[Cell]:
    """Every cell of a paper's grid. In an override, `{axis}` stands for the cell's choice on that axis.

    Raises Mistake, which lists the papers, for an unknown one.
    """
    papers = sorted(path.parent.name for path in PAPERS.glob("*/grid.yaml"))
    if paper not in papers:
        raise Mistake(f"no grid for paper {paper!r}: choose one of {', '.join(papers)}{close(paper, papers)}")
    for grid in load(PAPERS / paper / "grid.yaml"):
        for choices in product(*(axis.items() for axis in grid.values())):
            labels = {axis: str(label) for axis, (label, _) in zip(grid, choices, strict=True)}
            yield Cell(labels, [text.format(**labels) for _, overrides in choices for text in overrides])


def select(every: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells with one of the given choices on each axis, such as `classes=2,3`. Raises Mistake where none fits."""
    wanted: dict[str, list[str]] = {}
    for axis, _, choices in (text.partition("=") for text in only):
        wanted.setdefault(axis, []).extend(choices.split(","))
    known: dict[str, set[str]] = {}
    for cell in every:
        for axis, label in cell.labels.items():
            known.setdefault(axis, set()).add(label)
    for axis, choices in wanted.items():
        if axis not in known:
            raise Mistake(f"--only {axis}=...: no such axis; choose from {', '.join(known)}{close(axis, known)}")
        if unknown := sorted(set(choices) - known[axis]):
            there = sorted(known[axis])
            told = f"choose from {', '.join(there)}{close(unknown[0], there)}"
            raise Mistake(f"--only {axis}={','.join(unknown)}: {told}")
    fitting = [c for c in every if all(c.labels.get(axis) in choices for axis, choices in wanted.items())]
    if not fitting:
        raise Mistake(f"no cell fits --only {' '.join(only)}: these choices do not occur together")
    return fitting
