"""AdamW, or Muon for the hidden matrices with AdamW for the rest.

Muon orthogonalises the update of a matrix, which is meant for weights that map hidden states to hidden states; experts
are matrices each. The embedding, the output head, everything that is not a linear layer's matrix and all that a
residual mechanism owns stay with AdamW. The update is scaled by 0.2 sqrt(max(rows, columns)), so that its RMS is that
of AdamW and both can share one learning rate (Moonlight, arXiv 2502.16982, section 2.2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.layers.experts import MixtureOfExperts
from ..residual.base import Residual
from ..run.optim_config import OptimConfig, rate_fraction
from .muon import ExpertMuon, Muon


def parameter_groups(model: nn.Module | Sequence[nn.Module], config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups of one optimizer, weight decay and mesh, each parameter once.

    Several modules are parts of one model, with names that differ.

    A group is what torch.optim takes, with `params` as (name, parameter) pairs, and says in `optimizer` whose it is
    ("adamw", "muon", or "expert_muon" for batches of matrices). Frozen parameters are left out; a tied embedding counts
    as an embedding. Raises UsageError if none is left.
    """
    parts = [model] if isinstance(model, nn.Module) else model
    hidden, decayed = (set().union(*sets) for sets in zip(*map(_matrices, parts), strict=True))
    members: dict[tuple[str, float, object], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in (pair for part in parts for pair in part.named_parameters()):
        if parameter.requires_grad:
            owner = "adamw"
            if config.optimizer == "muon" and parameter in hidden:
                owner = "muon" if parameter.dim() == 2 else "expert_muon"
            decay = config.weight_decay if parameter in decayed else 0.0
            mesh = getattr(parameter, "device_mesh", None)  # an optimizer updates a group in one operation on one mesh
            members.setdefault((owner, decay, mesh), []).append((name, parameter))
    if not members:
        raise UsageError("model has no trainable parameters; set requires_grad on those that should learn")
    muon_lr = config.lr if config.muon_lr is None else config.muon_lr
    rates = {"adamw": config.lr, "muon": muon_lr, "expert_muon": muon_lr}
    return [
        {"optimizer": owner, "params": params, "lr": rates[owner], "initial_lr": rates[owner], "weight_decay": decay}
        for (owner, decay, _), params in members.items()
    ]


def _matrices(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """The hidden layers' matrices, experts included; and these with embeddings and head, which is all that decays."""
    linear: set[nn.Parameter] = set()
    ends: set[nn.Parameter] = set()
    residual: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 2]
        if isinstance(module, Residual):
            residual.update(module.parameters())
        elif isinstance(module, nn.Embedding) or path.rpartition(".")[2] == "lm_head":
            ends.update(matrices)
        elif isinstance(module, nn.Linear):
            linear.update(matrices)
        elif isinstance(module, MixtureOfExperts):
            linear.update(parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
    # a matrix of one row or column is a vector: orthogonalising it would only normalise it
    hidden = {matrix for matrix in linear - ends - residual if min(matrix.shape[-2:]) > 1}
    return hidden, (linear | ends) - residual


class Optimizers:
    """AdamW, and Muon where asked for, behind the interface of one optimizer.

    `by_name` holds those of "adamw", "muon" and "expert_muon" that have parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.config = config
        self.by_name: dict[str, torch.optim.Optimizer] = {}
        for name, build in (("adamw", _adamw), ("muon", _muon), ("expert_muon", _expert_muon)):
            if own := [group for group in groups if group["optimizer"] == name]:
                self.by_name[name] = build(own, config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.by_name.values() for group in optimizer.param_groups]

    def set_learning_rate(self, step: int, total_steps: int) -> float:
        """Sets every group's rate for update number `step` (from 0); returns that of AdamW, `learning_rate(...)`."""
        fraction = rate_fraction(step, total_steps, self.config)
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * fraction
        return self.config.lr * fraction

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to the global norm `config.clip`; returns their norm before, 0-dim.

        Where that is not finite they stay as they are, so that the wrong ones can be found.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip is not None and norm.isfinite():
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        return norm

    def step(self) -> None:
        for optimizer in self.by_name.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Optimizer -> parameter name -> its state, live tensors. Rates and decays come from the configuration."""
        return {
            name: {
                parameter_name: dict(optimizer.state.get(parameter, {}))
                for group in optimizer.param_groups
                for parameter_name, parameter in zip(group["param_names"], group["params"], strict=True)
            }
            for name, optimizer in self.by_name.items()
        }

    def load_state_dict(self, state_dict: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Takes over a `state_dict`, whose tensors must not be used elsewhere, on the parameters' devices.

        Raises UsageError if it is for other parameters or another optimizer.
        """
        for name in sorted(self.by_name.keys() | state_dict.keys()):
            saved, own = state_dict.get(name, {}).keys(), self._parameter_names(name)
            if different := sorted(saved ^ own):
                where = "saved state only" if different[0] in saved else "model only"
                raise UsageError(
                    f"optimizer state does not fit: {name} has {different[0]} in the {where} ({len(different)} such "
                    "parameters); resume with the model and the optimizer of the checkpoint"
                )
        for name, optimizer in self.by_name.items():
            groups = optimizer.state_dict()["param_groups"]
            indices = {p: i for group in groups for p, i in zip(group["param_names"], group["params"], strict=True)}
            state = {indices[parameter]: dict(values) for parameter, values in state_dict[name].items() if values}
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _parameter_names(self, name: str) -> set[str]:
        groups = self.by_name[name].param_groups if name in self.by_name else []
        return {parameter_name for group in groups for parameter_name in group["param_names"]}


def build_optimizer(model: nn.Module | Sequence[nn.Module], config: OptimConfig) -> Optimizers:
    """The optimizer of `model`'s trainable parameters; build it after moving the model to its device."""
    return Optimizers(parameter_groups(model, config), config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    devices = {parameter.device.type for group in groups for _, parameter in group["params"]}
    fused = True if devices <= {"cpu", "cuda"} else None  # None: torch chooses between foreach and a loop
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _muon(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return Muon(groups, lr=config.lr)


def _expert_muon(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return ExpertMuon(groups, lr=config.lr)
