"""peft's adapters with the residual connection beside them: saved, loaded on a fresh base, merged."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="peft is not installed")
import peft

from attnres import hf

from .converted import tokens, with_moved_queries

TARGETS = ["q_proj", "v_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*deprecated:FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("residual", ["block_attnres", "full_attnres"])
@pytest.mark.parametrize("name", ["native", "llama", "qwen3"])
def test_an_adapter_round_trips_exactly(name, residual, tmp_path):
    base = with_moved_queries(name, residual)
    plain = base(tokens()).logits
    base.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["residual"])
    adapted = peft.get_peft_model(copy.deepcopy(base), options).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")

    loaded = peft.PeftModel.from_pretrained(hf.load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens()).logits, expected)
    assert not torch.allclose(expected, plain)
    with loaded.disable_adapter():
        assert torch.equal(loaded(tokens()).logits, plain)

    moved = loaded.base_model.model.model.residual.modules_to_save["default"].pseudo_query.clone()
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    assert torch.equal(merged.model.residual.pseudo_query, moved)
    merged.save_pretrained(tmp_path / "merged")
    whole = hf.load(tmp_path / "merged")
    assert type(whole) is type(base) and torch.equal(whole(tokens()).logits, merged(tokens()).logits)
    assert [*whole.state_dict()] == [*base.state_dict()]
