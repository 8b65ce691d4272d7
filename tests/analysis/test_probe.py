"""The probe against a forward pass that is written out by hand, in fp64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from attnres.analysis.measure.probe import probe
from attnres.data.corpus import validation_batches
from attnres.model import Decoder, DecoderConfig

BLOCKS = 3  # Transformer blocks: six layers
VARIANTS = {
    "prenorm": {},
    "full_attnres": {},
    "block_attnres": {"block_size": 4},  # blocks of four and two layers
}


@pytest.fixture(scope="module")
def batches():
    """Rows of eight tokens in batches of two rows and of one."""
    tokens = torch.randint(0, 50, (25,), generator=torch.Generator().manual_seed(1)).numpy()
    return list(validation_batches(tokens, 2, 8))


def model(name, **options):
    shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2)
    decoder = Decoder(DecoderConfig(**shape, residual=name, residual_options={**VARIANTS[name], **options}), seed=2)
    decoder = decoder.double()
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.residual.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return decoder


def attend(decoder, row, sources):
    """Paper section 2 (and the decoder's scale: times the number of sources): the read and its weights."""
    v = torch.stack(sources)
    keys = v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * decoder.residual.key_norm[row]
    weights = (keys @ decoder.residual.pseudo_query[row]).softmax(0)
    return len(sources) * (weights[..., None] * v).sum(0), weights


def by_hand(decoder, name, inputs, targets):
    """(outputs, their gradients, weights) of one batch."""
    context = decoder.context(inputs.shape[1], inputs.device)
    embedding = decoder.embed_tokens(inputs)
    v, outputs, weights = [embedding], [], []
    for i in range(2 * BLOCKS + 1):
        if name == "prenorm":
            h = sum(v)
        elif name == "full_attnres":
            h, w = attend(decoder, i, v)
        else:
            borders = [b for b in (0, 4, 6) if b <= i]
            sources = [embedding] + [sum(v[1 + a : 1 + b]) for a, b in itertools.pairwise(borders)]
            sources += [sum(v[1 + borders[-1] :])] if borders[-1] < i else []
            h, w = attend(decoder, i, sources)
        if name != "prenorm":
            weights.append(w.flatten(1).mean(1))
        if i == 2 * BLOCKS:
            break
        new = decoder.layers[i](decoder.layers[i].norm(h), context)
        v.append(new)
        if i % 2:  # adding a zero gives a place to take the gradient of the state that the next reader sees
            hook = torch.zeros_like(new, requires_grad=True)
            v[-1] = new + hook
            if name == "prenorm":
                outputs.append((sum(v), hook))
            elif name == "full_attnres":
                outputs.append((v[-1], hook))
            else:
                outputs.append((sum(v[1 + (0 if i < 4 else 4) :]), hook))
    logits = decoder.lm_head(decoder.norm(h))
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
    gradients = torch.autograd.grad(loss, [hook for _, hook in outputs])
    return [output for output, _ in outputs], gradients, weights


@pytest.mark.parametrize("name", VARIANTS)
def test_probe_is_what_the_formulas_say(name, batches):
    decoder = model(name)
    seen = [by_hand(decoder, name, *batch) for batch in batches]
    found = probe(decoder, batches)
    for part, key in ((0, "output_magnitude"), (1, "gradient_magnitude")):
        per_block = [torch.cat([batch[part][b].flatten() for batch in seen]) for b in range(BLOCKS)]
        expected = [values.square().mean().sqrt().item() for values in per_block]
        assert found[key] == pytest.approx(expected, rel=1e-6), key
    if name == "prenorm":
        assert found["depth_weights"] is None
        return
    share = [targets.numel() / 24 for _, targets in batches]
    rows = [sum(s * batch[2][i] for s, batch in zip(share, seen, strict=True)) for i in range(2 * BLOCKS + 1)]
    assert [len(row) for row in found["depth_weights"]] == [len(row) for row in rows]
    for row, expected in zip(found["depth_weights"], rows, strict=True):
        assert row == pytest.approx(expected.tolist(), rel=1e-5)
        assert sum(row) == pytest.approx(1)


def test_rows_have_the_sources_of_the_paper(batches):
    lengths = {name: [len(row) for row in probe(model(name), batches)["depth_weights"]] for name in list(VARIANTS)[1:]}
    assert lengths["full_attnres"] == [1, 2, 3, 4, 5, 6, 7]
    assert lengths["block_attnres"] == [1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["full_attnres", "block_attnres"])
def test_the_schedule_makes_no_difference_and_is_put_back(name, batches):
    decoder = model(name, schedule="two_phase")
    found, expected = probe(decoder, batches), probe(model(name), batches)
    assert (decoder.residual.schedule, decoder.residual.lean) == ("two_phase", False)
    assert found["gradient_magnitude"] == pytest.approx(expected["gradient_magnitude"], rel=1e-6)
    assert found["output_magnitude"] == pytest.approx(expected["output_magnitude"], rel=1e-6)


def test_parameters_get_no_gradients(batches):
    decoder = model("full_attnres")
    with torch.no_grad():  # as it may be called in evaluation
        probe(decoder, batches)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_token_counts_the_same_in_any_batch(batches):
    """The gradient is that of the sum of the losses: a mean over the batch would shrink with its size."""
    decoder = model("prenorm")
    rows = [(i[None], t[None]) for inputs, targets in batches for i, t in zip(inputs, targets, strict=True)]
    assert probe(decoder, rows)["gradient_magnitude"] == pytest.approx(
        probe(decoder, batches)["gradient_magnitude"], rel=1e-6
    )


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches is empty"):
        probe(model("prenorm"), [])


def test_the_loss_is_the_model_s(batches):
    """The loop by hand is the decoder's own: else the tests above would compare two mistakes."""
    for name in VARIANTS:
        decoder, (inputs, targets) = model(name), batches[0]
        outputs, gradients, _ = by_hand(decoder, name, inputs, targets)
        last = outputs[-1].detach().requires_grad_()
        if name == "prenorm":  # the head sees the last stream
            loss = F.cross_entropy(
                decoder.lm_head(decoder.norm(last)).flatten(0, 1), targets.flatten(), reduction="sum"
            )
            assert torch.allclose(torch.autograd.grad(loss, last)[0], gradients[-1])
            assert torch.allclose(decoder.lm_head(decoder.norm(last)), decoder(inputs))


def test_a_probe_within_training_changes_nothing_of_it(batches):
    shape = dict(vocab_size=50, hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, num_experts=4)
    decoder = Decoder(DecoderConfig(**shape, num_experts_per_tok=2), seed=2)
    decoder.layers[0].o_proj = torch.nn.Sequential(decoder.layers[0].o_proj, torch.nn.Dropout(0.5))
    decoder.layers[1].eval()
    want = [module.training for module in decoder.modules()]
    found = probe(decoder, batches)
    assert [module.training for module in decoder.modules()] == want and decoder.training
    assert not any(layer.load.any() for layer in decoder.layers if hasattr(layer, "load"))
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert found == probe(decoder.eval(), batches)
