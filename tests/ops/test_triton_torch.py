"""The Triton backend as PyTorch sees it: layouts, bad input, custom ops, autograd, checkpoints, compilation.

Without a GPU the kernels run in Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from attnres import ops
from attnres.ops.reference import Reference
from attnres.ops.triton import merge
from attnres.ops.triton.backend import Triton
from attnres.ops.triton.inter_block import inter_block_op
from attnres.ops.triton.inter_block_backward import inter_block_gradients_op
from attnres.ops.triton.merge import merge_gradients_op, merge_op
from attnres.ops.triton.norm import add_norm_gradients_op, add_norm_op
from attnres.ops.triton.read import read_gradients_op, read_op

from ..device import DEVICE, needs_gpu

kernels, reference = Triton(), Reference()
WIDTH, EPS = 24, 1e-6
NORM_EPS = 1e-5


def randn(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_(requires_grad)


def leaves(n: int, *leading: int) -> dict[str, Tensor]:
    """Parameters of a block of three layers, and n sources."""
    made = {"queries": 0.3 * randn(3, WIDTH), "key_norms": 1 + 0.1 * randn(3, WIDTH, seed=1)}
    made["weight"] = randn(WIDTH, seed=2)
    made |= {f"source{i}": randn(*leading, WIDTH, seed=10 + i) for i in range(n)}
    return {name: t.detach().requires_grad_() for name, t in made.items()}


def block(backend, queries: Tensor, key_norms: Tensor, weight: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
    """A block of three layers, each of which doubles what it reads, and the read of the next layer."""
    norm = (weight, NORM_EPS)
    outs, lses, sources = backend.inter_block_chained(queries, sources, key_norms, EPS)
    partial, update = None, 2 * outs[0]
    for i in (1, 2):
        partial, x = backend.merge_norm(
            queries[i], partial, update, key_norms[i], outs[i], lses[i], EPS, scale=2.0, norm=norm
        )
        update = 2 * x
    total, x = backend.add_norm(partial, update, norm=norm)
    y, sources = backend.read_norm_chained(queries[0], [*sources, total], key_norms[0], EPS, scale=3.0, norm=norm)
    return x, y, *sources


def run(call, tensors: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = call(*tensors.values())
    loss = sum((output * randn(*output.shape, seed=5)).sum() for output in outputs)
    return [output.detach() for output in outputs], dict(
        zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True)
    )


def same(got, want, **tolerance) -> None:
    for ours, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


@pytest.fixture(scope="module")
def eager():
    """The block's outputs and gradients by the kernels, two sources of 2 x 2 tokens."""
    return run(lambda *t: block(kernels, *t), leaves(2, 2, 2))


@pytest.mark.parametrize("n", [1, 2])
def test_a_block_equals_the_reference(n):
    """With one source phase 1 hands that source out as every read."""
    got = run(lambda *t: block(kernels, *t), leaves(n, 2, 2))
    same(got, run(lambda *t: block(reference, *t), leaves(n, 2, 2)), rtol=1e-4, atol=1e-4)


def test_the_same_bits_every_run(eager):
    again = run(lambda *t: block(kernels, *t), leaves(2, 2, 2))
    same(again, eager, rtol=0, atol=0)


def test_compiles_without_graph_breaks(eager):
    compiled = torch.compile(lambda *t: block(kernels, *t), fullgraph=True, backend="aot_eager")
    same(run(compiled, leaves(2, 2, 2)), eager, rtol=0, atol=0)


def test_checkpointing(eager):
    same(
        run(lambda *t: checkpoint(lambda *u: block(kernels, *u), *t, use_reentrant=False), leaves(2, 2, 2)),
        eager,
        rtol=0,
        atol=0,
    )


