"""Makes every table and figure of the papers from recorded runs, and says for each claim whether we find the same.

    python scripts/tables.py [--results results]

Nothing is trained and nothing is downloaded. All comes from results/records, papers/, results/not_run.yaml,
results/benchmark.csv and conf/, and the same files give the same bytes. The command writes results/tables/<paper>.md,
.csv, .tex and <paper>_verdicts.csv, results/figures/<paper>/*.svg, and in papers/*/README.md and results/README.md
the text between a place such as `<!-- verdicts: <paper> -->` and `<!-- end -->`.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from nobackprop.mistakes import Mistake, answering
from nobackprop.papers.claims import MOST, Claims, Place, Result, place_of
from nobackprop.papers.figures import figures
from nobackprop.papers.results import (
    Cost,
    Figure,
    Findings,
    Found,
    Row,
    Table,
    described,
    findings,
    papers,
    published,
    rules_run,
)
from nobackprop.papers.take_home import take_home
from nobackprop.places import RESULTS
from nobackprop.records.files import write_atomically
from nobackprop.records.gathering import collect
from nobackprop.records.record import Record

SIGNS, FEWER = "†‡§¶‖⋆", "fewer epochs than planned"  # a sign for each kind of departure that a table can have
POINTS = "difference in points (95 % interval)"
TEX = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "°": r"$^\circ$"})
TEX |= str.maketrans(
    dict(zip(SIGNS, (r"$^\dagger$", r"$^\ddagger$", r"$^\S$", r"$^\P$", r"$^\|$", r"$^\star$"), strict=True))
)


def read_records(results: Path) -> list[Record]:
    """All of results/records. Raises Mistake for a damaged line or two records of one run and seed that differ."""
    found = collect(sorted((results / "records").glob("*.jsonl")))
    if found.conflicts:
        raise Mistake(f"{'; '.join(found.conflicts)}: keep one line of each in {results / 'records'}")
    return list(found.records.values())


def percent(fraction: float | None, digits: int = 2) -> str:
    return "" if fraction is None else f"{100 * fraction:.{digits}f}"


def spread(cell: Found) -> str:
    """Mean and standard deviation in percent, such as `97.31 ± 0.12`."""
    if cell.mean is None:
        return "diverged"
    return percent(cell.mean) + (f" ± {percent(cell.deviation)}" if cell.deviation is not None else "")


def signed(cell: Found, signs: Mapping[str, str]) -> str:
    """`spread` with a sign for each departure from the paper; a dash without runs."""
    return spread(cell) + "".join(signs[mark] for mark in cell.marks if mark in signs) if cell.records else "-"


def difference(cell: Found, figure: Figure) -> str:
    """Our figure minus a published one, in points; empty without ours, or if ours is of other images."""
    return "" if cell.mean is None or cell.stand_in else f"{100 * cell.mean - figure.accuracy:+.2f}"


def comparison(cell: Found, figure: Figure) -> str:
    """A published figure, as an accuracy in percent, and the difference of ours."""
    told = f"published {quoted(figure)}"
    return f"{told} ({apart})" if (apart := difference(cell, figure)) else told


def quoted(figure: Figure) -> str:
    """A published figure, as an accuracy in percent, with its spread and its number of seeds."""
    told = f"{figure.accuracy:.2f}" + (f" ± {figure.spread:.2f}" if figure.spread is not None else "")
    return told + (f", n = {figure.seeds}" if figure.seeds else "")


def text(cell: Found | str | None, signs: Mapping[str, str]) -> str:
    """The text of a table's cell."""
    if isinstance(cell, str):
        return cell
    if cell is None:
        return "-"
    ours = signed(cell, signs)
    if cell.interval:
        low, high = cell.interval
        ours += f" ({percent(low)} to {percent(high)})"
    return "; ".join([ours, *(comparison(cell, figure) for figure in cell.figures)])


def marks(rows: Iterable[Row]) -> dict[str, str]:
    """A sign for each way in which these rows depart from the paper."""
    rows = list(rows)
    every = [FEWER for row in rows if row.fewer_epochs]
    every += [mark for row in rows for cell in row.cells.values() for mark in cell.marks]
    kinds = dict.fromkeys(every)
    return dict(zip(kinds, SIGNS[: len(kinds)], strict=True))


