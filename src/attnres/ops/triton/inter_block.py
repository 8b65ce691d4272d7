"""Triton kernels of phase 1: the reads of all S layers of a block over the n finished blocks (paper section 4).

With q_l = w_l * g_l, r_i = rsqrt(mean(v_i^2) + eps), z_il = <q_l, v_i> r_i and p_l = softmax(z_l):

    o_l = sum_i p_il v_i,   lse_l = logsumexp(z_l)

The first layer of a block reads nothing else, so its read can leave with its scale and its norm, RMSNorm(scale o_0).
Backward, with do_l and dlse_l the gradients that the merges left, and dv_i' that of later blocks:

    dz_il = p_il (<do_l, v_i> - sum_j p_jl <do_l, v_j> + dlse_l),   c_il = dz_il r_i,   e_i = sum_l dz_il z_il r_i^2 / D
    dv_i  = dv_i' + sum_l (p_il do_l + c_il q_l) - e_i v_i
    dq_l  = sum_tokens sum_i c_il v_i

The norm's gradient needs o_0, which is made again: with y = dx * weight, t = scale * rstd and k = t^2 <y, o_0> / D it
is do_0 = t (y - k o_0), and <do_0, v_i> = t (<y, v_i> - k <o_0, v_i>), so all sums over a row need one barrier.

A program takes one token at a time and holds its rows in registers, in their own dtype. Rows moved a token: n + S
forward, 3n + S backward; dq is summed over each program's tokens in registers. `inter_block_wide` serves more
queries than four, more sources and wider rows; in decoding, where programs are few, reads are made here all the same,
with sources in tiles.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inter_block_wide import fold, wide_coefficients, wide_reads
from .launch import dense, even_share, few_tokens, launch, row_config, row_shape, rows
from .lists import dots, load_rows, num_tiles, row_pointer, squares, store_gradient, sums
from .reduce import query_partials, sum_partials

MAX_QUERIES, MAX_SOURCES, MAX_ELEMENTS = 4, 12, 8
"""For more, `inter_block_wide` is faster: what is done once a source and query is done by every thread here, and
a thread that holds more elements of a row runs out of registers."""


@triton.jit
def _load_query(p_q, query, num_queries, o_d, m_d, D: tl.constexpr):
    return tl.load(p_q + tl.minimum(query, num_queries - 1) * D + o_d, mask=m_d, other=0.0)


@triton.jit
def _logits_of_tile(
    p_logits, p_rstd, p_q, tile, group, rows, n, num_queries, eps, o_d, m_d,
    D: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Stores what backward needs of a tile and a group; returns the logits, (l, j) at l * TILE + j, -inf past the n-th
    source."""
    parts = squares(rows, TILE, LANES, VECTOR)
    for l in tl.static_range(GROUP):
        parts = parts + dots(rows, _load_query(p_q, group * GROUP + l, num_queries, o_d, m_d, D), TILE, LANES, VECTOR)
    totals = sums(parts, TILE * (1 + GROUP))
    rstds = ()
    for j in tl.static_range(TILE):
        source = tile * TILE + j
        rstds = rstds + (tl.rsqrt(totals[j] / D + eps),)
        tl.store(p_rstd + source, rstds[j], mask=source < n)
    logits = ()
    for l in tl.static_range(GROUP):
        query = group * GROUP + l
        for j in tl.static_range(TILE):
            source = tile * TILE + j
            logit = tl.where(source < n, totals[TILE * (1 + l) + j] * rstds[j], -float("inf"))
            tl.store(p_logits + source * num_queries + query, logit, mask=(source < n) & (query < num_queries))
            logits = logits + (logit,)
    return logits


@triton.jit
def _add_tile(b_read, top, mass, rows, logits, l: tl.constexpr, TILE: tl.constexpr):
    """Query l's online softmax over one more tile."""
    new_top = top
    for j in tl.static_range(TILE):
        new_top = tl.maximum(new_top, logits[l * TILE + j])
    kept = tl.exp(top - new_top)
    mass = mass * kept
    b_read = b_read * kept
    for j in tl.static_range(TILE):
        p = tl.exp(logits[l * TILE + j] - new_top)
        mass += p
        b_read += p * rows[j].to(tl.float32)
    return b_read, new_top, mass


