"""The documentation site, for Sphinx: `make docs` builds it."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

project = "torchrec-amort"
release = metadata.version(project)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Pages. Links to headings are those that GitHub makes, too.
myst_heading_anchors = 3
myst_enable_extensions = ["tasklist"]
nb_execution_mode = "off"  # tests run the notebooks

# The reference. In docstrings, what stands between single backticks is code.
default_role = "literal"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
nitpicky = True
# Names in annotations and docstrings of what other projects define, and, last, of our own aliases for types.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|torchrec|np|numpy|pa|pyarrow|pathlib|collections|concurrent|grpc|signal|typing)\..*"),
    ("py:.*", r"(Keyed)?(Jagged)?Tensor|DLRM|Embedding(Bag)?(Collection|Config)|Future|Path|int64|B \+ 1"),
    ("py:.*", r"cryptography\..*|KeyedOptimizer|tqdm|TracerProvider"),
    ("py:.*", r"(.*\.)?(Backend|Call|Combine|HistoryAttention|Location|Loss|Paths|Precision|Result|Role|Score)"),
    ("py:.*", "WhenLonger"),
]

html_theme = "furo"
html_title = project
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_domain_indices = False


def _copy_notebooks() -> None:
    """Sphinx reads what is below this folder, so notebooks are copied to docs/tutorials."""
    docs = Path(__file__).parent
    tutorials = docs / "tutorials"
    shutil.rmtree(tutorials, ignore_errors=True)
    tutorials.mkdir()
    for path in (docs.parent / "examples").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _links_from("docs/tutorials", "".join(cell["source"]), "examples")
        (tutorials / path.name).write_text(json.dumps(notebook), encoding="utf-8")


def _links_from(folder: str, text: str, old_folder: str) -> str:
    """The local links of a text in one folder of the repository, as they are from another one."""

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(f"{old_folder}/{link[0]}")
        return os.path.relpath(re.sub(r"^examples/(.*\.ipynb)$", r"docs/tutorials/\1", target), folder)

    parts = re.split("(```.*?```)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=\]\()(?!\w+:|#)[^)]+", moved, part) for part in parts[::2]]
    return "".join(parts)


def _read_from_the_root(app: Sphinx, path: Path, page: str, text: list[str]) -> None:
    """Pages of this folder include those of the repository's root."""
    text[0] = _links_from("docs", text[0], ".")


def setup(app: Sphinx) -> None:
    """See Sphinx."""
    _copy_notebooks()
    app.connect("include-read", _read_from_the_root)
