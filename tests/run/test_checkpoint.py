"""Checkpoints come back bit for bit, the right ones are kept, and configurations that differ are refused."""

import json
import math
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnres.errors import UsageError
from attnres.run.checkpoint import latest, load, save
from attnres.run.config import check_compatible

from .saved import FILES, assert_number, assert_same, names, save_number


def test_everything_comes_back_bit_for_bit(tmp_path):
    odd_bits = torch.tensor([math.nan, -0.0, math.inf, 1e-45])
    model = {
        "float32": odd_bits,
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(2).half(),
        "int64": torch.tensor([2**62 + 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "also.empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 2).t(),
    }
    nested = {
        "step": torch.tensor(7.0),
        "groups": [{"betas": (0.9, 0.95), "fused": True, "foreach": None, "lr": 0.1 + 0.2, "params": [0, 1]}],
        "empty": [{}, [], ()],
        0: torch.arange(3),
        "0": torch.arange(4),
        "a/b": {"c": torch.ones(1)},
        "a": {"b/c": torch.zeros(1)},
        "__tensor__": "only a key",
        "limits": (math.inf, math.nan, -0.0, 2**70, "ü\n"),
    }
    path = save(tmp_path, 3, model, nested, {"like": {1: nested["groups"]}}, keep=1)
    loaded = load(path)
    assert_same(loaded.model_tensors, model)
    assert_same(loaded.optimizer_state, nested)
    assert_same(loaded.state, {"like": {1: nested["groups"]}})


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    table = torch.randn(10, 4)
    model = {"embed": table, "head": table, "part": table[2:5], "flat": table.view(-1), "alike": table.clone()}
    path = save(tmp_path, 0, model, {"a": table, "b": table}, {}, keep=1)
    loaded = load(path)
    assert_same({name: loaded.model_tensors[name] for name in model}, model)
    assert loaded.model_tensors["head"] is loaded.model_tensors["embed"]
    assert loaded.optimizer_state["a"] is loaded.optimizer_state["b"]
    pointers = {tensor.data_ptr() for tensor in loaded.model_tensors.values()}
    assert len(pointers) == 4, "tensors that were views of one memory must not be tied unless they are the same tensor"
    assert "head" not in load_file(path / "model.safetensors")


def test_a_value_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^state/where/1 is a PosixPath, which a checkpoint cannot hold"):
        save(tmp_path, 0, {}, {}, {"where": [0, Path("x")]}, keep=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (0, 0)])
def test_step_and_keep_are_checked(tmp_path, step, keep):
    with pytest.raises(UsageError, match="step must be >= 0 and keep at least 1"):
        save_number(tmp_path, step, keep)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_number(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in FILES} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    path = save_number(tmp_path, 1)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert_number(path, 1)


def test_what_was_loaded_does_not_depend_on_the_files_any_more(tmp_path):
    path = save_number(tmp_path, 3)
    loaded = load(path)
    for name in FILES:
        with (path / name).open("r+b") as file:
            file.write(bytes((path / name).stat().st_size))
    assert loaded.model_tensors["w"].eq(3).all() and loaded.optimizer_state["adamw"]["w"]["exp_avg"].eq(3).all()


def test_latest_is_the_highest_step_and_strangers_are_ignored(tmp_path):
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None
    for step in (9, 100, 20):
        save_number(tmp_path, step)
    for stranger in ("step-1", "step-00000999x", "other", ".saving-step-00000999-0"):
        (tmp_path / stranger).mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-00000100"
    assert_number(tmp_path / "step-00000100", 100)


def test_the_last_ones_are_kept(tmp_path):
    for step in range(1, 6):
        save_number(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    save_number(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]


def test_one_that_was_just_written_is_never_removed_as_outdated(tmp_path):
    save_number(tmp_path, 10)
    save_number(tmp_path, 2)
    path = save_number(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]
    assert_number(path, 3)


def test_the_same_step_is_replaced(tmp_path):
    save_number(tmp_path, 4)
    path = save(tmp_path, 4, {"w": torch.zeros(1)}, {}, {"second": True}, keep=1)
    assert load(path).state == {"second": True}
    assert names(tmp_path) == ["step-00000004"]


def test_a_folder_that_is_no_checkpoint_is_a_usage_error(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="is not a checkpoint; give a folder such as"):
            load(path)


def test_equal_configurations_are_compatible():
    check_compatible(
        json.loads(json.dumps({"model": {"dims": (1, 2), "options": {}}, "lr": 1e-3})),
        {"model": {"dims": (1, 2), "options": {}}, "lr": 1e-3},
    )


def test_differing_fields_are_named_with_both_values():
    saved = {"model": {"hidden_size": 256, "residual": "prenorm", "options": {}, "gone": None}, "lr": 1e-3}
    now = {"model": {"hidden_size": 512, "residual": "prenorm", "options": {"num_blocks": 4}}, "lr": 1e-3}
    with pytest.raises(UsageError) as caught:
        check_compatible(saved, now)
    message = str(caught.value)
    for difference in (
        "model.hidden_size (256 in the checkpoint, 512 now)",
        "model.options.num_blocks (absent in the checkpoint, 4 now)",
        "model.gone (null in the checkpoint, absent now)",
    ):
        assert difference in message
    assert "residual" not in message and "lr" not in message
