"""The site: pages of docs/, and those that `generate` makes from code, conf/ and records. `make docs` builds it."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generate import write_all

project = "nobackprop"
author = copyright = "The nobackprop authors"
release = metadata.version("nobackprop")

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["generate"]
highlight_language = "default"

html_theme = "furo"
html_title = "nobackprop"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["files"]  # configs and records of all cells


def setup(app: object) -> None:
    write_all(Path(__file__).parent)
