"""The site builds without a warning, its links lead somewhere, and the code on its pages and in docstrings runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import torchrec_amort
from tests.docs.examples import EXAMPLES, NOT_RUN, namespace_of
from tests.launch import ROOT, launch
from tests.pages import blocks

pytestmark = pytest.mark.docs

PAGES = ["README.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
PAGES = [page for page in PAGES if not page.startswith(("docs/_build/", "docs/tutorials/"))]
WITH_CODE = [page for page in PAGES if blocks(page, "python")]
LOG_CALL = r"(?:logger|logging|warnings)\.(debug|info|warn\w*|error|exception|critical|log)\("
# Pages whose code is run by the tests of `make test`.
RUN_ELSEWHERE = {
    "docs/porting.md": "tests/docs/test_porting.py",
    "README.md": "tests/test_readme.py",
    "docs/encoders.md": "tests/test_readme.py",
    "docs/migration.md": "tests/apps/test_migrate.py",
    "docs/serving.md": "tests/test_readme.py",
}


@dataclass
class Page(HTMLParser):
    """What a page of the built site has and where it leads."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src") and value is not None:
                self.links.append(value)


def read_pages(site: Path) -> dict[Path, Page]:
    read = {}
    for path in site.rglob("*.html"):
        if "_static" not in path.parts:
            read[path] = Page()
            read[path].feed(path.read_text())
    return read


def targets(path: Path, page: Page) -> Iterator[tuple[str, Path, str]]:
    """The local links of a page: as written, the file, and the place in it."""
    for link in page.links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            yield link, (path.parent / unquote(parts.path)).resolve() if parts.path else path, unquote(parts.fragment)


def assert_every_local_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    followed = 0
    for path, page in pages.items():
        for link, file, place in targets(path, page):
            assert file.is_file(), f"{path.name}: {link}"
            assert not place or file.suffix != ".html" or place in pages[file].ids, f"{path.name}: {link}"
            followed += 1
    assert followed > 1000


def assert_every_page_is_reached_from_the_index(site: Path, pages: dict[Path, Page]) -> None:
    reached, new = set(), {site / "index.html"}
    while new:
        reached |= new
        found = {file for path in new for _, file, _ in targets(path, pages[path]) if file in pages}
        new = found - reached
    assert reached == set(pages)
    assert {site / f"{page.removeprefix('docs/').removesuffix('.md')}.html" for page in PAGES[2:]} <= reached
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} <= {path.stem for path in reached}


def assert_every_public_name_is_in_the_reference(pages: dict[Path, Page]) -> None:
    ids = set().union(*(page.ids for page in pages.values()))
    assert {f"torchrec_amort.{name}" for name in torchrec_amort.__all__} <= ids


def test_the_site_is_whole(tmp_path: Path) -> None:
    """One test: of several, each process of pytest-xdist would build a site of its own."""
    built = launch("python", "-m", "sphinx", "--fail-on-warning", "--keep-going", "docs", str(tmp_path), check=False)
    assert built.returncode == 0, built.stderr
    pages = read_pages(tmp_path)
    assert_every_local_link_leads_somewhere(pages)
    assert_every_page_is_reached_from_the_index(tmp_path, pages)
    assert_every_public_name_is_in_the_reference(pages)


def test_every_page_of_the_index_is_in_the_menu_once() -> None:
    listed = re.findall(r"^([\w/-]+)$", "\n".join(blocks("docs/index.md", "{toctree}")), re.MULTILINE)
    at_the_top = [page.removeprefix("docs/").removesuffix(".md") for page in PAGES[2:] if page.count("/") == 1]
    assert sorted(set(at_the_top) - {"index"}) == sorted(page for page in listed if "/" not in page)


@pytest.mark.parametrize("page", PAGES)
def test_local_links_of_a_page_are_files_of_the_repository(page: str) -> None:
    without_code = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert ((ROOT / page).parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in RUN_ELSEWHERE])
def test_the_python_code_of_a_page_runs(page: str) -> None:
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_the_python_code_of_the_other_pages_is_run_by_another_test(page: str) -> None:
    assert page in WITH_CODE
    assert (
        f'"{Path(page).name}"' in (source := (ROOT / RUN_ELSEWHERE[page]).read_text())
        or f'"{Path(page).stem}"' in source
    )


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in NOT_RUN])
def test_the_example_of_a_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[name], name, "exec"), namespace_of(name, tmp_path))


def test_examples_that_are_not_run_exist() -> None:
    assert set(NOT_RUN) <= set(EXAMPLES)


def test_the_package_logs_what_the_page_on_governance_says() -> None:
    """A new message needs a look at what it tells of users, and a word on that page."""
    calls = []
    for path in (ROOT / "torchrec_amort").rglob("*.py"):
        calls += re.findall(LOG_CALL, path.read_text())
    assert sorted(calls) == [*11 * ["error"], *3 * ["info"], *3 * ["warning"]]
