"""Prefill and decoding over processes that share the matrices and the tokens of the stream, beside a single one."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from attnres.cli import main
from attnres.errors import UsageError
from attnres.model.cache import KeyValueCache
from attnres.model.generate import generate
from attnres.parallel import inference, mesh, tensor
from attnres.parallel.config import ParallelConfig

from . import runs
from .agreement import CPU, K3, SHAPE, decoder

HYBRID = {
    "attention_pattern": ("kda", "mla", "gqa"),
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "linear_chunk_size": 4,
    "tie_word_embeddings": False,
}
MODELS = [
    {"residual": "block_attnres", "residual_options": {"num_blocks": 2}},
    {"residual": "full_attnres", "residual_options": {"schedule": "two_phase"}},
    {"residual": "mhc"},
    HYBRID,
    {**HYBRID, "num_shared_experts": 0},
    {**HYBRID, **K3},
    {**HYBRID, **K3, "latent_moe_use_norm": False, "num_shared_experts": 0},
]
# prompts at once and in chunks, longer and shorter than the processes are many, then token after token
PARTS = [[7, 1, 1], [8, 1], [3, 3, 3, 1], [1] * 5, [2, 9, 1]]
IDS = torch.randint(0, SHAPE["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(3))


def sharded(model: dict[str, Any], processes: int) -> Any:
    split = decoder(model).eval()
    inference.apply(split, mesh.build(ParallelConfig(tp=processes), CPU)["tp"])
    return split


@torch.no_grad()
def furthest(processes: int) -> float:
    """The largest difference of a logit from one process's."""
    worst = 0.0
    for model in MODELS:
        alone, split = decoder(model).eval(), sharded(model, processes)
        for parts in PARTS:
            cache, expected = KeyValueCache(), alone(IDS[:, : sum(parts)])
            found = torch.cat([split(ids, cache) for ids in IDS[:, : sum(parts)].split(parts, 1)], 1)
            worst = max(worst, (found - expected).abs().max().item())
        worst = max(worst, (split(IDS[:1], None, 1) - alone(IDS[:1])[:, -1:]).abs().max().item())
    return worst


@pytest.mark.parametrize("processes", [2, 4])
def test_logits_are_those_of_one_process(world, processes):
    assert max(world(processes).run(furthest, processes)) < 1e-11


def texts(processes: int) -> list[list[int]]:
    split = sharded(MODELS[0], processes)
    return [list(generate(split, IDS[0], 6, temperature=t, prefill_chunk=c)) for t in (0, 2.0) for c in (None, 1, 5)]


def test_every_process_generates_the_text_of_one(world):
    alone = decoder(MODELS[0]).eval()
    expected = [list(generate(alone, IDS[0], 6, temperature=t)) for t in (0, 2.0) for _ in range(3)]
    assert len({tuple(text) for text in expected}) == 2
    assert world(2).run(texts, 2) == [expected] * 2


def told(arguments: list[str]) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        status = main(arguments)
    return status, out.getvalue(), errors.getvalue()


