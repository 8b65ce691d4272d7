"""The code on the pages that have no tests of their own runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["quickstart", "own_model"])
def test_its_code_runs(page):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, names)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_its_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", re.sub("```.*?```", "", page.read_text(), flags=re.S)):
        assert (page.parent / target).exists(), target


def test_every_page_is_on_the_site():
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in nav, page