def missing(rows: Iterable[Row]) -> list[str]:
    """Sentences on the cells without runs, grouped by reason. A row without any run is named as a whole."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        whole = not row.run and len({cell.reason for cell in row.cells.values()}) == 1
        for rule, cell in row.cells.items():
            if not cell.records:
                place = _choices(row.labels)
                reasons.setdefault(cell.reason, []).append(place if whole else f"{place} rule={rule}")
    return [f"{_together(places)} ({reason})" for reason, places in reasons.items()]


def _choices(labels: Mapping[str, str]) -> str:
    return " ".join(f"{axis}={choice}" for axis, choice in labels.items())


def _together(places: Sequence[str]) -> str:
    """Places such as `net=mlp_mnist classes=2,3`. Those that differ only in the last axes are joined."""
    unique = [tuple(place.split(" ")) for place in dict.fromkeys(places) if place]
    for axis in range(max(map(len, unique), default=0) - 1, -1, -1):
        groups: dict[tuple[str, ...], list[str]] = {}
        for place in unique:
            if axis < len(place):
                name, choice = place[axis].split("=", 1)
                groups.setdefault((*place[:axis], f"{name}=", *place[axis + 1 :]), []).append(choice)
            else:
                groups.setdefault(place, [])
        unique = [
            (*place[:axis], place[axis] + ",".join(choices), *place[axis + 1 :]) if choices else place
            for place, choices in groups.items()
        ]
    return "; ".join(" ".join(place) for place in unique)


def epochs(row: Row, signs: Mapping[str, str]) -> str:
    return f"{row.epochs} of {row.planned_epochs}{signs[FEWER]}" if row.fewer_epochs else row.epochs


def title(axis: str) -> str:
    return axis.replace("_", " ")


def markdown(header: Sequence[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """A table in Markdown whose first `left` columns are aligned left, and the others right."""
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown: a head for each column (the first `left` hold text), and the cells of each line."""

    head: Sequence[str]
    left: int
    lines: Sequence[Sequence[Found | str | None]]
    signs: Mapping[str, str]  # for each way in which cells depart from the paper


def sheet(found: Findings, table: Table) -> Sheet | None:
    """The rows with something to show, with a column for each rule; or, for a table `by_rule`, a line for each rule.

    It is None if no row has runs or published figures.
    """
    shown = [row for row in found.tables[table.name] if row.shown]
    if not shown:
        return None
    rules, signs = list(dict.fromkeys(rule for row in shown for rule in row.shown)), marks(shown)
    if table.by_rule:
        names = [described(row.labels) for row in shown]
        sizes = [
            f"{name}, {epochs(row, signs)} epochs, {_count([int(row.seeds)], 'seed')}"
            for name, row in zip(names, shown, strict=True)
        ]
        costs = [found.costs_of(row) for row in shown]
        priced = [i for i, each in enumerate(costs) if each not in costs[:i]]  # several rows may be of one experiment
        further = [f"{names[i]}: {what} (bp = 1)" for what in ("speed", "memory") for i in priced]
        head = ["rule", *sizes, *(f"{name}: angle" for name in names), *further]
        lines = [[rule, *_across(shown, [costs[i] for i in priced], rule)] for rule in rules]
        kept = [i for i in range(len(head)) if any(line[i] != "-" for line in lines)]  # a column of dashes says nothing
        return Sheet([head[i] for i in kept], 1, [[line[i] for i in kept] for line in lines], signs)
    lines = [
        [*row.labels.values(), *(row.cells.get(rule) for rule in rules), row.seeds, epochs(row, signs)] for row in shown
    ]
    return Sheet([*map(title, table.rows), *rules, "seeds", "epochs"], len(table.rows), lines, signs)


