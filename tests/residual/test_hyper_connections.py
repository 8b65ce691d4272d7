import pytest
import torch

from attnres import residual
from attnres.errors import UsageError
from attnres.residual.streams import combine

from .loop import DIM, assert_formula, layers_of, randomised, rms_norm, run


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_reads_are_the_formula(n, dynamic):
    res = randomised(residual.build("hyper_connections", DIM, 5, num_streams=n, dynamic=dynamic))

    def written_out(x, layers):
        inputs, streams = [], torch.stack([x] * n, -2)
        for i, layer in enumerate(layers):
            beta, a_m, a_r = res.beta[i], res.alpha_m[i], res.alpha_r[i]
            if dynamic:
                unit = rms_norm(streams)
                w_beta, w_m, w_r = res.projection[i, 0], res.projection[i, 1], res.projection[i, 2:].T
                s_beta, s_alpha = res.scale[i]
                beta = beta + s_beta * torch.tanh(unit @ w_beta)
                a_m = a_m + s_alpha * torch.tanh(unit @ w_m)
                a_r = a_r + s_alpha * torch.tanh(unit @ w_r)
            a_r, a_m = a_r.expand(*x.shape[:-1], n, n), a_m.expand(*x.shape[:-1], n)
            h = torch.einsum("bts,btsd->btd", a_m, streams)
            mixed = torch.einsum("btso,btsd->btod", a_r, streams)  # row = source, column = target
            streams = mixed + torch.einsum("bts,btd->btsd", beta.expand(*x.shape[:-1], n), layer(h))
            inputs.append(h)
        return [*inputs, streams.sum(-2)]

    assert_formula(res, written_out, 5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_starts_as_prenorm_with_the_sum_of_equal_streams(dynamic):
    res = residual.build("hyper_connections", DIM, 7, num_streams=3, dynamic=dynamic).double()
    x, layers = torch.randn(4, DIM, dtype=torch.float64), layers_of(7)
    *want, last = run(residual.build("prenorm", DIM, 7), x, layers)
    *got, out = run(res, x, layers)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(out, 3 * last, rtol=1e-14, atol=1e-14)
    assert [row.argmax().item() for row in res.alpha_m] == [0, 1, 2, 0, 1, 2, 0]


def test_parameters_are_those_of_the_paper():
    n, dim = 4, 10
    for dynamic, count in ((False, n * (n + 2)), (True, n * (n + 2) + 2 + dim + dim + dim * n)):  # its section 3
        res = residual.build("hyper_connections", dim, 6, num_streams=n, dynamic=dynamic)
        assert sum(p.numel() for p in res.parameters()) == 6 * count
    assert res.init_scale("output") == 2 * residual.build("prenorm", dim, 6).init_scale("output")
    assert res.init_scale("value") == 1


def test_the_compiled_combination_is_the_product(monkeypatch):
    weights, streams = torch.randn(5, 2, 3), torch.randn(5, 3, 4, dtype=torch.bfloat16)
    want = combine(weights, streams)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(combine(weights, streams), want)


def test_agrees_with_the_published_package(monkeypatch):
    package = pytest.importorskip("hyper_connections.hyper_connections")
    monkeypatch.setattr("attnres.residual.mechanisms.hyper_connections.NORM_EPS", 0.0)  # its norm has none
    torch.manual_seed(0)
    n, layers = 3, layers_of(4)
    res = randomised(residual.build("hyper_connections", DIM, 4, num_streams=n))
    theirs = [package.HyperConnections(n, dim=DIM, layer_index=i).double() for i in range(4)]
    for i, site in enumerate(theirs):
        with torch.no_grad():
            site.static_alpha.copy_(torch.cat([res.alpha_m[i, :, None], res.alpha_r[i]], 1))
            site.dynamic_alpha_fn.copy_(res.projection[i, 1:].T)
            site.static_beta.copy_(res.beta[i])
            site.dynamic_beta_fn.copy_(res.projection[i, 0])
            site.dynamic_beta_scale.copy_(res.scale[i, 0])
            site.dynamic_alpha_scale.copy_(res.scale[i, 1])
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    expand, reduce = package.get_expand_reduce_stream_functions(n)
    streams = expand(x)
    for site, layer in zip(theirs, layers, strict=True):
        h, add = site(streams)
        streams = add(layer(h))
    torch.testing.assert_close(run(res, x, layers)[-1], reduce(streams), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hyper_connections", "mhc", "mhc_lite"])
@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_stream_counts_below_one_are_refused(name, n):
    with pytest.raises(UsageError, match="num_streams must be a positive whole number; it is"):
        residual.build(name, DIM, 4, num_streams=n)