def test_the_command_line_splits_a_run_over_torchruns_processes(world, corpus_file, tmp_path):
    runs.run(runs.settings(corpus_file, tmp_path))
    command = [
        "generate",
        str(tmp_path),
        "--prompt",
        "the sea",
        "--tokens",
        "5",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    alone = told(command)
    assert alone[0] == 0, alone
    first, second = world(2).run(told, [*command, "--prefill-chunk", "3"])
    assert first[:2] == alone[:2] and second[:2] == (0, "")
    for status, out, errors in world(4).run(told, command):
        assert (status, out) == (2, "")
        assert "num_key_value_heads must be a multiple of parallel.tp: 2 over 4 leaves 2 over" in errors


def told_apart(arguments: list[str]) -> tuple[int, str, str]:
    mesh.build(ParallelConfig(tp=2), CPU)  # the command leaves a job that it has joined, and a World has one job
    return told([*arguments, "--seed", os.environ["RANK"]])


def test_processes_that_would_draw_different_texts_say_so(world, corpus_file, tmp_path):
    runs.run(runs.settings(corpus_file, tmp_path))
    for status, out, errors in world(2).run(told_apart, ["generate", str(tmp_path), "--device", "cpu"]):
        assert (status, out) == (2, "")
        assert "the processes of this job disagree: seed is 0 in rank 0 and 1 in rank 1; " in errors


def held(residual: str, tokens: int, processes: int) -> dict[str, Any]:
    """Tokens of all sources that this process reads, elements of storage behind them, keys and parameters here."""
    split, cache, seen = sharded({"residual": residual}, processes), KeyValueCache(), []
    read = split.residual.read

    def watched(state, layer, norm=None):
        seen.extend(split.residual.sources(state, layer))
        return read(state, layer, norm)

    split.residual.read = watched
    with torch.no_grad():
        split(IDS[:, :tokens], cache)
    return {
        "tokens": {source.shape[1] for source in seen},
        "storage": max(source.untyped_storage().nbytes() for source in seen) // (len(IDS) * SHAPE["hidden_size"] * 8),
        "heads": cache.keys[0].shape[1],
        "parameters": sum(p.numel() for p in {id(p): p for p in split.parameters()}.values()),
    }


@pytest.mark.parametrize("residual", ["block_attnres", "full_attnres"])
def test_each_process_holds_its_tokens_of_every_source_and_its_heads(world, residual):
    found = world(4).run(held, residual, 12, 4)
    assert all(one["tokens"] == {3} and one["storage"] == 3 and one["heads"] == 1 for one in found)
    whole = sum(p.numel() for p in decoder({"residual": residual}).parameters())
    small = 8 * SHAPE["hidden_size"] * 5  # what every process has whole: norms, rows of the residual connection
    assert all(whole / 4 < one["parameters"] < whole / 4 + small for one in found)


def test_padding_is_one_token_at_most_and_few_tokens_lie_everywhere(world):
    padded, few = world(4).run(held, "block_attnres", 9, 4), world(4).run(held, "block_attnres", 3, 4)
    assert all(one["tokens"] == {3} for one in padded)  # 9 tokens over 4 processes
    assert all(one["tokens"] == {3} for one in few)


def messages(tokens: int) -> dict[str, int]:
    """Collectives of one forward pass, by name."""
    split = sharded({"residual": "full_attnres"}, 2)
    with torch.no_grad(), CommDebugMode() as mode:
        split(IDS[:, :tokens])
    return {str(op): count for op, count in mode.get_comm_counts().items()}


def test_the_read_sits_between_a_scatter_and_a_gather(world):
    layers = 2 * SHAPE["num_hidden_layers"]
    gather, scatter, reduce = "c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.allreduce_"
    found = world(2).run(messages, 5)[0]  # the embedding's sum, and the head's tokens and logits, beside the layers'
    assert found == {gather: layers + 2, scatter: layers, reduce: 1}
    assert world(2).run(messages, 1)[0] == {gather: 1, reduce: layers + 1}


def refusal(changes: dict[str, Any], processes: int) -> str:
    try:
        sharded(changes, processes)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4}, "num_attention_heads must be a multiple"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be a multiple of parallel.tp: 2 over 4 leaves 2 over"),
        ({"intermediate_size": 30}, "intermediate_size must be a multiple"),
    ],
)
def test_what_does_not_divide_is_refused_on_every_process(world, changes, message):
    assert all(message in found for found in world(4).run(refusal, changes, 4))


def refused(kind: str, name: str) -> str:
    model = decoder(HYBRID if kind else {})
    layer = next(layer for layer in model.layers if hasattr(layer, name))
    layer.register_module(name, torch.nn.Sequential(layer.get_submodule(name)))
    parts = mesh.build(ParallelConfig(tp=2), CPU)["tp"]
    try:
        (inference if kind != "training" else tensor).apply(model, parts)
    except UsageError as error:
        return str(error)
    return "split"


@pytest.mark.parametrize(("kind", "name"), [("", "o_proj"), ("inference", "kv_b_proj"), ("training", "kv_b_proj")])
def test_a_matrix_behind_an_adapter_is_refused(world, kind, name):
    for message in world(2).run(refused, kind, name):
        assert f"{name} must be a plain torch.nn.Linear" in message and "merge adapters" in message
