"""fast-attnres, whose module is called attnres too, in one environment with this library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnres

PACKAGE = Path(__file__).parents[1] / "src" / "attnres"
WAY_OUT = "run pip uninstall fast-attnres attnres, install attnres again, and keep fast-attnres in another environment"


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages with both in it, the __init__.py of either yet to come."""
    (tmp_path / "attnres").mkdir()
    for name in ("installation.py", "errors.py"):
        shutil.copy(PACKAGE / name, tmp_path / "attnres")
    (tmp_path / "fast_attnres-2.1.0.dist-info").mkdir()
    (tmp_path / "fast_attnres-2.1.0.dist-info" / "METADATA").write_text("Name: fast-attnres\nVersion: 2.1.0\n")
    return tmp_path


def said(site, folder="") -> str:
    """What importing the module from `folder` of `site` prints."""
    code = f"import sys; sys.path[:0] = [{str(site / folder)!r}, {str(site)!r}]; import attnres.installation"
    end = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True)
    assert (end.returncode == 0) == ("Failure" not in end.stderr), end.stderr
    return end.stderr


def test_whoever_imports_the_library_is_told():
    assert "attnres.installation" in sys.modules and attnres.ops


def test_the_other_over_this_one_is_an_error(site):
    (site / "attnres" / "__init__.py").write_text("__version__ = '2.1.0'\n")
    words = "fast-attnres, whose module is called attnres too, was installed over attnres"
    assert said(site).endswith(f"attnres.errors.Failure: {words}; {WAY_OUT}\n")


def test_what_uninstalling_the_other_leaves_is_an_error(site):
    words = "attnres has lost its __init__.py, as if fast-attnres had been uninstalled from it"
    assert said(site).endswith(f"attnres.errors.Failure: {words}; {WAY_OUT}\n")


def test_this_one_over_the_other_is_a_warning(site):
    (site / "attnres" / "__init__.py").write_text("# BlockAttnRes\n")
    assert f"UserWarning: attnres was installed over fast-attnres, whose module has its name; {WAY_OUT}\n" in said(site)


def test_two_folders_or_this_one_alone_are_fine(site):
    shutil.copytree(site / "attnres", site / "checkout" / "attnres")
    (site / "checkout" / "attnres" / "__init__.py").write_text("# BlockAttnRes\n")
    (site / "attnres" / "__init__.py").write_text("")
    assert said(site, "checkout") == ""
    shutil.rmtree(site / "fast_attnres-2.1.0.dist-info")
    (site / "attnres" / "__init__.py").write_text("# BlockAttnRes\n")
    assert said(site) == ""
