"""Triton kernels that sum parameter gradients over tokens in a fixed order: no atomics, the same bits every run.

A backward kernel leaves one fp32 row a program; `reduce_partials` adds them up. For phase 1, whose programs cannot hold
S rows of dq, `query_gradient` makes the rows: dq_l = sum_tokens sum_i c_il v_i is a product of [S, tokens] and
[tokens, D] matrices on the tensor cores, which reads every source once more.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch, multiprocessors, tensor_list
from .lists import row_pointer


@triton.jit(do_not_specialize=["n", "num_queries", "num_tokens", "tokens_per_program"])
def query_gradient(
    p_sources, p_along_query, p_partial, n, num_queries, num_tokens, tokens_per_program,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr,
    SPLIT: tl.constexpr, p_like,
):  # fmt: skip
    """p_along_query: c, [T, n, S] fp32; p_partial: [programs, S, D].

    SPLIT: c goes to the tensor cores as two numbers of the sources' dtype, whose errors add up to 2^-17 for bf16.
    Otherwise both sides go as fp32 in three tf32 products.
    """
    chunk = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    o_l = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    m_l = o_l < num_queries
    o_tokens = tl.arange(0, TOKENS)
    end = tl.minimum((chunk + 1) * tokens_per_program, num_tokens)

    b_dq = tl.zeros([QUERIES, BLOCK], tl.float32)
    for source in tl.range(0, n):
        p_source = row_pointer(p_sources, source, 0, COUNT, 1, p_like)
        for start in tl.range(chunk * tokens_per_program, end, TOKENS, num_stages=3):
            o_t = start + o_tokens
            m_t = o_t < end
            b_v = tl.load(p_source + o_t[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
            p_c = p_along_query + (o_t[None, :] * n + source) * num_queries + o_l[:, None]
            b_c = tl.load(p_c, mask=m_l[:, None] & m_t[None, :], other=0.0)
            if SPLIT:
                b_high = b_c.to(b_v.dtype)
                b_low = (b_c - b_high.to(tl.float32)).to(b_v.dtype)
                b_dq = tl.dot(b_high, b_v, b_dq)
                b_dq = tl.dot(b_low, b_v, b_dq)
            else:
                b_dq = tl.dot(b_c, b_v.to(tl.float32), b_dq, input_precision="tf32x3")
    p_rows = p_partial + (chunk * num_queries + o_l[:, None]) * D + o_d[None, :]
    tl.store(p_rows, b_dq, mask=m_l[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["num_partials"])
def reduce_partials(
    p_partial, p_queries, p_key_norms, p_dqueries, p_dkey_norms, p_dweight, num_partials,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """p_partial: [P, S + AFFINE, D]. Row l < S is dq_l, q_l = w_l g_l, hence dw_l = g_l dq_l and dg_l = w_l dq_l; row S
    is the gradient of the weight of the norm that follows the read. QUERIES is S."""
    row = tl.program_id(1)
    o_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    o_rows = tl.arange(0, ROWS)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, num_partials, ROWS):
        o_p = start + o_rows
        p_rows = p_partial + ((o_p[:, None] * (QUERIES + AFFINE) + row).to(tl.int64)) * D + o_d[None, :]
        b_sum += tl.sum(tl.load(p_rows, mask=(o_p < num_partials)[:, None] & m_d[None, :], other=0.0), 0)
    if QUERIES > 0 and row < QUERIES:
        o_query = row * D + o_d
        b_query = tl.load(p_queries + o_query, mask=m_d, other=0.0).to(tl.float32)
        b_key_norm = tl.load(p_key_norms + o_query, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_dqueries + o_query, (b_sum * b_key_norm).to(p_dqueries.dtype.element_ty), mask=m_d)
        tl.store(p_dkey_norms + o_query, (b_sum * b_query).to(p_dkey_norms.dtype.element_ty), mask=m_d)
    if AFFINE and row == QUERIES:
        tl.store(p_dweight + o_d, b_sum.to(p_dweight.dtype.element_ty), mask=m_d)


def query_partials(sources: Sequence[Tensor], along_query: Tensor, num_queries: int) -> Tensor:
    """Rows of dq, [programs, S, D], from the coefficients c [T, n, S] that phase 1's backward left."""
    first = sources[0]
    width = first.shape[-1]
    num_tokens = first.numel() // width
    tokens, block = 16, min(256, max(16, triton.next_power_of_2(width)))
    columns = triton.cdiv(width, block)
    # about three programs a multiprocessor, each with whole steps of tokens
    chunks = max(1, min(triton.cdiv(num_tokens, tokens), 3 * multiprocessors(first.device) // columns))
    share = triton.cdiv(num_tokens, chunks * tokens) * tokens
    chunks = triton.cdiv(num_tokens, share)
    partial = torch.empty((chunks, num_queries, width), dtype=torch.float32, device=first.device)
    list_of_sources = tensor_list(sources, 1)
    queries = 16 if num_queries <= 16 else 32
    launch(
        query_gradient,
        (chunks, columns, triton.cdiv(num_queries, queries)),
        list_of_sources.pointers,
        along_query,
        partial,
        len(sources),
        num_queries,
        num_tokens,
        share,
        D=width,
        BLOCK=block,
        TOKENS=tokens,
        COUNT=list_of_sources.COUNT,
        QUERIES=queries,
        # the interpreter has no bf16 dot
        SPLIT=first.dtype == torch.bfloat16 and not INTERPRETED,
        p_like=first,
        num_warps=4 if queries == 16 else 8,
        device=first.device,
    )
    return partial


def sum_partials(
    partial: Tensor, queries: Tensor | None, key_norms: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dqueries, dkey_norms, dweight) from the programs' rows [P, S + 1, D], or [P, S, D] without a weight. S = 0: no
    queries. What is not asked for comes back empty."""
    num_partials, num_rows, width = partial.shape
    dqueries, dkey_norms, dweight = (
        partial.new_empty(0) if like is None else torch.empty_like(like) for like in (queries, key_norms, weight)
    )
    block = 32  # many rows at a time: what counts here is the time of one load after the other
    launch(
        reduce_partials, (triton.cdiv(width, block), num_rows),
        partial, queries, key_norms, dqueries, dkey_norms, dweight, num_partials,
        D=width, ROWS=256, BLOCK=block, QUERIES=num_rows - (weight is not None), AFFINE=weight is not None, num_warps=8,
        device=partial.device,
    )  # fmt: skip
    return dqueries, dkey_norms, dweight