def _across(rows: Sequence[Row], priced: Sequence[Mapping[str, Cost]], rule: str) -> list[Found | str | None]:
    """The results of a rule: accuracy and angle in each row, and the costs of its step."""
    cells = [row.cells.get(rule) for row in rows]
    angles = ["-" if cell is None or cell.angle is None else f"{cell.angle:.0f}°" for cell in cells]
    costs = [each.get(rule) for each in priced]
    speeds = ["-" if cost is None else f"{cost.speed:.2f}" for cost in costs]
    return [*cells, *angles, *speeds, *("-" if cost is None else f"{cost.memory:.2f}" for cost in costs)]


def notes(found: Findings, table: Table, shown: Sheet | None) -> list[str]:
    """The sentences under a table: what departs from the paper, and what was not run."""
    signs = shown.signs if shown else {}
    told = [f"{sign} {mark}" for mark, sign in signs.items()] + ([table.note] if table.note else [])
    return told + [f"No results for {line}" for line in missing(found.tables[table.name])]


def heading(found: Findings, table: Table) -> str:
    """A table's title with the epochs and seeds of its runs, such as `MNIST, 10 epochs, 3 to 10 seeds`."""
    run = [row for row in found.tables[table.name] if row.run]
    lengths = [int(row.epochs) for row in run] or ([table.epochs] if table.epochs else [])
    counted = [_count(lengths, "epoch"), _count([int(row.seeds) for row in run], "seed")]
    return ", ".join([table.title, *filter(None, counted)])


def _count(numbers: Sequence[int], what: str) -> str:
    several = " to ".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ""
    return f"{several} {what}{'s' * (max(numbers) > 1)}" if numbers else ""


def caption(shown: Sheet) -> str:
    what = (
        "Test accuracy in %: mean ± standard deviation over seeds, and the 95 % interval of the mean over seeds, on "
        "these test images."
    )
    if any(name.endswith(": angle") for name in shown.head):
        what += (
            " The angle is that between a rule's update and backprop's gradient after the last epoch, the mean over "
            "hidden layers and seeds."
        )
    if any("(bp = 1)" in name for name in shown.head):
        what += (
            " Speed is in images a second, memory is what a training step needs besides weights and gradients; both "
            "are of a rule's default settings, not of those of the runs, and relative to backprop's on the same net "
            "(results/benchmark.csv)."
        )
    return what


def accuracy_table(found: Findings, table: Table) -> str:
    """A table's section in Markdown: accuracies, what departs from the paper, and what was not run."""
    shown = sheet(found, table)
    listed = "\n".join(f"- {note}" for note in notes(found, table, shown))
    if shown is None:
        return f"### {heading(found, table)}\n\nNo runs yet.\n\n{listed}".rstrip()
    lines = ([text(cell, shown.signs) for cell in line] for line in shown.lines)
    body = markdown(shown.head, lines, shown.left)
    return f"### {heading(found, table)}\n\n{caption(shown)}\n\n{body}\n\n{listed}".rstrip()


def ranking(found: Findings, table: Table) -> str:
    """The accuracies of a table by rule, a line for each, in Markdown. The best in the first row with all come first.

    A row whose runs differ in length has their mini-batches beside it, unless a row before it has the same.
    """
    rows = [row for row in found.tables[table.name] if row.run]
    rules = rules_run(rows)
    first = max(rows, key=lambda row: sum(rule in row.shown for rule in rules), default=None)
    columns: list[tuple[str, dict[str, str]]] = []
    told: dict[str, str] = {}
    for row in rows:
        cells = {rule: cell for rule, cell in row.cells.items() if cell.records}
        columns.append((described(row.labels), {rule: spread(cell) for rule, cell in cells.items()}))
        steps = {rule: str(max(r.steps for r in cell.records)) for rule, cell in cells.items()}
        if len({*steps.values()}) > 1 and steps.items() - told.items():
            columns.append(("mini-batches", steps))
            told = steps
    best = {rule: cell.mean or 0 for rule, cell in first.cells.items()} if first else {}
    rules.sort(key=lambda rule: best.get(rule, 0), reverse=True)
    lines = [[rule, *(column.get(rule, "-") for _, column in columns)] for rule in rules]
    return markdown(["rule", *(name for name, _ in columns)], lines)


def place(result: Result) -> str:
    return described(result.trial.at)


