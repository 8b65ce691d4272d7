"""Native and converted models split by transformers' tensor parallelism, beside themselves in one process."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

import attnres.hf
from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM

from ..distributed.processes import World
from .converted import ALL, PAD, build, move_queries, padded, tokens

SIZES = {"vocab_size": 64, "num_attention_heads": 8}  # the head's rows must divide before transformers 5.23
GROUPED = {**SIZES, "num_key_value_heads": 4}
LATENT = {**SIZES, "num_key_value_heads": 8}
OWN_SIZES = {"gpt2": {"vocab_size": 64, "n_head": 8}, "gpt_neox": SIZES, "gpt_neox_parallel": SIZES}
OWN_SIZES |= {name: LATENT for name in ("deepseek_v2", "deepseek_v3", "kimi_linear")}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
LENGTH = 9  # no number of processes divides it


@pytest.fixture(scope="module")
def world():
    worlds = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for opened in worlds.values():
        opened.close()


def native(residual, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "max_position_embeddings": 64}
    config = AttnResConfig(**{**shape, **GROUPED, **changes}, initializer_range=0.3, residual=residual)
    model = AttnResForCausalLM(config).double().eval()
    for parameter in model.model.residual.parameters():
        torch.nn.init.normal_(parameter)
    return model


MODELS = {
    "block": lambda: native("block_attnres"),
    "full": lambda: native("full_attnres"),
    "llama": lambda: move_queries(attnres.hf.convert(build("llama", **GROUPED), num_blocks=3)),
    "qwen3_moe": lambda: move_queries(attnres.hf.convert(build("qwen3_moe", **GROUPED), "full_attnres")),
    "gpt_neox": lambda: move_queries(attnres.hf.convert(build("gpt_neox_parallel", **SIZES))),
    "qwen3_next": lambda: move_queries(attnres.hf.convert(build("qwen3_next", **GROUPED))),
    "kimi_linear": lambda: move_queries(attnres.hf.convert(build("kimi_linear", **SIZES, num_key_value_heads=8))),
}


HEADS = {"gpt_neox": 8 // 2, "kimi_linear": 1}  # latent attention keeps one latent for all heads
GATHERED = {
    "qwen3_moe": {"Qwen3MoeSparseMoeBlock"},
    "qwen3_next": {"Qwen3NextSparseMoeBlock", "Qwen3NextGatedDeltaNet"},
    "kimi_linear": {"KimiLinearMoE", "KimiLinearAttention", "KimiLinearDeltaAttention"},
}
"""Sublayers that transformers' plans do not end in a sum over processes."""


