"""What the processes tell each other, what each of them holds, and the dtypes of it."""

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from attnres.model import Decoder, DecoderConfig
from attnres.parallel.fsdp import transformer_blocks

from .agreement import SHAPE, Case, Parallel, batch, decoder, loss_of, whole

LAYERS = 2 * SHAPE["num_hidden_layers"]
BLOCK = {"residual": "block_attnres"}


def messages(sizes: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of one forward and one backward pass, by name."""
    split = Parallel(Case(sizes, BLOCK))
    with CommDebugMode() as forward:
        loss = loss_of(split.model, batch(0)[split.rows])
    with CommDebugMode() as backward:
        loss.backward()
    return tuple({str(op): count for op, count in mode.get_comm_counts().items()} for mode in (forward, backward))


def test_a_layer_gathers_its_tokens_and_scatters_its_sum_and_reading_over_depth_says_nothing(world):
    forward, backward = world(2).run(messages, {"tp": 2})[0]
    gather, scatter = "c10d_functional.all_gather_into_tensor", "c10d_functional.reduce_scatter_tensor"
    assert forward == {gather: LAYERS + 2, scatter: LAYERS + 1}  # and the head's tokens and logits; the embedding
    assert backward == {gather: LAYERS + 1, scatter: LAYERS + 1}


def test_a_transformer_block_is_one_message_and_the_rest_another(world):
    forward, backward = world(2).run(messages, {"shard": 2})[0]
    groups = SHAPE["num_hidden_layers"] + 1
    assert forward == {"c10d._allgather_base_": groups}
    assert backward == {
        "c10d._allgather_base_": groups - 1,
        "c10d._reduce_scatter_base_": groups,
    }  # the root has stayed


def holdings(sizes: dict[str, int], checkpointing: bool) -> dict[str, Any]:
    """Elements that this process holds of some parameters, before the forward pass, after it and at the end."""
    split = Parallel(Case(sizes, BLOCK, checkpointing=checkpointing))

    def held() -> dict[str, int]:
        names = ("embed_tokens.weight", "layers.0.norm.weight", "layers.0.q_proj.weight", "residual.pseudo_query")
        parameters = dict(split.model.named_parameters())
        local = {name: parameters[name] for name in names}
        return {n: (p.to_local() if isinstance(p, DTensor) else p).numel() for n, p in local.items()}

    before = held()
    loss = loss_of(split.model, batch(0)[split.rows])
    between = held()
    loss.backward()
    return {"before": before, "between": between, "after": held()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_matrices_come_for_their_block_only_and_norms_and_residual_stay(world, checkpointing):
    width, rows = SHAPE["hidden_size"], LAYERS + 1
    full = [SHAPE["vocab_size"] * width, width, width * width, rows * width]
    halves = [15 * width, width // 2, width * width // 2, 3 * width]  # the first process has the odd row
    found = world(2).run(holdings, {"shard": 2}, checkpointing)[0]
    assert list(found["before"].values()) == list(found["after"].values()) == halves
    assert list(found["between"].values()) == [full[0], full[1], halves[2], full[3]]


def stream_shapes() -> set[tuple[int, ...]]:
    """Shapes of all that residual connection and norms are given, which is no DTensor."""
    split, seen = Parallel(Case({"tp": 2}, BLOCK)), []
    read, write = split.model.residual.read, split.model.residual.write

    def watched_read(state, layer, norm):
        assert not isinstance(norm.weight, DTensor)
        x, state = read(state, layer, norm)
        seen.append(x)
        return x, state

    def watched_write(state, layer, output):
        seen.append(output)
        return write(state, layer, output)

    split.model.residual.read, split.model.residual.write = watched_read, watched_write
    split.backward()
    assert not any(isinstance(tensor, DTensor) for tensor in seen)
    return {tuple(tensor.shape) for tensor in seen}


def test_under_tensor_parallelism_the_stream_is_plain_and_split_along_the_sequence(world):
    assert world(2).run(stream_shapes) == [{(4, 4, 16)}] * 2


def under_autocast(sizes: dict[str, int]) -> dict[str, float]:
    """Cosines between the gradients and those of one process, under bfloat16 autocast."""
    split, alone = Parallel(Case(sizes, BLOCK), torch.float32), decoder(BLOCK, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(alone, batch(0))
    loss.backward()
    assert abs(split.backward(autocast=True) / loss.item() - 1) < 1e-2
    found = {}
    for (name, own), true in zip(split.model.named_parameters(), alone.parameters(), strict=True):
        assert own.dtype == own.grad.dtype == torch.float32
        found[name] = nn.functional.cosine_similarity(whole(own.grad).flatten(), true.grad.flatten(), dim=0).item()
    return found


def test_autocast_works_as_in_one_process(world):
    for found in world(4).run(under_autocast, {"shard": 2, "tp": 2}):
        assert min(found.values()) > 0.995, found


def test_an_mlp_without_its_attention_is_a_block_of_its_own():
    model = Decoder(DecoderConfig(**SHAPE))
    first, *rest = model.layers[1:]
    assert transformer_blocks(list(model.layers)) == [list(model.layers[:2]), list(model.layers[2:])]
    assert transformer_blocks([first, *rest]) == [[first], rest]
    assert not distributed.is_initialized()
