"""torch.export of decoders: one program for any batch, any number of tokens and any number of earlier ones, which
consists of torch's own ops."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export, save

from attnres.model import Decoder, DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.model.layers.kda import KDAState
from attnres.ops import dispatch
from attnres.ops.eager import Eager
from attnres.ops.exporting import is_exporting

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
BLOCK = dict(residual="block_attnres", residual_options={"num_blocks": 2})
KINDS = {
    "prenorm": dict(residual="prenorm"),
    "full": dict(residual="full_attnres"),
    "block": BLOCK,
    "window": dict(BLOCK, attention_pattern=("sliding_window", "gqa"), sliding_window=5),
    "latent": dict(BLOCK, attention_pattern=("mla",)),
    "experts": dict(BLOCK, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
BATCH, TOKENS, PAST = Dim("batch"), Dim("tokens"), Dim("past", min=0)
IDS = torch.randint(0, 61, (3, 19), generator=torch.Generator().manual_seed(0))


def decoder(**options) -> Decoder:
    shape = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = Decoder(DecoderConfig(**shape, intermediate_size=48, initializer_range=0.2, **options)).double().eval()
    torch.manual_seed(1)
    for parameter in model.residual.parameters():
        nn.init.normal_(parameter)
    return model


def own_ops(program):
    return {str(node.target) for node in program.graph.nodes if "attnres" in str(node.target)}


def snippets():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_cache(model):
    """The module that the page writes."""
    names: dict = {}
    exec(snippets()[-1], names)
    return names["DecoderWithCache"](model)


@pytest.mark.parametrize("kind", ["prenorm", "block", "window", "experts"])
def test_a_program_takes_any_batch_and_any_number_of_tokens(kind):
    model = decoder(**KINDS[kind])
    program = export(model, (IDS[:2, :7].clone(),), dynamic_shapes={"input_ids": {0: BATCH, 1: TOKENS}})
    assert own_ops(program) == ({"attnres.token_experts.default"} if kind == "experts" else set())
    run = program.module()
    with torch.no_grad():
        for batch, tokens in ((1, 1), (1, 2), (3, 19), (2, 7)):
            ids = IDS[:batch, :tokens]
            torch.testing.assert_close(run(ids), model(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "block", "window", "latent"])
def test_one_program_reads_a_prompt_and_makes_cached_steps(kind):
    model, cache = decoder(**KINDS[kind]), KeyValueCache()
    with torch.no_grad():
        model(IDS[:2, :4], cache)
    past = [[kept.clone() for kept in side.values()] for side in (cache.keys, cache.values)]
    each = [{0: BATCH, 2: PAST}] * 2
    shapes = ({0: BATCH, 1: TOKENS}, each, each)
    run = export(with_cache(model), (IDS[:2, :3].clone(), *past), dynamic_shapes=shapes).module()
    keys, values = ([kept.new_empty(3, kept.shape[1], 0, kept.shape[3]) for kept in side] for side in past)
    with torch.no_grad():
        whole, logits = model(IDS), []
        for piece in IDS.split([6, 1, 1, 5, 6], 1):
            found, keys, values = run(piece, keys, values)
            logits.append(found)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)
    assert {kept.shape[2] for kept in (*keys, *values)} == {19}


def test_linear_attention_exports_for_one_number_of_tokens_and_as_a_step():
    model = decoder(**BLOCK, attention_pattern=("kda",))

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, states):
            cache = KeyValueCache()
            cache.states = {layer: KDAState(*state) for layer, state in enumerate(states)}
            return self.model(input_ids, cache), [tuple(state) for state in cache.states.values()]

    prompt = export(model, (IDS[:2],), dynamic_shapes={"input_ids": {0: BATCH}}).module()
    cache = KeyValueCache()
    with torch.no_grad():
        torch.testing.assert_close(prompt(IDS), model(IDS), rtol=1e-6, atol=1e-6)
        model(IDS[:, :9], cache)
        states = [tuple(state) for state in cache.states.values()]
        example = [tuple(kept[:2] for kept in state) for state in states]
        shapes = ({0: BATCH}, [({0: BATCH}, {0: BATCH})] * 2)
        step = export(Step(), (IDS[:2, 9:10].clone(), example), dynamic_shapes=shapes).module()
        for token in range(9, 12):
            logits, states = step(IDS[:, token : token + 1], states)
            expected = model(IDS[:, : token + 1])[:, -1:]
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_a_saved_program_runs_where_this_package_is_not_installed(tmp_path):
    model = decoder(**BLOCK)
    save(export(model, (IDS,), dynamic_shapes={"input_ids": {0: BATCH, 1: TOKENS}}), tmp_path / "model.pt2")
    torch.save(model(IDS[:1, :5]).detach(), tmp_path / "logits.pt")
    torch.save(IDS[:1, :5].clone(), tmp_path / "ids.pt")
    code = """
        import sys, torch
        sys.modules["attnres"] = None
        ids, logits = torch.load("ids.pt"), torch.load("logits.pt")
        torch.testing.assert_close(torch.export.load("model.pt2").module()(ids), logits, rtol=1e-10, atol=1e-10)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_program_has_the_gradients_of_the_model():
    model = decoder(**BLOCK)
    program = export(model, (IDS[:2, :7].clone(),), dynamic_shapes={"input_ids": {0: BATCH, 1: TOKENS}}).module()
    loss = [run(IDS).logsumexp(-1).mean() for run in (program, model)]
    names = dict(program.named_parameters())
    found = torch.autograd.grad(loss[0], list(names.values()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = torch.autograd.grad(loss[1], [parameters[name] for name in names])
    assert "residual.pseudo_query" in names
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_an_exporter_gets_the_formulas_on_a_gpu_too(monkeypatch):
    """Which a fake tensor stands for; a kernel would be an op of this package."""
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("attnres.ops.dispatch.is_exporting", lambda: True)
    with FakeTensorMode():
        assert type(dispatch.select(torch.empty(2, 16, device="cuda"), 3)) is Eager


def test_a_compiler_is_not_taken_for_an_exporter():
    """With torch 2.11 it is by torch's own question, and reads would go to the formulas on a GPU."""

    class Asked(torch.nn.Module):
        def forward(self, x):
            return x + (1 if is_exporting() else 2)

    x = torch.zeros(2)
    assert (Asked()(x) == 2).all()
    assert (torch.compile(Asked(), backend="eager", fullgraph=True)(x) == 2).all()
    for strict in (False, True):
        assert (export(Asked(), (x,), strict=strict).module()(x) == 1).all()
