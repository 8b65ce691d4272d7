"""Imports modules from their texts: what the code in a model's folder (`remote_code`) has beside modules of ours."""

import re
from collections.abc import Mapping, Sequence
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Carried(MetaPathFinder, ExecutionLoader):
    """Finds modules below a module: their names there, such as "ops.eager", and their texts, each line behind a "|".

    A package without a text of its own is empty.
    """

    def __init__(self, above: str, file: str, sources: Mapping[str, str]) -> None:
        self.above, self.file, self.sources = f"{above}.", file, sources

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(self.above):
            return None
        inner = name.removeprefix(self.above)
        if inner not in self.sources and not self.is_package(name):
            raise ModuleNotFoundError(f"{inner} of attnres is not in {self.file}; run: pip install attnres", name=name)
        spec = ModuleSpec(name, self, origin=self.file, is_package=self.is_package(name))
        spec.has_location = True
        return spec

    def is_package(self, name: str) -> bool:
        inside = name.removeprefix(self.above) + "."
        return any(other.startswith(inside) for other in self.sources)

    def get_filename(self, name: str) -> str:
        return f"{self.file}:{name.removeprefix(self.above)}"

    def get_source(self, name: str) -> str:
        return re.sub(r"^\|", "", self.sources.get(name.removeprefix(self.above), ""), flags=re.MULTILINE)
