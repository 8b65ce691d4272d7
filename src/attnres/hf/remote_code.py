"""The code in a model's folder, for machines where attnres is not installed: `save_pretrained(..., remote_code=True)`.

One file with the texts of those modules of this package that the model imports, and `carried`, which imports them. So
it is no second implementation: it computes what the package does without its kernels, and can be compared with the
package line by line. What a module imports at its top is carried, what it imports in a function or under a condition is
not. The code that a folder carries writes itself again, by the same functions.
"""

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..residual import registry
from ..version import __version__
from . import carried
from .card import write_card

FILE = "modeling_attnres.py"
_REFERENCE = f"{Path(FILE).stem}."
"""What the name of a class in that file begins with in a config's auto_map, behind that of a repository on the Hub."""
_ROOT = __name__.removesuffix(".hf.remote_code")

Names = Callable[[Any], Mapping[str, str]]
"""Where the classes are with which the Auto classes load a model: "AutoConfig" -> "hf.configuration.AttnResConfig" and
so on. Raises UsageError for a model with classes that another process would not find in the package."""

_DOUBLE, _SINGLE = 3 * '"', 3 * "'"
_HEAD = f"""{_DOUBLE}The code of the model in this folder, for machines where attnres is not installed.

transformers runs it for whoever loads the folder with trust_remote_code=True. It needs torch and transformers.
Written by attnres {__version__} (Apache-2.0). SOURCES has modules of that package as they are there, each line behind
a "|"; Carried imports them; the last lines name the classes that transformers asks for.
{_DOUBLE}

import importlib
import sys
"""
_IMPORT = """
for name in [name for name in sys.modules if name.startswith(f"{__name__}.")]:
    del sys.modules[name]  # of another version of this file
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "above", None) != f"{__name__}."]
sys.meta_path.insert(0, Carried(__name__, __file__, SOURCES))
__path__ = []

for module in MODULES:
    importlib.import_module(f"{__name__}.{module}")
importlib.import_module(f"{__name__}.hf.optim").spare_residuals()
for name, module in CLASSES.items():
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name].register_for_auto_class = lambda *_, **__: None  # save_pretrained writes this file itself
"""


def saving(original: Callable[..., None], names: Names, card: bool = True) -> Callable[..., None]:
    """The `save_pretrained` of a model class with a model card (without `card` only beside code) and an argument more.

    It is remote_code: True writes the code too, so that the folder loads with trust_remote_code=True where attnres is
    not installed; False does not; None does if the model came with it. Raises UsageError, before anything is written,
    for a model that needs other code than this package's and transformers'.
    """

    @functools.wraps(original)
    def save_pretrained(
        self: Any, save_directory: Any, *args: Any, remote_code: bool | None = None, **kwargs: Any
    ) -> None:
        said = getattr(self.config, "auto_map", None) or {}
        others = {auto: name for auto, name in said.items() if not _is_ours(name)}
        text = None
        if remote_code or (remote_code is None and len(others) < len(said)):
            if args[2] if len(args) > 2 else kwargs.get("push_to_hub"):
                raise UsageError("push_to_hub=True would leave the code out; save first, then model.push_to_hub(name)")
            places = names(self)
            text = _text(self, places)
            own = {auto: _REFERENCE + place.rpartition(".")[2] for auto, place in places.items()}
            self.config.auto_map = others | own
        elif said:
            self.config.auto_map = others
        original(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if not (args[0] if args else kwargs.get("is_main_process", True)) or not folder.is_dir():
            return
        if text is not None:
            (folder / FILE).write_text(text, encoding="utf-8", newline="\n")
        if card or text is not None:
            write_card(self, folder, with_code=text is not None)

    return save_pretrained


def check_class(model: Any, modules: Iterable[str]) -> None:
    """Raises UsageError if the class of a model is in none of these modules of the package."""
    own = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))  # FSDP makes its own
    if own.__module__ not in {f"{_ROOT}.{name}" for name in modules}:
        raise UsageError(f"remote_code=True is for models of attnres' own classes; {own.__name__} is none of them")


def _is_ours(name: Any) -> bool:
    return str(name).rpartition("--")[2].startswith(_REFERENCE)


def _text(model: Any, places: Mapping[str, str]) -> str:
    """The file for a model. Raises UsageError if its residual connection or a layer is of another package."""
    kinds = {*getattr(model.config, "layer_kinds", ())}
    kinds |= {registry.get(config.residual) for config in (model.config, type(model.config))}  # of an empty config too
    for kind in kinds:
        if not kind.__module__.startswith(f"{_ROOT}."):
            raise UsageError(
                f"remote_code=True cannot write the code of {kind.__name__}, which is in {kind.__module__}"
            )
    classes = {name: module for module, _, name in (place.rpartition(".") for place in places.values())}
    modules = {_inside(kind.__module__) for kind in kinds}
    modules |= {module.rpartition(".")[0] for module in modules}  # the packages, which enter them by their names
    sources = _with_imports([*classes.values(), *modules, "hf.optim"])
    return "\n".join(
        [
            _HEAD + _without_docstring(_source(carried)),
            "\nSOURCES = {}",
            *(f"SOURCES[{name!r}] = r{_SINGLE}{_quoted(source)}{_SINGLE}" for name, source in sources.items()),
            f"MODULES = {sorted(modules)}",
            f"CLASSES = {classes}",
            _IMPORT,
        ]
    )


def _with_imports(roots: Iterable[str]) -> dict[str, str]:
    """The sources of modules, and of what they import at their top, by their names inside the package."""
    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        module = importlib.import_module(f"{_ROOT}.{name}")
        found[name] = _source(module)
        for node in ast.parse(found[name]).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
                paths = [f"{base}.{alias.name}" for alias in node.names]
                todo += [_inside(path if path in sys.modules else base) for path in paths]
    return dict(sorted(found.items()))


def _inside(module: str) -> str:
    return module.removeprefix(f"{_ROOT}.")


def _source(module: Any) -> str:
    source: str = module.__spec__.loader.get_source(module.__name__)
    return source


def _without_docstring(source: str) -> str:
    return "\n".join(source.splitlines()[ast.parse(source).body[0].end_lineno or 0 :]).strip()


def _quoted(source: str) -> str:
    return "".join(f"|{line}\n" for line in source.removesuffix("\n").split("\n"))
