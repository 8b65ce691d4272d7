"""What a chunk is planned to keep against what autograd saves in a real one."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from attnres import ops
from attnres.model import DecoderConfig
from attnres.model.layers.experts import MixtureOfExperts
from attnres.ops import dispatch
from attnres.parallel import experts as expert_parallel
from attnres.parallel import mesh as meshes
from attnres.parallel import pipeline
from attnres.parallel import tensor as tensor_parallel
from attnres.parallel.config import ParallelConfig
from attnres.parallel.part import ModelPart
from attnres.parallel.pipeline import Layout
from attnres.plan.kept import footprints

from ..ops.native import require_native
from .plans import BF16, FP32, shape


def bytes_kept(config: DecoderConfig, cuts: list[int], index: int, precision: torch.dtype) -> int:
    """What one chunk keeps of a micro-batch of 2 x 8 tokens: every piece of memory that autograd saved."""
    layout = Layout(config, ParallelConfig(pp=len(cuts) - 1), (2, 8, 16), precision, cuts)
    (part,) = pipeline.chunks(config, layout, index, 8)
    return saved_by(part.to_empty(device="cpu"), precision, 8)


def saved_by(part: ModelPart, precision: torch.dtype, tokens: int) -> int:
    """tokens: of 8 a sequence, those that this process has between layers."""
    part.precision, part.residual.lean = precision, True
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for module in part.modules():
        if isinstance(module, MixtureOfExperts):
            module.correction_bias.zero_()
            module.exchange = module.exchange or (lambda run: run)  # what GPUs run, and the plan counts
    inputs = [torch.zeros(2, 8, dtype=torch.int64)]
    if not part.is_first:
        assert part.before is not None
        inputs = [torch.randn(2, tokens, 16).to(like.dtype).requires_grad_() for like in part.before.like]
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        saved[local.untyped_storage().data_ptr()] = local
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = part(*inputs)
        if part.is_last:
            F.cross_entropy(outputs.flatten(0, 1).float(), torch.zeros(16, dtype=torch.int64))
    if part.is_last:
        keep(outputs)
    state = [*part.parameters(), *(() if part.is_first else inputs), *(() if part.is_last else outputs)]
    for tensor in state:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        saved.pop(local.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.fixture
def kernels(interpreted):
    ops.set_backend("triton")
    yield
    ops.set_backend("auto")


MECHANISMS = [
    ("block_attnres", {"block_size": 5}),
    ("block_attnres", {"block_size": 4, "reads": "transformer_block"}),
    ("block_attnres", {"block_size": 4, "reads": "mlp"}),
    ("block_attnres", {"block_size": 4, "reads": "block"}),
    ("full_attnres", {}),
    ("prenorm", {}),
]


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("residual", "options"), MECHANISMS)
def test_activations_are_what_the_kernels_keep(kernels, residual, options, precision):
    config, cuts = shape(residual, layers=8, residual_options=options), [0, 3, 6, 8]
    measured = [bytes_kept(config, cuts, index, precision) for index in range(3)]
    assert [size.kept for size in footprints(config, cuts, (2, 8, 16), precision)] == measured


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
def test_experts_keep_their_rows_and_autocast_copies_of_all_of_them(kernels, precision):
    config, cuts = shape("prenorm", layers=8, **MIXTURE), [0, 3, 6, 8]
    offsets = 4 * 4 * (precision == BF16)  # of the grouped product in bfloat16
    for index, size in enumerate(footprints(config, cuts, (2, 8, 16), precision)):
        mixtures = [0, 2, 1][index]
        assert bytes_kept(config, cuts, index, precision) == size.kept + mixtures * offsets


def kept_under_ep(config: DecoderConfig) -> int:
    """What this process keeps of the second of three chunks, whose experts two processes share."""
    cpu, parallel = torch.device("cpu"), ParallelConfig(shard=2, ep=2)
    layout = Layout(config, ParallelConfig(pp=3), (2, 8, 16), FP32, [0, 3, 6, 8])
    (part,) = pipeline.chunks(config, layout, 1, 8)
    mesh = meshes.of_experts(parallel, meshes.build(parallel, cpu))
    assert mesh is not None
    expert_parallel.apply(part, mesh)
    ops.set_backend("triton")
    torch.manual_seed(0)  # the same tokens and routing in both
    try:
        return saved_by(part.to_empty(device="cpu"), FP32, 8)
    finally:
        ops.set_backend("auto")


def test_processes_that_share_experts_keep_the_rows_that_come(kernels, world):
    config = shape("prenorm", layers=8, **MIXTURE)
    _, size, _ = footprints(config, [0, 3, 6, 8], (2, 8, 16), FP32, ep=2)
    one, other = world(2).run(kept_under_ep, config)
    assert one + other == 2 * size.kept and one != other  # all tokens of both are routed, to either


def kept_under_tp(config: DecoderConfig, index: int) -> int:
    """What this process keeps of one of three chunks."""
    cpu, parallel = torch.device("cpu"), ParallelConfig(tp=2)
    layout = Layout(config, ParallelConfig(pp=3), (2, 4, 16), FP32, [0, 3, 6, 8])
    (part,) = pipeline.chunks(config, layout, index, 8)
    tensor_parallel.apply(part, meshes.build(parallel, cpu)["tp"])
    ops.set_backend("triton")
    try:
        return saved_by(part.to_empty(device="cpu"), FP32, 4)
    finally:
        ops.set_backend("auto")


@pytest.mark.parametrize(("residual", "options"), MECHANISMS)
def test_tensor_parallel_processes_keep_their_share(kernels, world, residual, options):
    config = shape(residual, layers=8, residual_options=options)
    _, middle, last = footprints(config, [0, 3, 6, 8], (2, 4, 16), FP32, tp=2)
    assert world(2).run(kept_under_tp, config, 1) == [middle.kept] * 2
    assert world(2).run(kept_under_tp, config, 2) == [last.kept] * 2


@pytest.mark.parametrize(("residual", "options"), MECHANISMS)
@pytest.mark.parametrize(("backend", "least", "most"), [("eager", 1, 1.5), ("native", 0.99, 1)])
def test_the_eager_backend_keeps_at_most_half_more_and_the_native_one_no_more(
    backend, least, most, residual, options, monkeypatch
):
    """A native read keeps a number a token less than planned."""
    if backend == "native":
        require_native()
    config, cuts = shape(residual, layers=8, residual_options=options, intermediate_size=48), [0, 3, 6, 8]
    sizes = footprints(config, cuts, (2, 8, 16), FP32)
    monkeypatch.setattr(dispatch, "_choice", backend)
    for index, size in enumerate(sizes):
        assert least * size.kept <= bytes_kept(config, cuts, index, FP32) <= most * size.kept


def test_checkpointing_keeps_a_tensor_a_transformer_block_and_computes_one_at_a_time():
    config, unit = shape("prenorm", layers=10), 2 * 8 * 16 * 4
    rotary, ids = 2 * 8 * 4 * 4, 2 * 8 * 8  # cos and sin; token ids
    blocks = footprints(config, [0, 2, 4, 6, 8, 10], (2, 8, 16), FP32)
    first, middle, _ = footprints(config, [0, 4, 8, 10], (2, 8, 16), FP32, checkpointing=True)
    assert first.kept == 2 * unit + rotary + ids  # the embedding and one more
    assert middle.kept == unit + rotary  # what it received is not its own
    assert first.working == middle.working == blocks[2].kept
