"""The matrix: every architecture in the table, converted, is the same function and stays a model to work with."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from attnres import hf
from attnres.hf.convert.table import ARCHITECTURES
from attnres.residual import BlockAttnRes, FullAttnRes

from .converted import ALL, PAD, REQUIRED, build, move_queries, padded, tokens
from .tiny import TYPES

PARALLEL = {"gpt_neox_parallel", "cohere", "phi"}
FORMS = {
    "block": {"residual": "block_attnres", "num_blocks": 2},
    "odd": {"residual": "block_attnres", "block_size": 1},
    "full": {"residual": "full_attnres"},
    "reads": {"residual": "block_attnres", "block_size": 2, "reads": "transformer_block"},
    "borders": {"residual": "block_attnres", "num_blocks": 2, "reads": "block"},
    "mlp": {"residual": "block_attnres", "block_size": 4, "reads": "mlp"},
}
SOME = {"llama", "gpt2", *PARALLEL}  # one of each way that a layer goes about its two sublayers
CASES = [
    (name, form)
    for name in ALL
    for form in FORMS
    if form == "block" or name in (REQUIRED if form in ("odd", "full") else SOME)
]


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def decode(model) -> torch.Tensor:
    """Logits of a chunk, then of token after token on the cache that it left."""
    ids = tokens()
    outputs = [model(ids[:, :6], use_cache=True)]
    for t in range(6, ids.shape[1]):
        outputs.append(model(ids[:, t : t + 1], past_key_values=outputs[-1].past_key_values, use_cache=True))
    return torch.cat([output.logits for output in outputs], 1)


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_entry_of_the_table_is_tested():
    tested = {build(name).config.model_type for name in ALL} | {*TYPES}
    of_others = {"emu3_text_model", "qwen2_vl_text", "qwen2_5_vl_text"}  # the text models of types for images and text
    assert {name for name in ARCHITECTURES if name in CONFIG_MAPPING} - of_others <= tested  # an older one lacks some


@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_logits_are_the_same_in_double_precision(name, form):
    original = build(name)
    model = hf.convert(copy.deepcopy(original), **FORMS[form])
    assert isinstance(model.base_model.residual, FullAttnRes if form == "full" else BlockAttnRes)
    ids, mask = padded("right")
    expected = original(ids, attention_mask=mask).logits[mask.bool()]
    assert expected.std() > 0.1  # a model whose logits hardly differ would prove nothing
    assert relative(model(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-9
    assert relative(decode(model), decode(original)) < 1e-9


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_logits_are_the_same_in_single_precision(name):
    original = build(name, torch.float32)
    model = hf.convert(copy.deepcopy(original))
    ids, mask = padded("left")
    expected = original(ids, attention_mask=mask).logits[mask.bool()]
    assert relative(model(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-4


@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt2"])
@torch.no_grad()
def test_small_streams_do_not_meet_the_eps_of_the_norms(name):
    """A mean over many sources is small enough for eps to matter; what the converted model reads must not be one."""
    original = build(name, num_hidden_layers=10)
    original.get_input_embeddings().weight.mul_(1e-3)
    model = hf.convert(copy.deepcopy(original), "full_attnres")
    ids = tokens()
    assert relative(model(ids).logits, original(ids).logits) < 1e-9


@pytest.mark.parametrize(("name", "form"), CASES)
@torch.no_grad()
def test_reads_are_attention_over_depth(name, form):
    """With trained queries every sublayer reads what the paper's formula says of the outputs before it."""
    model = move_queries(hf.convert(build(name), **FORMS[form]))
    base, residual = model.base_model, model.base_model.residual
    entry = ARCHITECTURES[model.config.original.model_type][0]
    reads: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def watch_read(module, args, kwargs):
        reads.append(args[0] if args else kwargs["hidden_states"])

    def watch_output(module, args, result):
        factor = getattr(base.layers[0], entry.multiplier) if entry.multiplier else 1
        outputs.append(factor * (result[0] if isinstance(result, tuple) else result))

    layers = getattr(base, entry.layers)
    for layer in layers:
        entry = layer.architecture
        attention = entry.attention
        readers = {entry.attention_norm or attention, entry.mlp_norm or entry.mlp}
        for reader in readers:
            getattr(layer, reader).register_forward_pre_hook(watch_read, with_kwargs=True)
        writers = {(attention, *entry.after_attention)[-1], (entry.mlp, *entry.after_mlp)[-1]}
        for writer in writers:
            getattr(layer, writer).register_forward_hook(watch_output)
    embeddings: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(lambda module, args: embeddings.append(args[0]))
    getattr(base, entry.final_norm).register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    model(tokens())

    assert len(reads) == 7 and len(outputs) == 6
    starts = getattr(residual, "block_starts", range(6))

    def attended(row: int, written: int) -> torch.Tensor:
        blocks = [outputs[a:b] for a, b in zip(starts, [*starts[1:], 6], strict=True)]
        sums = [sum(block[: written - a]) for a, block in zip(starts, blocks, strict=True) if a < written]
        sources = torch.stack([embeddings[0], *sums])
        keys = torch.nn.functional.rms_norm(sources, sources.shape[-1:], residual.key_norm[row], residual.eps)
        weights = (keys @ residual.pseudo_query[row]).softmax(0)
        return len(sources) * torch.einsum("nbt,nbtd->btd", weights, sources)

    for row, read in enumerate(reads):
        written = row - row % 2 if name in PARALLEL else row  # both sublayers read before either writes
        last = max(r for r in range(row + 1) if residual.reads_depth(r) or r == 0)
        if residual.reads_depth(row):
            expected = attended(row, written)
        elif form == "mlp":
            expected = sum(outputs[:written], embeddings[0])
        else:
            expected = sum(outputs[last:written], attended(last, last))
        assert relative(read, expected) < 1e-9, row


