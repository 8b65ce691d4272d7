"""The delta rule with a decay for every channel, as in Kimi Delta Attention (arXiv 2510.26692, sections 3 and 4).

Each head has a state S [K, V], a linear map from keys to values. With g <= 0 the log-decay and beta the step:

    S <- diag(exp(g_t)) S,   S <- S + beta_t k_t (v_t - S^T k_t)^T,   o_t = S^T q_t / sqrt(K)

`recurrent` is that, token by token. `chunked` is the same function, C tokens at a time: with G the sum of g from the
chunk's start up to and with a token,

    (I + A) v' = beta (v - (exp(G) k) S),             A_ij = beta_i sum_c k_ic exp(G_ic - G_jc) k_jc for i > j
    o = ((exp(G) q) S + P v') / sqrt(K),              P_ij = sum_c q_ic exp(G_ic - G_jc) k_jc for i >= j
    S <- diag(exp(G_C)) S + (exp(G_C - G) k)^T v'

exp(-G) overflows where decay is strong, so A and P are built by halves: where i lies in the later and j in the earlier
half of a range, exp(G_i - G_j) is the decay from j to the border times the decay from the border to i. Both exponents
are sums of g alone, so they are never positive, and no sum is subtracted from another.

Shapes: q, k, g [B, T, H, K], v [B, T, H, V], beta [B, T, H], states [B, H, K, V]. Statistics and states are in fp32, or
fp64 for fp64 inputs; o has the dtype of v. With cu_seqlens [N + 1], the borders 0 ... T of N sequences packed into one
row (B = 1), every sequence starts from a state of its own, and states are [N, H, K, V].
"""

from __future__ import annotations

import importlib.util
from itertools import islice, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UsageError

