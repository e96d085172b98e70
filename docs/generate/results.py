"""The results of each paper as a page: its README in words, every verdict, tables that sort, figures, and all cells."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import join

import yaml

from nobackprop.papers.claims import Result
from nobackprop.papers.figures import within_a_page
from nobackprop.papers.results import Findings, Found, Published, Row, Table
from nobackprop.papers.tables import (
    about,
    before,
    caption,
    changed,
    comparison,
    departures,
    heading,
    how,
    notes,
    p_value,
    percent,
    place,
    sheet,
    signed,
    tests_not_run,
)
from nobackprop.places import PAPERS
from nobackprop.records.record import Record

TITLES = {  # by the kind of figure; the first two and `rules`, which say most, are open
    "error": "Test error, with 95 % intervals",
    "accuracy": "Test accuracy, with 95 % intervals",
    "rules": "All rules, the best first: test error, angle of the updates to the gradient, time and memory of a step",
    "cost": "Test error against the time of a training step; the best rules are at the bottom left",
    "curves": "Learning curves, validation error: the mean over seeds, in a band from the lowest seed to the highest",
    "time": "Validation error against the time of training, at the pace of each cell's fastest seed",
    "angles": "Angle of each layer's update to backprop's gradient, the mean over seeds",
}
COMPARED = "compare", "second"  # the paper and its table that have all rules; the table's rows are the nets


def element(tag: str, content: str, **attributes: str | None) -> str:
    """An element whose content is HTML already; attributes of None are left out, and `_class` is `class`."""
    given = "".join(f' {k.strip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items() if v is not None)
    return f"<{tag}{given}>{content}</{tag}>"


def raw(html: str) -> str:
    """HTML within a page of Markdown."""
    return f"````{{raw}} html\n{html}\n````"


def breaking(name: str) -> str:
    """A name that may go on in the next line after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def sortable(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int, ids: Iterable[str] = ()) -> str:
    """A table that sorts; `rows` are made of whole cells, and the last `numbers` columns are of numbers."""
    first = len(header) - numbers
    heads = [
        element("th", element("button", breaking(text), type="button"), scope="col", _class="n" if i >= first else None)
        for i, text in enumerate(header)
    ]
    named = iter(ids)
    body = "\n".join(element("tr", "".join(row), id=next(named, None)) for row in rows)
    table = f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{body}</tbody>"
    return element("div", element("table", table, _class="sortable"), _class="wide")


def cell(text: str, number: bool = False, **attributes: str | None) -> str:
    return element("td", text, **({"_class": "n"} | attributes if number else attributes))


def anchor(found: Found) -> str:
    return "-".join(["cell", *found.labels.values(), str(found.epochs)])


def winner(row: Row) -> Found | None:
    """The cell with the best mean accuracy among several rules."""
    tested = [c for c in row.cells.values() if c.mean is not None]
    return max(tested, key=lambda c: c.mean or 0) if len(tested) > 1 else None


def accuracy(found: Found | None, best: bool, signs: Mapping[str, str]) -> str:
    """A cell of a table: the mean with its deviation, the interval beneath, and the way to its runs."""
    if found is None:
        return cell("", True)
    text = element("a", escape(signed(found, signs)), href=f"#{anchor(found)}") if found.records else ""
    if found.interval:
        text += element("small", " to ".join(percent(bound) for bound in found.interval))
    text += "".join(element("small", escape(comparison(found, figure))) for figure in found.figures)
    return cell(text, True, data_value=f"{found.mean or 0:.8f}", _class="n best" if best else "n")


def accuracies(found: Findings, table: Table) -> str:
    """A table of a paper, and what is to be said of it."""
    shown = sheet(found, table)
    parts = [f"### {heading(found, table)}"]
    if shown:
        winners = [winner(row) for row in found.tables[table.name]]
        body = [
            [
                cell(escape(each), i >= shown.left)
                if isinstance(each, str)
                else accuracy(each, any(each is one for one in winners), shown.signs)
                for i, each in enumerate(line)
            ]
            for line in shown.lines
        ]
        parts += [caption(shown), raw(sortable(shown.head, body, len(shown.head) - shown.left))]
    else:
        parts.append("No runs are recorded yet.")
    return "\n\n".join([*parts, *listed(notes(found, table, shown))])


