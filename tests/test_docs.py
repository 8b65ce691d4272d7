"""The code on the pages that have no tests of their own runs, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    found = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("page", ["quickstart", "own_model"])
def test_its_code_runs(page):
    names: dict = {}
    for code in blocks(page):
        exec(code, names)


def test_the_examples_of_extending_run(tmp_path):
    """In a process of their own: one enters a mechanism, the other starts processes that import it again."""
    (tmp_path / "extend.py").write_text("\n".join(blocks("extend")))
    environment = {**os.environ, "ATTNRES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "extend.py"]
    end = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert end.stdout.startswith("{2: ")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_its_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", re.sub("```.*?```", "", page.read_text(), flags=re.S)):
        assert (page.parent / target).exists(), target


def test_every_page_is_on_the_site():
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in nav, page
