"""A resumed run goes on exactly as if it had not stopped."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from attnres.run.checkpoint import load, rng_state, save, set_rng_state
from attnres.train.optim import OptimConfig, build_optimizer

from ..device import needs_gpu
from ..run.saved import assert_same


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.2)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.dropout(self.hidden(self.embed(tokens)).relu())))


def train(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(16, (32,)) if random.random() < 0.5 else torch.from_numpy(np.random.randint(16, size=32))
        optimizer.set_learning_rate(step, 12)
        nn.functional.cross_entropy(model(tokens), tokens.roll(-1)).backward()
        optimizer.clip_gradients()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path, name):
    config = OptimConfig(optimizer=name, lr=0.05, warmup_steps=2)
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    model = Tiny()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, range(6))
    path = save(tmp_path, 6, model.state_dict(), optimizer.state_dict(), {"rng": rng_state()}, keep=1)
    train(model, optimizer, range(6, 12))
    generators = rng_state()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99)
    resumed = Tiny()
    loaded = load(path)
    resumed.load_state_dict(loaded.model_tensors)
    continued = build_optimizer(resumed, config)
    continued.load_state_dict(loaded.optimizer_state)
    set_rng_state(loaded.state["rng"])
    train(resumed, continued, range(loaded.step, 12))

    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_same(continued.state_dict(), optimizer.state_dict())
    assert_same(rng_state(), generators)
    assert resumed.lm_head.weight is resumed.embed.weight


def test_torchs_own_state_dict_of_an_optimizer_comes_back(tmp_path):
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    loaded = load(save(tmp_path, 1, {}, optimizer.state_dict(), {}, keep=1)).optimizer_state
    assert_same(loaded, optimizer.state_dict())
    assert loaded["state"][0]["step"].shape == ()


@needs_gpu
def test_a_checkpoint_moves_between_devices_and_keeps_the_device_generator(tmp_path):
    model = nn.Linear(4, 4).cuda()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", warmup_steps=0))
    model(torch.ones(2, 4, device="cuda")).square().sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, model.state_dict(), optimizer.state_dict(), {"rng": rng_state()}, keep=1)
    expected = torch.rand(3, device="cuda")
    for device in ("cpu", "cuda"):
        loaded = load(path, device)
        assert {tensor.device.type for tensor in loaded.model_tensors.values()} == {device}
        resumed = nn.Linear(4, 4).to(device)
        resumed.load_state_dict(loaded.model_tensors)
        continued = build_optimizer(resumed, OptimConfig(optimizer="muon", warmup_steps=0))
        continued.load_state_dict(loaded.optimizer_state)
        resumed(torch.ones(2, 4, device=device)).square().sum().backward()
        continued.step()
        set_rng_state(loaded.state["rng"])
        assert torch.equal(torch.rand(3, device="cuda"), expected)
