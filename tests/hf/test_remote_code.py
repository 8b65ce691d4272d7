"""Folders that carry the model's code: what loads where attnres is not installed, and what is none of its business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from attnres import hf, ops
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM
from attnres.hf.convert import table
from attnres.residual import BlockAttnRes, registry

from .converted import COMMON, build, tokens, with_moved_queries

PACKAGE = Path(hf.__file__).parents[1]
NAMES = ["block_attnres", "full_attnres", "hybrid", "llama", "qwen3"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def make(name):
    if name == "hybrid":
        return with_moved_queries("native", attention_pattern=("kda", "mla"), num_experts=4, num_experts_per_tok=2)
    if name in ("llama", "qwen3"):
        return with_moved_queries(name, "full_attnres" if name == "qwen3" else "block_attnres")
    return with_moved_queries("native", name)


ELSEWHERE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
for name in ("attnres", "fla", "causal_conv1d"):
    sys.modules[name] = None
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers import trainer_pt_utils

models, folder = {}, Path(sys.argv[1])
ids, greedy, expected = torch.load(folder / "expected.pt")
for name, (logits, text, gradient) in expected.items():
    model = models[name] = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    config = AutoConfig.from_pretrained(folder / name, trust_remote_code=True)
    assert type(config).__module__ == type(model.config).__module__ and type(config)()
    tokenizer = AutoTokenizer.from_pretrained(folder / name, trust_remote_code=True)
    assert tokenizer("Depth").input_ids == [*b"Depth"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits), name
    assert torch.equal(model.generate(ids, **greedy), text), name
    assert model(ids, use_cache=True).past_key_values is not None

    decay = trainer_pt_utils.get_parameter_names(model, [torch.nn.LayerNorm])
    assert "lm_head.weight" in decay and "model.residual.pseudo_query" not in decay, name
    model.train()(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.residual.pseudo_query.grad, gradient), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(folder / "again" / name)
    again = AutoModelForCausalLM.from_pretrained(folder / "again" / name, trust_remote_code=True).eval()
    assert torch.equal(again(ids).logits, model(ids).logits) and not torch.equal(again(ids).logits, logits)
    assert all(
        (folder / "again" / name / file).read_text() == (folder / name / file).read_text()
        for file in ("modeling_attnres.py", "README.md", "config.json")
    )
    tagger = AutoModelForTokenClassification.from_pretrained(folder / name, trust_remote_code=True, num_labels=3)
    assert tagger(ids).logits.shape == (*ids.shape, 3)

try:
    model.from_run("somewhere")
    raise AssertionError("a run")
except AttributeError:
    pass
try:
    models["block_attnres"].from_run("somewhere")
    raise AssertionError("a run")
except ModuleNotFoundError as error:
    assert "run of attnres is not in" in str(error) and "pip install attnres" in str(error), error

del sys.modules["attnres"]
import attnres.hf  # afterwards the package serves, and what was loaded before goes on with its own code
for name, carried in models.items():
    ours = AutoModelForCausalLM.from_pretrained(folder / "again" / name).eval()
    assert type(ours).__module__.startswith("attnres.hf."), type(ours)
    torch.testing.assert_close(ours(ids).logits, carried(ids).logits, rtol=1e-4, atol=1e-4)
ours = AutoModelForCausalLM.from_pretrained(folder / "again" / "block_attnres")
for model, name in ((ours, "attnres"), (models["block_attnres"], "transformers_modules")):
    called = []  # operators, which torch knows by their names alone

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)(ids, use_cache=False)
    torch.testing.assert_close(compiled.logits, models["block_attnres"](ids).logits, rtol=1e-4, atol=1e-4)
    assert [operator for operator in called if operator.startswith(name) and "rotary_factors" in operator], called
print("all as expected")
"""