def before(found: Findings, result: Result) -> str:
    """The verdict in an earlier form of the tests, with its date."""
    return found.before.get((result.trial.claim.name, result.trial.reading, place(result)), "")


def changed(found: Findings) -> str:
    """A sentence on the verdicts that differ from those before, if there are any."""
    now = [(r, before(found, r)) for r in found.verdicts]
    differ = [
        f"{r.trial.claim.name} ({r.trial.reading}, {place(r)}): {r.verdict}, before {then}"
        for r, then in now
        if then and then.rpartition(" (")[0] != r.verdict
    ]
    return f"Verdicts that differ from those of the tests before: {'; '.join(differ)}." if differ else ""


def points(result: Result) -> str:
    """The difference with its interval."""
    assert result.mean is not None
    assert result.interval is not None
    low, high = (f"{100 * bound:+.2f}" for bound in result.interval)
    return f"{100 * result.mean:+.2f}" + (f" ({low} to {high})" if result.seeds > 1 else "")


def p_value(p: float | None) -> str:
    assert p is not None
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def about(found: Findings) -> list[str]:
    """Sentences on what to know before one reads a paper's tables."""
    told = []
    if found.published and not any(cell.figures for cell in found.cells_shown):
        state = "is comparable" if found.published.figures else "is at hand"
        tested = ": only claims are tested" if found.claims else ""
        told.append(f"No published figure {state}, so no cell is checked against one{tested}.")
    records = [r for cell in found.cells_shown for r in cell.all_seeds]
    if each := {(r.signature, r.seed): r.seconds * r.machine.threads for r in records}:
        runs, hours = f"{len(each)} run{'s' * (len(each) > 1)}", sum(each.values()) / 3600
        days = [r.finished[:10] for r in records]
        told.append(f"The {runs} behind the tables took {hours:.1f} core hours; they {between(days)}.")
    return told


def between(days: Sequence[str]) -> str:
    """A phrase such as `finished from 2026-01-31 to 2026-02-03`."""
    first, last = min(days), max(days)
    return f"finished on {first}" if first == last else f"finished from {first} to {last}"


def departures(found: Findings) -> list[str]:
    """A sentence on how runs of a paper depart from it, if they do."""
    signs = marks(row for rows in found.tables.values() for row in rows if row.run)
    return [f"These runs depart from the paper: {'; '.join(signs)}."] if signs else []


def verdict_table(found: Findings) -> str:
    """The verdicts on a paper's claims in Markdown. Tests that were not run are grouped by reason."""
    assert found.claims is not None
    run = [result for result in found.verdicts if result.mean is not None]
    body = []
    for r in run:
        both = p_value(r.p_holds), p_value(r.p_fails)
        told = r.trial.claim.name, r.trial.reading, place(r), str(r.epochs), str(r.seeds)
        body.append([*told, points(r), percent(r.margin) or "-", *both, f"**{r.verdict}**", r.would_decide or "-"])
        body[-1] += [before(found, r) or "-"] if found.before else []
    header = ["claim", "settings", "where", "epochs", "seeds", POINTS, "margin", "p, holds", "p, fails", "verdict"]
    header += ["seeds that would decide", *(["before"] if found.before else [])]
    lines = [markdown(header, body, 3), ""] if body else []
    lines += [f"- {line}" for line in [*departures(found), *filter(None, [changed(found)])]] if body else []
    return "\n".join([*lines, *(f"- {line}" for line in tests_not_run(found))]).rstrip()


def summary(found: Findings) -> list[list[str]]:
    """A head, and a line for each claim and reading. Each verdict has a column with the places that have it."""
    lines: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for r in found.verdicts:
        lines[r.trial.claim.name, r.trial.reading][r.verdict.partition(" at ")[0]].append(_choices(r.trial.at))
    kinds = ["holds", "fails", "undecided"]
    kinds += ["not run"] if any("not run" in places for places in lines.values()) else []
    # A claim without `each` has one test, and no place to name.
    body = [
        [*line, *(_together(places[kind]) or ("yes" if places[kind] else "") for kind in kinds)]
        for line, places in lines.items()
    ]
    return [["claim", "settings", *kinds], *body]


