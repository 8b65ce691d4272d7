"""fp16 has nothing above 65504. What a layer sees behind its norm is small whatever the sources are, so no step on the
way there may leave that range where the plain sum does not."""

import pytest
import torch
from torch import nn

from attnres import residual

DIM, LAYERS = 16, 29
SIZE = 3000.0
CASES = [
    ("prenorm", {}),
    ("full_attnres", {}),
    ("full_attnres", {"schedule": "two_phase"}),
    ("block_attnres", {"block_size": 1}),
    ("block_attnres", {"block_size": 1, "schedule": "two_phase"}),
    ("full_attnres", {"null_source": True}),
    ("full_attnres", {"heads": 2}),
    ("full_attnres", {"key_normalised": False}),
    ("full_attnres", {"query": "input"}),
    ("full_attnres", {"mixing": "sigmoid"}),
    ("full_attnres", {"mixing": "static"}),
    ("multihead_attnres", {}),
    ("lowrank_attnres", {}),
    ("delta_attnres", {}),
    ("keel", {}),
    ("deepnorm", {}),
    ("hyper_connections", {}),
    ("mhc", {}),
    ("siamesenorm", {}),
    ("denseformer", {}),
    ("x0_lambdas", {}),
]


def hooked():
    norm = nn.RMSNorm(DIM, 1e-6)
    norm.register_forward_hook(lambda *_: None)
    return norm


NORMS = {"folded": lambda: nn.RMSNorm(DIM, 1e-6), "called": hooked, "layer norm": lambda: nn.LayerNorm(DIM)}


def build(name, options):
    scaled = {"stream_scale": True} if name.endswith("attnres") and name != "delta_attnres" else {}
    torch.manual_seed(1)
    res = residual.build(name, DIM, LAYERS, **options, **scaled)
    for own, parameter in res.named_parameters():
        if own in ("pseudo_query", "query_proj"):  # then some layers read one source, times the number of sources
            nn.init.normal_(parameter, std=2.0)
    return res


def run(res, norm, values):
    state, seen = res.start(values[0]), []
    for i, output in enumerate(values[1:]):
        x, state = res.read(state, i, norm)
        seen.append(x)
        state = res.write(state, i, output)
    return torch.stack([*seen, res.finish(state, norm)])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_reads_of_large_sources_are_those_in_fp32(name, options, kind, grad):
    generator = torch.Generator().manual_seed(0)
    values = [(SIZE * torch.randn(4, DIM, generator=generator)).half() for _ in range(LAYERS + 1)]
    res, norm = build(name, options).half(), NORMS[kind]().half()
    with torch.set_grad_enabled(grad):
        found = run(res, norm, values)
        want = run(res.float(), norm.float(), [value.float() for value in values])
    assert found.dtype == torch.float16 and found.isfinite().all()
    torch.testing.assert_close(found.float(), want, rtol=0, atol=0.02)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_their_gradients_are_finite_and_those_in_fp32(name, options):
    res, norm = build(name, options).half(), NORMS["folded"]().half()
    values = torch.randn(LAYERS + 1, 4, DIM, generator=torch.Generator().manual_seed(0))
    values = (SIZE * values).half()

    def gradient(res, norm, values):
        values = values.clone().requires_grad_()
        # large, as a scaled loss makes them: the gradient of such sources is small
        (64 * run(res, norm, values.unbind()).float()[:, :, 0]).sum().backward()
        return values.grad

    found, want = gradient(res, norm, values), gradient(res.float(), norm.float(), values.float())
    assert found.isfinite().all()
    assert (found.float() - want).norm() < 0.02 * want.norm()


def test_one_read_beyond_the_range():
    """The sum is 3000 and a read of its largest source, times the number of sources, would be 90000."""
    res = residual.build("full_attnres", DIM, 29, stream_scale=True)
    with torch.no_grad():
        res.pseudo_query.fill_(1)
    res.half()
    norm = nn.RMSNorm(DIM, 1e-6).half()
    values = [torch.full((DIM,), 3000.0), *(torch.full((DIM,), -3000.0 * (-1) ** i) for i in range(28))]
    state = res.start(values[0].half())
    for i, value in enumerate(values[1:]):
        state = res.write(state, i, value.half())
    assert res.read(state, 28, norm)[0].tolist() == DIM * [1]