def listed(sentences: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []


def drawings(table: Table, drawn: Mapping[str, bytes]) -> list[str]:
    """A table's figures, each in a fold; those that say most are open."""
    parts = []
    for kind, title in TITLES.items():
        if svg := drawn.get(f"{table.name}_{kind}"):
            figure = element("figure", within_a_page(svg), _class="drawn", aria_label=title)
            shown = "" if kind in (table.drawn, "rules") else None
            parts.append(raw(element("details", element("summary", title) + figure, open=shown)))
    return parts


def verdict(result: Result, then: str = "") -> list[str]:
    kind = result.verdict.split()[0]
    cells = [cell(escape(text)) for text in (result.trial.claim.name, result.trial.reading, place(result))]
    cells.append(cell(element("span", escape(result.verdict), _class=f"verdict {kind}")))
    assert result.mean is not None
    assert result.interval is not None
    low, high = (f"{100 * bound:+.2f}" for bound in result.interval)
    between = element("small", f"{low} to {high}") if result.seeds > 1 else ""
    difference = cell(f"{100 * result.mean:+.2f}{between}", True, data_value=f"{result.mean:.8f}")
    both = [cell(escape(p_value(p)), True, data_value=f"{p:.8f}") for p in (result.p_holds, result.p_fails)]
    margin = cell(percent(result.margin), True)
    numbers = [cell(str(result.epochs), True), cell(str(result.seeds), True), difference, margin, *both]
    return [*cells, *numbers, cell(escape(result.would_decide)), cell(escape(then))]


def verdicts(found: Findings) -> list[str]:
    """The claims, and the verdict on each test."""
    if found.claims is None:
        return []
    claims = [f"**{c.name}**: {c.text} ({c.source}); test `{c.test}`" for c in found.claims.claims]
    run = [result for result in found.verdicts if result.mean is not None]
    head = [
        "claim",
        "settings",
        "where",
        "verdict",
        "epochs",
        "seeds",
        "difference",
        "margin",
        "p (holds)",
        "p (fails)",
    ]
    head += ["seeds that would decide", "before"]
    shown = [raw(sortable(head, (verdict(r, before(found, r)) for r in run), 8))] if run else []
    told = [*departures(found), *filter(None, [changed(found)])] if run else []
    below = listed(told + tests_not_run(found))
    return ["## Every verdict", *listed(claims), how(found.claims), *shown, *below]


def cells_run(found: Findings) -> dict[str, Found]:
    """Every cell with runs, once, by its anchor."""
    every = (cell for rows in found.tables.values() for row in rows for cell in row.cells.values())
    return {anchor(cell): cell for cell in every if cell.records}


def by_run(found: Found) -> dict[str, list[Record]]:
    return {run: [r for r in found.records if r.run == run] for run in dict.fromkeys(r.run for r in found.records)}


def runs(found: Findings) -> list[str]:
    """Every cell with runs: the command that trains it, its config and its records, and what each seed reached."""
    rows = []
    every = cells_run(found)
    for c in every.values():
        seeds = [r.seed for r in c.records]
        command = join(["nobackprop", *c.overrides, f"max_epochs={c.epochs}", f"seeds={seeds}".replace(" ", "")])
        reached = "; ".join(f"seed {s}: {percent(a)}" for s, a in sorted(c.accuracies.items()))
        reached += f"; {c.diverged} diverged" if c.diverged else ""
        links = [
            element("a", name, href=f"../cells/{run}/{file}")
            for run in by_run(c)
            for name, file in (("config", "config.yaml"), ("records", "records.jsonl"))
        ]
        rows.append(
            [
                cell(escape(", ".join(c.labels.values()).replace("_", " "))),
                cell(element("code", escape(command))),
                cell(" ".join(links)),
                cell(escape(reached)),
                cell(f"{c.seconds:.1f}", True),
            ]
        )
    if not rows:
        return []
    header = "cell", "command", "files", "test accuracy, %", "seconds an epoch"
    table = sortable(header, rows, 1, every)
    fold = element("details", element("summary", f"All {len(rows)} cells with runs") + table)
    told = (
        f"A cell's records are lines of `results/records`; `results/tables/{found.paper}.csv` has all cells in one "
        "table. Seconds are those of the fastest seed, since runs shared a machine."
    )
    return ["## Every cell", told, raw(fold)]


def files(found: Findings) -> dict[str, bytes]:
    """The config and the records of every run of a paper."""
    made: dict[str, bytes] = {}
    for c in cells_run(found).values():
        for run, records in by_run(c).items():
            made[f"cells/{run}/config.yaml"] = yaml.safe_dump(records[0].config, sort_keys=False).encode()
            made[f"cells/{run}/records.jsonl"] = b"".join(r.line() for r in sorted(records, key=lambda r: r.seed))
    return made


def page(found: Findings, drawn: Mapping[str, bytes]) -> str:
    """A paper's page, with its figures by their names."""
    words = (PAPERS / found.paper / "README.md").read_text()
    parts = [words.rstrip(), *verdicts(found), "## Tables and figures", *filter(None, [" ".join(about(found))])]
    for table in found.layout.tables:
        parts += [accuracies(found, table), *drawings(table, drawn)]
    return "\n\n".join([*parts, *runs(found)]) + "\n"


def all_rules(drawn: Mapping[str, Mapping[str, bytes]]) -> str:
    """Of the figures by paper and name that of all rules, for the first page; empty without runs."""
    paper, table = COMPARED
    svg = drawn[paper].get(f"{table}_rules")
    return element("figure", within_a_page(svg), _class="drawn") + "\n" if svg else ""


def elsewhere(every: Mapping[str, Published]) -> str:
    """Published figures that stand beside none of ours."""
    parts = [
        "# Published elsewhere",
        "These figures are copied from their sources, with the place where they stand. None of them has the settings "
        "of a cell of ours, so none is compared with one.",
    ]
    for known in every.values():
        shown = [figure for figure in known.figures if not figure.cell]
        if not shown:
            continue
        header = ["table", "row", "column", "source", "value", "spread", "seeds"]
        rows = [
            [cell(escape(text)) for text in (f.table, f.row, f"{f.column} ({f.unit})", f.source)]
            + [cell(f"{f.value:g}", True), cell("" if f.spread is None else f"{f.spread:g}", True)]
            + [cell(str(f.seeds or known.seeds or ""), True)]
            for f in shown
        ]
        title = f"[{known.paper}]({known.link})" if known.link else known.paper
        parts += [f"## {title}", known.note, raw(sortable(header, rows, 3))]
    return "\n\n".join(parts) + "\n"


def overview(every: Sequence[Findings], drawn: Mapping[str, Mapping[str, bytes]], readme: Path) -> str:
    """results/README.md, with its figures, and a line for each paper: its verdicts, and how many runs there are."""
    rows = []
    for found in every:
        kinds = [result.verdict.split()[0] for result in found.verdicts]
        counts = [str(kinds.count(kind)) if kinds else "" for kind in ("holds", "fails", "undecided")]
        number = len({(r.signature, r.seed) for c in cells_run(found).values() for r in c.records})
        link = element("a", escape(found.layout.title), href=f"{found.paper}.html")
        rows.append([cell(link), *(cell(text, True) for text in [*counts, str(number)])])
    table = sortable(["results", "claims' tests that hold", "fail", "are undecided", "runs shown"], rows, 4)
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(found.paper for found in every), "elsewhere", "```"])

    def figure(match: re.Match[str]) -> str:
        svg = drawn[match[2]].get(match[3])  # None without runs
        return raw(element("figure", within_a_page(svg), _class="drawn", aria_label=match[1])) if svg else ""

    head, _, body = readme.read_text().partition("\n")
    body = re.sub(r"!\[(.*)\]\(figures/(\w+)/(\w+)\.svg\)", figure, body).replace("](tables/", "](")
    first, mark, rest = body.partition("<!-- end -->")
    return "\n\n".join([head, tree, first.strip() + mark, raw(table), rest.lstrip("\n")])
