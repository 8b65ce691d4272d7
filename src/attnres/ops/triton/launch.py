"""How the Triton kernels are launched: what they support, their static configurations, and lists of tensors.

Configurations depend on shapes alone. Nothing is tuned at run time and nothing synchronises, so that a launch can be
captured in a CUDA graph and runs the same way every time. What programs of whole rows take stands in `table`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .lists import pack_addresses
from .table import FEW_TOKENS, line

MAX_WIDTH = 8192
MAX_SOURCES = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

INTERPRETED = not isinstance(pack_addresses, triton.runtime.jit.JITFunction)
"""Whether TRITON_INTERPRET=1 was set at import: kernels then run on CPU tensors, slowly."""

_MAX_ARGUMENTS = 16
_PACK = 32


def unsupported(tensor: Tensor, num_sources: int) -> str | None:
    """Why the kernels do not take so many sources like `tensor`; None where they do."""
    if tensor.dtype not in DTYPES:
        return f"the Triton backend takes bfloat16, float16 and float32 sources; these are {tensor.dtype}"
    if not (tensor.is_cuda or INTERPRETED):
        return f"the Triton backend takes sources on a CUDA device; these are on {tensor.device}"
    if tensor.shape[-1] > MAX_WIDTH:
        return f"the Triton backend takes a width of at most {MAX_WIDTH}; sources have {tensor.shape[-1]}"
    if num_sources > MAX_SOURCES:
        return f"the Triton backend takes at most {MAX_SOURCES} sources; there are {num_sources}"
    return None


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, device: torch.device, **constants: Any
) -> None:
    """Launches on `device`. Multiply-adds are fused whatever Triton's default is."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=True, **constants)


class RowConfig(NamedTuple):
    """A program that holds whole rows in registers: the width padded to a power of two, threads that share a row and
    how many neighbours each loads at once, sources in registers at once, warps, how many programs share a device when
    each loops over tokens, and stages of that loop."""

    BLOCK: int
    LANES: int
    VECTOR: int
    TILE: int
    num_warps: int
    programs: int
    STAGES: int


def row_config(kernel: str, like: Tensor, num_tokens: int, n: int = 1) -> RowConfig:
    """like: a tensor of rows; n: sources, which are taken in equal tiles."""
    block, warps = row_shape(kernel, like.shape[-1])
    _, most, programs, stages = line(kernel, block)
    if few_tokens(num_tokens):  # more threads a row where rows cannot fill the device
        warps = max(warps, block // 512)
    vector = 16 // like.element_size()
    lanes = min(32 * warps, block // vector)
    tile = n if n <= most else even_share(n, min(most, 4))
    programs = max(1, min(num_tokens, multiprocessors(like.device) * programs))
    return RowConfig(block, lanes, vector, tile, warps, programs, stages)


def row_shape(kernel: str, width: int) -> tuple[int, int]:
    """(the width padded to a power of two, warps); plain arithmetic, which torch.compile may trace."""
    block = max(32, 1 << (width - 1).bit_length())
    return block, min(line(kernel, block).warps, max(1, block // 64))


class ChunkConfig(NamedTuple):
    """A phase-1 program: chunk of the width, one lane a thread, warps, the most registers a thread may have; sources
    and queries taken at a time."""

    BLOCK: int
    LANES: int
    num_warps: int
    maxnreg: int
    TILE: int
    GROUP: int


def chunk_config(like: Tensor, n: int, num_queries: int, *, backward: bool) -> ChunkConfig:
    """like: a tensor of rows. Measured on an H100 at D = 2048 and 7168."""
    width = like.shape[-1]
    warps = 1 if width <= 1024 else (4 if backward else 2) if width <= 4096 else (8 if backward else 4)
    lanes = 32 * warps
    tile, group = even_share(n, 4), even_share(num_queries, 4)
    return ChunkConfig(lanes * (16 // like.element_size()), lanes, warps, min(128, 65536 // lanes), tile, group)


def few_tokens(num_tokens: int) -> bool:
    return num_tokens <= FEW_TOKENS


def even_share(count: int, limit: int) -> int:
    """The size of equal groups of at most `limit`."""
    return triton.cdiv(count, triton.cdiv(count, limit))


@cache
def multiprocessors(device: torch.device) -> int:
    # three programs in the interpreter, so that partial sums over programs are exercised
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class TensorList(NamedTuple):
    """A list of tensors as kernels take it (`lists.row_pointer`)."""

    pointers: tuple[Tensor, ...] | Tensor
    COUNT: int


def tensor_list(tensors: Sequence[Tensor], tile: int) -> TensorList:
    """A tuple, filled up to whole tiles with the last tensor, or a table of addresses for more than 16 tensors."""
    padded = tuple(tensors) + (tensors[-1],) * (-len(tensors) % tile)
    if len(padded) <= _MAX_ARGUMENTS:
        return TensorList(padded, len(padded))
    padded += (padded[-1],) * (-len(padded) % _PACK)
    table = torch.empty(len(padded), dtype=torch.int64, device=padded[0].device)
    for first in range(0, len(padded), _PACK):
        launch(
            pack_addresses,
            (1,),
            padded[first : first + _PACK],
            table,
            first,
            COUNT=_PACK,
            num_warps=1,
            device=table.device,
        )
    return TensorList(table, 0)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, as a table of addresses promises."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def dense_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else dense(tensor)
