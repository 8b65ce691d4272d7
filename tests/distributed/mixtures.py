"""Mixtures of experts on many processes beside a single one, in fp64."""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from attnres.errors import UsageError
from attnres.model.layers.experts import MixtureOfExperts
from attnres.parallel import mesh
from attnres.parallel.config import ParallelConfig
from attnres.parallel.experts import split_experts
from attnres.train.balance import balance_experts
from attnres.train.muon import ExpertMuon, Muon

from .agreement import CPU


def sharers(processes: int) -> DeviceMesh:
    """All processes, which share the experts."""
    config = ParallelConfig(shard=processes, ep=processes)
    found = mesh.of_experts(config, mesh.build(config, CPU))
    assert found is not None
    return found["ep"]


def mixture(experts: int = 8) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MixtureOfExperts(hidden_size=8, intermediate_size=12, num_experts=experts, experts_per_token=3, scaling=2.0)
    moe.correction_bias.normal_(std=0.3)
    return moe.double()


def expert_parallel_errors(processes: int, lopsided: bool) -> dict[str, float]:
    """Largest differences of output, input gradient, parameter gradients, load and bias from one process."""
    sharing = sharers(processes)
    group, rank = sharing.get_group(), sharing.get_local_rank()
    alone, split = mixture(), mixture()
    split_experts(split, sharing)
    if lopsided:  # the last process's experts are chosen by no token
        for moe in (alone, split):
            moe.correction_bias[-8 // processes :] -= 10
    inputs = torch.randn(processes, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factor = torch.randn(inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, own = inputs.clone().requires_grad_(), inputs[rank].clone().requires_grad_()
    expected, found = alone(whole.flatten(0, 1)).view(inputs.shape), split(own)
    (expected * factor).sum().backward()
    (found * factor[rank]).sum().backward()
    errors = {"output": found - expected[rank], "input": own.grad - whole.grad[rank]}
    for name, parameter in split.named_parameters():
        if name == "norm.weight":
            continue
        gradient, true = parameter.grad, alone.get_parameter(name).grad
        if name in MixtureOfExperts.experts:
            gradient, true = gradient.to_local(), true.chunk(processes)[rank]
        else:
            distributed.all_reduce(gradient, group=group)
        errors[name] = gradient - true
    ours, theirs = balance_experts([split], [group]), balance_experts([alone])
    errors["load"] = torch.tensor([ours[key] - theirs[key] for key in theirs])
    errors["bias"] = split.correction_bias - alone.correction_bias
    return {name: error.abs().max().item() for name, error in errors.items()}


def refusal(processes: int, experts: int) -> str:
    try:
        split_experts(mixture(experts), sharers(processes))
    except UsageError as error:
        return str(error)
    raise AssertionError("it was not refused")


def thin_muon_error(processes: int, shape: tuple[int, int], dim: int) -> float:
    """Largest difference of a matrix after three steps of Muon, split along `dim`, from one process."""
    device_mesh = mesh.build(ParallelConfig(shard=processes), CPU)["shard"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    alone = nn.Parameter(weight.clone())
    split = nn.Parameter(distribute_tensor(weight.clone(), device_mesh, [Shard(dim)]))
    optimizers = [torch.optim.Muon([alone], lr=0.1, adjust_lr_fn="match_rms_adamw"), Muon([split], lr=0.1)]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        alone.grad, split.grad = gradient, distribute_tensor(gradient, device_mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    assert split.grad is not None and optimizers[1].state[split]["momentum_buffer"].placements == (Shard(dim),)
    return (split.full_tensor() - alone).abs().max().item()


def muon_error(processes: int, dim: int) -> float:
    """Largest difference of experts after three steps of Muon, split along `dim`, from one process."""
    device_mesh = mesh.build(ParallelConfig(shard=processes), CPU)["shard"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 10, 6, generator=generator)  # two processes get two experts and one
    alone = nn.Parameter(weight.clone())
    split = nn.Parameter(distribute_tensor(weight.clone(), device_mesh, [Shard(dim)]))
    optimizers = [ExpertMuon([alone], lr=0.1), ExpertMuon([split], lr=0.1)]
    for _ in range(3):
        gradient = torch.randn(weight.shape, generator=generator)
        alone.grad, split.grad = gradient, distribute_tensor(gradient, device_mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[1].state[split]["momentum_buffer"].placements == (Shard(dim),)
    return (split.full_tensor() - alone).abs().max().item()
