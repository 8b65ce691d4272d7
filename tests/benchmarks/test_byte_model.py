"""The byte model against numbers that were published or counted, not against its own formulas. What it says of this
library's kernels is counted in test_traffic.py."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# passes per layer, forward and backward
PASSES = {
    (2048, 32, 8): {
        "standard residual, add + norm fused": (4, 4),
        "standard residual, add, then norm": (5, 6),
        "fused read (flash-linear-attention, Triton)": (7.2, 26.5),
        "fused read (flash-linear-attention, Gluon)": (7.2, 18.5),
        "two-phase, recomputed (flash-attn-res)": (9.1, 32.3),
        "least possible": (4.25, 4.6),
    },
    (2304, 54, 6): {
        "fused read (flash-linear-attention, Triton)": (9.5, 38.7),
        "two-phase, recomputed (flash-attn-res)": (9.4, 34.0),
        "least possible": (4.7, 5.6),
    },
    (7168, 186, 24): {
        "fused read (flash-linear-attention, Triton)": (9.3, 35.9),
        "two-phase, recomputed (flash-attn-res)": (9.1, 32.4),
        "least possible": (4.2, 4.4),
    },
}


@pytest.mark.parametrize("shape", PASSES)
def test_passes_per_layer(benchmarks: Path, shape: tuple[int, int, int]) -> None:
    import byte_model

    width, layers, size = shape
    for design, expected in PASSES[shape].items():
        passes = byte_model.DESIGNS[design](width, layers, size)
        assert [p / layers for p in passes] == pytest.approx(expected, abs=0.06), design


def test_bytes_and_shares_of_a_step(benchmarks: Path) -> None:
    import byte_model

    rows = dict(line[2:].split(" | ", 1) for line in byte_model.table(2048, 32, 8).splitlines()[4:])
    assert rows["standard residual, add + norm fused"] == "4.0 + 4.0 | 268 + 268 | 17.2 | 5.7 | 2.3 % |"
    assert rows["**two-phase fused, chained**"] == "6.2 + 8.3 | 413 + 557 | 31.0 | 10.3 | 4.2 % |"
    assert rows["least possible"].endswith("| 19.0 | 6.3 | 2.6 % |")


def test_published_times_of_flash_attn_res(benchmarks: Path) -> None:
    """Its authors report 35.8 ms forward and 149.3 ms backward on an A100 for T=65536, D=2048, L=32, S=8, layers left
    out. 1.75 TB/s is what an A100's copies reach."""
    import byte_model

    moved = byte_model.two_phase_recomputed(32, 8, norms=False).bytes(65536, 2048)
    assert [b / 1.75e12 * 1e3 for b in moved] == pytest.approx((35.8, 149.3), rel=0.11)


@pytest.mark.parametrize(("layers", "size"), [(32, 8), (10, 4), (5, 1), (6, 6)])
def test_autograd_sums_as_often_as_the_model_says(benchmarks: Path, layers: int, size: int) -> None:
    import byte_model

    class Read(torch.autograd.Function):
        """A fused read: one gradient a source and no sums of its own."""

        @staticmethod
        def forward(ctx, *sources):
            ctx.count = len(sources)
            return sources[0].clone()

        @staticmethod
        def backward(ctx, gradient):
            return tuple(gradient.clone() for _ in range(ctx.count))

    class Sums(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten.add.Tensor
            return function(*args, **(kwargs or {}))

    embedding = torch.randn(2, requires_grad=True)
    blocks, start = [embedding], 0
    while start < layers:
        partial = None
        for _ in range(min(size, layers - start)):
            output = Read.apply(*blocks, *([] if partial is None else [partial])).sin()
            partial = output if partial is None else partial + output
        blocks.append(partial)
        start += size
    with Sums() as sums:
        Read.apply(*blocks).sum().backward()

    def fused(m: int) -> byte_model.Passes:
        return byte_model.Passes(0, 0)

    assert byte_model.layer_by_layer(layers, size, fused).backward == 3 * sums.count


def test_designs_are_ordered(benchmarks: Path) -> None:
    import byte_model

    for width, layers, size in byte_model.SHAPES:
        totals = {name: design(width, layers, size).total for name, design in byte_model.DESIGNS.items()}
        full_two_phase, full = (
            totals.pop("Full AttnRes in two phases"),
            totals.pop("Full AttnRes, fused read, chained"),
        )
        *others, unchained, chained, least = totals.values()
        assert all(a < b for a, b in itertools.pairwise([least, chained, unchained, min(others[2:])]))
        assert chained < full_two_phase < full


@pytest.mark.parametrize(("layers", "most"), [(16, 23.2), (24, 28.2), (32, 32.0), (48, 37.0), (64, 42.1), (128, 57.8)])
def test_passes_of_full_attnres_in_two_phases(benchmarks: Path, layers: int, most: float) -> None:
    import byte_model

    found = byte_model.full_two_phase_rows(layers).total
    assert found / layers <= most
    sizes = range(2, 20)
    assert found <= 1.02 * min(byte_model.full_two_phase_rows(layers, size=size).total for size in sizes)


def test_the_page_shows_what_the_model_says(benchmarks: Path) -> None:
    import byte_model

    page = (benchmarks.parent / "docs" / "performance.md").read_text()
    assert byte_model.table(*byte_model.SHAPES[0]) in page
