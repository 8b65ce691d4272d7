"""The depth mixing matrix against each mechanism's own weights, in fp64 and as the definition says."""

import math

import pytest
import torch

import attnres.analysis
from attnres import residual
from attnres.analysis import mixing_figure, mixing_matrices, mixing_matrix, semiseparable_rank
from attnres.analysis.measure.mixing import _solve
from attnres.errors import UsageError
from attnres.model import Decoder, DecoderConfig

LAYERS = 6
IDS = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))
PER_CHANNEL = {"layerscale", "highway", "deepnorm", "keel", "siamesenorm", "gated_residual"}
WITHIN_WIDTH = {"laurel", "multihead_attnres"}
INEXACT = PER_CHANNEL | WITHIN_WIDTH
"""Mechanisms that do not weigh whole outputs: per channel (or norms with weights), by maps, by slices of the width."""


def decoder(name, **options):
    shape = dict(vocab_size=31, hidden_size=16, num_attention_heads=2, intermediate_size=24, initializer_range=0.2)
    config = DecoderConfig(**shape, num_hidden_layers=LAYERS // 2, residual=name, residual_options=options)
    model = Decoder(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in model.residual.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


def inputs_and_outputs(model):
    """h_0 .. h_L and v_0 .. v_L of the decoder's own loop, in fp64."""
    model = model.double()
    context = model.context(IDS.shape[1], IDS.device)
    outputs, inputs = [model.embed_tokens(IDS)], []
    state = model.residual.start(outputs[0])
    for i, layer in enumerate(model.layers):
        h, state = model.residual.read(state, i)
        outputs.append(layer(layer.norm(h), context))
        inputs.append(h)
        state = model.residual.write(state, i, outputs[-1])
    return [*inputs, model.residual.finish(state)], outputs


@pytest.mark.parametrize("name", residual.names())
def test_weights_make_every_input_out_of_the_outputs(name):
    model = decoder(name).double()
    matrices, unexplained = mixing_matrices(model, IDS)
    assert matrices.shape == (2, 5, LAYERS + 1, LAYERS + 1) and matrices.dtype == torch.float64
    assert matrices.triu(1).count_nonzero() == 0
    inputs, outputs = inputs_and_outputs(model)
    made = torch.einsum("btli,ibtd->lbtd", matrices, torch.stack(outputs))
    wanted = torch.stack(inputs)
    if name in INEXACT:
        share = (made - wanted).square().sum((1, 2, 3)) / wanted.square().sum((1, 2, 3))
        torch.testing.assert_close(unexplained, share)
        assert 1e-12 < unexplained.max() < 0.7
    else:
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)
        assert unexplained.max() < 1e-18
    torch.testing.assert_close(mixing_matrix(model, IDS), matrices.mean((0, 1)))


def test_the_plain_sum_has_ones_up_to_the_diagonal():
    for model, tolerance in (
        (decoder("prenorm").double(), 1e-10),
        (decoder("prenorm"), 1e-4),
        (decoder("prenorm").bfloat16(), 1e-9),
    ):
        matrix = mixing_matrix(model, IDS)
        torch.testing.assert_close(matrix, torch.ones(7, 7).tril().double(), rtol=tolerance, atol=tolerance)
    assert semiseparable_rank(matrix) == 1


@pytest.mark.parametrize("schedule", ["layerwise", "two_phase"])
def test_attnres_weights_are_its_softmax(schedule):
    model = decoder("full_attnres", schedule=schedule).double()
    matrices = mixing_matrices(model, IDS).matrices
    _, outputs = inputs_and_outputs(model)
    state = model.residual.start(outputs[0])
    for i in range(LAYERS + 1):
        weights = (i + 1) * model.residual.depth_weights(state, i)  # the decoder reads with stream_scale
        torch.testing.assert_close(matrices[..., i, : i + 1], weights.movedim(0, -1), rtol=1e-8, atol=1e-8)
        if i < LAYERS:
            state = model.residual.write(model.residual.read(state, i)[1], i, outputs[i + 1])


def test_outputs_of_a_block_share_their_weight():
    model = decoder("block_attnres", block_size=2).double()
    last = mixing_matrix(model, IDS)[-1]
    torch.testing.assert_close(last[1::2], last[2::2])
    assert not torch.allclose(last[1], last[3])


def test_hyper_connections_are_semiseparable():
    n = 2
    model = decoder("hyper_connections", num_streams=n, dynamic=False).double()
    res = model.residual
    want = torch.zeros(7, 7).double()
    for l in range(LAYERS + 1):
        read = torch.ones(n).double() if l == LAYERS else res.alpha_m[l]
        for i in range(l + 1):  # beta_i^T (A_i .. A_{l-1}) alpha_l, where v_0 enters every stream
            row = torch.ones(n).double() if i == 0 else res.beta[i - 1]
            for k in range(i, l):
                row = row @ res.alpha_r[k]
            want[l, i] = row @ read
    matrices = mixing_matrices(model, IDS).matrices
    torch.testing.assert_close(matrices, want.expand_as(matrices), rtol=1e-8, atol=1e-8)
    assert (semiseparable_rank(matrices) == n).all()


def test_rank_of_known_matrices():
    full = torch.rand(8, 8).double().tril()
    assert semiseparable_rank(full) == 4
    assert semiseparable_rank(torch.eye(5)) == 1
    steps = torch.stack(
        [torch.ones(6, 6).tril(), torch.ones(6, 6).tril() + torch.outer(torch.arange(6), torch.arange(6)).tril()]
    )
    assert semiseparable_rank(steps).tolist() == [1, 2]


def test_an_output_that_is_a_sum_of_earlier_ones_gets_no_weight():
    v = torch.randn(1, 8, 4).double()
    v[..., 2] = v[..., 0] - v[..., 1]
    v[..., 3] = 0
    h = torch.stack([v[..., : l + 1].sum(-1) for l in range(4)], -1)
    m = _solve(v, h)
    assert m.isfinite().all() and not m[0, :, 2:].any()
    torch.testing.assert_close(v @ m.mT, h)


def test_the_model_stays_as_it_was_and_may_be_one_of_hugging_face():
    model = decoder("block_attnres", block_size=2)
    model.enable_checkpointing()
    model.train()
    want = model(IDS)
    matrix = mixing_matrix(model, IDS)
    assert torch.equal(model(IDS), want) and model.residual.lean and model.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    hf = pytest.importorskip("transformers") and attnres.hf
    config = hf.AttnResConfig(**{k: v for k, v in model.config.to_dict().items() if k in hf.AttnResConfig().to_dict()})
    same = hf.AttnResForCausalLM(config)
    same.model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})
    torch.testing.assert_close(mixing_matrix(same, IDS), matrix, rtol=1e-5, atol=1e-5)