@triton.jit
def _store_read(
    p_outs, p_lse, p_weight, p_norm_rstd, group, l: tl.constexpr, b_read, top, mass, token, num_queries, num_tokens,
    scale, norm_eps, o_d, o_row, m_d,
    D: tl.constexpr, OUTS: tl.constexpr, GROUP: tl.constexpr, MIX: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, p_like,
):  # fmt: skip
    query = group * GROUP + l
    if query < num_queries:
        tl.store(p_lse + query.to(tl.int64) * num_tokens + token, top + tl.log(mass))
        if l == 0:  # noqa: SIM102 (known when the kernel is compiled)
            if query == 0:
                norm_rstd = 1.0
                if NORM:
                    b_x = b_read * (scale / mass)
                    norm_rstd = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + norm_eps)
                    b_x = b_x * norm_rstd
                    if AFFINE:
                        b_x = b_x * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
                    p_out = row_pointer(p_outs, 0, 0, OUTS, GROUP if MIX else 1, p_like)
                    tl.store(p_out + o_row, b_x.to(p_like.dtype.element_ty), mask=m_d)
                tl.store(p_norm_rstd, norm_rstd)
        if MIX:  # noqa: SIM102
            if (not (NORM and l == 0)) or query > 0:
                p_out = row_pointer(p_outs, group, l, OUTS, GROUP, p_like)
                tl.store(p_out + o_row, (b_read / mass).to(p_like.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n", "num_queries", "num_tokens", "groups_per_program"])
def inter_block_forward(
    p_sources,
    p_outs,
    p_q,
    p_weight,
    p_logits,
    p_rstd,
    p_lse,
    n,
    num_queries,
    num_tokens,
    groups_per_program,
    scale,
    eps,
    norm_eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    OUTS: tl.constexpr,
    GROUP: tl.constexpr,
    MIX: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    p_like,
):
    """p_q: [S, D] fp32; p_logits: [T, n, S]; p_rstd: [T, n + 1], the last of the first read's norm; p_lse: [S, T].
    MIX false (n = 1): o_l is the source itself and not written, but for the first with its norm."""
    token = tl.program_id(0).to(tl.int64)
    first_group = tl.program_id(1) * groups_per_program
    last_group = tl.minimum(first_group + groups_per_program, tl.cdiv(num_queries, GROUP))
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    o_row = token * D + o_d
    p_logits += token * n * num_queries
    p_rstd += token * (n + 1)
    b_zeros = tl.zeros([BLOCK], tl.float32)

    if COUNT == TILE:
        rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_like)
        for group in tl.range(first_group, last_group):
            logits = _logits_of_tile(
                p_logits, p_rstd, p_q, 0, group, rows, n, num_queries, eps, o_d, m_d, D, LANES, VECTOR, TILE, GROUP
            )
            for l in tl.static_range(GROUP):
                b_read, top, mass = _add_tile(b_zeros, -float("inf"), 0.0, rows, logits, l, TILE)
                _store_read(
                    p_outs, p_lse, p_weight, p_rstd + n, group, l, b_read, top, mass, token, num_queries, num_tokens,
                    scale, norm_eps, o_d, o_row, m_d, D, OUTS, GROUP, MIX, NORM, AFFINE, p_like,
                )  # fmt: skip
    else:
        for group in tl.range(first_group, last_group):
            reads = (b_zeros,) * GROUP
            tops = ()
            masses = ()
            for _ in tl.static_range(GROUP):
                tops = tops + (-float("inf"),)
                masses = masses + (0.0,)
            for tile in tl.range(0, num_tiles(n, COUNT, TILE)):
                rows = load_rows(p_sources, tile, o_row, m_d, COUNT, TILE, p_like)
                logits = _logits_of_tile(
                    p_logits, p_rstd, p_q, tile, group, rows, n, num_queries, eps, o_d, m_d,
                    D, LANES, VECTOR, TILE, GROUP,
                )  # fmt: skip
                new_reads = ()
                new_tops = ()
                new_masses = ()
                for l in tl.static_range(GROUP):
                    b_read, top, mass = _add_tile(reads[l], tops[l], masses[l], rows, logits, l, TILE)
                    new_reads = new_reads + (b_read,)
                    new_tops = new_tops + (top,)
                    new_masses = new_masses + (mass,)
                reads = new_reads
                tops = new_tops
                masses = new_masses
            for l in tl.static_range(GROUP):
                _store_read(
                    p_outs, p_lse, p_weight, p_rstd + n, group, l, reads[l], tops[l], masses[l], token, num_queries,
                    num_tokens, scale, norm_eps, o_d, o_row, m_d, D, OUTS, GROUP, MIX, NORM, AFFINE, p_like,
                )  # fmt: skip


@triton.jit
def _weights_of(p_logits, query: tl.constexpr, lse, TILE: tl.constexpr, QUERIES: tl.constexpr):
    weights = ()
    for j in tl.static_range(TILE):
        weights = weights + (tl.exp(tl.load(p_logits + j * QUERIES + query) - lse),)
    return weights


@triton.jit
def _source_gradients(
    p_later, p_dsources, p_logits, p_rstd, p_q, o_d, o_row, m_d, rows, douts, along_rows, deltas, lses, dqs,
    D: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, CHAINED: tl.constexpr, p_like,
):  # fmt: skip
    """Writes the gradients of the sources; returns dqs with this token's part added.

    along_rows: <do_l, v_j> at l * TILE + j; deltas: sum_j p_jl <do_l, v_j> - dlse_l."""
    gradients = ()
    along = ()
    for j in tl.static_range(TILE):
        gradients = gradients + (tl.zeros_like(rows[j]).to(tl.float32),)
        along = along + (0.0,)
    new_dqs = ()
    for l in tl.static_range(QUERIES):
        b_q = tl.load(p_q + l * D + o_d, mask=m_d, other=0.0)
        b_dout = douts[l].to(tl.float32)
        b_dq = dqs[l]
        new_gradients = ()
        new_along = ()
        for j in tl.static_range(TILE):
            logit = tl.load(p_logits + j * QUERIES + l)
            rstd = tl.load(p_rstd + j)
            p = tl.exp(logit - lses[l])
            along_query = p * (along_rows[l * TILE + j] - deltas[l]) * rstd
            b_dq += along_query * rows[j].to(tl.float32)
            new_gradients = new_gradients + (gradients[j] + p * b_dout + along_query * b_q,)
            new_along = new_along + (along[j] + along_query * logit * rstd,)
        gradients = new_gradients
        along = new_along
        new_dqs = new_dqs + (b_dq,)
    for j in tl.static_range(TILE):
        b_dv = gradients[j] - (along[j] / D) * rows[j].to(tl.float32)
        store_gradient(b_dv, p_later, p_dsources, 0, j, o_row, m_d, COUNT, TILE, CHAINED, p_like)
    return new_dqs


@triton.jit(do_not_specialize=["num_tokens"])
def inter_block_backward(
    p_sources,
    p_later,
    p_dsources,
    p_douts,
    p_q,
    p_weight,
    p_logits,
    p_rstd,
    p_lse,
    p_dlse,
    p_partial,
    num_tokens,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    OUTS: tl.constexpr,
    QUERIES: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
    CHAINED: tl.constexpr,
    STAGES: tl.constexpr,
    p_like,
):
    """p_partial: [programs, S + AFFINE, D], this program's sums of dq and of the norm weight's gradient. TILE is n."""
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    dqs = (tl.zeros([BLOCK], tl.float32),) * QUERIES
    b_dweight = tl.zeros([BLOCK], tl.float32)

    for token in tl.range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0), num_stages=STAGES):
        o_row = token * D + o_d
        p_z = p_logits + token * TILE * QUERIES
        p_r = p_rstd + token * (TILE + 1)
        douts = load_rows(p_douts, 0, o_row, m_d, OUTS, QUERIES, p_like)
        rows = load_rows(p_sources, 0, o_row, m_d, COUNT, TILE, p_like)
        lses = ()
        for l in tl.static_range(QUERIES):
            lses = lses + (tl.load(p_lse + l * num_tokens + token),)
        if NORM:
            t = scale * tl.load(p_r + TILE)
            b_dx = douts[0].to(tl.float32)
            b_y = b_dx
            if AFFINE:
                b_y = b_dx * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_first = tl.zeros([BLOCK], tl.float32)
            weights = _weights_of(p_z, 0, lses[0], TILE, QUERIES)
            for j in tl.static_range(TILE):
                b_first += weights[j] * rows[j].to(tl.float32)
            parts = dots(rows, b_y, TILE, LANES, VECTOR)
        else:
            parts = dots(rows, douts[0].to(tl.float32), TILE, LANES, VECTOR)
        for l in tl.static_range(1, QUERIES):
            parts = parts + dots(rows, douts[l].to(tl.float32), TILE, LANES, VECTOR)
        if NORM:
            parts = parts + dots(rows, b_first, TILE, LANES, VECTOR)
        along_rows = sums(parts, TILE * (QUERIES + NORM))
        if NORM:
            along = 0.0
            for j in tl.static_range(TILE):
                along += weights[j] * along_rows[j]
            k = t * t * along / D
            firsts = ()
            for j in tl.static_range(TILE):
                firsts = firsts + (t * (along_rows[j] - k * along_rows[TILE * QUERIES + j]),)
            along_rows = firsts + along_rows[TILE : TILE * QUERIES]
        deltas = ()
        for l in tl.static_range(QUERIES):
            delta = -tl.load(p_dlse + l * num_tokens + token)
            weights = _weights_of(p_z, l, lses[l], TILE, QUERIES)
            for j in tl.static_range(TILE):
                delta += weights[j] * along_rows[l * TILE + j]
            deltas = deltas + (delta,)
        if NORM:
            douts = (t * (b_y - k * b_first),) + douts[1:]
        dqs = _source_gradients(
            p_later, p_dsources, p_z, p_r, p_q, o_d, o_row, m_d, rows, douts, along_rows, deltas, lses, dqs,
            D, COUNT, TILE, QUERIES, CHAINED, p_like,
        )  # fmt: skip
        if AFFINE:
            b_dweight += b_dx * (t * b_first)

    p_row = p_partial + tl.program_id(0) * (QUERIES + AFFINE) * D + o_d
    for l in tl.static_range(QUERIES):
        tl.store(p_row + l * D, dqs[l], mask=m_d)
    if AFFINE:
        tl.store(p_row + QUERIES * D, b_dweight, mask=m_d)


