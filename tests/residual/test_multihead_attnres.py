import pytest
import torch

from attnres import residual
from attnres.errors import UsageError

from .loop import DIM, assert_formula, layers_of, randomised, rms_norm, run


def sources_of(embedding, outputs, size):
    """The embedding and the sums of blocks of `size` outputs, the last block as far as it is."""
    return [embedding, *(sum(outputs[first : first + size]) for first in range(0, len(outputs), size))]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_reads_are_the_formula(heads, size, scale):
    res = residual.build("multihead_attnres", DIM, 5, heads=heads, block_size=size, stream_scale=scale)
    randomised(res)

    def written_out(x, layers):
        inputs, outputs = [], []
        for i in range(6):
            sources = sources_of(x, outputs, size)
            query, weight = res.pseudo_query[i].view(heads, -1), res.key_norm[i].view(heads, -1)
            slices = torch.stack(sources).unflatten(-1, (heads, -1))
            attention = (query * rms_norm(slices, weight)).sum(-1, keepdim=True).softmax(0)
            inputs.append((attention * slices).sum(0).flatten(-2) * (len(sources) if scale else 1))
            if i < 5:
                outputs.append(layers[i](inputs[-1]))
        return inputs

    assert_formula(res, written_out, 5)


@pytest.mark.parametrize(("name", "size"), [("full_attnres", 1), ("block_attnres", 3)])
@pytest.mark.parametrize(
    ("variant", "options"), [("multihead_attnres", {"heads": 1}), ("lowrank_attnres", {"rank": 6})]
)
def test_one_head_or_full_rank_is_attnres(name, size, variant, options):
    plain = randomised(residual.build(name, DIM, 7, **({"block_size": size} if size > 1 else {})))
    same = residual.build(variant, DIM, 7, block_size=size, **options).double()
    same.load_state_dict(plain.state_dict())
    x, layers = torch.randn(4, DIM, dtype=torch.float64), layers_of(7)
    torch.testing.assert_close(run(same, x, layers), run(plain, x, layers), rtol=1e-12, atol=1e-12)
    assert [same.read_flops(i) for i in range(8)] == [plain.read_flops(i) for i in range(8)]


def test_depth_weights_are_a_softmax_per_head():
    res = randomised(residual.build("multihead_attnres", DIM, 4, heads=3))
    state = res.start(torch.randn(2, DIM, dtype=torch.float64))
    for i in range(3):
        state = res.write(res.read(state, i)[1], i, torch.randn(2, DIM, dtype=torch.float64))
    weights = res.depth_weights(state, 3)
    assert weights.shape == (4, 2, 3)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 3, dtype=torch.float64))
    h = sum(w.repeat_interleave(2, -1) * v for w, v in zip(weights, res.sources(state, 3), strict=True))
    torch.testing.assert_close(h, res.read(state, 3)[0])


def test_heads_add_no_parameters():
    for heads in (1, 2, 3):
        res = residual.build("multihead_attnres", DIM, 5, heads=heads)
        assert sum(p.numel() for p in res.parameters()) == 2 * 6 * DIM
    assert residual.build("multihead_attnres", 64, 5).weighing.heads == 4


def test_agrees_with_the_published_function_on_every_slice():
    naive = pytest.importorskip("fla.ops.attnres.naive").naive_attnres
    res = residual.build("multihead_attnres", DIM, 3, heads=2)
    for p in res.parameters():
        torch.nn.init.normal_(p)
    sources = [torch.randn(2, 5, DIM) for _ in range(3)]
    (query, weight), slices = res.rows(2), [s.unflatten(-1, (2, 3)) for s in sources]
    want = torch.cat(
        [naive(query[a], [s[..., a, :].contiguous() for s in slices], weight[a], rms_eps=res.eps) for a in (0, 1)], -1
    )
    torch.testing.assert_close(res.single_read(tuple(sources), 2, None)[0], want)


@pytest.mark.parametrize("heads", [0, 4, 7, -2, 1.5])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(UsageError, match="heads must be a positive whole number that divides the width, 6; it is"):
        residual.build("multihead_attnres", DIM, 5, heads=heads)