def split(model, folder, **options):
    """The model over all processes, loaded from `folder`."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    if distributed.get_rank() == 0:
        model.save_pretrained(folder)
    distributed.barrier()
    options = options or {"distributed_config": DistributedConfig(tp_size=distributed.get_world_size())}
    with warnings.catch_warnings(action="ignore"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    if any("experts" in name for name, _ in model.named_parameters()):
        loaded.set_experts_implementation("eager")  # the grouped kernel knows no double precision
    return loaded


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # rotary factors are fp32


@torch.no_grad()
def agree(name, folder, whole_test):
    whole = MODELS[name]()
    one, ids = split(copy.deepcopy(whole), folder), tokens(2, LENGTH)
    expected = whole(ids, output_hidden_states=True)
    found = one(ids, output_hidden_states=True)
    for a, b in zip((found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
        close(a, b)
    close(one(ids[:, :1]).logits, whole(ids[:, :1]).logits)
    cache, alone = DynamicCache(config=one.config), DynamicCache(config=whole.config)
    for part in ids.split([4, 3, 1, 1], 1):  # each against the same part, as delta rules compute in fp32
        close(one(part, past_key_values=cache).logits, whole(part, past_key_values=alone).logits)
    left, mask = padded("left")
    text = whole.generate(left, attention_mask=mask, **GREEDY)
    recurrent = "linear_attention" in (getattr(whole.config, "layer_types", None) or ())
    for chunk in (None, 1, 4, 50) if whole_test else (4,):
        options = {} if chunk is None else {"prefill_chunk_size": chunk}
        if recurrent:  # for which transformers forgets the padding in chunks of one token
            text = whole.generate(left, attention_mask=mask, **options, **GREEDY)
        assert torch.equal(one.generate(left, attention_mask=mask, **options, **GREEDY), text), chunk
    with torch.enable_grad():  # transformers' own way: all tokens everywhere
        close(one(ids).logits, expected.logits)
    return holdings(one, ids, cache)


def holdings(model, ids, cache):
    """Tokens of the sources that this process reads and behind their storage, its key heads, and the sublayers of which
    the sums are not scattered."""
    base, seen = model.base_model, []
    read = base.residual.read

    def watched(state, layer, norm=None):
        seen.extend(base.residual.sources(state, layer))
        return read(state, layer, norm)

    base.residual.read = watched
    model(ids)
    row = len(ids) * model.config.hidden_size * 8
    return {
        "tokens": {source.shape[1] for source in seen},
        "storage": max(source.untyped_storage().nbytes() // row for source in seen),
        "heads": next(layer.keys for layer in cache.layers if hasattr(layer, "keys")).shape[1],
        "gathered": {type(part).__name__ for part in base.sublayers() if not hasattr(part, "leaves_partial_sums")},
    }


@pytest.mark.parametrize(("processes", "names"), [(2, list(MODELS)), (4, ["block", "full"])])
def test_logits_and_texts_are_those_of_one_process(world, processes, names, tmp_path):
    for name in names:
        share = -(-LENGTH // processes)
        for found in world(processes).run(agree, name, tmp_path / name, processes == 2):
            assert found["tokens"] == {share} and found["storage"] == share
            assert found["heads"] == HEADS.get(name, 4 // processes)
            assert found["gathered"] == GATHERED.get(name, set())


@torch.no_grad()
def every_architecture(folder: Path) -> list[str]:
    """The converted architectures whose logits, or whose next one with a cache, are not those of one process."""
    wrong = []
    for name in sorted(ALL.keys() - {"gpt2", "qwen3_next"}):  # transformers has no plan for the first
        whole = move_queries(attnres.hf.convert(build(name, **OWN_SIZES.get(name, GROUPED)), num_blocks=3))
        try:
            one, ids = split(copy.deepcopy(whole), folder / name), tokens(2, LENGTH)
            logits = whole(ids).logits
            within = {"rtol": 0, "atol": 1e-6 * logits.abs().max().item()}  # rotary factors are fp32
            torch.testing.assert_close(one(ids).logits, logits, **within)
            last, cached = [
                model(ids[:, -1:], past_key_values=model(ids[:, :-1]).past_key_values).logits for model in (whole, one)
            ]
            torch.testing.assert_close(cached, last, **within)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    return wrong


def test_every_architecture_that_can_be_converted(world, tmp_path):
    assert world(2).run(every_architecture, tmp_path) == [[]] * 2


def by_the_word_auto(folder: Path) -> tuple[int, ...]:
    model = split(native("block_attnres"), folder, tp_plan="auto")
    with torch.no_grad():
        close(model(tokens()).logits, native("block_attnres")(tokens()).logits)
    return tuple(model.model.layers[0].q_proj.weight.to_local().shape)


def test_the_word_auto_splits_over_all_processes(world, tmp_path):
    assert world(2).run(by_the_word_auto, tmp_path) == [(16, 32)] * 2


def refusal(folder: Path) -> str:
    try:
        split(native("block_attnres", num_attention_heads=9, num_key_value_heads=9, head_dim=4), folder)
    except UsageError as error:
        return str(error)
    return ""


def test_heads_that_do_not_divide_are_refused_on_every_process(world, tmp_path):
    said = "num_attention_heads must be a multiple of the tensor-parallel processes: 9 over 2 leaves 1 over"
    assert all(said in found for found in world(2).run(refusal, tmp_path))
