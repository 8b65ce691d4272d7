"""The compiled kernels: hardly a register spilled, no load narrower than it should be, shared memory that fits a GPU.

Compiling needs no GPU. It happens in a process of its own, as kernels that this one imports may be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compile_targets.json"
SHARED_MEMORY = 227 * 1024


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return json.loads(RESULTS.read_text())["rows"]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    script = [sys.executable, str(ROOT / "benchmarks" / "compile_targets.py"), "--quick"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("kernel", "width", "sources", "queries", "architecture"))


def roomy(row: dict) -> bool:
    """Whether a program's rows, of five sources at most, leave registers to spare."""
    if row["kernel"].endswith("_wide") or row["width"] < 1024:
        return False
    return row["width"] < 7168 if row["sources"] is None else int(str(row["sources"]).split()[0]) <= 5


def test_compiled_kernels(compiled, table):
    recorded = {key(row): row for row in table}
    assert len(compiled) >= 9
    for row in compiled:
        assert row["spill_bytes"] <= recorded[key(row)]["spill_bytes"], (row, recorded[key(row)])
        assert row["spill_bytes"] == 0 or not roomy(row), row
        assert row["narrow_loads"] == 0, row
        assert row["shared_bytes"] < SHARED_MEMORY, row
        assert row["wide_loads"] >= recorded[key(row)]["wide_loads"], (row, recorded[key(row)])


def test_the_table_covers_every_kernel_on_every_architecture(table):
    kernels = {f"{name}_{way}" for name in ("read", "merge", "add_norm") for way in ("forward", "backward")}
    kernels |= {"reduce_partials"}
    few = {"inter_block_forward", "inter_block_backward"}
    many = {"inter_block_forward_wide", "inter_block_backward_wide", "query_gradient"}
    phase_1 = {512: few, 1024: few, 2048: few | many, 2304: many, 7168: many}
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for width, expected in phase_1.items():
            rows = [row for row in table if (row["architecture"], row["width"]) == (architecture, width)]
            assert {row["kernel"] for row in rows} == kernels | expected


def test_the_table_has_few_spills_and_no_narrow_loads(table):
    for row in table:
        # a few numbers a thread where that measures faster than fewer rows in registers or fewer programs
        assert row["spill_bytes"] <= (0 if roomy(row) else 64), row
        assert row["narrow_loads"] == 0, row
        assert row["shared_bytes"] < SHARED_MEMORY, row
