"""The native backend's own: odd shapes and values, its gradients in chains, threads, forks, and how it is compiled."""

import hashlib
import logging
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from attnres import ops
from attnres.ops import dispatch
from attnres.ops.eager import Eager
from attnres.ops.native import build, calls
from attnres.ops.native.backend import NATIVE
from attnres.ops.reference import Reference

from .native import COMPILED, require_native

pytestmark = pytest.mark.skipif(not COMPILED, reason=str(build.library(torch.float64)))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(n, shape, dim, dtype=torch.float64, queries=2):
    """Queries, key norms [S, D], a norm's weight, a partial sum, an update and n sources, all leaves."""
    generator = torch.Generator().manual_seed(n + dim)
    randn = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = [(0.3 + i) * randn(*shape, dim) for i in range(n + 2)]
    leaves = [randn(queries, dim), 1 + 0.3 * randn(queries, dim), 1 + 0.3 * randn(dim), *rows]
    return [t.to(dtype).requires_grad_() for t in leaves]


def everything(backend, queries, key_norms, weight, partial, update, *sources, normed=True):
    """Every form of every op, each reading what the one before hands on."""
    q, g, norm = queries[0], key_norms[0], (weight, 1e-2) if normed else None
    x, chain = backend.read_norm_chained(q, sources, g, 1e-3, scale=2.0, norm=norm)
    outs, lses, chain = backend.inter_block_chained(queries, chain, key_norms, 1e-3, scale=2.0, norm=norm)
    more, chain = backend.read_norm_chained(q, chain, g, 1e-3, scale=3.0, norm=norm, prior=(outs[-1], lses[-1]))
    total, merged = backend.merge_norm(q, partial, update, g, outs[-1], lses[-1], 1e-3, scale=1.5, norm=norm)
    first = backend.merge_norm(q, None, update, g, outs[-1], lses[-1], 1e-3, scale=1.5, norm=norm)
    last = backend.read_norm(q, [*chain, total], g, 1e-3)
    return [x, *outs, *lses, more, total, merged, *first, last, *backend.add_norm(total, update, norm=(weight, 0.1))]


def with_gradients(backend, leaves, **options):
    results = everything(backend, *leaves, **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, leaves, directions, materialize_grads=True)]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize(("shape", "dim", "queries"), [((), 1, 1), ((3,), 17, 3), ((2, 1, 65), 12, 1), ((0, 4), 8, 2)])