FLA_INSTALLED = importlib.util.find_spec("fla") is not None
"""Found at import: a compiler that traces a layer must not trace the search for a package."""
SPAN = 16
"""Chunks whose tensors are made at once: those of a whole long sequence would leave the caches of a CPU."""


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Output o and final state by the fastest form: `recurrent` for one token, else `chunked`, or for half precision
    on CUDA `fused` where flash-linear-attention is installed. Arguments and errors are those of `chunked`."""
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and FLA_INSTALLED:
        return fused(q, k, v, g, beta, initial_state, cu_seqlens)
    if q.shape[1] == 1 and cu_seqlens is None:
        return recurrent(q, k, v, g, beta, initial_state)
    return chunked(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output o [B, T, H, V] and final state [B, H, K, V], token by token.

    initial_state: zeros by default. Raises UsageError for shapes that do not fit each other.
    """
    lengths = check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    dtype, outputs, finals = v.dtype, [], []
    with torch.autocast(v.device.type, enabled=False):
        states = _first_states(k, v, initial_state, lengths)
        q, k, v, g, beta = (tensor.to(states[0].dtype) for tensor in (q, k, v, g, beta.unsqueeze(-1)))
        tokens = zip(*(x.unbind(1) for x in (q * q.shape[-1] ** -0.5, k, v, g.exp(), beta)), strict=True)
        for state, length in zip(states, lengths, strict=True):
            for q_BHK, k_BHK, v_BHV, decay_BHK, beta_BH1 in islice(tokens, length):
                state = decay_BHK.unsqueeze(-1) * state
                error_BHV = v_BHV - (k_BHK.unsqueeze(-2) @ state).squeeze(-2)
                state = state + k_BHK.unsqueeze(-1) * (beta_BH1 * error_BHV).unsqueeze(-2)
                outputs.append((q_BHK.unsqueeze(-2) @ state).squeeze(-2))
            finals.append(state)
    return torch.stack(outputs, 1).to(dtype), torch.cat(finals)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """What `recurrent` returns, `chunk_size` tokens at a time. Raises UsageError, too, if that is no power of two."""
    lengths = check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    check_chunk_size(chunk_size)
    if cu_seqlens is None and q.shape[1] > SPAN * chunk_size:
        state, pieces = initial_state, []
        for q_, k_, v_, g_, beta_ in zip(*(x.split(SPAN * chunk_size, 1) for x in (q, k, v, g, beta)), strict=True):
            o, state = chunked(q_, k_, v_, g_, beta_, state, chunk_size=chunk_size)
            pieces.append(o)
        assert state is not None
        return torch.cat(pieces, 1), state
    dtype, outputs, corrections, finals = v.dtype, [], [], []
    size = min(chunk_size, 1 << (max(lengths) - 1).bit_length())
    slots = None if cu_seqlens is None else _slots(lengths, size, q.device)
    with torch.autocast(v.device.type, enabled=False):
        states = _first_states(k, v, initial_state, lengths)
        parts = (tensor.to(states[0].dtype) for tensor in (q, k, v, g, beta.unsqueeze(-1)))
        q, k, v, g, beta = (_in_chunks(part, size, slots) for part in parts)
        q = q * q.shape[-1] ** -0.5
        P, A, up_to, after = _scores(q, k, g)
        decayed = up_to.exp()
        # (I + A) v' = beta v - beta exp(G) k S for all chunks at once, before any S is known
        right = beta * torch.cat([decayed * k, v], -1)
        w, u = torch.linalg.solve_triangular(
            beta * A, right, upper=False, unitriangular=True
        ).split([k.shape[-1], v.shape[-1]], -1)  # fmt: skip
        by_chunk = (torch.cat([w, decayed * q], -2), u, decayed[..., -1, :, None], (after.exp() * k).mT)
        chunks = zip(*(x.unbind(2) for x in by_chunk), strict=True)
        for state, length in zip(states, lengths, strict=True):
            for wq, u_, decay, kept in islice(chunks, -(-length // size)):
                read, o = (wq @ state).chunk(2, -2)
                corrections.append(u_ - read)
                outputs.append(o)
                state = decay * state + kept @ corrections[-1]
            finals.append(state)
        o = torch.stack(outputs, 2) + P @ torch.stack(corrections, 2)
    o = o.flatten(2, 3).transpose(1, 2)  # [B, slots, H, V]
    return (o[:, : lengths[0]] if slots is None else o.index_select(1, slots)).to(dtype), torch.cat(finals)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `recurrent` returns, by the Triton kernels of flash-linear-attention (extra `fla`), in the dtype of v."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    check_shapes(q, k, v, g, beta, initial_state, cu_seqlens)
    # the recurrent kernel has no backward pass
    kernel = fused_recurrent_kda if q.shape[1] == 1 and not torch.is_grad_enabled() else chunk_kda
    return kernel(
        q=q.to(v.dtype).contiguous(),
        k=k.to(v.dtype).contiguous(),
        v=v.contiguous(),
        g=g.float().contiguous(),
        beta=beta.float().contiguous(),
        scale=q.shape[-1] ** -0.5,
        initial_state=None if initial_state is None else initial_state.float().contiguous(),
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )


def check_chunk_size(chunk_size: int) -> None:
    """Raises UsageError unless it is a power of two: a chunk is halved down to single tokens."""
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise UsageError(f"chunk_size must be a power of two, such as 64; it is {chunk_size!r}")


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> list[int]:
    """Tokens of each sequence: T alone, or those between the borders. Raises UsageError for what does not fit."""
    if q.dim() != 4 or v.dim() != 4 or q.shape[1] == 0:
        raise UsageError(
            "q and v must be [batch, tokens, heads, width] with at least one token; "
            f"they are {list(q.shape)} and {list(v.shape)}"
        )
    for name, tensor, like, shape in (
        ("k", k, "q", q.shape),
        ("g", g, "q", q.shape),
        ("v", v, "q but for its width", (*q.shape[:3], v.shape[3])),
        ("beta", beta, "q without its width", q.shape[:3]),
    ):
        if tensor.shape != shape:
            raise UsageError(f"{name} must have the shape of {like}, {list(shape)}; it is {list(tensor.shape)}")
    lengths = [q.shape[1]] if cu_seqlens is None else _lengths(cu_seqlens, q)
    states = (q.shape[0] if cu_seqlens is None else len(lengths), q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != states:
        raise UsageError(
            f"initial_state must be {list(states)}, sequences by heads by key width by value width; "
            f"it is {list(initial_state.shape)}"
        )
    return lengths


def _lengths(cu_seqlens: Tensor, q: Tensor) -> list[int]:
    if q.shape[0] != 1:
        raise UsageError(
            f"cu_seqlens is for sequences packed into one row, and there are {q.shape[0]}; give a batch of 1"
        )
    borders = [] if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() else cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    if not lengths or borders[0] != 0 or borders[-1] != q.shape[1] or min(lengths) < 0:
        raise UsageError(
            f"cu_seqlens must be whole numbers that rise from 0 to the number of tokens, {q.shape[1]}, and have one "
            f"dimension; it is {cu_seqlens.tolist()}"
        )
    return lengths


def _first_states(k: Tensor, v: Tensor, initial_state: Tensor | None, lengths: list[int]) -> tuple[Tensor, ...]:
    """The state that every sequence starts from; an unpacked batch counts as one."""
    dtype = torch.float64 if torch.float64 in (k.dtype, v.dtype) else torch.float32
    if initial_state is None:
        batch = len(lengths) if len(lengths) > 1 else k.shape[0]
        initial_state = k.new_zeros(batch, k.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    return initial_state.to(dtype).tensor_split(len(lengths))


def _slots(lengths: list[int], size: int, device: torch.device) -> Tensor:
    """Where each token goes if every sequence starts a chunk of its own."""
    places, start = [], 0
    for length in lengths:
        places.append(torch.arange(start, start + length, device=device))
        start += -(-length // size) * size
    return torch.cat(places)


def _in_chunks(x: Tensor, size: int, slots: Tensor | None) -> Tensor:
    """[B, T, H, E] -> [B, H, N, C, E]. A token of zeros fills up: it decays nothing and writes nothing."""
    if slots is None:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    else:
        filled = int(slots[-1]) // size * size + size
        x = x.new_zeros(x.shape[0], filled, *x.shape[2:]).index_copy(1, slots, x)
    return x.transpose(1, 2).unflatten(2, (-1, size))


def _scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P and A / beta [..., C, C], and the sums of g up to and with a token and after it [..., C, K], from [..., C, K].

    Ranges of `half` tokens, which already have all four, are joined in pairs until one is left.
    """
    both = torch.stack([q, k], -2)  # a token's two rows, [..., C, 2, K]
    ranges = q.shape[-2]
    up_to, after = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)  # [..., ranges, half, K]
    diagonal = (q * k).sum(-1)
    scores = torch.stack([diagonal, torch.zeros_like(diagonal)], -1)[..., None, :, None]  # [..., ranges, half, 2, half]
    half = 1
    while ranges > 1:
        ranges //= 2
        early_up_to, late_up_to = up_to.unflatten(-3, (ranges, 2)).unbind(-3)
        early_after, late_after = after.unflatten(-3, (ranges, 2)).unbind(-3)
        early_scores, late_scores = scores.unflatten(-4, (ranges, 2)).unbind(-4)
        rows = both.unflatten(-3, (ranges, 2, half))[..., 1, :, :, :] * late_up_to.exp().unsqueeze(-2)
        columns = k.unflatten(-2, (ranges, 2, half))[..., 0, :, :] * early_after.exp()
        across = (rows.flatten(-3, -2) @ columns.mT).unflatten(-2, (half, 2))
        scores = torch.cat([F.pad(early_scores, (0, half)), torch.cat([across, late_scores], -1)], -3)
        up_to = torch.cat([early_up_to, early_up_to[..., -1:, :] + late_up_to], -2)
        after = torch.cat([early_after + late_up_to[..., -1:, :], late_after], -2)
        half *= 2
    P, A = scores.squeeze(-4).unbind(-2)
    return P, A, up_to.squeeze(-3), after.squeeze(-3)
