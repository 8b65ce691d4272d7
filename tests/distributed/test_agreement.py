"""Tensor parallelism, sharding and replicas compute what one process computes."""

import pytest

from attnres import residual
from attnres.parallel.config import ParallelConfig

from .agreement import K3, Case, errors

LAYOUTS = [
    {"tp": 2},
    {"shard": 2},
    {"dp": 2},
    {"tp": 4},
    {"shard": 4},
    {"dp": 2, "shard": 2},
    {"dp": 2, "tp": 2},
    {"shard": 2, "tp": 2},
]
PLAIN = {"tie_word_embeddings": False}
MODELS = {
    "prenorm": {"residual": "prenorm"},
    "block": {"residual": "block_attnres", "residual_options": {"block_size": 3}},  # borders within Transformer blocks
    "full": {"residual": "full_attnres"},
}


def name(sizes: dict[str, int]) -> str:
    return " ".join(f"{key}{value}" for key, value in sizes.items())


def worst(world, case: Case) -> dict[str, tuple[float, str]]:
    return max(
        world(ParallelConfig(**case.sizes).world_size).run(errors, case), key=lambda found: found["gradients"][0]
    )


def assert_equal(found) -> None:
    for what, error in found.items():
        assert (error[0] if isinstance(error, tuple) else error) < 1e-10, (what, error)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=name)
def test_losses_gradients_norm_and_step_are_those_of_one_process(world, sizes, model):
    assert_equal(worst(world, Case(sizes, {**MODELS[model], **PLAIN})))


@pytest.mark.parametrize("model", ["block", "full"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=name)
def test_so_they_are_with_tied_embeddings_checkpointing_and_accumulation(world, sizes, model):
    assert_equal(worst(world, Case(sizes, MODELS[model], checkpointing=True, accumulate=2)))


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"dp": 2, "shard": 2}], ids=name)
def test_so_they_are_with_the_two_phase_schedule(world, sizes):
    options = {"num_blocks": 2, "schedule": "two_phase"}
    assert_equal(worst(world, Case(sizes, {"residual": "block_attnres", "residual_options": options})))


@pytest.mark.parametrize("reads", ["transformer_block", "block", "mlp"])
def test_so_they_are_with_fewer_reads(world, reads):
    options = {"residual": "block_attnres", "residual_options": {"num_blocks": 2, "reads": reads}}
    assert_equal(worst(world, Case({"shard": 2, "tp": 2}, options, checkpointing=True, accumulate=2)))


@pytest.mark.parametrize("mechanism", sorted(set(residual.names()) - {"block_attnres", "full_attnres"}))
def test_so_they_are_with_every_other_mechanism(world, mechanism):
    assert_equal(worst(world, Case({"shard": 2, "tp": 2}, {"residual": mechanism}, checkpointing=True, accumulate=2)))


HYBRID = {
    "attention_pattern": ("kda", "mla"),
    "linear_chunk_size": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    **MODELS["block"],
}


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"shard": 2}, {"shard": 2, "tp": 2}], ids=name)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_so_they_are_with_delta_attention_latent_attention_and_experts(world, sizes, checkpointing):
    assert_equal(worst(world, Case(sizes, {**HYBRID, **PLAIN}, checkpointing=checkpointing, accumulate=2)))


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"shard": 2, "tp": 2, "ep": 2}], ids=name)
@pytest.mark.parametrize("normalised", [True, False])
def test_so_they_are_with_the_layers_of_kimi_k3(world, sizes, normalised):
    """The norm of latent experts is of their whole sum, in front of the end of the layer."""
    shape = {**HYBRID, "num_experts": 4, **PLAIN, **K3, "latent_moe_use_norm": normalised}
    assert_equal(worst(world, Case(sizes, shape, checkpointing=True, accumulate=2)))


EXPERT_LAYOUTS = [
    {"shard": 2, "ep": 2},
    {"dp": 2, "ep": 2},
    {"shard": 4, "ep": 2},
    {"dp": 2, "shard": 2, "ep": 2},
    {"dp": 2, "shard": 2, "ep": 4},
    {"shard": 2, "tp": 2, "ep": 2},
]
EXPERTS = {**HYBRID, "num_experts": 4, **PLAIN}


@pytest.mark.parametrize("sizes", EXPERT_LAYOUTS, ids=name)
def test_so_they_are_with_experts_on_many_processes(world, sizes):
    assert_equal(worst(world, Case(sizes, EXPERTS, checkpointing=True, accumulate=2)))


def test_without_their_mean_the_gradients_of_experts_are_wrong(world):
    error, parameter = worst(world, Case({"shard": 4, "ep": 2}, EXPERTS, reduce=False))["gradients"]
    assert error == pytest.approx(1) and parameter.endswith(("gate_proj", "up_proj", "down_proj"))


def test_without_the_sum_over_tp_the_replicated_gradients_are_wrong(world):
    found = worst(world, Case({"tp": 2}, MODELS["block"], reduce=False))
    error, parameter = found["gradients"]
    assert found["loss"] < 1e-10 and error > 0.1 and ("norm" in parameter or "residual" in parameter)
