"""Continuous batching: requests computed in one row, over a paged cache, give the tokens that each gives alone."""

import time

import pytest
import torch

pytest.importorskip("transformers")
from transformers import ContinuousBatchingConfig, GenerationConfig

import attnres.hf
from attnres.hf import AttnResConfig, AttnResForCausalLM

from .converted import COMMON, VOCAB, build, move_queries

LENGTHS = (40, 1, 7, 3, 29)  # the longest takes several steps of 16 tokens
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(1, VOCAB, (n,), generator=GENERATOR).tolist() for n in LENGTHS]
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
ROOM = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)  # or it takes most of the memory
NATIVE = {
    "full_attnres": {},
    "block_attnres": {"num_blocks": 2},
    "two_phase": {"num_blocks": 2, "schedule": "two_phase"},
}
CONVERTED = ("llama", "mistral", "gpt_neox_parallel", "mixtral")  # mistral's attention is sliding


def make(name):
    if name in NATIVE:
        torch.manual_seed(0)
        residual = "block_attnres" if name == "two_phase" else name
        options = NATIVE[name]
        config = AttnResConfig(**COMMON, initializer_range=0.3, residual=residual, residual_options=options)
        model = AttnResForCausalLM(config).eval()
        for p in model.model.residual.parameters():
            torch.nn.init.normal_(p)
        return model
    return move_queries(attnres.hf.convert(build(name, dtype=torch.float32), num_blocks=3))


def one_by_one(model, tokens=6):
    return [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY, max_new_tokens=tokens)[0, -tokens:].tolist()
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in (*NATIVE, *CONVERTED)), ("block_attnres", "eager"), ("llama", "eager")],
)
def test_a_batch_gives_what_each_request_gives_alone(name, attention):
    model = make(name)
    want = one_by_one(model)
    model.set_attn_implementation(f"paged|{attention}")
    results = model.generate_batch(PROMPTS, GREEDY, continuous_batching_config=ROOM, warmup=False)
    assert [result.generated_tokens for result in results.values()] == want


def test_requests_come_and_go_while_others_run():
    model = make("block_attnres")
    want = one_by_one(model, tokens=12)
    manager = model.init_continuous_batching(generation_config=GREEDY, continuous_batching_config=ROOM)
    manager.start()
    found = {}

    def collect_until(done):
        deadline, result = time.monotonic() + 60, None
        while not done(result):
            assert time.monotonic() < deadline
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens

    try:
        manager.add_request(PROMPTS[0], request_id="first", max_new_tokens=12)
        manager.add_request(PROMPTS[1], request_id="gone", max_new_tokens=100, streaming=True)
        collect_until(lambda result: result is not None and result.request_id == "gone")
        manager.cancel_request("gone")
        for i, (prompt, tokens) in enumerate(zip(PROMPTS[2:], (12, 1, 5), strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=tokens)
        collect_until(lambda _: len(found) == 4)
    finally:
        manager.stop(block=True, timeout=60)
    assert found["first"] == want[0] and "gone" not in found
    assert [found[str(i)] for i in range(3)] == [tokens[:n] for tokens, n in zip(want[2:], (12, 1, 5), strict=True)]
