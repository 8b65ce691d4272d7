"""A run on many processes is the run of a single one: the same curve, and checkpoints that either can go on from."""

from pathlib import Path

import pytest

from . import runs
from .versions import V_SHAPED

ZERO_BUBBLE = {"schedule": V_SHAPED, "virtual_stages": 2}
INTERLEAVED = {"schedule": "Interleaved1F1B", "virtual_stages": 2}
TIED, FULL = {"tie_word_embeddings": True}, {"residual": "full_attnres", "residual_options": {}}
HYBRID = {
    "attention_pattern": ("kda", "mla"),
    "linear_chunk_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
WINDOWS = {"attention_pattern": ("sliding_window", "gqa"), "sliding_window": 3}
MUON = {"optimizer": "muon"}
KIMI = {"model": runs.EXPERTS, "steps": 3}
UNSHARED = {**runs.EXPERTS, "num_shared_experts": 0}
ROUNDING, EXACT = 2e-6, 1e-9
"""Of single precision; of double precision, where tokens choose experts or Muon would work in bfloat16."""

CASES = {
    "dp 4": ({"dp": 4}, {}, ROUNDING),
    "shard 4, tied": ({"shard": 4}, {"model": TIED, "accumulate": 2}, ROUNDING),
    "shard 2 x tp 2": ({"shard": 2, "tp": 2}, {"accumulate": 2, "steps": 2}, ROUNDING),
    "tp 2 x pp 2, tied": ({"tp": 2, "pp": 2, "microbatches": 2}, {"model": TIED}, ROUNDING),
    "tp 2 x pp 2, hybrid": ({"tp": 2, "pp": 2, "microbatches": 2}, {"model": HYBRID, "accumulate": 2}, EXACT),
    "tp 2 x pp 2, sliding windows": ({"tp": 2, "pp": 2, "microbatches": 2}, {"model": WINDOWS}, ROUNDING),
    "dp 2 x pp 2, tied": ({"dp": 2, "pp": 2, "microbatches": 2}, {"model": TIED | FULL, "accumulate": 2}, ROUNDING),
    "pp 4 x 2": ({"pp": 4, "microbatches": 4, **INTERLEAVED}, {"model": FULL}, ROUNDING),
    "shard 2 x pp 2": (
        {"shard": 2, "pp": 2, "microbatches": 2},
        {"checkpointing": True, "optim": {"clip": None}},
        ROUNDING,
    ),
    "shard 2 x pp 2, zero bubble, tied": (
        {"shard": 2, "pp": 2, "microbatches": 2, **ZERO_BUBBLE},
        {"model": TIED, "accumulate": 2},
        ROUNDING,
    ),
    "muon, shard 2 x tp 2": ({"shard": 2, "tp": 2}, {"optim": MUON, "steps": 2}, EXACT),
    "muon, pp 4 x 2": ({"pp": 4, "microbatches": 4, **INTERLEAVED}, {"optim": MUON}, EXACT),
    "experts over 2, shard 4": ({"shard": 4, "ep": 2}, {**KIMI, "accumulate": 2}, EXACT),
    "experts over 4, dp 2 x shard 2": ({"dp": 2, "shard": 2, "ep": 4}, {**KIMI, "checkpointing": True}, EXACT),
    "experts over 2, shard 2 x pp 2": ({"shard": 2, "pp": 2, "ep": 2, "microbatches": 2}, KIMI, EXACT),
    "experts over 2, none shared, shard 2 x tp 2": (
        {"shard": 2, "tp": 2, "ep": 2},
        {**KIMI, "model": UNSHARED},
        EXACT,
    ),
    "experts over 2, muon, shard 4": ({"shard": 4, "ep": 2}, {**KIMI, "optim": MUON}, EXACT),
    "bf16, tp 2 x pp 2": ({"tp": 2, "pp": 2, "microbatches": 2}, {"precision": "bfloat16"}, 1e-2),
    "bf16, shard 4": ({"shard": 4}, {"precision": "bfloat16", "checkpointing": True}, 1e-2),
}


def assert_same_curve(out: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = runs.curve(out), runs.curve(expected)
    assert theirs["loss"] and theirs["val_loss"]
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=tolerance), name


@pytest.mark.parametrize("case", CASES)
def test_many_processes_train_like_one(world, corpus_file, tmp_path, case):
    parallel, run, tolerance = CASES[case]
    train = runs.run_exactly if tolerance == EXACT else runs.run
    alone = train(runs.settings(corpus_file, tmp_path / "one", **run))
    ends = world(4).run(train, runs.settings(corpus_file, tmp_path / "many", parallel, **run))
    assert len(set(ends)) == 1 and ends[0] == pytest.approx(alone, rel=tolerance)
    assert_same_curve(tmp_path / "many", tmp_path / "one", tolerance)