def test_autocast_leaves_the_kernels_alone(eager):
    def call(*tensors):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return block(kernels, *tensors)

    same(run(call, leaves(2, 2, 2)), eager, rtol=0, atol=0)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Block(nn.Module):
    """`block` with its parameters."""

    def __init__(self, queries: Tensor, key_norms: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.queries, self.key_norms, self.weight = (
            nn.Parameter(t.detach().clone()) for t in (queries, key_norms, weight)
        )

    def forward(self, *sources: Tensor) -> tuple[Tensor, ...]:
        return block(kernels, self.queries, self.key_norms, self.weight, *sources)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sharded_parameters_used_twice_in_one_graph(one_process, checkpointed):
    """FSDP2: parameters are DTensors outside of the backend and gathered inside, here in two passes of one graph."""
    queries, key_norms, weight, *sources = leaves(2, 2).values()
    plain = Block(queries, key_norms, weight)
    sharded = fully_shard(Block(queries, key_norms, weight), reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())

    def gradients(module: nn.Module) -> list[Tensor]:
        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            return checkpoint(module, *inputs, use_reentrant=False) if checkpointed else module(*inputs)

        inputs = [t.detach().requires_grad_() for t in sources]
        x, y, *_ = call(*inputs)
        results = call(y, x)
        sum((r * randn(*r.shape, seed=5)).sum() for r in results).backward()
        full = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
        return [*full, *(t.grad for t in inputs)]

    for ours, theirs in zip(gradients(sharded), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


class Calls(TorchDispatchMode):
    """Counts calls by name."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def read_three_times(chained: bool) -> int:
    """Adds that autograd makes for two sources, each with three readers."""
    tensors = leaves(2, 2)
    sources = [tensors["source0"] * 1, tensors["source1"] * 1]
    results = []
    for i in range(3):
        query, key_norm = tensors["queries"].detach()[i], tensors["key_norms"].detach()[i]
        if chained:
            x, sources = kernels.read_norm_chained(query, sources, key_norm, EPS, scale=1.0, norm=None)
        else:
            x = kernels.read_norm(query, sources, key_norm, EPS, scale=1.0, norm=None)
        results.append(x)
    with Calls() as calls:
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    return calls.counts.get("add", 0)


def test_chaining_leaves_autograd_nothing_to_add():
    assert read_three_times(chained=False) == 4
    assert read_three_times(chained=True) == 0


def test_chained_blocks_leave_autograd_nothing_to_add(monkeypatch):
    merges = []
    gradients = merge.merge_gradients
    monkeypatch.setattr(merge, "merge_gradients", lambda *a: merges.append(a) or gradients(*a))
    tensors = leaves(2, 2)
    frozen = [t.detach() for t in list(tensors.values())[:3]]
    sources = [tensors["source0"] * 1, tensors["source1"] * 1]
    x, y, *_ = block(kernels, *frozen, *sources)
    with Calls() as calls:
        torch.autograd.backward([x, y], [torch.ones_like(x), torch.ones_like(y)])
    assert len(merges) == 2
    assert calls.counts.get("add", 0) == 0


def test_a_tensor_may_be_used_twice():
    def call(backend, query, key_norm, source):
        x = backend.read_norm(query, [source, source], key_norm, EPS, scale=1.0, norm=None)
        y = backend.read_norm(query, [x, source], key_norm, EPS, scale=1.0, norm=(query, NORM_EPS))
        partial, z = backend.merge_norm(query, x, x, key_norm, y, y.sum(-1), EPS, scale=1.0, norm=None)
        return x, y, partial, z

    tensors = {"query": randn(WIDTH), "key_norm": randn(WIDTH, seed=1), "source": randn(2, WIDTH)}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    got = run(lambda *t: call(kernels, *t), tensors)
    same(got, run(lambda *t: call(reference, *t), tensors), rtol=1e-4, atol=1e-4)


def test_a_tensor_may_be_used_twice_in_a_compiled_op():
    """torch.compile refuses, or before torch 2.13 loses gradients of, a Function's input that comes twice."""

    def call(query, key_norm, a, b):
        x, handed_on = kernels.read_norm_chained(query, [a, b, a], key_norm, EPS, scale=1.0, norm=None)
        queries, key_norms = torch.stack([query, key_norm]), torch.stack([key_norm, query])
        outs, lses, others = kernels.inter_block_chained(queries, [a, b, b], key_norms, EPS)
        total, y = kernels.merge_norm(query, a, a, key_norm, outs[0], lses[0], EPS, scale=1.0, norm=None)
        twice, z = kernels.add_norm(b, b, norm=(query, NORM_EPS))
        return x, *handed_on, *outs, *others, total, y, twice, z

    tensors = {
        "query": randn(WIDTH),
        "key_norm": randn(WIDTH, seed=1),
        "a": randn(2, WIDTH),
        "b": randn(2, WIDTH, seed=1),
    }
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    same(run(compiled, tensors), run(call, tensors), rtol=1e-5, atol=1e-5)  # sums in another order


def test_what_backward_keeps():
    """A read keeps its sources and 2n + 2 numbers a token; a merge three and no row but its inputs and the new sum."""
    tensors = leaves(2, 5)
    sources = [tensors["source0"], tensors["source1"]]
    query, key_norm, weight = tensors["queries"][0], tensors["key_norms"][0], tensors["weight"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = kernels.read_norm(query, sources, key_norm, EPS, scale=1.0, norm=(weight, NORM_EPS))
        read = {t.data_ptr(): t.numel() for t in kept}
        kept.clear()
        total, _ = kernels.merge_norm(
            query, sources[0], sources[1], key_norm, x, x.sum(-1).detach(), EPS, scale=1.0, norm=(weight, NORM_EPS)
        )
        merge = {t.data_ptr(): t.numel() for t in kept if t.shape != (5,)}
    parameters = {t.data_ptr() for t in (query, key_norm, weight)}
    new = [size for pointer, size in read.items() if pointer not in parameters | {s.data_ptr() for s in sources}]
    assert new == [6 * 5]
    rows = {total.data_ptr(), x.data_ptr()}
    assert rows <= merge.keys()
    assert sorted(size for pointer, size in merge.items() if pointer not in parameters | rows) == [15]


def operands(n: int) -> dict[str, object]:
    """Arguments of every custom op."""
    t = {name: value.detach() for name, value in leaves(n, 2).items()}
    sources = [t[f"source{i}"] for i in range(n)]
    query, key_norm, weight = t["queries"][0], t["key_norms"][0], t["weight"]
    lse, stats, kept = randn(2), randn(2, 3).abs(), randn(2, 2 * n + 2).abs()
    a, b = sources[0], sources[-1]
    lses, logits, rstd = randn(3, 2), randn(2, n, 3), randn(2, n + 1).abs()
    block, norm = (t["queries"], t["key_norms"], sources), (EPS, NORM_EPS, 2.0)
    first = (query, key_norm, None, a, b, lse, None, EPS, None, 2.0)
    return {
        "read": (read_op, (query, key_norm, sources, None, None, weight, *norm)),
        "read that goes on": (read_op, (query, key_norm, sources, a, lse, None, EPS, None, 1.0)),
        "read backward": (
            read_gradients_op,
            (query, key_norm, sources, a, lse, weight, kept, b, sources, NORM_EPS, 2.0),
        ),
        "inter_block": (inter_block_op, (*block, weight, *norm, True)),
        "inter_block without norm": (inter_block_op, (*block, None, EPS, None, 1.0, True)),
        "inter_block backward": (
            inter_block_gradients_op,
            (*block, weight, lses, logits, rstd, [a, b, a], randn(3, 2), [], NORM_EPS, 2.0),
        ),
        "merge": (merge_op, (query, key_norm, a, b, a, lse, weight, *norm)),
        "first merge": (merge_op, first),
        "merge backward": (
            merge_gradients_op,
            (query, key_norm, a, b, lse, weight, stats, a, b, NORM_EPS, 2.0),
        ),
        "add_norm": (add_norm_op, (a, b, weight, NORM_EPS)),
        "norm alone": (add_norm_op, (None, a, weight, NORM_EPS)),
        "add_norm backward": (add_norm_gradients_op, (a, None, randn(2), b, a)),
    }


@pytest.mark.parametrize("name", list(operands(1)))
def test_opcheck(name):
    op, arguments = operands(2)[name]
    torch.library.opcheck(op, arguments)


def every_function(backend, t: dict[str, Tensor], sources: list[Tensor]) -> tuple[Tensor, ...]:
    norm, first = (t["weight"], NORM_EPS), sources[0]
    outs, lses = backend.inter_block(t["queries"], sources, t["key_norms"], EPS)
    partial, x = backend.merge_norm(
        t["queries"][1], first, sources[-1], t["key_norms"][1], outs[1], lses[1], EPS, scale=2.0, norm=norm
    )
    total, y = backend.add_norm(partial, outs[0], norm=norm)
    h = backend.read_norm(t["queries"][0], sources, t["key_norms"][0], EPS)
    return *outs, *lses, partial, x, total, y, h


LAYOUTS = {
    "one row": lambda: [randn(WIDTH, seed=i) for i in range(2)],
    "three leading dimensions": lambda: [randn(1, 2, 1, WIDTH, seed=i) for i in range(2)],
    "transposed": lambda: [randn(2, 1, WIDTH, seed=i).transpose(0, 1) for i in range(2)],
    "every second element": lambda: [randn(2, 2 * WIDTH, seed=i)[:, ::2] for i in range(2)],
    "not on 16 bytes": lambda: [randn(2 * WIDTH + 1, seed=i)[1:].view(2, WIDTH) for i in range(2)],
    "expanded": lambda: [randn(1, WIDTH, seed=i).expand(2, WIDTH) for i in range(2)],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout):
    results = []
    for backend in (kernels, reference):
        t = leaves(0)
        sources = [s.detach().requires_grad_() for s in LAYOUTS[layout]()]
        outputs = every_function(backend, t, sources)
        # .sum() gives every output a gradient that is one number, expanded
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), [*t.values(), *sources])
        results.append((list(outputs), dict(enumerate(gradients))))
    same(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_tokens(leading):
    t = leaves(0)
    sources = [randn(*leading, WIDTH, requires_grad=True) for _ in range(2)]
    outputs = every_function(kernels, t, sources)
    assert all(output.numel() == 0 for output in outputs)
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), [*t.values(), *sources])
    assert all((gradient == 0).all() for gradient in gradients)