@pytest.mark.parametrize("name", REQUIRED)
def test_gradients(name):
    """Those of the old parameters as before; the queries' at once, the key norms' as soon as a query has moved."""
    original = build(name)
    model = hf.convert(copy.deepcopy(original), num_blocks=3)
    ids = tokens()
    expected, found = gradients(original, ids), gradients(model, ids)
    prefix = next(key for key in found if key.endswith("pseudo_query")).removesuffix("pseudo_query")
    queries = found.pop(prefix + "pseudo_query")
    found.pop(prefix + "key_norm")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # norms compute in single precision whatever the model's
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-6), key
    alone = 2 if name in PARALLEL else 1  # rows whose read has but one source, the embedding
    assert not queries[:alone].any()
    assert (queries[alone:].abs().amax(1) > 1e-6).all()
    key_norms = gradients(move_queries(model), ids)[prefix + "key_norm"]
    assert (key_norms[alone:].abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("name", REQUIRED)
@torch.no_grad()
def test_save_and_load(name, tmp_path):
    """Through the original's own folder too, whose layout of experts' weights is not that of the state dict."""
    build(name).save_pretrained(tmp_path / "original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float64)
    keys = set(original.state_dict())
    model = move_queries(hf.convert(original, num_blocks=2))
    added = {key.rpartition(".")[2] for key in set(model.state_dict()) - keys}
    assert keys < set(model.state_dict()) and added == {"pseudo_query", "key_norm"}
    model.save_pretrained(tmp_path / "converted", max_shard_size="20KB")
    loaded = hf.load(tmp_path / "converted")
    assert type(loaded) is type(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    single = tokens()
    model, loaded = model.float(), loaded.float()
    assert torch.equal(model(single).logits, loaded(single).logits)


@pytest.mark.parametrize("name", REQUIRED)
@torch.no_grad()
def test_generate_with_caches(name):
    original = build(name, torch.float32)
    model = hf.convert(copy.deepcopy(original), num_blocks=3)
    ids, mask = padded("left")
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)

    def generate(model, **options):
        return model.generate(ids, attention_mask=mask, generation_config=greedy, **options)

    assert torch.equal(generate(model), generate(original))
    move_queries(model)
    moved = generate(model)
    assert moved.shape == (2, ids.shape[1] + 4)
    assert torch.equal(moved, generate(model, use_cache=False))
    assert torch.equal(moved, generate(model, cache_implementation="static", disable_compile=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", REQUIRED)
def test_gradient_checkpointing(name):
    model = move_queries(hf.convert(build(name), num_blocks=3)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layer = getattr(model.base_model, ARCHITECTURES[model.config.original.model_type][0].layers)[0]
    norm = next(module for module in layer.children() if "Norm" in type(module).__name__)
    runs: list[int] = []
    norm.register_forward_pre_hook(lambda *_: runs.append(1))
    ids = tokens()
    expected = gradients(model, ids)
    once = len(runs)
    model.gradient_checkpointing_enable()
    found = gradients(model, ids)
    assert len(runs) == 3 * once  # once before, once forward, once more in the backward pass
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-9), key
