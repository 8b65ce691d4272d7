"""Calls into the library: tensors as addresses, and nothing that PyTorch would do for microseconds.

Rows are made contiguous, parameters come in the dtype of statistics, and shapes are compared once more: the C code
would read beyond a tensor's end. `Form` is what of a read is no tensor.
"""

import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import statistics_dtype
from .build import library

SHARE = 1 << 15
"""Elements of the rows from which a further thread pays."""

_PLAIN = {Tensor, torch.nn.Parameter}

_threads_lost = False
"""Whether OpenMP may wait for threads that this process, a fork, does not have."""
_had_threads = False


def _before_fork() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:
        _had_threads = True


def _after_fork() -> None:
    global _threads_lost
    _threads_lost = _threads_lost or _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


class Form(NamedTuple):
    """norm_eps None: no norm follows. phase_1: log-sum-exps are wanted, and copies of an only source are not. heads:
    slices of the width that are read alone, by a query each."""

    eps: float
    norm_eps: float | None = None
    scale: float = 1.0
    phase_1: bool = False
    heads: int = 1


class ReadResult(NamedTuple):
    """outs: S reads, None for what is a view of the only source; lse: [S, ...]; stats: what the backward pass needs,
    [..., logits S x n and n + 1 reciprocal roots], one of them a head; total: first source + addend."""

    outs: list[Tensor | None]
    lse: Tensor | None
    stats: Tensor | None
    total: Tensor | None


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: a subclass may have its data elsewhere or none at all."""
    return type(tensor) in _PLAIN


def rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with rows one after the other. Raises ValueError unless they agree."""
    first = tensors[0]
    shape, dtype = first.shape, first.dtype
    made = []
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            tensor = tensor.clone()  # a collective's result waits for its data here
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or type(tensor) not in _PLAIN:
            raise ValueError(
                f"the native backend takes plain CPU tensors of one shape and dtype; {dtype} {list(shape)} meets "
                f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        made.append(tensor if tensor.is_contiguous() else tensor.contiguous())
    return made


def numbers(tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
    """A parameter or statistic in `dtype`, that of statistics. Raises ValueError unless it has the shape."""
    if tensor is None:
        return None
    if tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"the native backend expects numbers {list(shape)} on the CPU; it got {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    if type(tensor) not in _PLAIN:
        tensor = tensor.clone()
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _sizes(form: Form, first: Tensor, query: Tensor) -> tuple[tuple[int, int, int], int]:
    """((rows, width, channels of a key), queries) of a read; queries are [D], [S, D], [heads, D / heads], or [r].

    Raises ValueError unless they fit the width."""
    width, keys = first.shape[-1] // form.heads, query.shape[-1]
    rows_of_queries = 1 if query.dim() == 1 else len(query)
    fits = keys == width if query.dim() > 1 else keys <= width
    if not fits or (form.heads > 1 and rows_of_queries != form.heads):
        raise ValueError(f"the native backend expects queries for width {width}; they are {list(query.shape)}")
    return (first.numel() // max(width, 1), width, keys), rows_of_queries // form.heads


def read(
    form: Form, query: Tensor, key_norm: Tensor | None, weight: Tensor | None, prior: Tensor | None,
    prior_lse: Tensor | None, addend: Tensor | None, sources: Sequence[Tensor], keep: bool,
) -> ReadResult:  # fmt: skip
    """S reads of the sources by queries [S, D] or [D]; `Function` in `autograd` says what the arguments are. keep: the
    backward pass will need statistics."""
    n = len(sources)
    given = rows([*sources, *(t for t in (prior, addend) if t is not None)])
    first = given[0]
    sizes, queries = _sizes(form, first, query)
    dtype, width, leading = statistics_dtype(first.dtype), first.shape[-1], first.shape[:-1]
    q, g = numbers(query, dtype, query.shape), numbers(key_norm, dtype, query.shape)
    w, earlier = numbers(weight, dtype, (width,)), numbers(prior_lse, dtype, leading)
    total = torch.empty_like(first) if addend is not None else None
    lse = first.new_empty((queries, *leading), dtype=dtype) if form.phase_1 else None
    heads = (form.heads,) if form.heads > 1 else ()
    stats = first.new_empty((*leading, *heads, n * (queries + 1) + 1), dtype=dtype) if keep else None
    outs: list[Tensor | None] = [torch.empty_like(first) for _ in range(queries)]
    if form.phase_1 and n == 1:
        outs = [out if i == 0 and form.norm_eps is not None else None for i, out in enumerate(outs)]
    table = [*given[: n + (prior is not None)], *outs]
    _run("depth_read", first, form, sizes, n, queries, q, g, w, earlier,
         given[-1] if total is not None else None, total, lse, stats, None, None, None, None, None, table)  # fmt: skip
    return ReadResult(outs, lse, stats, total)


class ReadGradients(NamedTuple):
    query: Tensor
    key_norm: Tensor | None
    weight: Tensor | None
    prior: Tensor | None
    prior_lse: Tensor | None
    sources: list[Tensor]


def read_backward(
    form: Form, query: Tensor, key_norm: Tensor | None, weight: Tensor | None, prior: Tensor | None,
    prior_lse: Tensor | None, sources: Sequence[Tensor], stats: Tensor, douts: Sequence[Tensor | None],
    dlse: Tensor | None, later: Sequence[Tensor | None],
) -> ReadGradients:  # fmt: skip
    """Gradients of what `read` made; `sources` with the addend in the first. later: what is added to theirs."""
    n = len(sources)
    given = rows([*sources, *([] if prior is None else [prior])])
    first = given[0]
    left = iter(rows([first, *(t for t in (*douts, *later) if t is not None)])[1:])
    gradients = [None if t is None else next(left) for t in (*douts, *later)]
    sizes, queries = _sizes(form, first, query)
    dtype, width = statistics_dtype(first.dtype), first.shape[-1]
    q, g = numbers(query, dtype, query.shape), numbers(key_norm, dtype, query.shape)
    w, earlier = numbers(weight, dtype, (width,)), numbers(prior_lse, dtype, first.shape[:-1])
    assert q is not None
    dq, dg = torch.empty_like(q), None if g is None else torch.empty_like(g)
    dw = None if w is None else torch.empty_like(w)
    dearlier = None if earlier is None else torch.empty_like(earlier)
    made = [torch.empty_like(first) for _ in given]
    _run("depth_read_backward", first, form, sizes, n, queries, q, g, w, earlier, None, None, None, stats,
         numbers(dlse, dtype, (queries, *first.shape[:-1])), dq, dg, dw, dearlier,
         [*given, *gradients, *made])  # fmt: skip
    return ReadGradients(dq, dg, dw, None if prior is None else made[-1], dearlier, made[:n])


def mix(weights: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """sum_i weights[i] * sources[i]; weights [n] or [n, ...]."""
    first, *others = rows(sources)
    made = torch.empty_like(first)
    sizes, w = _mix_sizes(first, weights, len(sources))
    _run("depth_mix", first, Form(0.0), sizes, len(sources), 1, w, *[None] * 12, [first, *others, made])
    return made


def mix_backward(
    weights: Tensor, sources: Sequence[Tensor], dh: Tensor, later: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """(gradient of the weights, of the sources). later: what is added to theirs."""
    first, *others = rows([*sources, dh, *(t for t in later if t is not None)])
    left, made = iter(others[len(sources) :]), [torch.empty_like(first) for _ in sources]
    sizes, w = _mix_sizes(first, weights, len(sources))
    dweights = torch.empty_like(w)
    _run("depth_mix_backward", first, Form(0.0), sizes, len(sources), 1, w, *[None] * 8, dweights, *[None] * 3,
         [first, *others[: len(sources)], *(None if t is None else next(left) for t in later), *made])  # fmt: skip
    return dweights, made


def _mix_sizes(first: Tensor, weights: Tensor, count: int) -> tuple[tuple[int, int, int], Tensor]:
    """((rows, width, weights that serve all rows, 0 where each has its own), the weights as C takes them)."""
    width = first.shape[-1]
    shape = (count,) if weights.dim() == 1 else (count, *first.shape[:-1])
    w = numbers(weights, statistics_dtype(first.dtype), shape)
    assert w is not None
    return (first.numel() // max(width, 1), width, count if weights.dim() == 1 else 0), w


def add_norm(
    stream: Tensor | None, update: Tensor, weight: Tensor | None, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(stream + update or update, its norm, what the backward pass needs)."""
    given = rows([update] if stream is None else [update, stream])
    first = given[0]
    width = first.shape[-1]
    total = None if stream is None else torch.empty_like(first)
    x = torch.empty_like(first)
    stats = first.new_empty(first.shape[:-1], dtype=statistics_dtype(first.dtype)) if keep else None
    w = numbers(weight, statistics_dtype(first.dtype), (width,))
    _run("depth_add", first, Form(0.0, eps), (first.numel() // max(width, 1), width, 0), 1, 0, None, None, w, None,
         given[-1] if total is not None else None, total, None, stats, None, None, None, None, None,
         [first, x])  # fmt: skip
    return first if total is None else total, x, stats


def add_norm_backward(
    total: Tensor, weight: Tensor | None, stats: Tensor, dx: Tensor, dtotal: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """(gradient of the sum and so of what was added, of the weight)."""
    first, *given = rows([total, dx] if dtotal is None else [total, dx, dtotal])
    width = first.shape[-1]
    w = numbers(weight, statistics_dtype(first.dtype), (width,))
    dw, made = None if w is None else torch.empty_like(w), torch.empty_like(first)
    sizes = (first.numel() // max(width, 1), width, 0)
    _run("depth_add_backward", first, Form(0.0, eps), sizes, 1, 0, None, None, w, None,
         None, None, None, stats, None, None, None, dw, None,
         [first, given[0], given[1] if len(given) > 1 else None, made])  # fmt: skip
    return made, dw


def _run(
    name: str, first: Tensor, form: Form, sizes: tuple[int, int, int], sources: int, queries: int, *tensors: Any
) -> None:
    """One call; `tensors` are the fields of `struct call` from `query` on, the table of rows last."""
    *fields, table = tensors
    tokens, width, keys = sizes
    threads = 1
    if not _threads_lost:
        threads = max(1, min(torch.get_num_threads(), tokens, tokens * width * (sources + queries) // SHARE))
    given = (*fields, *table)
    addresses = [0 if t is None else t.data_ptr() for t in given]
    missing = sum(t is None for t in given)  # count(None) would ask every tensor whether it equals None
    if tokens and width and addresses.count(0) > missing:
        raise ValueError("the native backend was given a tensor whose memory has been freed")
    call = struct.pack(
        f"8q3d{len(addresses)}q",
        tokens, width, keys, form.heads, sources, queries, threads, form.norm_eps is not None,
        form.eps, form.scale, form.norm_eps or 0.0, *addresses,
    )  # fmt: skip
    if getattr(library(first.dtype), name)(call):
        raise MemoryError(f"the native backend found no memory for sums of {queries + 1} x {width} numbers a thread")
