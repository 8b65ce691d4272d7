"""Memory of training steps, by torch's own profiler: under checkpointing depth attention keeps per layer what the plain
model keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attnres import ops
from attnres.model import Decoder, DecoderConfig
from attnres.model.cache import KeyValueCache
from attnres.plan.prompt import plan_inference

CPU = torch.device("cpu")
NUM_BLOCKS = 2
OPTIONS: dict[str, dict[str, Any]] = {"prenorm": {}, "block_attnres": {"num_blocks": NUM_BLOCKS}, "full_attnres": {}}


@pytest.fixture
def memory(benchmarks: Path) -> Iterator[ModuleType]:
    import memory

    yield memory
    ops.set_backend("auto")


def test_a_layer_peaks_where_a_plain_one_does(memory: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SEQUENCES", 1)
    monkeypatch.setattr(memory, "CONTEXT", 128)
    monkeypatch.setattr(memory, "WIDTH", 64)

    def peaks(residual: str) -> dict[int, float]:
        return {
            n: memory.step_peak(residual, OPTIONS[residual], n, True, CPU, torch.float32) / (4 * 128 * 64)
            for n in (4, 6)
        }

    plain, block = peaks("prenorm"), peaks("block_attnres")
    # two layers' rows of the two parameters' gradients
    assert memory.growth(block) == pytest.approx(memory.growth(plain) + 4 / 128, abs=0.02)
    # the gradients of the blocks, and what a read's backward writes
    assert block[6] - plain[6] < 2 * (NUM_BLOCKS + 1) + 2


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_a_forward_pass_keeps(memory: ModuleType, backend: str, request: pytest.FixtureRequest) -> None:
    """One tensor a Transformer block, the stream, a block or a partial sum; two for Full, a layer's output each."""
    if backend == "triton":
        request.getfixturevalue("interpreted")
    ops.set_backend(backend)
    tokens, width = 8, 64
    ids = torch.zeros(1, tokens, dtype=torch.int64)

    def kept(residual: str, depth: int, checkpointed: bool = True) -> float:
        config = DecoderConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=1,
            residual=residual,
            residual_options=OPTIONS[residual],
        )
        model = Decoder(config)
        model.enable_checkpointing(checkpointed)

        def forward() -> torch.Tensor:
            logits = model(ids)
            gc.collect()  # Triton's interpreter holds a launch's arguments in cycles
            return logits

        gc.collect()  # what other tests have left would count as given back
        _, left = memory.allocated(forward, CPU)
        return left / (4 * tokens * width)

    generator = torch.get_rng_state().nbytes / (4 * tokens * width)  # each checkpoint keeps its state
    growth = {name: (kept(name, 4) - kept(name, 2)) / 2 - generator for name in OPTIONS}
    assert growth == pytest.approx({"prenorm": 1, "block_attnres": 1, "full_attnres": 2}, abs=0.1)
    assert kept("block_attnres", 4) - kept("prenorm", 4) < NUM_BLOCKS
    assert kept("block_attnres", 2, checkpointed=False) > 3 * kept("block_attnres", 2)


PROMPT: dict[str, Any] = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1)


def prefill_peak(memory: ModuleType, config: DecoderConfig, context: int, chunk: int) -> int:
    """Bytes at the fullest moment of reading a prompt, above the weights."""
    model, ids = Decoder(config).eval(), torch.zeros(1, context, dtype=torch.int64)

    def prefill() -> KeyValueCache:
        cache = KeyValueCache()
        with torch.inference_mode():
            for part in ids.split(chunk, 1):
                model(part, cache, logits_to_keep=1)
        return cache

    return memory.allocated(prefill, CPU)[0]


@pytest.mark.parametrize(("residual", "chunk"), [("block_attnres", 128), ("block_attnres", 512), ("full_attnres", 128)])
def test_the_plan_of_a_prompt_is_what_reading_it_takes(memory: ModuleType, residual: str, chunk: int) -> None:
    config = DecoderConfig(**PROMPT, residual=residual)
    found = plan_inference(config, 1, 512, 1, chunk, torch.float32, "cpu")
    assert prefill_peak(memory, config, 512, chunk) == pytest.approx(found.total_bytes - found.weight_bytes, rel=0.1)


def test_the_peak_of_a_prompt_grows_with_the_chunk_and_the_cache_alone(memory: ModuleType) -> None:
    config = DecoderConfig(**PROMPT)
    cached = {n: plan_inference(config, 1, n, precision=torch.float32, device="cpu").cache_bytes for n in (512, 1024)}
    short, long = (prefill_peak(memory, config, n, 64) - cached[n] for n in cached)
    mask_and_old_keys = 5 * 64 * 512 + cached[512] // PROMPT["num_hidden_layers"]  # a layer's, while it runs
    assert long - short < 1.1 * mask_and_old_keys
    one = 4 * 256  # bytes of a token of the stream
    wide = prefill_peak(memory, config, 512, 256) - cached[512]
    assert wide - short > (256 - 64) * 9 * one  # eight blocks and the embedding
