"""Mixture of experts: every token goes to k of E small MLPs, and all tokens to the shared ones.

    s = sigmoid(W_router x)                         fp32, one score per expert
    chosen = top-k of s + correction_bias           the bias selects and does nothing else
    y = scaling * sum over chosen e of s_e / (sum of chosen s + 1e-20) * expert_e(x) + shared(x)

Router as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Kimi Linear (arXiv 2510.26692). Experts are balanced
without a loss (arXiv 2408.15664): after a step the bias of an overloaded expert falls and that of others rises. No
token is ever dropped: tokens are sorted by expert, and an expert takes as many as come.

Latent experts (Kimi K3, arXiv 2607.24653) work at a width of their own: experts take W_down x, and W_up leads their sum
back, normalised or not. Router and shared experts have the full width. Shapes: N tokens, K of E experts, R = N K rows,
width D (also where it is the latent one), inner width I of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UsageError, check_counts
from ...residual.base import normed
from ..config import DecoderShape
from ..layer import Layer, layer_input
from .activation import SILU, Activation
from .experts_cpu import token_experts
from .feed_forward import FeedForward, GatedMLP
from .linear import linear_in

Experts = Callable[[Tensor, Tensor], Tensor]
"""Outputs [R, D] for inputs [R, D] sorted by expert, and how many rows [E] each expert has."""


class MixtureOfExperts(Layer):
    """One mixture-of-experts layer, with its input norm.

    Args:
        hidden_size: width D.
        intermediate_size: inner width I of one expert.
        num_experts: routed experts E.
        experts_per_token: K, at most E.
        num_shared_experts: experts that take every token, as one MLP of their joint inner width; may be 0.
        scaling: factor on the routed experts' sum (routed_scaling_factor).
        norm_eps: of all norms.
        activation: of routed and shared experts.
        latent_size: width of what routed experts take and give; None: hidden_size, without matrices in between.
        latent_norm: whether an RMSNorm stands between the sum of the routed experts and the matrix that leads back.

    Raises UsageError for a size outside its range.
    """

    word = "MoE"
    is_attention = False
    experts = ("gate_proj", "up_proj", "down_proj")
    roles = {**Layer.roles, "routed_expert_up_proj": "output"}
    split = {
        "gate_proj": 1,
        "up_proj": 1,
        "down_proj": 2,
        **{f"shared_experts.{path}": dim for path, dim in FeedForward.split.items()},
    }
    divides = ("moe_intermediate_size",)
    correction_bias: Tensor
    load: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        experts_per_token: int,
        num_shared_experts: int = 1,
        scaling: float = 1.0,
        norm_eps: float = 1e-6,
        activation: Activation = SILU,
        latent_size: int | None = None,
        latent_norm: bool = False,
    ) -> None:
        super().__init__()
        _check(hidden_size, intermediate_size, num_experts, experts_per_token, num_shared_experts, scaling)
        width = hidden_size if latent_size is None else latent_size
        check_counts(latent_size=width)
        self.activation = activation
        self.num_experts, self.experts_per_token, self.scaling = num_experts, experts_per_token, scaling
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, width))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, intermediate_size))
        is_latent = latent_size is not None
        self.routed_expert_down_proj = nn.Linear(hidden_size, width, bias=False) if is_latent else None
        self.routed_expert_norm = nn.RMSNorm(width, norm_eps) if latent_norm else None
        self.routed_expert_up_proj = nn.Linear(width, hidden_size, bias=False) if is_latent else None
        shared_size = num_shared_experts * intermediate_size
        self.shared_experts = GatedMLP(hidden_size, shared_size, activation=activation) if num_shared_experts else None
        if not num_shared_experts:
            self.split = {name: type(self).split[name] for name in self.experts}
        self.register_buffer("correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.exchange: Callable[[Experts], Experts] | None = None  # what makes of a process's own experts all of them
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: DecoderShape, block: int) -> MixtureOfExperts:
        assert config.moe_intermediate_size is not None
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
            num_shared_experts=config.num_shared_experts,
            scaling=config.routed_scaling_factor,
            norm_eps=config.rms_norm_eps,
            activation=Activation.from_config(config),
            latent_size=config.routed_expert_hidden_size,
            latent_norm=config.latent_moe_use_norm,
        )

    def forward(self, x_BTD: Tensor, context: Any = None) -> Tensor:
        """The layer's output [B, T, D] for its already normalised input [B, T, D]."""
        x_BTD = layer_input(self, x_BTD, context)
        x_ND = x_BTD.flatten(0, -2)
        y_ND = self.routed(x_ND)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view(x_BTD.shape)

    def routed(self, x_ND: Tensor) -> Tensor:
        """The routed experts' sum [N, D] for tokens [N, D], weighted and scaled."""
        weight_NK, expert_NK = self.route(x_ND)
        if self.routed_expert_down_proj is not None:
            x_ND = self.routed_expert_down_proj(x_ND)
        expert_R = expert_NK.flatten()
        count_E = torch.zeros_like(self.load).scatter_add(0, expert_R, torch.ones_like(expert_R))
        order_R = expert_R.argsort(stable=True)
        if self.exchange is None and x_ND.device.type == "cpu":
            weight_R = weight_NK.flatten().index_select(0, order_R)
            token_R = order_R // self.experts_per_token
            matrices = self.gate_proj, self.up_proj, self.down_proj
            y_ND = token_experts(_cast(x_ND), weight_R, token_R, count_E, *matrices, self.activation)
        else:
            # index_select and a sum over K instead of one addition at an index: the same order every time
            x_RD = x_ND.index_select(0, order_R // self.experts_per_token)
            run = self.run_experts if self.exchange is None else self.exchange(self.run_experts)
            y_RD = run(x_RD, count_E).index_select(0, order_R.argsort())
            y_ND = torch.bmm(weight_NK[:, None].to(y_RD.dtype), y_RD.view(*expert_NK.shape, -1)).squeeze(1)
        if self.training:
            y_ND = _Counted.apply(y_ND, count_E, self.load)
        if self.routed_expert_norm is not None:
            if self.total is not None:  # the norm is not of parts; what follows is whole, and its share a part again
                y_ND = self.total(y_ND)
            y_ND = normed(y_ND, self.routed_expert_norm) / self.processes
        return y_ND if self.routed_expert_up_proj is None else self.routed_expert_up_proj(y_ND)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [N, K], fp32 or wider, and numbers [N, K] of the experts of every token."""
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            score_NE = linear_in(dtype, self.router, x_ND).sigmoid()
        expert_NK = (score_NE.detach() + self.correction_bias).topk(self.experts_per_token, sorted=False).indices
        weight_NK = score_NE.gather(1, expert_NK)
        return self.scaling * weight_NK / (weight_NK.sum(1, keepdim=True) + 1e-20), expert_NK

    def run_experts(self, x_RD: Tensor, count_E: Tensor) -> Tensor:
        """Outputs [R, D] for inputs [R, D] sorted by expert, count_E of each."""
        x_RD = _cast(x_RD)
        gate, up, down = (weight.to(x_RD.dtype) for weight in (self.gate_proj, self.up_proj, self.down_proj))
        run = grouped_experts if _can_group(x_RD, self.gate_proj) else looped_experts
        return run(x_RD, gate, up, down, count_E, self.activation)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3) -> None:
        """Makes experts that had more than the mean load since the last call less likely, others more likely.

        To be called once an optimizer step, with `load` [E] summed over all processes that trained on other tokens.
        """
        load_E = self.load.to(torch.float64)
        self.correction_bias += rate * (load_E.mean() - load_E).sign().to(self.correction_bias.dtype)
        self.correction_bias -= self.correction_bias.mean()
        self.load.zero_()

    def initial_values(
        self, std: Callable[[str], float], generator: torch.Generator | None, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and normal initial value of every 3-D parameter, whole, one after the other.

        std: standard deviation of a role, "value" (what reads the input) or "output" (what adds to the stream).
        """
        last = "output" if self.routed_expert_up_proj is None else "value"
        for name, role in (("gate_proj", "value"), ("up_proj", "value"), ("down_proj", last)):
            parameter = getattr(self, name)
            shape = (self.num_experts, *parameter.shape[1:])  # a process may hold only some
            value = torch.empty(shape, dtype=parameter.dtype, device=device)
            yield name, value.normal_(std=std(role), generator=generator)

    def flops(self, context: int) -> float:
        """Of the experts those that a token is sent to."""
        routed = sum(getattr(self, name).numel() for name in self.experts)
        return super().flops(context) + 2.0 * routed * self.experts_per_token / self.num_experts

    def idle_parameters(self) -> int:
        routed = sum(getattr(self, name).numel() for name in self.experts)
        return routed * (self.num_experts - self.experts_per_token) // self.num_experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureOfExperts:
        bias = self.correction_bias
        super()._apply(fn, recurse)
        if self.correction_bias.dtype.itemsize < 4:  # whose resolution its steps of 1e-3 are below
            self.correction_bias = bias.to(self.correction_bias.device, torch.float32)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Experts as torch initialises a linear layer of their shape; balancing starts anew."""
        for parameter in (getattr(self, name) for name in self.experts):
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        self.correction_bias.zero_()
        self.load.zero_()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, experts_per_token={self.experts_per_token}, scaling={self.scaling}"


def looped_experts(
    x_RD: Tensor,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    count_E: Tensor,
    activation: Activation = SILU,
) -> Tensor:
    """Outputs [R, D] of experts for rows [R, D] sorted by expert, count_E of each, one expert after the other.

    The counts go to the host.
    """
    experts = zip(x_RD.split(count_E.tolist()), gate_EID.unbind(), up_EID.unbind(), down_EDI.unbind(), strict=True)
    return torch.cat([F.linear(activation(F.linear(x, gate), F.linear(x, up)), down) for x, gate, up, down in experts])


def grouped_experts(
    x_RD: Tensor,
    gate_EID: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    count_E: Tensor,
    activation: Activation = SILU,
) -> Tensor:
    """The same with one matrix product for all experts; bfloat16 only. The counts stay on the device."""
    end_E = count_E.cumsum(0).to(torch.int32)
    gate_RI, up_RI = (F.grouped_mm(x_RD, weight.transpose(1, 2), offs=end_E) for weight in (gate_EID, up_EID))
    return F.grouped_mm(activation(gate_RI, up_RI), down_EDI.transpose(1, 2), offs=end_E)


def _cast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast, if it is on, has matrix products."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _can_group(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    if x_RI.dtype != torch.bfloat16 or x_RI.shape[0] == 0:
        return False
    if x_RI.is_cuda and torch.cuda.get_device_capability(x_RI.device) < (8, 0):
        return False
    return all(size % 8 == 0 for size in weight_EOI.shape[1:])  # rows of 16 bytes


class _Counted(torch.autograd.Function):
    """The identity on y; adds `count` to `load` in the backward pass.

    That pass runs once for every batch that is trained on, also where activations are computed twice, and never in
    evaluation.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, count: Tensor, load: Tensor) -> Tensor:
        ctx.count, ctx.load = count, load
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.load += ctx.count
        return gradients[0], None, None


def _check(hidden: int, inner: int, experts: int, chosen: int, shared: int, scaling: float) -> None:
    check_counts(hidden_size=hidden, intermediate_size=inner, num_experts=experts, experts_per_token=chosen)
    if chosen > experts:
        raise UsageError(
            f"experts_per_token must be at most num_experts; it is {chosen}, and there are {experts} experts"
        )
    if not isinstance(shared, int) or shared < 0:
        raise UsageError(f"num_shared_experts must be a whole number, zero or more; it is {shared!r}")
    if not 0 < scaling < float("inf"):
        raise UsageError(f"scaling must be a positive number; it is {scaling!r}")
