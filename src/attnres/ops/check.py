"""What every depth-attention op asks of its arguments: one sentence each, before any work starts."""

from collections.abc import Sequence

from torch import Tensor


def check_sources(sources: Sequence[Tensor], name: str = "sources") -> None:
    """Raises ValueError unless there is a source and all agree in shape, floating dtype and device."""
    if isinstance(sources, Tensor):
        raise ValueError(f"{name} must be a sequence of tensors, not one tensor; pass list(tensor) or [tensor]")
    if len(sources) == 0:
        raise ValueError(f"{name} is empty; a read needs at least one source, the embedding")
    first = sources[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if first.dim() == 0 or not first.is_floating_point():
        raise ValueError(f"{name} must be floating-point tensors of shape [..., dim]; {name}[0] is {_say(first)}")
    for i, source in enumerate(sources):
        if source.shape != shape or source.dtype != dtype or source.device != device:
            raise ValueError(
                f"{name} must share one shape, dtype and device; {name}[0] is {_say(first)} "
                f"but {name}[{i}] is {_say(source)}"
            )


def check_vectors(dim: int, device: object, leading: tuple[int, ...] = (), **vectors: Tensor) -> None:
    """Raises ValueError unless every named tensor has shape (*leading, dim) and lives on `device`."""
    for name, vector in vectors.items():
        if tuple(vector.shape) != (*leading, dim) or vector.device != device:
            expected = "x".join(map(str, (*leading, dim)))
            raise ValueError(
                f"{name} must have shape {expected} and be on {device}, as the sources are; it is {_say(vector)}"
            )


def check_queries(queries: Tensor, key_norms: Tensor, dim: int, device: object) -> None:
    """Raises ValueError unless queries and key_norms are both [S, dim] with S >= 1, on `device`."""
    if queries.dim() != 2 or queries.shape[0] == 0:
        raise ValueError(f"queries must have shape [num_queries, dim] with at least one query; it is {_say(queries)}")
    check_vectors(dim, device, (queries.shape[0],), queries=queries, key_norms=key_norms)


def check_read(
    query: Tensor, sources: Sequence[Tensor], key_norm: Tensor | None, norm: tuple[Tensor | None, float] | None = None
) -> None:
    """Raises ValueError unless one read can be made of these; key_norm None: the query has been folded."""
    check_sources(sources)
    first = sources[0]
    width, shape = first.shape[-1], tuple(query.shape)
    part = shape == (min(query.numel(), width),) or (len(shape) == 2 and shape[0] * shape[1] == width)
    alone = shape != (width,) and key_norm is not None and tuple(key_norm.shape) == (width,)
    if not part or alone or query.numel() == 0:
        raise ValueError(
            f"query must have shape {width}, as the sources are wide, or with a key_norm like it [r], r below {width}, "
            f"or [heads, {width} / heads]; it is {_say(query)}"
        )
    *leading, size = shape
    check_vectors(size, first.device, (*leading,), query=query, key_norm=query if key_norm is None else key_norm)
    check_norm(norm, first)


def check_statistics(lse: Tensor, out: Tensor) -> None:
    """Raises ValueError unless lse has one entry per token of out, on the same device."""
    if lse.shape != out.shape[:-1] or lse.device != out.device:
        raise ValueError(f"lse must have shape {list(out.shape[:-1])}, that of out without its last; it is {_say(lse)}")


def check_weights(weights: Tensor, sources: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is a weight for each source, or for each source and token, on their device."""
    first = sources[0]
    shapes = ((len(sources),), (len(sources), *first.shape[:-1]))
    if tuple(weights.shape) not in shapes or weights.device != first.device:
        raise ValueError(
            f"weights must have shape {list(shapes[0])} or {list(shapes[1])} and be on {first.device}, as the sources "
            f"are; they are {_say(weights)}"
        )


def check_norm(norm: tuple[Tensor | None, float] | None, source: Tensor) -> None:
    """Raises ValueError unless the weight of the norm that follows, if there is one, has the width of `source`."""
    if norm is not None and norm[0] is not None:
        check_vectors(source.shape[-1], source.device, norm_weight=norm[0])


def check_scale(eps: float, scale: float = 1.0) -> None:
    """Raises ValueError for a negative eps or a scale that is not positive."""
    if not eps >= 0:
        raise ValueError(f"eps must be zero or positive; it is {eps}")
    if not scale > 0:
        raise ValueError(f"scale must be positive; it is {scale}")


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}".removeprefix("torch.")