def test_parameters_keep_their_dtype():
    query, key_norm = randn(WIDTH).bfloat16().requires_grad_(), torch.ones(WIDTH, device=DEVICE, requires_grad=True)
    sources = [randn(2, WIDTH, seed=i).half().requires_grad_() for i in range(2)]
    h = kernels.read_norm(query, sources, key_norm, EPS)
    h.float().sum().backward()
    assert h.dtype == torch.float16
    assert (query.grad.dtype, key_norm.grad.dtype, sources[0].grad.dtype) == (torch.bfloat16, torch.float32, h.dtype)


A, B = randn(2, WIDTH), randn(2, WIDTH, seed=1)
Q, G = randn(WIDTH), torch.ones(WIDTH, device=DEVICE)
WIDE = torch.ones(8200, device=DEVICE)
BAD = {
    "sources is empty": lambda: ops.depth_attention(Q, [], G),
    r"sources\[1\]": lambda: ops.depth_attention(Q, [A, B[:1]], G),
    r"sources must share one shape, dtype": lambda: ops.inter_block(Q[None], [A, B.half()], G[None]),
    "at most 256 sources": lambda: ops.depth_attention(Q, [A] * 257, G),
    "width of at most 8192": lambda: ops.depth_attention(WIDE, [WIDE], WIDE),
    "query must have shape": lambda: ops.read_norm(Q[:-1], [A], G, EPS, scale=1.0, norm=None),
    "key_norms must have shape": lambda: ops.inter_block(Q[None], [A], G[None, 1:], EPS),
    "lse must have shape": lambda: ops.merge(Q, A, G, B, torch.zeros(3, device=DEVICE)),
    r"\(partial, update, out\)": lambda: ops.merge_norm(Q, A, B[:1], G, B, A.sum(-1), EPS, scale=1.0, norm=None),
    "norm_weight must have shape": lambda: ops.add_norm(A, B, norm=(Q[1:], EPS)),
    "float16 and float32": lambda: ops.read_norm_chained(Q.double(), [A.double()], G.double(), EPS),
    "eps must be": lambda: ops.depth_attention(Q, [A], G, -1.0),
}


@pytest.mark.parametrize("message", list(BAD))
@pytest.mark.parametrize("gradients", [True, False])
def test_bad_input(message, gradients):
    """Checked at the door, once, also without gradients: a kernel would read beyond the end."""
    ops.set_backend("triton")
    try:
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=message):
            BAD[message]()
    finally:
        ops.set_backend("auto")


@needs_gpu
def test_cuda_graph():
    t = leaves(2, 8)
    with torch.no_grad():
        eager = block(kernels, *t.values())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(kernels, *t.values())
        given = {t.data_ptr() for t in t.values()}
        for output in captured:
            if output.data_ptr() not in given:  # some results are sources, handed on
                output.zero_()
        graph.replay()
    for ours, theirs in zip(captured, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
