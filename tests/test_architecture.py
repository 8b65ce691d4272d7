"""The order of docs/architecture.md, against the imports of the code: one way, no circles, every room in its table."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "attnres"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}

# Imports that still run back up, and those that close a circle. Whoever mends one takes its line out; none is added.
KNOWN_UPWARDS = {
    ("hf.modeling", "run.find"),
}
KNOWN_CIRCLES = {
    ("model.config", "model.counting"),
}


def table():
    """(rooms, files that they hold) of each row of the page's table, in its order."""
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", PAGE, re.MULTILINE)
    return [(re.findall(r"`([\w/.]+)`", rooms), re.findall(r"`([\w/.]+)`", files)) for rooms, files in rows]


def order():
    """The rooms, lowest first: a folder, or a file that stands beside the folders; a row's from left to right."""
    rooms = [room.removesuffix("/").removesuffix(".py") for rooms, _ in table() for room in rooms]
    at = rooms.index("analysis")
    return [*rooms[:at], "analysis.measure", "analysis.draw", *rooms[at:]]


def room_of(module):
    return next((room for room in order() if module == room or module.startswith(f"{room}.")), None)


@cache
def imports(module):
    """The modules of the package that a module imports, anywhere in it but for type checkers."""
    here, found = ["attnres", *module.split(".")], set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            start = here[: -node.level] if node.level else []
            source = [*start, *(node.module or "").split(".")]
            for name in ([*source, alias.name] for alias in node.names):
                found.add(_module_of([part for part in name if part]))
        if isinstance(node, ast.Import):
            found.update(_module_of(alias.name.split(".")) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(FILES[module].read_text(encoding="utf-8")))
    return found - {None}


def _module_of(path):
    """The module that an import of `path` reads: itself, its package, or the module that it is a name in."""
    if path[0] != "attnres":
        return None
    for parts in (path[1:], path[1:-1]):
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in FILES:
                return name
    raise AssertionError(f"{'.'.join(path)} is no module")


def test_imports_run_down_the_table():
    height = {module: order().index(room_of(module)) for module in FILES if room_of(module)}
    upwards = {(a, b) for a in height for b in imports(a) if height.get(b, 0) > height[a]}
    assert upwards <= KNOWN_UPWARDS


def test_no_modules_import_each_other():
    graph = {module: imports(module) - {other for a, other in KNOWN_CIRCLES if a == module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_table_names_every_room_and_files_that_exist():
    assert {module.partition(".")[0] for module in FILES} == {
        "__init__",
        "__main__",
        *(room.partition(".")[0] for room in order()),
    }
    for rooms, files in table():
        places = [folder for room in rooms for folder in (PACKAGE / room, *(PACKAGE / room).glob("*/"))]
        for name in files:
            ends = (name,) if name.endswith("/") else (name, f"{name}.py")
            assert any((place / end).exists() for place in places for end in ends), f"{rooms} has no {name}"


def test_files_that_the_page_names_exist():
    for name in re.findall(r"`(\w+(?:/\w+)*(?:\.py|/))`", PAGE):
        assert (ROOT / name).exists() or (PACKAGE / name).exists() or list(PACKAGE.glob(f"*/{name}")), name


WITH_TORCH_ALONE = """
import sys
import torch
sys.modules["numpy"] = None  # as if it were not installed; where it is, torch loads it
before = set(sys.modules)
import attnres
model = attnres.model.Decoder(attnres.model.DecoderConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
model(torch.tensor([[1, 2]])).sum().backward()
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*loaded - {"attnres", "torch"} - sys.stdlib_module_names)
"""


def test_the_library_needs_torch_alone():
    end = subprocess.run([sys.executable, "-c", WITH_TORCH_ALONE], capture_output=True, text=True)
    assert (end.returncode, end.stdout.split()) == (0, []), end.stderr
