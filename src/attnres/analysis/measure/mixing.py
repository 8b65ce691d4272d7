"""The depth mixing matrix of a model: with which weights every layer's input is made of the outputs before it.

    h_l = sum_{i <= l} M[l, i] v_i          v_0 the embedding, v_i the output of layer i - 1, h_L what the output reads

One method serves every mechanism. The model runs once and its v_i are recorded; the residual connection then runs over
them again in fp64, which gives the h_l that belong to them. Both are vectors of D numbers a token, and where D exceeds
the number of layers the v_i of a token are independent, so M is the solution of a least-squares problem: the exact
weights of a mechanism that weighs whole outputs token by token, the nearest ones of others (weights per channel or per
head, norms with weights, low-rank maps), with the share of h that they leave out. Paper: section 10 of the discussion,
"Attention Residuals", arXiv 2603.15031.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...model.decoder import Backbone, backbone_of
from ...model.loop import run
from ...residual import Residual
from .probe import evaluating

TOKENS_AT_ONCE = 256
DEPENDENT = 1e-9
"""A v_i of which less than this is left beside the earlier ones is a sum of those, and gets the weight zero."""


class Mixing(NamedTuple):
    """Mixing matrices of every token, on the CPU in fp64.

    matrices: [B, T, L + 1, L + 1], zero above the diagonal; unexplained: [L + 1], the share of each h's mean square
    that no weights on whole outputs reproduce: zero to rounding where the matrices are exact.
    """

    matrices: Tensor
    unexplained: Tensor


def mixing_matrix(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The mean of the depth mixing matrix over the tokens input_ids [B, T]: [L + 1, L + 1] in fp64 on the CPU.

    Row l: weights of v_0 .. v_L in layer l's input, before its norm; the last row: in what the output head reads. The
    standard residual has ones up to the diagonal. See `mixing_matrices` for single tokens, what may be inexact, and
    errors.
    """
    return mixing_matrices(model, input_ids).matrices.mean((0, 1))


def mixing_matrices(model: nn.Module, input_ids: Tensor) -> Mixing:
    """The depth mixing matrices of the tokens input_ids [B, T].

    model: a `Decoder` or a Hugging Face model of this package. Raises UsageError for another, for input_ids that are no
    batch of tokens, and for a model whose width does not exceed its number of layers.
    """
    backbone = backbone_of(model)
    if backbone is None:
        raise UsageError(f"model must be a decoder of this package with its residual connection; it is {type(model)}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UsageError(f"input_ids must be token ids of shape [batch, tokens]; it is {list(input_ids.shape)}")
    width, layers = backbone.config.hidden_size, len(backbone.layers)
    if width <= layers:
        raise UsageError(
            f"model must be wider than it has layers for weights to be unique; it has {width} and {layers}"
        )
    outputs = _record(model, backbone, input_ids)
    residual = copy.deepcopy(backbone.residual).cpu().double()
    matrices, missing, total = [], torch.zeros(layers + 1).double(), torch.zeros(layers + 1).double()
    for values in zip(*(v.split(TOKENS_AT_ONCE) for v in outputs), strict=True):
        v, h = torch.stack(values, -1), torch.stack(_replay(residual, values), -1)
        matrices.append(_solve(v, h))
        missing += (h - v @ matrices[-1].mT).square().sum((0, 1))
        total += h.square().sum((0, 1))
    return Mixing(torch.cat(matrices).unflatten(0, input_ids.shape), missing / total.clamp_min(1e-300))


def semiseparable_rank(matrices: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The largest rank of the blocks M[l:, :l + 1] of lower triangular matrices [..., n, n]: [...] whole numbers.

    It is the number of states that a recurrence over depth needs to do the same: 1 for the plain sum, at most m for m
    streams, up to n / 2 where every layer weighs everything on its own. Singular values below tolerance times a
    block's largest count as zero.
    """
    ranks = [torch.linalg.matrix_rank(matrices[..., l:, : l + 1], rtol=tolerance) for l in range(matrices.shape[-1])]
    return torch.stack(ranks).amax(0)


@torch.no_grad()
def _record(model: nn.Module, backbone: Backbone, input_ids: Tensor) -> list[Tensor]:
    """v_0 .. v_L of every token, each [tokens, D], on the CPU in fp64."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        seen.append(output.flatten(0, -2).cpu().double())

    hooks = [module.register_forward_hook(keep) for module in (backbone.embed_tokens, *backbone.layers)]
    try:
        with evaluating(model):
            model(input_ids.to(backbone.embed_tokens.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def _replay(residual: Residual, values: tuple[Tensor, ...]) -> list[Tensor]:
    """h_0 .. h_L of the residual connection over recorded v_0 .. v_L."""
    inputs: list[Tensor] = []

    def call(output: Tensor, h: Tensor) -> Tensor:
        inputs.append(h)
        return output

    state = run(residual, values[1:], residual.start(values[0]), 0, len(values) - 1, call=call)
    return [*inputs, residual.finish(state)]


def _solve(v: Tensor, h: Tensor) -> Tensor:
    """M [tokens, n, n] of v and h [tokens, D, n]; h[..., l] draws on v[..., : l + 1] alone.

    With V = Q R the first l + 1 columns of Q span the first l + 1 outputs, so that all rows are one triangular system.
    """
    lengths = v.norm(dim=1)
    unit = v / lengths.clamp_min(torch.finfo(v.dtype).tiny).unsqueeze(1)
    q, r = torch.linalg.qr(unit)
    coordinates = (q.mT @ h).triu()
    pivots = r.diagonal(dim1=-2, dim2=-1)
    dependent = pivots.abs() < DEPENDENT
    pivots.masked_fill_(dependent, 1.0)
    coordinates.masked_fill_(dependent.unsqueeze(-1), 0.0)
    solution = torch.linalg.solve_triangular(r, coordinates, upper=True).mT
    return torch.where(lengths.unsqueeze(1) > 0, solution / lengths.unsqueeze(1), 0.0)