def test_what_has_no_unique_weights_is_refused():
    shape = dict(vocab_size=31, hidden_size=6, num_attention_heads=1, head_dim=6)
    narrow = Decoder(DecoderConfig(**shape, num_hidden_layers=3, residual="prenorm"))
    with pytest.raises(UsageError, match=r"model must be wider than it has layers.*it has 6 and 6"):
        mixing_matrix(narrow, IDS)
    with pytest.raises(UsageError, match="model must be a decoder of this package"):
        mixing_matrix(torch.nn.Linear(2, 2), IDS)
    for bad in (IDS[0], IDS[:0]):
        with pytest.raises(UsageError, match=r"input_ids must be token ids of shape \[batch, tokens\]"):
            mixing_matrix(decoder("prenorm"), bad)


def test_figure_shows_the_lower_triangle_and_the_rank():
    pytest.importorskip("matplotlib")
    matrix = mixing_matrix(decoder("denseformer"), IDS)
    figure = mixing_figure(matrix, "DenseFormer")
    axes, bar = figure.axes
    mesh = axes.collections[0]
    drawn = mesh.get_array().reshape(7, 7)
    assert drawn.mask.sum() == 21 and math.isclose(drawn[6, 0], matrix[6, 0])
    rank = semiseparable_rank(matrix, 0.01).item()
    assert axes.get_title() == f"DenseFormer\nsemiseparable rank {rank} of at most 4"
    assert mesh.get_clim()[0] == (-mesh.get_clim()[1] if matrix.min() < -0.01 * matrix.abs().max() else 0)
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "output" and bar.get_ylabel() == "Mean weight"
    positive = mixing_figure(torch.ones(3, 3).tril()).axes[0].collections[0]
    assert positive.get_clim() == (0, 1)
    with pytest.raises(UsageError, match="matrix must be square"):
        mixing_figure(torch.ones(2, 3))