def readings(found: Findings) -> str:
    """A sentence that says what each reading of a paper's settings is; empty where there is one without choices."""
    assert found.claims is not None
    told = [f"{name}: {_choices(labels)}" for name, labels in found.claims.readings.items() if labels]
    return f"Settings {'; '.join(told)}." if told else ""


def lengths(found: Findings) -> str:
    """Sentences on how long the tests' runs were trained, when a paper's runs finished, and how they depart from it."""
    counts = Counter(r.epochs for r in found.verdicts if r.epochs)
    parts = [f"{count} of runs of {epochs} epochs" for epochs, count in sorted(counts.items(), reverse=True)]
    days = [
        r.finished[:10] for rows in found.tables.values() for row in rows for c in row.cells.values() for r in c.records
    ]
    told = [f"Tests: {', '.join(parts)}. The runs {between(days)}."] if parts else []
    return " ".join([*told, *departures(found)])


def verdict_summary(found: Findings) -> str:
    """The same in Markdown, with the settings and the lengths of the runs."""
    head, *body = summary(found)
    told = " ".join(filter(None, [readings(found), lengths(found)]))
    return f"{markdown(head, body, len(head))}\n\n{told}".rstrip()


def sentences(every: Sequence[Findings]) -> str:
    """What a reader takes home, in Markdown: sentences, each with its test, and figures."""
    content, results = take_home(every)
    lines = []
    for claim in content.claims:
        tests = [result for result in results if result.trial.claim == claim]
        hardest = max(tests, key=lambda result: (result.mean is None, result.p_holds or 0))
        numbers = ["-", "-", "-"]
        if hardest.mean is not None:
            numbers = [points(hardest), str(hardest.seeds), p_value(hardest.p_holds)]
        runs = f"[{claim.source}](tables/{claim.at['paper']}.md)"
        lines.append([f"**{claim.name}**", claim.text, runs, *numbers, hardest.verdict])
    told = (
        f"Each sentence has a test (`papers/take_home.yaml`), and all are one family at the level {content.alpha:g}. "
        "Of several tests of a sentence, the one that is hardest to pass is shown. The sentences were written with the "
        "runs at hand."
    )
    drawn = [f"{d.shows}\n\n![{d.shows}](figures/{d.paper}/{d.figure}.svg)" for d in content.figures]
    header = ["about", "what we find", "runs", POINTS, "seeds", "p", "verdict"]
    return "\n\n".join([markdown(header, lines, 3), told, *drawn])


def beside_published(every: Sequence[Findings]) -> str:
    """Each published figure that has ours beside it, in Markdown; why some differ; and what is said of the others."""
    lines, reasons, others = [], {}, []
    findings_of = {found.paper: found for found in every}
    for paper, known in published().items():
        cells = [c for c in (findings_of[paper].cells_shown if paper in findings_of else []) if c.mean is not None]
        cells.sort(key=lambda cell: cell.epochs or 0)  # so that of several the longest training counts
        ours = {figure.place: cell for cell in cells for figure in cell.figures}
        for figure in known.figures:
            if not (cell := ours.get(figure.place)):
                continue
            planned = f" of {cell.planned_epochs}" if cell.epochs != cell.planned_epochs else ""
            told = [paper, ", ".join(figure.place), quoted(figure), spread(cell)]
            told += [str(len(cell.tested)), f"{cell.epochs}{planned}", difference(cell, figure) or "other images"]
            lines.append([*told, near(cell, figure)])
            if lines[-1][-1] != "yes":
                reasons[paper] = f"- {paper}: {known.differs}"
        if left := len(known.figures) - len(ours):
            others.append(f"- {paper}: {left} of {len(known.figures)}. {known.note}".rstrip())
    table = markdown(["results", "figure", "published", "ours", "seeds", "epochs", "difference", "near"], lines, 2)
    why = ["Why some are not near, or not known to be:", "\n".join(reasons.values())] if reasons else []
    return "\n\n".join([table, *why, *(["Figures without ours:", "\n".join(others)] if others else [])])


