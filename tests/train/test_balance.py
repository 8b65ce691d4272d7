"""A run of a decoder whose MLPs are mixtures of experts: loads are counted once, recorded, and balanced."""

import pytest
import torch

from attnres.model import DecoderConfig
from attnres.model.layers.experts import MixtureOfExperts
from attnres.run.config import TrainConfig
from attnres.train.balance import balance_experts
from attnres.train.optim import OptimConfig
from attnres.train.trainer import train

from ..command_line import metrics


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_counts_every_token_once_and_records_the_load(corpus_file, tmp_path, monkeypatch, checkpointing):
    totals, update = [], MixtureOfExperts.update_bias
    monkeypatch.setattr(
        MixtureOfExperts, "update_bias", lambda self: (totals.append(self.load.sum().item()), update(self))
    )
    config = TrainConfig(
        data=str(corpus_file), cache_dir=tmp_path / "cache", out=tmp_path / "run", device="cpu", precision="float32",
        steps=3, batch_size=2, context=16, accumulate=2, checkpointing=checkpointing, validation_tokens=80,
        validate_every=1, log_every=1, checkpoint_every=3, optim=OptimConfig(optimizer="muon", warmup_steps=1),
        model=DecoderConfig(
            vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, residual="block_attnres",
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=0,
        ),
    )  # fmt: skip
    model = train(config).model
    assert totals == [2 * 2 * 16 * 2] * 6  # accumulation, rows, tokens, experts of a token; layers and steps
    records = [record for record in metrics(config.out) if "loss" in record]
    assert len(records) == 3
    assert all(0 <= record["min_load"] <= 1 <= record["max_load"] <= 2 for record in records)
    biases = [module.correction_bias for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert all(0 < bias.abs().max() < 0.01 and bias.mean().abs() < 1e-8 for bias in biases)


def test_loads_are_relative_to_the_mean_and_averaged_over_layers():
    shape = dict(hidden_size=8, intermediate_size=16, num_experts=4, experts_per_token=2)
    layers = [MixtureOfExperts(**shape) for _ in range(2)]
    layers[0].load += torch.tensor([4, 2, 2, 0])
    layers[1].load += torch.tensor([5, 5, 5, 5])
    assert balance_experts(layers) == {"max_load": 1.5, "min_load": 0.5}
    assert balance_experts([torch.nn.Linear(2, 2)]) == {}
