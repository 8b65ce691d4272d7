"""Notices fast-attnres in this package's place: its module is called attnres too, and pip puts one over the other.

Importing this module raises Failure where files of this package are no longer its own, and warns where they will not be
for long: uninstalling either of the two takes files of the other along.
"""

import sys
import warnings
from importlib import metadata
from pathlib import Path

from .errors import Failure

WAY_OUT = "run pip uninstall fast-attnres attnres, install attnres again, and keep fast-attnres in another environment"


def _check() -> None:
    init = getattr(sys.modules[__name__.rpartition(".")[0]], "__file__", None)
    if init is None:  # what pip uninstall fast-attnres leaves
        raise Failure(f"attnres has lost its __init__.py, as if fast-attnres had been uninstalled from it; {WAY_OUT}")
    try:
        theirs = metadata.distribution("fast-attnres").locate_file("attnres/__init__.py")
    except metadata.PackageNotFoundError:
        return
    if Path(init).resolve() != Path(str(theirs)).resolve():
        return  # somewhere else
    if "BlockAttnRes" not in Path(init).read_text(encoding="utf-8"):
        raise Failure(f"fast-attnres, whose module is called attnres too, was installed over attnres; {WAY_OUT}")
    warnings.warn(f"attnres was installed over fast-attnres, whose module has its name; {WAY_OUT}", stacklevel=2)


_check()