def near(cell: Found, figure: Figure) -> str:
    """Whether ours is within two deviations of a published figure, those of our seeds and of its own: yes or no.

    A dash where there is no deviation, or ours is of other images.
    """
    apart, deviation = difference(cell, figure), hypot(100 * (cell.deviation or 0), figure.spread or 0)
    if not apart or not deviation:
        return "-"
    return "yes" if abs(float(apart)) <= 2 * deviation else "no"


def what_is_next(every: Sequence[Findings]) -> str:
    """What is decided of all claims, and the tests that further seeds would decide, the cheapest first, in Markdown."""
    judged = [(found, result) for found in every for result in found.verdicts]
    kinds = Counter(r.verdict.partition(" ")[0] for _, r in judged)
    lines = []
    for found, r in judged:
        needed, _, expected = r.would_decide.rstrip(")").partition(" (")
        if expected:
            hours = (int(needed) - r.seeds) * _seconds_of_a_seed(found, r) / 3600
            told = [found.layout.title, r.trial.claim.name, r.trial.reading, place(r)]
            lines.append((hours, [*told, str(r.epochs), str(r.seeds), needed, expected, f"{hours:.1f}"]))
    undecided, decided = kinds["undecided"], kinds["holds"] + kinds["fails"]
    told = (
        f"Of {len(judged)} tests of claims {decided} are decided: {kinds['holds']} hold and {kinds['fails']} fail. Of "
        f"the {undecided} undecided ones further seeds would decide {len(lines)}, at the mean and the spread seen; the "
        "table has these, with what each would cost alone, at the pace of the runs recorded. The others need more test "
        f"images, or more than {MOST} seeds."
    )
    header = ["results", "claim", "settings", "where", "epochs", "seeds", "seeds needed", "would show", "core hours"]
    return "\n\n".join([told, *([markdown(header, [line for _, line in sorted(lines)], 4)] if lines else [])])


def _seconds_of_a_seed(found: Findings, result: Result) -> float:
    """What one more seed of all cells of a test takes."""
    places = dict.fromkeys(place_of(labels) for contrast in result.trial.contrasts for _, labels in contrast.terms)
    each = [[r for r in found.cells[at].records if r.config["max_epochs"] == result.epochs] for at in places]
    return sum(median(r.seconds for r in runs) for runs in each)


def incomplete(every: Sequence[Findings]) -> str:
    """How many cells have three seeds of as many epochs as the paper, and what the others would cost, in Markdown.

    The cost is at the pace of a cell's own runs. A cell that is in several tables counts in the first one.
    """
    lines = []
    for found in every:
        seen: set[Place] = set()
        for table in found.layout.tables:
            shown = [place_of(c.labels) for row in found.tables[table.name] for c in row.cells.values()]
            cells = [found.cells[place] for place in shown if place not in seen]
            seen.update(shown)
            seconds = [_seconds_for_three_seeds(cell) for cell in cells if cell.records]
            if any(seconds):
                whole = seconds.count(0)
                counts = map(str, (whole, len(seconds) - whole, len(cells) - len(seconds)))
                lines.append([found.layout.title, table.title, *counts, f"{sum(seconds) / 3600:.1f}"])
    return markdown(["results", "table", "three seeds, all epochs", "fewer", "without runs", "core hours"], lines, 2)


def _seconds_for_three_seeds(cell: Found) -> float:
    """What a cell's runs of the paper's epochs take that are missing to three seeds."""
    planned = cell.planned_epochs or 0
    seeds = {r.seed for r in cell.records if r.config["max_epochs"] == planned}
    return max(3 - len(seeds), 0) * median(r.seconds * planned / r.config["max_epochs"] for r in cell.records)