@pytest.mark.parametrize("normed", [True, False])
def test_every_form_and_every_gradient_are_the_references(n, shape, dim, queries, normed):
    leaves = draw(n, shape, dim, queries=queries)
    got, want = (with_gradients(backend, leaves, normed=normed) for backend in (NATIVE, Reference()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("n", [1, 9, 40])
def test_error_is_at_most_twice_the_references(dtype, n):
    leaves = draw(n, (40, 7), 65, dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth, plain = with_gradients(Reference(), wide), with_gradients(Reference(), leaves)
    floor = 16 * torch.finfo(torch.float32).eps
    for found, rival, want in zip(with_gradients(NATIVE, leaves), plain, truth, strict=True):
        assert found.dtype == rival.dtype and found.shape == rival.shape
        assert (found.double() - want).norm() <= 2 * (rival.double() - want).norm() + floor * want.norm()


def test_long_sums_over_tokens_lose_no_digits():
    leaves = draw(2, (100_000,), 3, torch.float32, 1)
    found = with_gradients(NATIVE, leaves)[-7:-4]
    truth = with_gradients(NATIVE, [t.detach().double().requires_grad_() for t in leaves])[-7:-4]
    for got, want in zip(found, truth, strict=True):
        assert (got - want).norm() < 2e-6 * want.norm() + 1e-2


def test_gradients_by_differences():
    leaves = draw(2, (2,), 3)
    assert torch.autograd.gradcheck(lambda *t: tuple(everything(NATIVE, *t)), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_gradients_and_without_and_every_time(dtype):
    leaves = draw(3, (50,), 33, dtype)
    first, again = with_gradients(NATIVE, leaves), with_gradients(NATIVE, leaves)
    with torch.no_grad():
        without = everything(NATIVE, *leaves)
    for a, b in zip([*first, *first], [*again, *without], strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_carried_through(dtype, value):
    leaves = [t.detach() for t in draw(3, (4,), 20, dtype)]
    leaves[5][2, 7] = value
    with torch.no_grad():
        for got, want in zip(everything(NATIVE, *leaves), everything(Reference(), *leaves), strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())
    gradient = torch.full((4, 20), value, dtype=dtype)
    _, _, _, _, _, *sources = leaves = [t.requires_grad_() for t in leaves]
    for source in torch.autograd.grad(NATIVE.read_norm(leaves[0][0], sources, None, 1e-3), sources, gradient):
        assert not source.isfinite().all()


def test_results_are_written_whole(monkeypatch):
    """Into memory that was full of NaN."""

    def poisoned(empty):
        return lambda *a, **k: empty(*a, **k).fill_(float("nan"))

    leaves = draw(3, (5,), 19)
    want = with_gradients(NATIVE, leaves)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    torch.testing.assert_close(with_gradients(NATIVE, leaves), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_converted_both_ways(dtype):
    """By sums with zero, and numbers between them are rounded to the nearest, ties to even."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    sums, _ = NATIVE.add_norm(halves, torch.zeros_like(halves), norm=(None, 1e-6))
    assert torch.equal(sums.nan_to_num(7.0), (halves + 0).nan_to_num(7.0))
    assert torch.equal(sums.isnan(), halves.isnan())
    other = halves.flatten().roll(12345).view(256, 256)
    sums, _ = NATIVE.add_norm(halves, other, norm=(None, 1e-6))
    assert torch.equal(sums.nan_to_num(7.0), (halves + other).nan_to_num(7.0))


def test_layouts_and_broadcast_gradients():
    leaves = draw(3, (4, 6), 10)
    turned = [t if t.dim() < 3 else t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in leaves]
    sliced = [t if t.dim() < 3 else torch.stack([t.detach(), -t.detach()], -1)[..., 0] for t in leaves]
    for others in (turned, sliced):
        others = [t.detach().requires_grad_() for t in others]
        torch.testing.assert_close(with_gradients(NATIVE, others), with_gradients(NATIVE, leaves), rtol=0, atol=0)
    x = NATIVE.read_norm(leaves[0][0], leaves[5:], leaves[1][0], 1e-3)
    summed = torch.autograd.grad(x.sum(), leaves[5:], retain_graph=True)  # its gradient is one number, expanded
    torch.testing.assert_close(summed, torch.autograd.grad(x, leaves[5:], torch.ones_like(x)), rtol=0, atol=0)


def test_a_source_twice_and_a_graph_twice():
    query, source = draw(1, (3,), 5)[0][0], draw(1, (3,), 5)[5]

    def twice(backend):
        h, (a, b) = backend.read_norm_chained(query, [source, source], None, 1e-3)
        return backend.read_norm(query, [a, b, h, source], None, 1e-3).square().sum()

    got, want = twice(NATIVE), twice(Reference())
    for _ in range(2):
        found = torch.autograd.grad(got, source, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(want, source, retain_graph=True))


@pytest.mark.parametrize("normed", [True, False])
def test_second_derivatives_are_the_references(normed):
    leaves = draw(2, (3,), 5)

    def second(backend):
        first = torch.autograd.grad(
            sum(r.square().sum() for r in everything(backend, *leaves, normed=normed)), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(second(NATIVE), second(Reference()))


def test_many_gradients_at_once():
    leaves = draw(2, (3,), 5)
    x = NATIVE.read_norm(leaves[0][0], leaves[5:], None, 1e-3)
    _, y = NATIVE.add_norm(x, leaves[4], norm=(leaves[2], 1e-3))
    directions = torch.randn(4, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, leaves[2:], directions, retain_graph=True, is_grads_batched=True, allow_unused=True)
    for i, direction in enumerate(directions):
        want = torch.autograd.grad(y, leaves[2:], direction, retain_graph=True, allow_unused=True)
        torch.testing.assert_close([f[i] for f in found if f is not None], [w for w in want if w is not None])


def test_transformed_functions_are_left_to_pytorch():
    a, b, w = torch.randn(3, 5), torch.randn(3, 5), torch.rand(5)
    loss = lambda a, b, w: ops.add_norm(a, b, norm=(w, 1e-3))[1].square().sum()  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in (a, b, w)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(a, b, w), want)
    _, along = torch.func.jvp(loss, (a, b, w), (a, b, w))
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(want, (a, b, w), strict=True)))
    rows = torch.func.vmap(lambda a, b: ops.add_norm(a, b, norm=(w, 1e-3))[1])(a, b)
    torch.testing.assert_close(rows, ops.add_norm(a, b, norm=(w, 1e-3))[1])


def test_checkpointing_and_autocast():
    leaves = draw(2, (3, 4), 8, torch.float32)
    want = with_gradients(NATIVE, leaves)
    results = checkpoint(lambda *t: everything(NATIVE, *t), *leaves, use_reentrant=False)
    torch.testing.assert_close(results, want[: len(results)], rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(with_gradients(NATIVE, leaves), want, rtol=0, atol=0)


def test_threads_agree_and_a_fork_has_one():
    leaves = draw(3, (999,), 64, torch.float64)
    one = with_gradients(NATIVE, leaves)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = with_gradients(NATIVE, leaves)
        torch.testing.assert_close(three, with_gradients(NATIVE, leaves), rtol=0, atol=0)
        torch.testing.assert_close(three, one)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # threads of the parent are not here: to wait for them would be for ever
            found = everything(NATIVE, *leaves)
            torch.set_num_threads(1)
            os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, one, strict=False)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_a_fork_of_a_process_without_threads_may_have_many():
    """As the workers of a fork server are."""
    script = """if True:
        import os, signal, torch
        from attnres import ops
        from attnres.ops.native import calls
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(2)
            rows = torch.ones(999, 64)
            ops.add_norm(rows, rows, norm=(None, 1e-6))
            os._exit(int(calls._threads_lost))
        assert os.waitpid(child, 0)[1] == 0
        """
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # else torch starts threads when it is imported
    subprocess.run([sys.executable, "-c", script], check=True, env=alone)


def test_what_does_not_fit_is_named():
    """Without gradients too, where the doors of `ops` check less."""
    row, wide = torch.zeros(2, 6), torch.zeros(6)
    turned = torch.zeros(6, 2)  # as many numbers, another shape
    norm = (torch.zeros(2, 3), 1e-6)
    with torch.no_grad():
        for read in (
            lambda: NATIVE.read_norm(wide, [row, torch.zeros(1, 6)], None, 1e-6),
            lambda: NATIVE.read_norm(wide, [row, turned], None, 1e-6),
            lambda: NATIVE.merge_norm(wide, row, turned, None, row, torch.zeros(2), 1e-6),
            lambda: NATIVE.merge_norm(wide, None, row, None, turned, torch.zeros(2), 1e-6),
            lambda: NATIVE.add_norm(row, turned, norm=(None, 1e-6)),
        ):
            with pytest.raises(ValueError, match=r"one shape and dtype; torch.float32 \[.*\] meets"):
                read()
        for read in (
            lambda: NATIVE.read_norm(wide, [row], torch.ones(4), 1e-6),
            lambda: NATIVE.read_norm(wide, [row], torch.ones(1, 6), 1e-6),
            lambda: NATIVE.read_norm(wide, [row], None, 1e-6, norm=norm),
            lambda: NATIVE.add_norm(row, row, norm=norm),
            lambda: NATIVE.merge_norm(wide, None, row, None, row, torch.zeros(1, 2), 1e-6),
            lambda: NATIVE.weighted_sum(torch.ones(2), [row]),
            lambda: NATIVE.weighted_sum(torch.ones(1, 3), [row]),
        ):
            with pytest.raises(ValueError, match="expects numbers"):
                read()
        for query in (torch.zeros(7), torch.zeros(2, 2), torch.zeros(3, 3), torch.zeros(2, 6)):
            with pytest.raises(ValueError, match="expects queries"):
                NATIVE.read_norm(query, [row], None, 1e-6)
        with pytest.raises(ValueError, match="expects queries"):
            NATIVE.inter_block(torch.zeros(3, 4), [row], None, 1e-6)


def test_memory_that_was_freed_is_not_read():
    row = torch.zeros(2, 3)
    row.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ValueError, match="freed"):
        NATIVE.add_norm(row, torch.zeros(2, 3), norm=(None, 1e-6))


def test_it_serves_plain_tensors_that_nobody_records():
    row = torch.zeros(2, 3)
    assert dispatch.select(row) is NATIVE
    with torch.inference_mode():
        assert dispatch.select(row) is NATIVE
    with FakeTensorMode():
        assert type(dispatch.select(torch.zeros(2, 3))) is Eager
        assert "records" in NATIVE.declines(row, 1)
    for other, reason in ((row.to("meta"), "on a CPU"), (row.int(), "sources are torch.int32")):
        assert reason in NATIVE.declines(other, 1)


SCRIPT = """if True:
    import logging, torch
    logging.basicConfig(level="INFO", format="%(message)s")
    from attnres import ops
    rows = torch.ones(2, 3)
    print(ops.depth_attention(rows[0], [rows, rows], rows[1]).tolist() == rows.tolist(), flush=True)
"""


def use(folder, **environment):
    """What a process that uses the default backend logs; it has to get the right result."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "ATTNRES_CACHE": str(folder), **environment},
    )
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr
    return [line for line in done.stderr.splitlines() if "native" in line]


NATIVE_RUNS = "depth attention runs on the native backend (cpu, torch.float32)"


def test_compiled_once_and_anew_where_a_file_is_damaged(tmp_path):
    first, second = use(tmp_path)
    assert first.startswith("compiled the native backend for float32 in ") and second == NATIVE_RUNS
    (kept,) = (tmp_path / "native").iterdir()
    assert stat.S_IMODE((tmp_path / "native").stat().st_mode) == 0o700
    assert use(tmp_path) == [NATIVE_RUNS]
    whole = kept.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1] + b"?", hashlib.sha256(b"").digest()):
        kept.write_bytes(damaged)
        assert len(use(tmp_path)) == 2
        assert len(kept.read_bytes()) == len(whole)


def compiler(folder, script):
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "finds no C compiler"),
        ("echo 'depth.c:1: error: no such thing' >&2; exit 1", "depth.c:1: error: no such thing"),
        ("kill -9 $$", "exit status -9"),
        ("exit 0", "exit status 0"),
        ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "does not load"),
    ],
)
def test_without_a_compiler_that_works_eager_serves_and_says_why(tmp_path, script, reason):
    cc = compiler(tmp_path, script) if script else str(tmp_path / "none")
    (line,) = use(tmp_path / "cache", CC=cc)
    assert line.startswith("depth attention runs on the eager backend: ") and reason in line and "CC" in line
    made = build.library(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build._made, torch.float64, "no compiler")
        patch.setattr(dispatch, "_choice", "native")
        with pytest.raises(ValueError, match="no compiler"):
            ops.add_norm(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    assert build.library(torch.float64) is made


def test_a_compiler_that_knows_neither_the_processor_nor_openmp_serves(tmp_path):
    refuse = 'case "$*" in *march=native*|*-fopenmp\\ *) echo "error: unknown option" >&2; exit 1;; esac; exec cc "$@"'
    assert use(tmp_path / "cache", CC=compiler(tmp_path, refuse))[-1] == NATIVE_RUNS


def test_a_cache_that_cannot_be_used_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    shared = tmp_path / "shared" / "native"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    for folder, reason in ((tmp_path / "file", "cannot be used"), (tmp_path / "shared", "written by others")):
        first, second = use(folder)
        assert "for this process alone" in first and reason in first and second == NATIVE_RUNS
    assert not list(shared.iterdir())


def test_a_library_belongs_to_a_processor_a_compiler_and_its_flags(tmp_path, monkeypatch):
    cc = compiler(tmp_path, 'exec cc "$@"')
    names = {build._identity([cc], cc), build._identity([cc, "-g"], cc)}
    monkeypatch.setattr(build, "_processor", lambda: "another")
    names.add(build._identity([cc], cc))
    monkeypatch.setattr(build, "_processor", lambda: "")
    assert not any("-march=native" in extras for extras in build._extras())
    names.add(build._identity([cc], cc))
    Path(cc).write_text('#!/bin/sh\nexec  cc "$@"\n')
    names.add(build._identity([cc], cc))
    assert len(names) == 5


def test_two_processes_and_two_threads_may_compile_at_once(tmp_path, monkeypatch, caplog):
    with ThreadPoolExecutor() as pool:
        for lines in pool.map(lambda _: use(tmp_path), range(3)):
            assert lines[-1] == NATIVE_RUNS
    assert len(list((tmp_path / "native").iterdir())) == 1
    monkeypatch.setenv("ATTNRES_CACHE", str(tmp_path / "threads"))
    monkeypatch.setattr(build, "_made", {})
    with caplog.at_level(logging.INFO, "attnres"), ThreadPoolExecutor() as pool:
        made = set(pool.map(lambda _: build.library(torch.float32), range(4)))
    assert len(made) == 1 and len(caplog.records) == 1


def test_import_compiles_nothing(tmp_path):
    script = "import attnres; from attnres.ops.native import build; assert not build._made"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "ATTNRES_CACHE": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_the_last_word_on_memory(monkeypatch):
    require_native()
    monkeypatch.setattr(calls, "library", lambda dtype: type("Full", (), {"depth_add": lambda call: 1}))
    with torch.no_grad(), pytest.raises(MemoryError, match="no memory"):
        NATIVE.add_norm(torch.zeros(2, 3), torch.zeros(2, 3), norm=(None, 1e-6))
