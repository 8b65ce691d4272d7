"""A model on many processes beside the same one in a single process, both in fp64: how far they are apart."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.parallel import experts, gradients, mesh, tensor
from attnres.parallel import fsdp as shard
from attnres.parallel.config import ParallelConfig
from attnres.train.optim import OptimConfig, build_optimizer

CPU = torch.device("cpu")
ROWS, CONTEXT = 4, 8
SHAPE = {
    "vocab_size": 29,  # no number of processes divides it
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
}

K3 = {
    "hidden_act": "situ",
    "activation_situ_beta": 1.5,
    "activation_situ_linear_beta": 2.0,
    "linear_gate_lower_bound": -5.0,
    "linear_full_rank_gate": True,
    "q_lora_rank": 6,
    "mla_use_output_gate": True,
    "routed_expert_hidden_size": 10,
    "latent_moe_use_norm": True,
}
"""What Kimi K3's layers have that Kimi Linear's have not."""


@dataclass(frozen=True)
class Case:
    """sizes: of ParallelConfig; model: what differs from SHAPE; reduce: whether replicated gradients are summed and
    experts' averaged."""

    sizes: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    accumulate: int = 1
    optimizer: str = "adamw"
    reduce: bool = True


def decoder(model: dict[str, Any], dtype: torch.dtype = torch.float64) -> Decoder:
    """One whose parameters are all away from their initial zeros and ones."""
    built = Decoder(DecoderConfig(**{**SHAPE, **model})).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return built


def batch(index: int) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(index))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).double(), tokens[:, 1:].flatten())


class Parallel:
    """The parallel model: its mesh, and what a trainer does with it."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        self.config = ParallelConfig(**case.sizes)
        self.mesh = mesh.build(self.config, CPU)
        self.model = decoder(case.model, dtype)
        self.model.enable_checkpointing(case.checkpointing)
        self.expert_mesh = mesh.of_experts(self.config, self.mesh)
        if self.expert_mesh is not None:
            experts.apply(self.model, self.expert_mesh)
        if self.config.tp > 1:
            tensor.apply(self.model, self.mesh["tp"])
        shard.apply(self.model, self.mesh, self.expert_mesh)
        replicas = self.config.dp * self.config.shard
        own = self.mesh.get_local_rank("dp") * self.config.shard + self.mesh.get_local_rank("shard")
        self.rows = slice(own * ROWS // replicas, (own + 1) * ROWS // replicas)

    def backward(self, autocast: bool = False) -> float:
        """The loss over all processes, whose gradients are there now."""
        total = torch.zeros((), dtype=torch.float64)
        for index in range(self.case.accumulate):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = loss_of(self.model, batch(index)[self.rows]) / self.case.accumulate
            loss.backward()
            total += loss.detach()
        if self.case.reduce:
            experts.average_gradients(self.model, self.config.ep)
        if self.config.tp > 1 and self.case.reduce:
            tensor.reduce_replicated_gradients(self.model, self.mesh["tp"])
        return self.mean(total)

    def mean(self, loss: Tensor) -> float:
        for name in ("dp", "shard"):
            distributed.all_reduce(loss, group=self.mesh.get_group(name))
        return loss.item() / (self.config.dp * self.config.shard)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def furthest(pairs: dict[str, tuple[Tensor, Tensor]]) -> tuple[float, str]:
    """The largest error of all, relative to the largest element of what it should be, and its name.

    What should be nearly zero is the difference of larger numbers, and is measured against 1e-4.
    """
    return max(
        ((whole(a) - b).abs().max().item() / max(1e-4, b.abs().max().item()), name) for name, (a, b) in pairs.items()
    )


def errors(case: Case) -> dict[str, Any]:
    """Relative errors of the loss, the gradients, their norm, the clipped gradients, one optimizer step and the loss
    after it, from a single process; with the name of the worst parameter."""
    alone, split = decoder(case.model), Parallel(case)
    assert not case.checkpointing or split.model.checkpointing
    loss = sum(loss_of(alone, batch(index)) / case.accumulate for index in range(case.accumulate))
    loss.backward()
    found: dict[str, Any] = {"loss": abs(split.backward() / loss.item() - 1)}

    own, true = dict(split.model.named_parameters()), dict(alone.named_parameters())
    assert own.keys() == true.keys()
    assert not [name for name, parameter in own.items() if parameter.grad is None]
    found["gradients"] = furthest({name: (own[name].grad, true[name].grad) for name in own})

    norm = nn.utils.get_total_norm([parameter.grad for parameter in true.values()])
    half = norm.item() / 2
    found["norm"] = abs(
        gradients.clip(own.values(), half, split.mesh, expert_mesh=split.expert_mesh).item() / norm.item() - 1
    )
    nn.utils.clip_grads_with_norm_(true.values(), half, norm)
    found["clipped"] = furthest({name: (own[name].grad, true[name].grad) for name in own})

    for model in (alone, split.model):
        build_optimizer(model, OptimConfig(optimizer=case.optimizer, lr=1e-2, eps=1e-3)).step()
    found["step"] = furthest({name: (own[name], true[name]) for name in own})
    with torch.no_grad():
        after = split.mean(loss_of(split.model, batch(7)[split.rows]))
        found["loss after"] = abs(after / loss_of(alone, batch(7)).item() - 1)
    return found