def tests_not_run(found: Findings) -> list[str]:
    """Sentences on the tests without runs, grouped by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for r in found.verdicts:
        if r.mean is None:
            reasons[r.missing].append(f"{r.trial.claim.name} ({r.trial.reading}, {place(r)})")
    return [f"Not tested, {why}: {'; '.join(tests)}." for why, tests in reasons.items()]


def how(claims: Claims) -> str:
    """Explains how verdicts come about."""
    points = f"{claims.margin:g} percentage point{'s' * (claims.margin != 1)}"
    return (
        f"Each test compares test accuracies seed by seed, at the level alpha = {claims.alpha:g}. The margin is "
        f"{points} or {claims.relative:.0%} of the error of what is compared with, whichever is less. "
        "The difference is that of the comparison hardest to show: its mean over all seeds that its two sides share, "
        "which may be more than the tables show, and its 95 % interval, which is not adjusted. Interval and p-values "
        "take in the spread over seeds and the sampling of the test images. One p-value is of the test for the claim, "
        "the other of the test against it. Those of all tests of the paper, run or not, are one family and are "
        "adjusted together (Holm), so that the probability of any wrong verdict is at most alpha. Where a test is "
        "undecided, a column says how many seeds would decide it, with 80 % power at the mean and spread seen, and "
        "what they would show. `none on these test images` means that the difference is too small for so few images. "
        "`src/nobackprop/papers/claims.py` defines the tests, and `papers/<paper>/claims.yaml` fixes them; "
        "`results/README.md` says what has changed since then, and `results/verdicts_before.csv` has the verdicts from "
        "before the last change."
    )


def page(found: Findings, drawn: Iterable[str]) -> str:
    """results/tables/<paper>.md, with the figures of these names."""
    parts = [f"# {found.layout.title}", "Made by `make results` from `results/records`; not to be edited."]
    parts += [" ".join(about(found))]
    if found.claims:
        claims = [f"- **{c.name}**: {c.text} ({c.source}); test `{c.test}`" for c in found.claims.claims]
        parts += ["## Do we find what the paper claims?", "\n".join(claims), verdict_summary(found)]
        parts += ["### Every test", how(found.claims), verdict_table(found)]
    parts += ["## Tables"]
    for table in found.layout.tables:
        own = [name for name in drawn if name.rpartition("_")[0] == table.name]
        parts += [accuracy_table(found, table), *(f"![{name}](../figures/{found.paper}/{name}.svg)" for name in own)]
    return "\n\n".join(parts) + "\n"


def rows_of(found: Findings) -> pd.DataFrame:
    """results/tables/<paper>.csv: a line for each cell, also for those without runs."""
    lines: list[dict[str, Any]] = []
    for table in found.layout.tables:
        for row in found.tables[table.name]:
            for rule, cell in row.cells.items():
                low, high = cell.interval or (None, None)
                line = {
                    "table": table.name,
                    **cell.labels,
                    "rule": rule,
                    "seeds": len(cell.records),
                    "epochs": cell.epochs,
                    "planned_epochs": cell.planned_epochs,
                }
                line |= {"mean": percent(cell.mean, 4), "standard_deviation": percent(cell.deviation, 4)}
                line |= {"low_95": percent(low, 4), "high_95": percent(high, 4), "diverged": cell.diverged}
                line["published"] = "; ".join(f"{f.accuracy:g}" for f in cell.figures)
                line["published_spread"] = "; ".join("" if f.spread is None else f"{f.spread:g}" for f in cell.figures)
                line["published_seeds"] = "; ".join(str(f.seeds or "") for f in cell.figures)
                line["difference"] = "; ".join(difference(cell, f) for f in cell.figures)
                line["departs"] = "; ".join(cell.marks)
                line["not_run"] = "" if cell.records else cell.reason
                line["signatures"] = " ".join(sorted({record.signature for record in cell.records}))
                line["overrides"] = " ".join([*cell.overrides, *([f"max_epochs={cell.epochs}"] if cell.epochs else [])])
                lines.append(line)
    frame = pd.DataFrame(lines)
    return frame.astype({"epochs": "Int64", "planned_epochs": "Int64"})


def verdicts_of(found: Findings) -> pd.DataFrame:
    """results/tables/<paper>_verdicts.csv: a line for each test."""
    return pd.DataFrame(
        {
            "claim": r.trial.claim.name,
            "reading": r.trial.reading,
            "where": place(r),
            "test": r.trial.claim.test,
            "epochs": r.epochs,
            "seeds": r.seeds,
            "difference": percent(r.mean, 4),
            "low_95": percent(r.interval[0], 4) if r.interval else "",
            "high_95": percent(r.interval[1], 4) if r.interval else "",
            "margin": percent(r.margin, 4),
            "p_holds": "" if r.p_holds is None else f"{r.p_holds:.6g}",
            "p_fails": "" if r.p_fails is None else f"{r.p_fails:.6g}",
            "verdict": r.verdict,
            "would_decide": r.would_decide,
            "before": before(found, r),
            "not_run": r.missing,
        }
        for r in found.verdicts
    ).astype({"epochs": "Int64"})


def latex(found: Findings) -> str:
    """results/tables/<paper>.tex: a tabular for each table, for the package booktabs."""
    parts = ["% Made by `make results`; not to be edited. Needs \\usepackage{booktabs}."]
    for table in found.layout.tables:
        shown = sheet(found, table)
        if shown is None:
            continue
        lines = [f"\\begin{{tabular}}{{{'l' * shown.left}{'r' * (len(shown.head) - shown.left)}}}", "\\toprule"]
        lines += [" & ".join(name.translate(TEX) for name in shown.head) + r" \\", "\\midrule"]
        rows = ([text(cell, shown.signs).translate(TEX) for cell in line] for line in shown.lines)
        lines += [" & ".join(row) + r" \\" for row in rows]
        lines += ["\\bottomrule", "\\end{tabular}"]
        below = [f"\\par{{\\footnotesize {note.translate(TEX)}}}" for note in notes(found, table, shown)]
        parts.append("\n".join([f"% {table.title}", *lines, *below]))
    return "\n\n".join(parts) + "\n"


def every_paper(results: Path) -> list[Findings]:
    """The findings of all papers. Raises Mistake where a file that they are made from is invalid."""
    records = read_records(results)
    return [findings(paper, records, results) for paper in papers()]


def generated(every: Sequence[Findings], results: Path) -> dict[Path, bytes]:
    """The content of every table and figure of these findings, by path."""
    files: dict[Path, bytes] = {}
    for found in every:
        tables = results / "tables"
        drawn = figures(found)
        files[tables / f"{found.paper}.md"] = page(found, drawn).encode()
        files[tables / f"{found.paper}.tex"] = latex(found).encode()
        files[tables / f"{found.paper}.csv"] = rows_of(found).to_csv(index=False, lineterminator="\n").encode()
        if found.claims:
            verdicts = verdicts_of(found).to_csv(index=False, lineterminator="\n")
            files[tables / f"{found.paper}_verdicts.csv"] = verdicts.encode()
        for name, svg in drawn.items():
            files[results / "figures" / found.paper / f"{name}.svg"] = svg
    sections = {f"verdicts: {found.paper}": verdict_summary(found) for found in every if found.claims}
    sections |= {"sentences: take_home": sentences(every), "list: next": what_is_next(every)}
    sections |= {"list: published": beside_published(every), "list: incomplete": incomplete(every)}
    sections |= {f"ranking: {f.paper}/{t.name}": ranking(f, t) for f in every for t in f.layout.tables if t.by_rule}
    for readme in [*sorted((results.parent / "papers").glob("*/README.md")), *results.glob("README.md")]:
        files[readme] = with_sections(readme.read_text(), sections).encode()
    return files


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """The text with the part between a place such as `<!-- verdicts: lra_e -->` and `<!-- end -->` replaced."""

    def section(match: re.Match[str]) -> str:
        if match[1] not in sections:
            raise Mistake(f"<!-- {match[1]} --> names nothing that is made here; choose from {', '.join(sections)}")
        return f"<!-- {match[1]} -->\n{sections[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+: \S+) -->\n.*?<!-- end -->", section, text, flags=re.DOTALL)


def replace_with(files: Mapping[Path, bytes], results: Path) -> None:
    """Writes the files that have changed, and removes figures of a paper that are no longer made."""
    for paper in papers():
        for path in sorted((results / "figures" / paper).glob("*.svg")):
            if path not in files:
                path.unlink()
                print(f"{path} is made no more, and removed")
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
            print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with answering(parser.prog):
        replace_with(generated(every_paper(options.results), options.results), options.results)
