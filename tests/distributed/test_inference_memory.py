"""The memory of a prompt: the paper's figures, closed forms, and what real models and processes hold."""

import json
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from attnres.errors import UsageError
from attnres.model import DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.plan.prompt import plan_inference

from .agreement import SHAPE, decoder
from .plans import BF16, FP32, shape
from .test_inference import HYBRID, sharded


@pytest.mark.parametrize(("tp", "chunk", "gigabytes"), [(1, None, 15.03), (8, None, 1.88), (8, 16384, 0.235)])
def test_the_blocks_of_a_long_prompt_are_the_papers(tp, chunk, gigabytes):
    config = shape(layers=16, hidden_size=7168, num_attention_heads=8, num_key_value_heads=8, intermediate_size=8)
    found = plan_inference(config, 1, 131072, tp, chunk)
    assert found.block_bytes == pytest.approx(1e9 * gigabytes, rel=3e-3)


@pytest.mark.parametrize(
    ("residual", "device", "tensors"),
    [
        ({"residual": "prenorm"}, "cuda", 2),  # the stream, and the update that the next read adds
        ({"residual_options": {"num_blocks": 4, "schedule": "layerwise"}}, "cpu", 5),
        ({"residual_options": {"num_blocks": 4}}, "cpu", 4 + 2 + 1),  # sources, two results ahead, an update
        ({"residual_options": {"num_blocks": 4}}, "cuda", 4 + 2 + 1),
        ({"residual": "full_attnres"}, "cpu", 13),
        ({"residual": "full_attnres"}, "cuda", 13),  # what a group's layers have not written, phase 1 has
    ],
)
def test_what_is_kept_over_depth(residual, device, tensors):
    config = shape(layers=12, **residual)
    whole = plan_inference(config, 2, 64, precision=FP32, device=device)
    one = 2 * 64 * 16 * 4
    assert whole.state_bytes == pytest.approx(tensors * one, abs=one / 2)  # and a number a token for results ahead
    split = plan_inference(config, 2, 64, 2, 16, FP32, device)
    assert split.state_bytes == whole.state_bytes / 8


def held(processes: int, model: dict[str, Any], tokens: int, chunk: int) -> tuple[int, int]:
    """Bytes of weights and of the cache in this process."""
    split, cache = sharded(model, processes), KeyValueCache()
    split.float()
    with torch.no_grad():
        for part in torch.zeros(2, tokens, dtype=torch.int64).split(chunk, 1):
            split(part, cache)
    tensors = {id(t): t for t in (*split.parameters(), *split.buffers())}.values()
    kept = tree_leaves([cache.keys, cache.values, cache.states])
    return sum(t.nbytes for t in tensors), sum(t.nbytes for t in kept)


@pytest.mark.parametrize("model", [{}, {"tie_word_embeddings": False}, HYBRID])
def test_weights_and_cache_are_those_of_two_processes(world, model):
    config = DecoderConfig(**{**SHAPE, **model})
    found = plan_inference(config, 2, 11, 2, 4, FP32, "cpu")
    # of an odd number of rows the last process holds zeros as well
    assert world(2).run(held, 2, model, 11, 4) == [(found.weight_bytes, found.cache_bytes)] * 2


def test_one_process_without_a_split():
    model, config = decoder(HYBRID).float(), DecoderConfig(**{**SHAPE, **HYBRID})
    found = plan_inference(config, 1, 8, precision=FP32, device="cpu")
    assert found.parameters == config.parameter_counts()["total"]
    assert found.weight_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found.total_bytes == found.weight_bytes + found.cache_bytes + found.state_bytes + found.working_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "batch_size must be a positive whole number; it is 0"),
        ((1, 8, 1, 0), "prefill_chunk must be a positive whole number; it is 0"),
        ((1, 8, 3), "num_attention_heads must be a multiple of parallel.tp: 4 over 3 leaves 1 over"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        plan_inference(shape(), *arguments, precision=BF16)


SMALL = "--inference --model.num-hidden-layers 2 --batch-size 1 --context 64 --residual.num-blocks 2"


def test_the_command_lists_the_ways_to_read_a_prompt(server):
    end = server.run("plan", *SMALL.split(), "--parallel.tp", 2, "--prefill-chunk", 16)
    assert end.status == 0, end.err
    lines = end.out.splitlines()
    assert "1 x 64 tokens in bfloat16" in lines[0] and "2 blocks" in lines[2]
    assert [line.split()[:2] for line in lines[3:6]] == [["1", "64"], ["2", "64"], ["2", "16"]]
    assert all(line.endswith("fits") for line in lines[3:6])
    steps = json.loads(server.run("plan", *SMALL.split(), "--json").out)
    assert [(step["processes"], step["tokens"]) for step in steps] == [(1, 64)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--inference --parallel.pp 2", "parallel.pp is for training, and is 2; inference is planned over parallel.tp"),
        ("--inference --checkpointing", "checkpointing is for training"),
        ("--prefill-chunk 16", "prefill_chunk is for inference; add --inference, or leave it out"),
        ("--inference --prefill-chunk 0", "prefill_chunk must be a positive whole number; it is 0"),
        ("--inference --parallel.tp 3", "num_attention_heads must be a multiple of parallel.tp"),
    ],
)
def test_the_command_refuses(server, flags, message):
    end = server.run("plan", *flags.split())
    assert end.status == 2 and message in end.said