def test_the_folder_is_all_that_is_needed(tmp_path):
    expected, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    ops.set_backend("eager")
    try:
        for name in NAMES:
            model = make(name)
            with torch.no_grad():
                logits = model(tokens()).logits
            text = model.generate(tokens(), **GREEDY)
            model.save_pretrained(tmp_path / name, remote_code=True)
            ByteTokenizer().save(tmp_path / name)
            model.train()(tokens(), labels=tokens()).loss.backward()
            expected[name] = (logits, text, model.model.residual.pseudo_query.grad)
    finally:
        ops.set_backend("auto")
        torch.set_num_threads(threads)
    torch.save((tokens(), GREEDY, expected), tmp_path / "expected.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(PACKAGE.parent)}
    end = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert (end.returncode, end.stdout.strip()) == (0, "all as expected"), end.stderr[-3000:]


@pytest.mark.parametrize("name", ["full_attnres", "llama"])
def test_the_library_runs_nothing_from_the_folder(name, tmp_path, monkeypatch):
    model = make(name)
    model.save_pretrained(tmp_path, remote_code=True)
    code = tmp_path / "modeling_attnres.py"
    code.write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(UsageError, match="trust_remote_code is not needed and not accepted"):
        hf.load(tmp_path, trust_remote_code=True)
    for loaded in (
        hf.load(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "with")  # as it was loaded, but this package's code
    assert "SOURCES['residual.base']" in (tmp_path / "with" / "modeling_attnres.py").read_text()
    loaded.save_pretrained(tmp_path / "without", remote_code=False)
    assert not (tmp_path / "without" / "modeling_attnres.py").exists()
    said = json.loads((tmp_path / "without" / "config.json").read_text())
    assert not said.get("auto_map")
    hf.load(tmp_path / "without").save_pretrained(tmp_path / "still-without")
    assert not (tmp_path / "still-without" / "modeling_attnres.py").exists()
    assert 'AutoModelForCausalLM.from_pretrained("this-folder", trust' in (tmp_path / "with" / "README.md").read_text()
    assert not [card for card in tmp_path.glob("*without/README.md") if "trust_remote_code" in card.read_text()]


def test_nobody_is_asked_whether_to_run_code(tmp_path, monkeypatch):
    make("llama").save_pretrained(tmp_path, remote_code=True)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_type": "attnres_of_tomorrow"}))
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    with pytest.raises(UsageError, match=r"no config that can be read.* contains custom code"):
        hf.load(tmp_path)


def test_what_is_carried_is_the_package_as_it_is(tmp_path):
    make("llama").save_pretrained(tmp_path, remote_code=True)
    names = {}
    text = (tmp_path / "modeling_attnres.py").read_text().partition("\nfor name in")[0]
    exec(text, names)
    carried = names["Carried"]("somewhere", "", names["SOURCES"])
    for name in names["SOURCES"]:
        path = PACKAGE.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert carried.get_source(f"somewhere.{name}") == path.read_text(encoding="utf-8"), name
    absent = ("triton", "native", "run.", "train", "model.layers", "residual.mechanisms.full_attnres")
    assert not [name for name in names["SOURCES"] if any(part in name for part in absent)]


def test_what_another_process_could_not_find_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(table, "ARCHITECTURES", dict(table.ARCHITECTURES))

    class Mine(BlockAttnRes):
        pass

    class MyModel(AttnResForCausalLM):
        pass

    registry.register("mine")(Mine)
    mine = AttnResForCausalLM(AttnResConfig(**COMMON, residual="mine"))
    for model, reason in (
        (mine, "cannot write the code of Mine"),
        (MyModel(AttnResConfig(**COMMON)), "attnres' own classes; MyModel is none"),
    ):
        with pytest.raises(UsageError, match=reason):
            model.save_pretrained(tmp_path / "refused", remote_code=True)
    llama = make("llama")
    with pytest.raises(UsageError, match=r"save first, then model\.push_to_hub"):
        llama.save_pretrained(tmp_path / "refused", remote_code=True, push_to_hub=True)
    llama.config.auto_map = {"AutoConfig": "somebody/model--modeling_attnres.AttnResLlamaConfig"}
    with pytest.raises(UsageError, match=r"save first, then model\.push_to_hub"):
        llama.save_pretrained(tmp_path / "refused", push_to_hub=True)
    del table.ARCHITECTURES["llama"]
    table.register(table.Architecture("llama"))
    with pytest.raises(UsageError, match="an architecture that you registered"):
        llama.save_pretrained(tmp_path / "refused", remote_code=True)
    assert not (tmp_path / "refused").exists()


def test_a_class_that_is_not_of_transformers_is_refused(tmp_path):
    class Elsewhere(LlamaForCausalLM):
        pass

    model = hf.convert(Elsewhere(build("llama").config))
    with pytest.raises(UsageError, match="cannot write the code of Elsewhere"):
        model.save_pretrained(tmp_path / "refused", remote_code=True)
