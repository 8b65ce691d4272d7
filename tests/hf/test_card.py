"""The model card that converted models are saved with."""

import pytest
import torch
from huggingface_hub import ModelCard

from attnres import hf
from attnres.hf.convert.folder import convert_folder

from .converted import build

CARD = """---
license: apache-2.0
language: [en]
tags: [tiny]
base_model: somebody/llama
---
# A tiny Llama

Trained on letters.
"""


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "tiny-llama"
    build("llama", torch.float32).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE.txt").write_text("a licence")
    return folder


def holds(card):
    assert card.data.license == "apache-2.0" and card.data.language == ["en"]
    assert card.data.tags == ["tiny", "attention-residuals"] and card.data.library_name == "transformers"
    assert card.data.base_model == "somebody/llama"
    assert "# tiny-llama with Attention Residuals" in card.text and "num_blocks=3" in card.text
    assert 'attnres.hf.load("this-folder")' in card.text
    assert card.text.index("with Attention Residuals") < card.text.index("Trained on letters.")


def test_a_converted_folder_has_a_card_above_that_of_the_original(original, tmp_path):
    convert_folder(original, tmp_path / "converted", num_blocks=3)
    holds(ModelCard.load(tmp_path / "converted" / "README.md"))
    assert (tmp_path / "converted" / "LICENSE.txt").read_text() == "a licence"
    assert (original / "README.md").read_text() == CARD


def test_save_pretrained_writes_it_once_and_carries_it_along(original, tmp_path):
    model = hf.convert(type(build("llama")).from_pretrained(original), num_blocks=3)
    model.save_pretrained(tmp_path / "first")
    holds(ModelCard.load(tmp_path / "first" / "README.md"))
    assert (tmp_path / "first" / "LICENSE.txt").exists()
    text = (tmp_path / "first" / "README.md").read_text().replace("Trained on letters", "Trained on")
    (tmp_path / "first" / "README.md").write_text(text)
    hf.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text().strip() == text.strip()
    hf.load(tmp_path / "first").save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "README.md").read_text() == text


def test_a_model_from_nowhere_has_one_too(tmp_path):
    hf.convert(build("gpt2", torch.float32), "full_attnres").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "# gpt2 with Attention Residuals" in card.text and "`full_attnres`" in card.text
    assert card.data.base_model is None and card.data.license is None


@pytest.mark.parametrize("broken", [b"---\nlicense: [\n---\ntext", b"\xff\xfe\x00", b""])
def test_a_card_that_cannot_be_read_is_no_obstacle(original, tmp_path, broken):
    (original / "README.md").write_bytes(broken)
    convert_folder(original, tmp_path / "converted", num_blocks=3)
    assert "with Attention Residuals" in (tmp_path / "converted" / "README.md").read_text()
