"""FSDP2 applied by hand, as its users do: layer by layer, the residual connection alone, the whole model last."""

import copy
import os

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.parallel import mesh
from attnres.parallel.config import ParallelConfig

SHAPE = dict(vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2)
HYBRID = dict(
    attention_pattern=("kda", "mla"), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, linear_chunk_size=4
)


def open_mesh():
    """Of all processes of the world."""
    return mesh.build(ParallelConfig(shard=int(os.environ["WORLD_SIZE"])), torch.device("cpu"))["shard"]


def trained_like(model):
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    return model


def ids(step, rank):
    return torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model, tokens):
    logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def compare(model, layers, residual, groups, **options):
    """Losses, gradients and parameters over three steps, two micro-batches in the second, are those of one process with
    the batches of all."""
    options["mesh"] = open_mesh()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    whole = copy.deepcopy(model)
    if "layers" in groups:
        for layer in layers(model):
            fully_shard(layer, **options)
    if "residual" in groups:
        fully_shard(residual(model), **options)
    fully_shard(model, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for step in range(3):
        with torch.no_grad():  # what an evaluation gathers must not be stale in the next step
            torch.testing.assert_close(loss_of(model, ids(9, 0)), loss_of(whole, ids(9, 0)))
        for micro in range(1 + step % 2):
            loss_of(model, ids(step + 5 * micro, rank)).backward()
            for other in range(size):
                (loss_of(whole, ids(step + 5 * micro, other)) / size).backward()
        for (name, p), q in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q[1].grad, msg=lambda m, n=name: f"{n}: {m}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)


def native(name, groups, hybrid=False, checkpointing=False, options=None):
    shape = {**SHAPE, **(HYBRID if hybrid else {})}
    model = trained_like(Decoder(DecoderConfig(**shape, residual=name)).double())
    model.enable_checkpointing(checkpointing)
    compare(model, lambda m: m.layers, lambda m: m.residual, groups, **(options or {}))


def without_a_root(name):
    model = Decoder(DecoderConfig(**SHAPE, residual=name))
    fully_shard(model.residual, mesh=open_mesh())
    try:
        model(ids(0, 0))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def converted(family, residual, groups):
    import transformers

    from attnres import hf

    shape = dict(SHAPE, num_key_value_heads=2)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape)
    sizes = {"num_blocks": 2} if residual == "block_attnres" else {}
    model = hf.convert(getattr(transformers, f"{family}ForCausalLM")(config), residual, **sizes)
    compare(trained_like(model.double()), lambda m: m.model.layers, lambda m: m.model.residual, groups)


def hugging_face(groups):
    from attnres import hf

    shape = {**SHAPE, "max_position_embeddings": 16}
    torch.manual_seed(0)  # transformers draws weights from the process's generator, wherever that stands
    model = trained_like(hf.AttnResForCausalLM(hf.AttnResConfig(**shape, residual="block_attnres")).double())
    compare(model, lambda m: m.model.layers, lambda m: m.model.residual, groups)
