"""TRL's trainers: a few steps on a few bytes, of native and converted models."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="trl is not installed")
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from attnres.data.tokenizer import ByteTokenizer

from .converted import with_moved_queries

BYTES = {"vocab_size": 257, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}
OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "weight_decay": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
TEXTS = [{"text": "depth is read, not summed"}] * 8
CHOICES = [{"prompt": "depth is", "chosen": " read", "rejected": " lost"}] * 8
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    ByteTokenizer().save(folder)
    return AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")


@pytest.fixture(params=["native", "llama", "qwen3"])
def model(request, tmp_path):
    """From a folder, which is where DPO takes its reference model from."""
    with_moved_queries(request.param, **BYTES).save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def train(trainer, model):
    """The losses of all steps; the queries move and do not decay."""
    query = model.model.residual.pseudo_query
    before = query.detach().clone()
    trainer.train()
    (group,) = [group for group in trainer.optimizer.param_groups if any(p is query for p in group["params"])]
    assert group["weight_decay"] == 0
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0, 0.5}
    assert (query != before).any(1)[1:].all()  # a query of the embedding alone has nothing to choose
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_supervised_fine_tuning(model, tokenizer, tmp_path):
    options = SFTConfig(str(tmp_path / "sft"), max_length=32, **OPTIONS)
    trainer = SFTTrainer(model, options, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer)
    losses = train(trainer, model)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned.model.residual.pseudo_query, model.model.residual.pseudo_query)


def test_preferences_against_the_model_that_it_was(model, tokenizer, tmp_path):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = DPOConfig(str(tmp_path / "dpo"), **OPTIONS)
    trainer = DPOTrainer(model, args=options, train_dataset=Dataset.from_list(CHOICES), processing_class=tokenizer)
    losses = train(trainer, model)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "both models are the same before the first step"
    assert losses[-1] < losses[0] - 0.1
    reference = trainer.ref_model
    assert type(reference) is type(model)
    assert all(torch.equal(p, start[name]) for name, p in reference.named_parameters())
