"""The models of the arms: what they are opened as, what of them is trained, and at which rates."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..errors import UsageError
from ..hf.convert.door import convert, load_pretrained, read_config
from ..hf.optim import parameter_groups, residual_parameters
from .config import PLAIN, UpgradeConfig


def check_packages(train: str) -> None:
    """Raises UsageError where a package is missing, which would be missed later."""
    if find_spec("accelerate") is None:
        raise UsageError("an upgrade needs the package accelerate; run: pip install 'attnres[hf]'")
    if train == "lora" and find_spec("peft") is None:
        raise UsageError("train='lora' needs the package peft; run: pip install peft")


def open_plain(name: str) -> Any:
    """The model as it was, in float32; from here on transformers shows no bars of its own beside the journal's."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load_pretrained(name, dtype=torch.float32)


def open_arm(config: UpgradeConfig, arm: str, seed: int) -> Any:
    """The model of an arm in float32, its parameters trainable as config.train says, its adapters drawn by the seed."""
    model = open_plain(config.model)
    if arm != PLAIN:
        name, options = config.conversion(arm)
        convert(model, name, **options)
    model.config.use_cache = False  # beside a cache transformers does not keep packed sequences apart
    if config.train == "lora":
        return _with_adapters(model, config.lora_rank, seed)
    if config.train == "residual":
        own = residual_parameters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in own)
    return model


def trained(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer(model: nn.Module, config: UpgradeConfig) -> torch.optim.Optimizer:
    """AdamW without weight decay, the residual connection at a rate of its own."""
    groups = parameter_groups(model, lr=config.rate, weight_decay=0.0, query_lr=config.query_rate)
    return torch.optim.AdamW(groups)


def finished(model: Any, config: UpgradeConfig) -> Any:
    """The model of an arm as it is saved: adapters merged, with a cache if the original has one."""
    if config.train == "lora":
        model = model.merge_and_unload()
    model.config.use_cache = getattr(read_config(config.model), "use_cache", True)
    return model


def _with_adapters(model: Any, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    kept = ["residual"] if residual_parameters(model) else None
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", modules_to_save=kept))
