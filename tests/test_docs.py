"""The site, the notebooks, the example and the tutorial: built and run as they are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import generate
import nbformat
import pytest
from conftest import ROOT, options
from generate import reference, results
from nbclient import NotebookClient
from sphinx.cmd.build import build_main

import nobackprop
from nobackprop.core.rule import FAMILIES
from nobackprop.papers.results import findings, papers
from nobackprop.records.gathering import collect

QUICK = {"SEEDS = 15, 3": "SEEDS = 2, 1", "seeds=3,": "seeds=1,", "max_epochs=15,": "max_epochs=2,"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "".join(cell.source for cell in notebook.cells)
    assert sum(text.count(long) for long in QUICK) in (1, 2)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "notebooks are kept without outputs"
        for long, short in QUICK.items():
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not [output.text for output in shown if output.get("name") == "stderr"]


def test_the_example_trains_compares_and_plots(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "compare_rules.py").read_text()
    quick = code.replace("seeds=3,", "seeds=1,").replace("max_epochs=15,", "max_epochs=2,")
    assert len(quick) == len(code) - 1
    (tmp_path / "example.py").write_text(quick)
    ended = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"^(\w+) +\d\d\.\d\d +-?\d+\.\d\d$", ended.stdout, re.MULTILINE) == ["bp", "fa", "dfa", "lra_e"]
    assert (tmp_path / "runs" / "example" / "compare_rules.png").exists()


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    """But for the number of epochs: all its commands and all its Python, in order, in an empty folder."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    named = {"half.py": "from dataclasses", "conf/rule/half.yaml": "_target_"}
    typed = []
    for kind, code in re.findall(r"```(bash|python|yaml)\n(.*?)```", text, re.DOTALL):
        file = [name for name, start in named.items() if code.startswith(start)]
        if file:
            (tmp_path / file[0]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file[0]).write_text(code)
        elif kind == "python" and typed and typed[-1].endswith("\nEND"):  # typed on in the same session
            typed[-1] = typed[-1].removesuffix("END") + f"{code}END"
        elif kind == "python":
            typed.append(f"python - <<'END'\n{code}END")
        else:
            typed.append(
                re.sub(r"^(nobackprop .*|nobackprop)$", r"\1 max_epochs=2 logger=none", code, flags=re.MULTILINE)
            )
    script = "set -e\n" + "\n".join(typed).replace("seeds=3)", 'seeds=3, max_epochs=2, logger="none")')
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "100"}
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    accuracies = dict(re.findall(r"│ (\S+_mlp_digits(?: rule\.share=\S+)?) +│ +3 │ +(\d\d\.\d\d%)", ended.stdout))
    assert accuracies["half_mlp_digits rule.share=0"] == accuracies["bp_mlp_digits"]
    assert accuracies["half_mlp_digits rule.share=1"] == accuracies["fa_mlp_digits"]
    assert {"fa_mlp_digits", "dfa_mlp_digits", "lra_e_mlp_digits"} <= accuracies.keys()
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "runs" / "half" / "learning_curves.png").exists()


README = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "papers").glob("*/*.md"),
    *(ROOT / "results").rglob("*.md"),
]


