"""Every snippet of docs/convert.md runs, in order, as a reader would run it."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from attnres import hf
from attnres.hf.convert import table
from attnres.hf.convert.folder import convert_folder

from .converted import build, tokens

PAGE = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "ARCHITECTURES", dict(table.ARCHITECTURES))
    original = build("llama", torch.float32, num_hidden_layers=4)
    original.save_pretrained("base-model")
    names = {}
    for snippet in snippets("python"):
        exec(compile(snippet, "docs/convert.md", "exec"), names)
    assert hf.load("attnres-model").model.residual.num_blocks == 8
    trainable = {name.split(".")[-1] for name, p in names["model"].named_parameters() if p.requires_grad}
    assert "pseudo_query" in trainable
    assert "my_decoder" in table.ARCHITECTURES
    with torch.no_grad():
        assert torch.allclose(names["model"](tokens()).logits, original(tokens()).logits, atol=1e-5)


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("llama", torch.float32, num_hidden_layers=4).save_pretrained("base-model")
    (commands,) = snippets("console")
    (program, command, source, target, flag, value), after = map(shlex.split, commands.replace("$ ", "").splitlines())
    assert (program, command, flag) == ("attnres", "convert", "--num-blocks")
    assert after[:3] == ["attnres", "generate", target]
    convert_folder(source, target, num_blocks=int(value))
    assert hf.load(target).model.residual.num_blocks == 8


def test_the_table_of_architectures_is_complete():
    rows = re.search(r"\| decoder layer.*?\n\n", PAGE, re.DOTALL)
    assert rows is not None
    named = [name for row in rows[0].splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.rpartition("|")[0])]
    assert sorted(named) == sorted(table.ARCHITECTURES)
    assert str(len(named)) in PAGE
