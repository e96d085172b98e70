"""Makes the pages that come from code, conf/ and records: the reference and the results."""

import shutil
from pathlib import Path

from generate import reference, results
from nobackprop.papers.figures import figures
from nobackprop.papers.results import published
from nobackprop.papers.tables import every_paper
from nobackprop.places import RESULTS


def pages() -> dict[str, bytes]:
    """The content of every page and file that is made, by its path in docs/."""
    every = every_paper(RESULTS)
    drawn = {found.paper: figures(found) for found in every}
    made = {f"results/{found.paper}.md": results.page(found, drawn[found.paper]) for found in every}
    made["results/index.md"] = results.overview(every, drawn, RESULTS / "README.md")
    made["results/elsewhere.md"] = results.elsewhere(published())
    made["results/all_rules.html"] = results.all_rules(drawn)
    made |= {f"reference/{name}.md": text for name, text in reference.pages(every, drawn).items()}
    content = {path: text.encode() for path, text in made.items()}
    for found in every:
        content |= {f"files/{path}": each for path, each in results.files(found).items()}
    return content


def write_all(docs: Path) -> None:
    """Writes all of them, and removes what an earlier build made and this one does not."""
    content = pages()
    for folder in ("results", "reference", "files"):
        shutil.rmtree(docs / folder, ignore_errors=True)
    for name, text in content.items():
        path = docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