@pytest.mark.parametrize("path", sorted(README), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_that_is_read_in_the_repository_leads_to_a_file(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match("https?:|#", link):
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly, with the few records of two papers and none of the others."""
    source = tmp_path_factory.mktemp("source")
    for name in ("docs", "CONTRIBUTING.md", "CHANGELOG.md"):
        copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    few = [ROOT / "results" / "records" / f"{paper}.jsonl" for paper in ("pepita", "akrout")]
    recorded = {path.stem: list(collect([path]).records.values()) for path in few}
    every = [findings(paper, recorded.get(paper, []), ROOT / "results") for paper in papers()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generate, "every_paper", lambda results: every)
        quiet = ["--quiet", "--fail-on-warning", "--keep-going"]
        assert build_main([*quiet, str(source / "docs"), str(source / "site")]) == 0
    return source / "site"


def links(page: Path) -> list[str]:
    return re.findall(r'<(?:a|link|img|script)\b[^>]*? (?:href|src)="([^"]+)"', page.read_text())


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = {path: set(re.findall(r' id="([^"]+)"', path.read_text())) for path in site.rglob("*.html")}
    assert {f"{name}.html" for name in ("index", "tutorial", "results/compare", "reference/rules")} <= {
        str(path.relative_to(site)) for path in pages
    }
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?:https?:)?//', text), page
        for link in links(page):
            if re.match("https?:|mailto:|data:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert target.exists(), f"{page}: {link}"
            if anchor and target in pages:
                assert unquote(anchor) in pages[target] | {""}, f"{page}: {link}"


def test_every_rule_and_every_public_name_is_on_the_site(site: Path) -> None:
    rules, interface, keys = (
        (site / "reference" / f"{name}.html").read_text() for name in ("rules", "interface", "keys")
    )
    for name in options("rule"):
        assert f'href="#{name.replace("_", "-")}"' in rules
    for name in nobackprop._MODULES:
        if not nobackprop._MODULES[name].startswith("rules."):
            assert f'id="nobackprop.{name}"' in interface, name
    assert "how often a seed sees all images" in keys


def test_a_dead_link_fails_the_build(site: Path, tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text('extensions = ["myst_parser"]\nmyst_heading_anchors = 3\n')
    (tmp_path / "index.md").write_text("# A\n\n[there](nowhere.md)\n")
    assert build_main(["--quiet", "--fail-on-warning", str(tmp_path), str(tmp_path / "out")]) != 0


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("bp", ("yes", "values", "none")),
        ("usf", ("yes", "signs", "none")),
        ("fa", ("yes", "nothing", "fixed B, as W")),
        ("lra_e", ("no", "nothing", "learned E, as W")),
        ("recursive_lra", ("no", "nothing", "learned D, units x outputs; learned E, as W")),
        ("dtp", ("yes", "values, at the output", "learned Q, as W")),
        ("dfa", ("yes", "nothing", "fixed B, units x outputs")),
        ("pepita", ("no", "nothing", "fixed F, inputs x outputs")),
        ("node_perturbation", ("no", "values, forward alone", "none")),
        ("forward_gradient", ("yes", "values, forward alone", "none")),
        ("evolution", ("no", "values, forward alone", "none")),
        ("incremental_predictive_coding", ("yes", "values", "none")),
    ],
)
def test_what_a_rule_needs_is_found_by_running_it(name: str, needs: tuple[str, ...], configured: Any) -> None:
    found = reference.needs(configured("rule", name))
    assert (found.derivative, found.above, found.own) == needs
    assert found.work > 1.9


@pytest.mark.parametrize(
    ("name", "label", "updates", "up"),
    [
        ("bp", "no", 1, 1),
        ("brainprop", "no", 1, 1),  # its error is not the loss's
        ("dfa_two_pass", "no", 1, 2),
        ("drtp", "yes", 1, 1),
        ("pepita", "no", 1, 2),
        ("counter_current", "yes", 1, 1),
        ("local_errors", "yes", 1, 1),
        ("forward_forward", "yes", 1, 3),  # the right label, a wrong one and a neutral one
        ("channel_competitive_ff", "yes", 1, 1),
        ("soft_hebb", "no", 1, 1),
        ("dtp", "no", 1, 2),
        ("fixed_weight_dtp", "no", 1, 1),  # its decoders read the output
        ("weight_mirror", "no", 2, 2),
        ("difference_reconstruction", "no", 6, 11),
        ("incremental_predictive_coding", "no", 5, 5),
        ("predictive_coding", "no", 1, 1 + 15 * 4),
        ("equilibrium_propagation", "no", 1, 1 + 10 * 4 + 2 * 10 * 4),  # both nudged phases relax side by side
        ("evolution", "no", 1, 20),
    ],
)
def test_labels_updates_and_passes_are_found_by_running_a_rule(
    name: str, label: str, updates: int, up: int, configured: Any
) -> None:
    found = reference.needs(configured("rule", name))
    assert (found.label, found.updates, found.up) == (label, updates, up)


def test_the_table_of_rules_has_families_in_order(site: Path) -> None:
    table = (site / "reference" / "rules.html").read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    families = re.findall(r"<tr><td>.*?</td><td>(.*?)</td>", table)
    assert len(families) == len(options("rule"))
    assert list(dict.fromkeys(families)) == [family for family in FAMILIES if family in families]
    assert families == sorted(families, key=list(FAMILIES).index)


def test_pages_show_the_comparison_that_has_all_rules() -> None:
    named = ("accuracy_rules", "accuracy_cost", "second_rules", "second_cost", "mnist_rules", "mnist_cost")
    drawn = {"other": {"other_rules": b"<svg>other</svg>"}, "compare": {n: f"<svg>{n}</svg>".encode() for n in named}}
    for shown, name in ((results.all_rules(drawn), "second_rules"), ("".join(reference._field(drawn)), "second_cost")):
        assert re.findall("<svg>(.*?)</svg>", shown) == [name]
    without: dict[str, dict[str, bytes]] = {"compare": {}}
    assert (results.all_rules(without), reference._field(without)) == ("", [])


CHECKS = """
<pre id="checked"></pre><script>addEventListener("load", () => setTimeout(() => {
const said = [];
const check = (what, so) => said.push(`${so ? "ok" : "FAILED"} ${what}`);
const table = document.querySelector("table.sortable td.best").closest("table");
const column = table.querySelector("td.best").cellIndex;
const values = () => [...table.tBodies[0].rows].map(row => +row.cells[column].dataset.value);
const sorted = (list, sign) => list.every((v, i) => i === 0 || sign * (v - list[i - 1]) >= 0);
const button = table.tHead.rows[0].cells[column].querySelector("button");
button.click(); check("descending", sorted(values(), -1));
button.click(); check("ascending", sorted(values(), 1));
const link = table.querySelector("td a"), target = document.getElementById(link.hash.slice(1));
check("closed", !target.closest("details").open);
location.hash = link.hash;
check("a figure in the text's colour", getComputedStyle(document.querySelector("figure svg text")).fill
  === getComputedStyle(document.querySelector("article p")).color);
check("no wider than the window", document.documentElement.scrollWidth <= innerWidth);
check("nothing from elsewhere", performance.getEntriesByType("resource").every(e => e.name.startsWith("file:")));
setTimeout(() => {
  check("opened", target.closest("details").open);
  document.getElementById("checked").textContent = said.join("\\n");
}, 100);
}, 100));
</script>
"""
CHROMIUM = next(filter(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome", "chrome")), None)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium-headless-shell, chromium or google-chrome")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_a_page_of_results_works_in_a_browser(site: Path, tmp_path: Path, width: int, theme: str) -> None:
    page = (site / "results" / "akrout.html").read_text()
    path = site / "results" / f"checked_{width}_{theme}.html"
    path.write_text(page.replace("</body>", CHECKS + "</body>"))
    options = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", f"--window-size={width},900"]
    command = [str(CHROMIUM), "--headless", *options, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    path.unlink()
    assert "CONSOLE" not in ended.stderr
    (said,) = re.findall(r'<pre id="checked">(.*?)</pre>', ended.stdout, re.DOTALL)
    lines = said.splitlines()
    assert len(lines) == 7
    assert [line for line in lines if not line.startswith("ok ")] == []
