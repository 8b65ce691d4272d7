"""Every causal model type that transformers knows: converted exactly, or refused in a sentence.

A release of transformers with a type that converts and is not in the table fails here, and so does one whose layers
have changed.
"""

import copy

import pytest
import torch
import transformers
from packaging import version
from transformers import CONFIG_MAPPING

from attnres import hf
from attnres.errors import UsageError
from attnres.hf.convert import table

from .tiny import TYPES, UNBUILT, build, in_double

NO_CACHE = {"recurrent_gemma"}
"""Whose outputs hold no cache that a caller could give back."""
OLDER = {
    "cohere_compass_text": "makes no frequencies for heads of the size that is asked for",
    "lfm2": "saves layer types that it does not know when it reads them",
    "lfm2_moe": "saves layer types that it does not know when it reads them",
    "phimoe": "mixes precisions in its rotary embedding where the rest of it is in double",
}
"""What transformers before 5.23 does with some types."""
PRECISE = 1e-9


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def batch():
    """Ids and mask; the second row has padding on its left."""
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def computed(model):
    """Logits of what is no padding, and the gradients of all parameters."""
    ids, mask = batch()
    model.zero_grad()
    logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype))
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def decoded(model):
    """Logits of a chunk, then of one token after the other on the cache."""
    ids = batch()[0][:1]
    outputs = [model(ids[:, :6], use_cache=True)]
    for t in range(6, ids.shape[1]):
        outputs.append(model(ids[:, t : t + 1], past_key_values=outputs[-1].past_key_values, use_cache=True))
    return torch.cat([output.logits for output in outputs], 1)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in UNBUILT])
def test_is_exact_or_refused(model_type, tmp_path):
    if model_type in OLDER and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip(f"this transformers {OLDER[model_type]}")
    original = build(model_type)
    other = copy.deepcopy(original)
    with in_double():
        try:
            model = hf.convert(copy.deepcopy(original), num_blocks=3)
        except UsageError as error:
            assert "\n" not in str(error)
            assert original.base_model.config.model_type not in table.ARCHITECTURES, error
            return
        assert model.config.original.model_type in table.ARCHITECTURES, "exact, and not in the table yet"
        if original.device.type == "meta":  # it stays large, and computes nothing; its language model is proven apart
            assert model.config.original.model_type in {*TYPES} - {model_type}
            return
        logits, gradients = computed(original)
        assert logits.std() > 0.05  # a model whose logits hardly differ would prove nothing
        largest = max(g.abs().max() for g in gradients.values())
        for converted in (model, hf.convert(other, "full_attnres")):
            found, found_gradients = computed(converted)
            assert relative(found, logits) < PRECISE
            for name, gradient in gradients.items():
                assert (found_gradients[name] - gradient).abs().max() < PRECISE * largest, name
            if model_type not in NO_CACHE:
                assert relative(decoded(converted), decoded(original)) < PRECISE
    converted.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path, dtype=torch.float64, attn_implementation="eager").to(torch.float64)
    if "expert" in " ".join(dict(loaded.named_parameters())):
        loaded.set_experts_implementation("eager")
    assert type(loaded) is type(converted)
    for name, value in converted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with in_double():  # but for constants that a model computes in single precision when it is made
        assert relative(computed(loaded)[0], logits) < 1e-6


@pytest.mark.parametrize("model_type", [name for name in TYPES if name in UNBUILT])
def test_what_transformers_cannot_make_of_a_config_alone(model_type):
    """What it can make belongs to the test above."""
    try:
        build(model_type)
    except Exception:  # its own, whatever that is
        return
    pytest.fail(f"{model_type} can be built, which was left out because it {UNBUILT[model_type]}")


def test_auto_config_finds_the_converted_form_of_every_type():
    for name in (name for name in table.ARCHITECTURES if name in CONFIG_MAPPING):
        converted = CONFIG_MAPPING[table.TYPE_PREFIX + name]
        assert converted.original is CONFIG_MAPPING[name] and converted.model_type == table.TYPE_PREFIX + name


def test_the_bar():
    """As many types as transformers knows of those in the table, without what stands for one of them."""
    assert sum(name in CONFIG_MAPPING for name in table.ARCHITECTURES) >= 70
