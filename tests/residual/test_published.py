"""Agreement with implementations that others published; the extra dev brings them.

Hyper-connections and multi-head AttnRes are compared in their own files. (fast-attnres must not be installed for it: it
has a package of this one's name.)
"""

from itertools import pairwise

import pytest
import torch

from attnres import residual
from attnres.residual.sinkhorn import sinkhorn

from .loop import DIM, layers_of, run


@pytest.mark.parametrize(("name", "options"), [("full_attnres", {}), ("block_attnres", {"block_size": 2})])
def test_reads_agree_with_flash_linear_attention(name, options):
    naive = pytest.importorskip("fla.ops.attnres.naive").naive_attnres
    torch.manual_seed(0)
    res = residual.build(name, DIM, 4, eps=1e-3, **options)
    for p in res.parameters():
        torch.nn.init.normal_(p)
    layers = layers_of(4).float()
    embedding = torch.randn(2, 5, DIM, requires_grad=True)

    def theirs():
        inputs, outputs, starts = [], [embedding], getattr(res, "block_starts", range(4))
        for i in range(5):
            # outputs[0] is the embedding, outputs[j + 1] layer j's: blocks begun before layer i, the last one partial
            begun = [start + 1 for start in starts if start < i]
            sums = [sum(outputs[a:b]) for a, b in pairwise([*begun, i + 1])]
            sources = [embedding, *sums]
            query, weight = res.rows(i)
            inputs.append(naive(query, sources, weight, rms_eps=res.eps))
            if i < 4:
                outputs.append(layers[i](inputs[-1]))
        return inputs

    leaves = [embedding, *res.parameters(), *layers.parameters()]
    want, got = theirs(), run(res, embedding, layers)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    directions = [torch.randn_like(h) for h in want]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, directions),
        torch.autograd.grad(want, leaves, directions),
        rtol=1e-4,
        atol=1e-5,
    )


def test_sinkhorn_agrees_with_hyper_connections():
    theirs = pytest.importorskip("hyper_connections.mHCv2").sinkhorn_knopps
    logits = torch.randn(3, 4, 4, requires_grad=True)
    got, want = sinkhorn(logits, 20), theirs(logits, 20)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(logits)
    torch.testing.assert_close(
        torch.autograd.grad(got, logits, direction), torch.autograd.grad(want, logits, direction), rtol=1e-4, atol=1e-6
    )
