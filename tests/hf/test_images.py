"""The language model inside a model for images and text, converted: the whole trains, saves, loads and generates."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

from attnres import hf
from attnres.errors import UsageError

from .converted import move_queries, randomise

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
IMAGE = 60
MARKS = {"image_token_index": IMAGE, "image_token_id": IMAGE}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def whole(family, vision, text, **more):
    config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text, **more)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def siglip(**sizes):
    return transformers.SiglipVisionConfig(**VISION, **sizes)


def qwen(family, **sizes):
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **sizes}
    return whole(family, vision, {**TEXT, "rope_parameters": ROPE}, image_token_id=IMAGE, vision_start_token_id=61)


BEYOND = {"out_hidden_size": 32, "intermediate_size": 24}
MODELS = {
    "llava": lambda: whole(
        "Llava",
        transformers.CLIPVisionConfig(**VISION, patch_size=8, projection_dim=16),
        transformers.LlamaConfig(**TEXT),
        **MARKS,
    ),
    "gemma3": lambda: whole(
        "Gemma3",
        siglip(patch_size=4),
        transformers.Gemma3TextConfig(**TEXT, sliding_window=5),
        mm_tokens_per_image=4,
        boi_token_index=61,
        **MARKS,
    ),
    "paligemma": lambda: whole(
        "PaliGemma",
        siglip(patch_size=8, projection_dim=32),
        transformers.GemmaConfig(**TEXT),
        projection_dim=32,
        **MARKS,
    ),
    "mistral3": lambda: whole(
        "Mistral3",
        transformers.PixtralVisionConfig(**VISION, patch_size=4),
        transformers.MistralConfig(**TEXT),
        spatial_merge_size=2,
        **MARKS,
    ),
    "qwen2_vl": lambda: qwen("Qwen2VL", embed_dim=16, hidden_size=32),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL", window_size=16, fullatt_block_indexes=[1], **BEYOND),
}
QWEN3 = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], **BEYOND}


def built(make):
    torch.manual_seed(0)
    model = make()
    return randomise(model).float().eval(), inputs(model)


def inputs(model):
    """One image, and a prompt in which its four tokens stand."""
    ids = torch.tensor([[1, 5, *[IMAGE] * 4, 7, 8, 9, 10, 11]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(0)
    if "Qwen" in type(model).__name__:
        given["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        given["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    if "Mistral3" in type(model).__name__:
        given["image_sizes"] = torch.tensor([[16, 16]])
    if "Gemma" in type(model).__name__:
        given["token_type_ids"] = (ids == IMAGE).long()
    return given


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_works_with_a_converted_language_model(name, tmp_path):
    model, given = built(MODELS[name])
    with torch.no_grad():
        expected = model(**given).logits
        blind = {**given, "pixel_values": given["pixel_values"] + 1}
        assert not torch.allclose(model(**blind).logits, expected, atol=1e-3)  # the image is looked at
    generated = model.generate(**given, max_new_tokens=4, do_sample=False)

    hf.convert(model.model.language_model, num_blocks=3)
    with torch.no_grad():
        assert torch.allclose(model(**given).logits, expected, atol=1e-3)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), generated)

    model.train()
    model(**given, labels=given["input_ids"]).loss.backward()
    residual = model.model.language_model.residual
    assert residual.pseudo_query.grad[1:].abs().amax(-1).gt(0).all()
    vision = [p for key, p in model.named_parameters() if "vision" in key or "visual" in key]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in vision)

    move_queries(model.eval().model.language_model)
    with torch.no_grad():
        moved = model(**given).logits
    assert not torch.allclose(moved, expected, atol=1e-3)
    own_class = "AttnRes" in type(model).__name__
    if own_class:
        with pytest.raises(UsageError, match=f"for language models; a {type(model).__name__} needs attnres"):
            model.save_pretrained(tmp_path, remote_code=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists() == own_class == (name in ("gemma3", "qwen2_vl", "qwen2_5_vl"))
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and "AttnRes" in type(loaded.model.language_model).__name__
    with torch.no_grad():
        assert torch.allclose(loaded(**given).logits, moved, atol=1e-5)
    assert torch.equal(
        loaded.generate(**given, max_new_tokens=4, do_sample=False),
        model.generate(**given, max_new_tokens=4, do_sample=False),
    )


def test_features_added_between_layers_are_refused():
    model, _ = built(lambda: qwen("Qwen3VL", **QWEN3))
    with pytest.raises(UsageError, match=r"'qwen3_vl_text' cannot be converted exactly: .*deepstack"):
        hf.convert(model.model.language_model)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_the_whole_is_refused_with_the_name_of_its_language_model(name):
    model, _ = built(MODELS[name])
    with pytest.raises(UsageError, match=r"is made of several models; convert its language_model, a \w+ of type"):
        hf.convert(copy.deepcopy(model))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_without_this_package_no_plain_model_is_loaded(name, tmp_path):
    model, _ = built(MODELS[name])
    hf.convert(model.model.language_model)
    assert type(pickle.loads(pickle.dumps(model)).config) is type(copy.deepcopy(model).config) is type(model.config)
    model.save_pretrained(tmp_path)
    for imports, expected in (("", 1), ("import attnres.hf; ", 0)):
        script = f"{imports}import transformers as t; t.AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})"
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert found.returncode == expected, found.stderr
        assert not expected or "attnres_" in found.stderr
