"""What the depth-attention kernels share: lists of tensors inside one kernel, and several sums with one barrier.

A short list of tensors travels as a tuple of kernel arguments, so that nothing is stacked and nothing is copied to the
device. A long one travels as a table of addresses on the device, written by a kernel: a copy from host memory would
synchronise or, in a captured graph, be replayed from memory that has changed.
"""

# Triton compiles tuple concatenation but not unpacking, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl


@triton.jit
def num_tiles(n, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Tiles of TILE rows that cover the n tensors of a list."""
    if COUNT == TILE:
        return 1
    else:
        return (n + TILE - 1) // TILE


@triton.jit
def row_pointer(p_rows, tile, j: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, p_like):
    """Pointer to tensor tile * TILE + j of a list, which is filled up to whole tiles with its last tensor.

    COUNT > 0: `p_rows` is a tuple of COUNT pointers. COUNT == 0: it is a table of addresses, of the type of p_like.
    The tensors are aligned to 16 bytes.
    """
    if COUNT == 0:
        p_row = tl.load(p_rows + tile * TILE + j).to(p_like.dtype)
    else:
        p_row = p_rows[j]
        for k in tl.static_range(1, COUNT // TILE):
            p_row = tl.where(tile == k, p_rows[k * TILE + j], p_row)
    return tl.multiple_of(p_row, 16)


@triton.jit
def load_rows(p_rows, tile, o_row, m_row, COUNT: tl.constexpr, TILE: tl.constexpr, p_like):
    """The rows of one tile in their own dtype: a tuple of TILE tensors [BLOCK]. Past the end of the list the last row
    comes again, from cache, so that no load needs a mask of its own; who uses the tile leaves it out."""
    rows = ()
    for j in tl.static_range(TILE):
        p_row = row_pointer(p_rows, tile, j, COUNT, TILE, p_like)
        rows = rows + (tl.load(p_row + o_row, mask=m_row, other=0.0),)
    return rows


@triton.jit
def per_lane(b_x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Adds up what one thread holds of a row, VECTOR neighbours at a time: [BLOCK] -> [LANES]."""
    b_x = tl.reshape(b_x, [b_x.shape[0] // (LANES * VECTOR), LANES, VECTOR])
    return tl.sum(tl.sum(b_x, 2), 0)


@triton.jit
def dots(rows, b_other, COUNT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """What each thread adds to <row, other> for COUNT rows: a tuple of tensors [LANES], for `sums`."""
    parts = ()
    for j in tl.static_range(COUNT):
        parts = parts + (per_lane(rows[j].to(tl.float32) * b_other, LANES, VECTOR),)
    return parts


@triton.jit
def squares(rows, COUNT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """What each thread adds to <row, row>, as `dots` does."""
    parts = ()
    for j in tl.static_range(COUNT):
        b_row = rows[j].to(tl.float32)
        parts = parts + (per_lane(b_row * b_row, LANES, VECTOR),)
    return parts


@triton.jit
def store_gradient(
    b_dv, p_later, p_dsources, tile, j: tl.constexpr, o_row, m_row,
    COUNT: tl.constexpr, TILE: tl.constexpr, CHAINED: tl.constexpr, p_like,
):  # fmt: skip
    """Writes a source's gradient, with CHAINED on top of what later readers left."""
    if CHAINED:
        p_row = row_pointer(p_later, tile, j, COUNT, TILE, p_like)
        b_dv += tl.load(p_row + o_row, mask=m_row, other=0.0).to(tl.float32)
    p_row = row_pointer(p_dsources, tile, j, COUNT, TILE, p_like)
    tl.store(p_row + o_row, b_dv.to(p_like.dtype.element_ty), mask=m_row)


@triton.jit
def load_query(p_query, p_key_norm, o_d, m_d):
    """q = w * g in fp32."""
    b_query = tl.load(p_query + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_query * tl.load(p_key_norm + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def load_folded(p_q, query, num_queries, o_d, m_d, D: tl.constexpr):
    """q of one of several queries; past the end the last one comes again."""
    return tl.load(p_q + tl.minimum(query, num_queries - 1) * D + o_d, mask=m_d, other=0.0)


@triton.constexpr_function
def log2_ceil(count):
    return (count - 1).bit_length()


@triton.jit
def join(parts, COUNT: tl.constexpr):
    """COUNT tensors side by side along new trailing axes of size 2, zeros up to a power of two. Moves no data."""
    DEPTH: tl.constexpr = log2_ceil(COUNT)
    for _ in tl.static_range(COUNT, 1 << DEPTH):
        parts = parts + (tl.zeros_like(parts[0]),)
    for d in tl.static_range(DEPTH):
        joined = ()
        for k in tl.static_range(1 << (DEPTH - 1 - d)):
            joined = joined + (tl.join(parts[2 * k], parts[2 * k + 1]),)
        parts = joined
    return parts[0]


@triton.jit
def joined_sums(joined, COUNT: tl.constexpr):
    """Sums over axis 0 of the COUNT tensors that `join` joined, a tuple of scalars, with the barriers of one sum."""
    DEPTH: tl.constexpr = log2_ceil(COUNT)
    totals = (tl.sum(joined, 0),)
    for d in tl.static_range(DEPTH):
        halves = ()
        for k in tl.static_range(1 << d):
            halves = halves + tl.split(totals[k])
        totals = halves
    return totals[:COUNT]


@triton.constexpr_function
def _whole(count):
    """How many of `count` tensors are summed together: all, or a power of two if filling up to the next costs much."""
    below, above = 1 << (count.bit_length() - 1), 1 << (count - 1).bit_length()
    return count if 4 * (above - count) <= count else below


@triton.jit
def sums(parts, COUNT: tl.constexpr):
    """Sums of COUNT tensors over axis 0: a tuple of scalars."""
    WHOLE: tl.constexpr = _whole(COUNT)
    totals = joined_sums(join(parts[:WHOLE], WHOLE), WHOLE)
    if WHOLE < COUNT:
        totals = totals + joined_sums(join(parts[WHOLE:], COUNT - WHOLE), COUNT - WHOLE)
    return totals


@triton.jit(do_not_specialize=["o_first"])
def pack_addresses(p_rows, p_table, o_first, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(p_table + o_first + k, p_rows[k].to(tl.int64))
