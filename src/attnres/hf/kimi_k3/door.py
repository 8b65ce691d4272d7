"""Models in Kimi K3's layout, opened as native ones: Block AttnRes, delta and latent attention, latent experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..configuration import AttnResConfig
from ..modeling import AttnResForCausalLM
from . import config as k3
from .weights import Weights


def read_config(folder: str | Path) -> AttnResConfig | None:
    """Our config of the model in a folder in Kimi K3's layout; None for any other folder.

    Raises UsageError for a model that this package does not compute, in one sentence that names why.
    """
    text = k3.text_of(folder)
    return None if text is None else k3.native(text)


def is_kimi_k3(folder: str | Path) -> bool:
    """Whether a folder is in Kimi K3's layout."""
    return k3.text_of(folder) is not None


def load(folder: str | Path, config: AttnResConfig, **options: Any) -> AttnResForCausalLM:
    """The model of a folder in Kimi K3's layout; experts are held twice while it is read.

    config: what `read_config` returned. options: of `from_pretrained`, such as dtype or device_map. Raises UsageError
    if the weights do not fit the config, Failure if a file is damaged.
    """
    weights = Weights(Path(folder), config)
    if (Path(folder) / "generation_config.json").is_file():
        options.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    model: Any = AttnResForCausalLM.from_pretrained(None, config=config, state_dict=weights.state_dict(), **options)
    model.config.name_or_path = str(folder)
    return model
