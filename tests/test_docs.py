"""The documentation as a reader sees it: the built site, and the files that it is made of."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", into],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # With --strict every warning is an error: of a link, an anchor, a docstring.
    assert result.returncode == 0, result.stderr
    return into


def text(page: Path) -> str:
    """The page as text: its code without the elements that colour it."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_is_built_and_its_includes_are_code(site: Path, page: Path) -> None:
    if page.name == "README.html":
        page = page.with_name("index.html")
    shown = text(site / page)
    assert len(shown) > 300
    assert "--8" not in shown


def included(page: str) -> list[str]:
    return re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / page).read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "number"), [("extending", 4), ("examples", 1), ("changelog", 1)])
def test_an_include_shows_the_file(site: Path, page: str, number: int) -> None:
    files = included(f"{page}.md")
    assert len(files) == number
    shown = text(site / f"{page}.html")
    for file in files:
        if file.endswith(".py"):
            assert (ROOT / file).read_text(encoding="utf-8").strip() in shown
        else:
            assert "0.1.0" in shown


def test_the_callbacks_arguments_are_on_its_page(site: Path) -> None:
    shown = text(site / "api" / "monitor.html")
    for argument in ("probe", "every_n_epochs", "mean", "std", "max_overhead"):
        assert re.search(rf"^\s*{argument}\s*$", shown, re.MULTILINE), argument


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_a_link_of_a_page_outside_the_site_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!http|#|mailto)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_files_that_contributing_names_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(
        r"`((?:lightning_aop|tests|docs|benchmarks|configs|examples)/[\w./-]*)`", page
    )
    missing = [name for name in names if not (ROOT / name).exists()]
    assert names
    assert not missing
