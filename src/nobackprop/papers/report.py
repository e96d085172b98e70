"""Makes all that is made from recorded runs: tables and figures as scripts/tables.py does, and results/report.html.

    python scripts/report.py [--results results] [--readme README.md]

The page holds every table, figure, verdict and run in one file that needs no network. Tables sort by a click on a
column's head, a rule is hidden in all figures by its box, and every cell leads to the runs it came from. The same files
give the same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import join

from nobackprop.papers.claims import Result
from nobackprop.papers.figures import COLOURS, OTHER
from nobackprop.papers.results import Findings, Found, Published, Row, Table, published, rules_run
from nobackprop.papers.tables import (
    about,
    caption,
    command,
    comparison,
    departures,
    every_paper,
    generated,
    how,
    lengths,
    notes,
    p_value,
    percent,
    place,
    readings,
    sheet,
    signed,
    summary,
    tests_not_run,
)

TITLES = {
    "error": "Test error, with 95 % intervals",
    "accuracy": "Test accuracy, with 95 % intervals",
    "rules": "Test error with 95 % intervals, angle of the updates to the gradient, cost of a step",
    "curves": "Learning curves: mean over seeds, band from the lowest seed to the highest",
    "time": "Accuracy against time of training, at the pace of each cell's fastest seed (runs shared a machine)",
    "angles": "Angle of each layer's update to backpropagation's gradient, in all seeds in which it was measured",
}

STYLE = """
:root { color-scheme: light; --line: #dcdfe4; --soft: #5b6470; --link: #0b57a4; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2127; background: #fff; }
main { max-width: 1240px; margin: 0 auto; padding: 24px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; }
h2 { margin: 2.2em 0 .5em; padding-top: .7em; border-top: 2px solid #1c2127; }
h3 { margin: 1.8em 0 .4em; } a { color: var(--link); }
p, ul { max-width: 78ch; overflow-wrap: anywhere; } .soft { color: var(--soft); }
code { font: .86em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; background: #fff; border-bottom: 1px solid var(--line); }
nav div { max-width: 1240px; margin: 0 auto; padding: 8px 24px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
nav label { white-space: nowrap; } nav b { display: inline-block; width: 14px; height: 4px; vertical-align: middle; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; margin: .4em 0; }
th, td { padding: 5px 12px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding: 5px 0 5px 20px; }
th { border-bottom: 2px solid #1c2127; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); } th button::after { content: " \\2195"; color: #a9b0b9; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
td small { display: block; color: var(--soft); } td a { color: inherit; text-decoration-color: #a9b0b9; }
td.best a { font-weight: 700; } tr:target, tr:target td { background: #fff3c4; } [id] { scroll-margin-top: 104px; }
.verdict { padding: 1px 8px; border-radius: 9px; white-space: nowrap; background: #eceff2; }
.holds { background: #d3f0dc; color: #0b5a28; } .fails { background: #fbdcd8; color: #8a1c10; }
details { margin: .6em 0; } summary { cursor: pointer; font-weight: 600; } figure { margin: .6em 0; }
figure svg { max-width: 100%; height: auto; display: block; }
@media (max-width: 600px) {
  main { padding: 14px; } nav div { padding: 6px 14px; } figure { overflow-x: auto; } figure svg { min-width: 620px; }
  nav { position: static; } [id] { scroll-margin-top: 8px; }
}
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    const x = value(a), y = value(b), m = parseFloat(x), n = parseFloat(y);
    if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
    return (isNaN(m) ? x.localeCompare(y) : m - n) * (down ? -1 : 1);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
};
for (const box of document.querySelectorAll("nav input")) box.onchange = () => {
  const display = box.checked ? "" : "none";
  for (const part of document.querySelectorAll(`svg .rule-${box.value}`)) part.style.display = display;
};
const open = () => {
  const target = document.getElementById(location.hash.slice(1));
  for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  target?.scrollIntoView();
};
addEventListener("hashchange", open);
if (location.hash) open();
"""


def element(tag: str, content: str, **attributes: str | None) -> str:
    """An element whose content is HTML already; attributes of None are left out, and `_class` is `class`."""
    given = "".join(f' {k.strip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items() if v is not None)
    return f"<{tag}{given}>{content}</{tag}>"


def sortable(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int) -> str:
    """A table that sorts; `rows` are made of whole cells, the last `numbers` columns are of numbers."""
    first = len(header) - numbers
    heads = [
        element("th", element("button", escape(text), type="button"), scope="col", _class="n" if i >= first else None)
        for i, text in enumerate(header)
    ]
    body = "\n".join(element("tr", "".join(row)) for row in rows)
    table = element("table", f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{body}</tbody>")
    return element("div", table, _class="wide")


def cell(text: str, number: bool = False, **attributes: str | None) -> str:
    return element("td", text, **({"_class": "n"} | attributes if number else attributes))


def anchor(paper: str, found: Found) -> str:
    return "-".join(["runs", paper, *found.labels.values(), str(found.epochs)])


def winner(row: Row) -> Found | None:
    """The cell with the best mean accuracy among several rules."""
    tested = [c for c in row.cells.values() if c.mean is not None]
    return max(tested, key=lambda c: c.mean or 0) if len(row.cells) > 1 and tested else None


def accuracy(paper: str, found: Found | None, best: bool, signs: Mapping[str, str]) -> str:
    """A cell of a table: the mean with its deviation, the interval beneath, and the way to its runs."""
    if found is None:
        return cell("", True)
    text = element("a", escape(signed(found, signs)), href=f"#{anchor(paper, found)}") if found.records else ""
    if found.interval:
        text += element("small", " to ".join(percent(bound) for bound in found.interval))
    text += "".join(element("small", escape(comparison(found, figure))) for figure in found.figures)
    return cell(text, True, data_value=f"{found.mean or 0:.8f}", _class="n best" if best else "n")


def section(found: Findings, table: Table) -> str:
    """A table of a paper, and what is to be said of it."""
    rows, shown = found.tables[table.name], sheet(found, table)
    parts = [element("h3", escape(table.title), id=f"{found.paper}-{table.name}")]
    if shown:
        winners = [winner(row) for row in rows]
        body = [
            [
                cell(escape(each), i >= shown.left)
                if isinstance(each, str)
                else accuracy(found.paper, each, any(each is one for one in winners), shown.signs)
                for i, each in enumerate(line)
            ]
            for line in shown.lines
        ]
        text = element("p", escape(caption(table, intervals=True)), _class="soft")
        parts += [text, sortable(shown.head, body, len(shown.head) - shown.left)]
    else:
        parts.append(element("p", "No runs are recorded yet."))
    return "\n".join([*parts, listed(notes(found, table, shown))])


def listed(sentences: Sequence[str]) -> str:
    return element("ul", "".join(element("li", escape(sentence)) for sentence in sentences)) if sentences else ""


def drawings(table: Table, figures: Mapping[str, bytes]) -> str:
    """A table's figures; those that say most are open."""
    parts = []
    for kind, title in TITLES.items():
        if svg := figures.get(f"{table.name}_{kind}"):
            drawn = svg.decode()
            figure = element("figure", drawn[drawn.index("<svg") :], aria_label=title)
            shown = "" if kind in (table.drawn, "rules") else None
            parts.append(element("details", element("summary", title) + figure, open=shown))
    return "\n".join(parts)


def verdict(result: Result) -> list[str]:
    claim = result.trial.claim
    kind = result.verdict.split()[0]
    cells = [cell(escape(text)) for text in (claim.name, result.trial.reading, place(result))]
    cells.append(cell(element("span", escape(result.verdict), _class=f"verdict {kind}")))
    assert result.mean is not None
    assert result.interval is not None
    low, high = (f"{100 * bound:+.2f}" for bound in result.interval)
    between = element("small", f"{low} to {high}") if result.seeds > 1 else ""
    difference = cell(f"{100 * result.mean:+.2f}{between}", True, data_value=f"{result.mean:.8f}")
    both = [cell(escape(p_value(p)), True, data_value=f"{p:.8f}") for p in (result.p_holds, result.p_fails)]
    return [*cells, cell(str(result.epochs), True), cell(str(result.seeds), True), difference, *both]


def verdicts(found: Findings) -> str:
    """The claims, and the verdict on each test."""
    if found.claims is None:
        return ""
    claims = "".join(
        element("li", f"<b>{escape(c.name)}</b>: {escape(c.text)} ({escape(c.source)}); test <code>{c.test}</code>")
        for c in found.claims.claims
    )
    run = [result for result in found.verdicts if result.mean is not None]
    below = listed((departures(found) if run else []) + tests_not_run(found))
    header = ["claim", "settings", "where", "verdict", "epochs", "seeds", "difference", "p, holds", "p, fails"]
    shown = sortable(header, map(verdict, run), 5) if run else ""
    head, *lines = summary(found)
    in_short = sortable(head, [[cell(escape(text)) for text in line] for line in lines], 0)
    in_short += element("p", escape(f"{readings(found)} {lengths(found)}"), _class="soft")
    explained = element("p", escape(how(found.claims)), _class="soft")
    return "\n".join([element("ul", claims), in_short, explained, shown, below])


def runs(found: Findings, sources: Mapping[str, str]) -> str:
    """Every cell with runs: the command, the records and each seed's accuracy; `sources` are the files of records."""
    rows = []
    unique = {anchor(found.paper, c): c for rows in found.tables.values() for row in rows for c in row.cells.values()}
    for name, c in unique.items():
        if not c.records:
            continue
        chosen = ",".join(str(record.seed) for record in c.records)
        command = join(["nobackprop", *c.overrides, f"max_epochs={c.epochs}", f"seeds=[{chosen}]"])
        seeds = "; ".join(f"seed {s}: {percent(a)}" for s, a in sorted(c.accuracies.items()))
        seeds += f"; {c.diverged} diverged" if c.diverged else ""
        signatures = sorted({record.signature for record in c.records})
        names = sorted({record.name for record in c.records})
        files = [name for name, text in sources.items() if any(f'"{signature}"' in text for signature in signatures)]
        cells = [
            element("td", escape(" ".join(c.labels.values()))),
            element("td", element("code", escape(command))),
            element("td", element("code", escape(f"{', '.join(names)}-{', '.join(signatures)}"))),
            element("td", ", ".join(element("a", escape(name), href=name) for name in files)),
            element("td", escape(seeds)),
            element("td", f"{c.seconds:.1f}", _class="n"),
        ]
        rows.append((name, "".join(cells)))
    if not rows:
        return ""
    header = "cell", "command", "run", "records", "test accuracy, %", "s an epoch"
    heads = "".join(f"<th>{text}</th>" for text in header)
    body = "\n".join(element("tr", cells, id=name) for name, cells in rows)
    table_file = element("a", f"tables/{found.paper}.csv", href=f"tables/{found.paper}.csv")
    source = f"Seconds are those of the fastest seed; runs shared a machine. All cells as a table: {table_file}."
    table = element("div", f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>", _class="wide")
    return element("details", element("summary", f"All {len(rows)} cells with runs") + element("p", source) + table)


def named(known: Published) -> str:
    return element("a", escape(known.paper), href=known.link) if known.link else escape(known.paper)


def elsewhere(every: Mapping[str, Published]) -> str:
    """Published figures that stand beside none of ours, as they are there."""
    parts = []
    for paper, known in every.items():
        figures = [figure for figure in known.figures if not figure.cell]
        if not figures:
            continue
        header = ["table", "row", "column", "source", "value", "spread", "seeds"]
        rows = [
            [cell(escape(text)) for text in (f.table, f.row, f"{f.column} ({f.unit})", f.source)]
            + [cell(f"{f.value:g}", True), cell("" if f.spread is None else f"{f.spread:g}", True)]
            + [cell(str(f.seeds or known.seeds or ""), True)]
            for f in figures
        ]
        parts += [element("h3", named(known), id=f"published-{paper}"), element("p", escape(known.note))]
        parts.append(sortable(header, rows, 3))
    return "\n".join(parts)


def page(
    every: Sequence[Findings],
    known: Mapping[str, Published],
    drawn: Mapping[str, Mapping[str, bytes]],
    sources: Mapping[str, str],
) -> str:
    """The whole page, with the figures that were drawn of each paper and the files of records, by path."""
    rules = dict.fromkeys(r for f in every for rows in f.tables.values() for r in rules_run(rows))
    boxes = [
        f'<label><input type="checkbox" checked value="{r}"> <b style="background:{colour}"></b> {r}</label>'
        for r, colour in ((r, COLOURS.get(r, OTHER)) for r in rules)
    ]
    links = [element("a", escape(f.layout.title), href=f"#{f.paper}") for f in every]
    parts = []
    for found in every:
        parts.append(element("h2", escape(found.layout.title), id=found.paper))
        if found.published:
            parts.append(element("p", named(found.published)))
        parts.append(element("p", escape(" ".join(about(found)))))
        parts.append(verdicts(found))
        for table in found.layout.tables:
            parts += [section(found, table), drawings(table, drawn[found.paper])]
        parts.append(runs(found, sources))
    parts += [element("h2", "Figures published elsewhere", id="published"), elsewhere(known)]
    nav = element("nav", element("div", "".join([*links, element("a", "Published", href="#published"), *boxes])))
    made = "Made from <code>results/records</code> by <code>make results</code>; no result of ours is typed by hand."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>nobackprop: results</title>
<style>{STYLE}</style>
</head>
<body>
{nav}
<main>
<h1>Training without backpropagation: what we find</h1>
<p class="soft">{made}</p>
{chr(10).join(parts)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def everything(results: Path, readme: Path) -> dict[Path, bytes]:
    """The content of every generated file, by path. Raises Mistake where a file it is made from is not valid."""
    every = every_paper(results)
    files = generated(every, results, readme)
    drawn = {
        found.paper: {path.stem: svg for path, svg in files.items() if path.parent == results / "figures" / found.paper}
        for found in every
    }
    sources = {f"records/{path.name}": path.read_text() for path in sorted((results / "records").glob("*.jsonl"))}
    content = page(every, published(), drawn, sources)
    return files | {results / "report.html": content.encode()}


def main() -> None:
    command(__doc__, everything)