def norm_fits(source: Tensor, n: int, num_queries: int, backward: bool) -> bool:
    """Whether the first read can come with its norm."""
    return rows_fit(source, n, num_queries) or (not backward and few_tokens(source.numel() // source.shape[-1]))


def rows_fit(source: Tensor, n: int, num_queries: int) -> bool:
    """Whether the kernels here are for so many sources, queries and elements."""
    block, warps = row_shape("inter_block_backward", source.shape[-1])
    return num_queries <= MAX_QUERIES and n <= MAX_SOURCES and block <= MAX_ELEMENTS * 32 * warps


def inter_block(
    queries: Tensor,
    key_norms: Tensor,
    sources: list[Tensor],
    weight: Tensor | None,
    eps: float,
    norm_eps: float | None,
    scale: float,
    mix: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(S reads [..., D], lse [S, ...], logits [..., n, S], rstd [..., n + 1]). norm_eps: a norm follows the first read,
    which is returned with its scale and norm. mix False, for one source: of the reads, which are the source, only the
    one with a norm is returned."""
    sources = [dense(source) for source in sources]
    outs, lse, logits, rstd = _inter_block_outputs(queries, sources, norm_eps, mix)
    n, num_queries = len(sources), queries.shape[0]
    num_tokens = rstd.numel() // (n + 1)
    if num_tokens == 0:
        return outs, lse, logits, rstd
    q = fold(queries, key_norms)
    few = few_tokens(num_tokens)
    if not (few or rows_fit(sources[0], n, num_queries)):
        assert norm_eps is None, "the first read comes with its norm only from the kernel here"
        wide_reads(q, sources, eps, outs, lse, logits, rstd)
        return outs, lse, logits, rstd
    config = row_config("inter_block_forward", sources[0], num_tokens, n)
    group = even_share(num_queries, 2) if few else num_queries
    num_groups = triton.cdiv(num_queries, group)
    groups_per_program = 1 if few else num_groups
    p_sources = rows(sources, config.TILE)
    p_outs = rows(outs or sources[:1], group if mix else 1)
    launch(
        inter_block_forward,
        (num_tokens, triton.cdiv(num_groups, groups_per_program)),
        p_sources.pointers,
        p_outs.pointers,
        q,
        None if weight is None else dense(weight),
        logits,
        rstd,
        lse,
        n,
        num_queries,
        num_tokens,
        groups_per_program,
        scale,
        eps,
        norm_eps or 0.0,
        D=sources[0].shape[-1],
        BLOCK=config.BLOCK,
        LANES=config.LANES,
        VECTOR=config.VECTOR,
        COUNT=p_sources.COUNT,
        TILE=config.TILE,
        OUTS=p_outs.COUNT,
        GROUP=group,
        MIX=mix,
        NORM=norm_eps is not None,
        AFFINE=weight is not None,
        p_like=sources[0],
        num_warps=config.num_warps,
        device=sources[0].device,
    )
    return outs, lse, logits, rstd


def _inter_block_outputs(
    queries: Tensor, sources: list[Tensor], norm_eps: float | None, mix: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    n, num_queries, first = len(sources), queries.shape[0], sources[0]
    leading = first.shape[:-1]
    outs = [first.new_empty(first.shape) for _ in range(num_queries if mix else norm_eps is not None)]
    lse = first.new_empty((num_queries, *leading), dtype=torch.float32)
    return outs, lse, lse.new_empty((*leading, n, num_queries)), lse.new_empty((*leading, n + 1))


inter_block_op = torch.library.custom_op("attnres::inter_block", inter_block, mutates_args=())


@inter_block_op.register_fake
def _(queries, key_norms, sources, weight, eps, norm_eps, scale, mix):  # type: ignore[no-untyped-def]
    return _inter_block_outputs(queries, sources, norm_eps, mix)


def inter_block_gradients(
    queries: Tensor,
    key_norms: Tensor,
    sources: list[Tensor],
    weight: Tensor | None,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
    douts: list[Tensor],
    dlse: Tensor,
    later: list[Tensor],
    norm_eps: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(dqueries, dkey_norms, dsources, dweight or empty). later: what is added to dsources, or nothing."""
    sources, later, douts = ([dense(t) for t in tensors] for tensors in (sources, later, douts))
    queries, key_norms, weight = dense(queries), dense(key_norms), None if weight is None else dense(weight)
    dsources = [torch.empty_like(source) for source in sources]
    n, num_queries, width = len(sources), *queries.shape
    num_tokens = rstd.numel() // (n + 1)
    if num_tokens == 0:
        return torch.zeros_like(queries), torch.zeros_like(key_norms), dsources, _empty_like(queries, weight).zero_()
    q = fold(queries, key_norms)
    if not rows_fit(sources[0], n, num_queries):
        assert norm_eps is None, "the first read comes with its norm only from the kernel here"
        along_query = wide_coefficients(q, sources, lse, logits, rstd, douts, dense(dlse), later, dsources)
        partial = query_partials(sources, along_query, num_queries)
    else:
        config = row_config("inter_block_backward", sources[0], num_tokens, n)
        partial = lse.new_empty((config.programs, num_queries + (weight is not None), width))
        p_sources, p_douts = rows(sources, n), rows(douts, num_queries)
        launch(
            inter_block_backward,
            (config.programs,),
            p_sources.pointers,
            rows(later, n).pointers if later else None,
            rows(dsources, n).pointers,
            p_douts.pointers,
            q,
            weight,
            logits,
            rstd,
            lse,
            dense(dlse),
            partial,
            num_tokens,
            scale,
            D=width,
            BLOCK=config.BLOCK,
            LANES=config.LANES,
            VECTOR=config.VECTOR,
            COUNT=p_sources.COUNT,
            TILE=n,
            OUTS=p_douts.COUNT,
            QUERIES=num_queries,
            NORM=norm_eps is not None,
            AFFINE=weight is not None,
            CHAINED=len(later) > 0,
            STAGES=config.STAGES,
            p_like=sources[0],
            num_warps=config.num_warps,
            device=sources[0].device,
        )
    dqueries, dkey_norms, dweight = sum_partials(partial, queries, key_norms, weight)
    return dqueries, dkey_norms, dsources, dweight


inter_block_gradients_op = torch.library.custom_op(
    "attnres::inter_block_backward", inter_block_gradients, mutates_args=()
)


@inter_block_gradients_op.register_fake
def _(queries, key_norms, sources, weight, lse, logits, rstd, douts, dlse, later, norm_eps, scale):  # type: ignore[no-untyped-def]
    return (
        queries.new_empty(queries.shape),
        key_norms.new_empty(key_norms.shape),
        [source.new_empty(source.shape) for source in sources],
        _empty_like(queries, weight),
    )


def _empty_like(queries: Tensor, weight: Tensor | None) -> Tensor:
    return queries.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
