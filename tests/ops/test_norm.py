"""The RMSNorm behind a read is rounded once, at its end: a weight in fp32 is not rounded to bf16 first."""

import pytest
import torch

from attnres.ops.eager import Eager
from attnres.ops.native.backend import NATIVE
from attnres.ops.no_grad import NoGrad
from attnres.ops.reference import Reference

from .native import require_native

WIDTH = 256


def rounded_once(h, weight, scale=1.0):
    h = h.double() * scale
    return (weight.double() * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(torch.bfloat16)


@pytest.mark.parametrize(
    "backend", [Reference(), Eager(), NoGrad(), NATIVE], ids=["reference", "eager", "no_grad", "native"]
)
@pytest.mark.parametrize("rows", [3, 400], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_wider_weight_keeps_its_digits(backend, rows, dtype, autocast):
    if backend is NATIVE:
        require_native()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, WIDTH, generator=generator).bfloat16()
    weight = (1.001 + torch.randn(WIDTH, generator=generator) / 512).to(dtype)
    query, key_norm = torch.zeros(WIDTH), torch.ones(WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = {
            "norm": backend.rms_norm(h, (weight, 1e-6)),
            "add": backend.add_norm(h, torch.zeros_like(h), norm=(weight, 1e-6))[1],
            "read": backend.read_norm(query, [h, h], key_norm, 1e-6, scale=2.0, norm=(weight, 4e-6)),
        }
    for what, x in found.items():
        assert x.dtype == torch.bfloat16
        same = (x == rounded_once(h, weight)).float().mean()  # fp32 may fall to the other side of a tie
        assert same > 0.99, (what, same)


@pytest.mark.parametrize("backend", [Eager(), NATIVE], ids=["eager", "native"])
def test_its_gradients_are_those_in_fp64(backend):
    if backend is NATIVE:
        require_native()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(WIDTH, generator=generator).requires_grad_()
    direction = torch.randn(5, WIDTH, generator=generator)
    (backend.rms_norm(h, (weight, 1e-6)).float() * direction).sum().backward()
    wide, wide_weight = (t.detach().double().requires_grad_() for t in (h, weight))
    (Reference().rms_norm(wide, (wide_weight, 1e-6)) * direction.bfloat16()).sum().backward()
    assert weight.grad.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h.grad.double(), wide.grad, rtol=1e-2, atol=1e-2)
