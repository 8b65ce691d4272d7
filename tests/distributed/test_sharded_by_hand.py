import pytest

from attnres import residual

from . import sharded_by_hand

GROUPS = (["layers"], ["layers", "residual"], ["residual"])


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres", "prenorm", "mhc", "siamesenorm", "rezero", "keel"])
def test_every_grouping_equals_one_process(world, name):
    for groups in GROUPS if list(residual.build(name, 4, 2).parameters()) else GROUPS[:1]:
        world(2).run(sharded_by_hand.native, name, groups)


@pytest.mark.parametrize(
    ("hybrid", "checkpointing", "reshard"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_layers_of_every_kind_checkpointed_or_kept(world, hybrid, checkpointing, reshard):
    options = {"reshard_after_forward": reshard}
    world(2).run(sharded_by_hand.native, "block_attnres", GROUPS[1], hybrid, checkpointing, options)


def test_hugging_face_models(world):
    pytest.importorskip("transformers")
    for groups in GROUPS:
        world(2).run(sharded_by_hand.hugging_face, groups)
        world(2).run(sharded_by_hand.converted, "Llama", "block_attnres", groups)
    world(2).run(sharded_by_hand.converted, "Qwen3", "full_attnres", ["residual"])


def test_a_residual_connection_without_the_model(world):
    for said in world(2).run(sharded_by_hand.without_a_root, "block_attnres"):
        assert said.startswith("UsageError: fully_shard was applied to the residual connection and not to the model")
