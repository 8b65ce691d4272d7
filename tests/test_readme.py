"""The README keeps its promises: its code runs, its files exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_model_of_ones_own_runs_and_starts_as_the_plain_sum():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    hidden, layers = names["hidden"], names["layers"]
    assert hidden.shape == (2, 10, 64) and hidden.isfinite().all()
    hidden.sum().backward()
    assert all(p.grad is not None for p in [*names["residual"].parameters(), *layers.parameters()])


def test_links_and_paths_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"^    (src/\S+|benchmarks/|docs/)", README, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_its_commands_are_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
