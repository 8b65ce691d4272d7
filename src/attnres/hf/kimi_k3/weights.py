"""The tensors of a folder in Kimi K3's layout as those of an `AttnResForCausalLM`.

Which are there, of which shape and type, is compared with the config from the files' headers, before any is read.
Dimensions of one do not count: a convolution is [N, 1, W] there and [N, W] here, A_log [H] or [1, 1, H, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import json_text
from ...errors import Failure, UsageError, first_line
from ...model import Decoder
from ..configuration import AttnResConfig
from .names import ATTENTION, FEED_FORWARD, LOW_RANK_GATE, OUTPUT_READ, OUTSIDE, PREFIX, READS

_log = logging.getLogger(__name__)

_NOT_TEXT = ("vision_tower.", "mm_projector.")
_INDEX = "model.safetensors.index.json"


class Target(NamedTuple):
    """One tensor of ours, of the `shape` of what each of `theirs` is; they are stacked where they are `many`."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    many: bool = False


class Weights:
    """Where the tensors of the text model in `folder` lie, by their names without the prefix.

    Raises UsageError where there are no safetensors files, or they do not fit the config; Failure for a damaged file.
    """

    def __init__(self, folder: Path, config: AttnResConfig) -> None:
        self._files: dict[str, tuple[Any, str]] = {}
        others = 0
        for path in _files(folder):
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except (OSError, SafetensorError) as error:
                raise Failure(f"the weight file {path} is damaged ({first_line(error)}); fetch it again") from error
            for name in names:
                if name.startswith(_NOT_TEXT):
                    others += 1
                else:
                    self._files[name.removeprefix(PREFIX)] = file, name
        if others:
            _log.warning("%s: the text model alone is read, without %d tensors for images", folder, others)
        self._targets = list(_targets(config))
        self._check(folder, tied=config.tie_word_embeddings)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by the names of an `AttnResForCausalLM`, in the types that they are stored in."""
        return {
            target.ours: torch.stack(found) if target.many else found[0]
            for target in self._targets
            for found in [[self._read(name).reshape(target.shape) for name in target.theirs]]
        }

    def _read(self, name: str) -> Tensor:
        file, stored = self._files[name]
        return file.get_tensor(stored)

    def _check(self, folder: Path, tied: bool) -> None:
        wanted = {name: target.shape for target in self._targets for name in target.theirs}
        unread = {name for name in self._files if name not in wanted and not name.endswith("rotary_emb.inv_freq")}
        if tied:
            unread.discard("lm_head.weight")
        packed = sorted(name for name in unread if name.endswith(("_packed", "_scale", "_scale_inv")))
        for name in wanted:
            if name in self._files:
                file, stored = self._files[name]
                found = file.get_slice(stored)
                if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    packed.append(name)
                elif _plain(found.get_shape()) != _plain(wanted[name]):
                    raise UsageError(
                        f"the weights in {folder} do not fit its config.json: {name} is {found.get_shape()}, and it "
                        f"must be {list(wanted[name])}"
                    )
        if packed:
            raise UsageError(
                f"the weights in {folder} are quantised, such as {packed[0]}, and are read in bf16 or wider only; take "
                "a checkpoint that has been dequantised"
            )
        for kind, names in (("missing", wanted.keys() - self._files.keys()), ("unexpected", unread)):
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UsageError(f"the weights in {folder} do not fit its config.json: {kind} {min(names)}{others}")


def _files(folder: Path) -> list[Path]:
    try:
        index = json_text.parse_object((folder / _INDEX).read_bytes())
        files = sorted({folder / name for name in index["weight_map"].values()})
    except FileNotFoundError:
        files = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{folder / _INDEX} cannot be read ({first_line(error)}); fetch it again") from error
    if not files:
        raise UsageError(f"{folder} holds no safetensors files; Kimi K3 models are read from these alone")
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}, which {_INDEX} names, is not there; fetch it")
    return files


def _targets(config: AttnResConfig) -> Iterator[Target]:
    """Every tensor of ours, the embedding first."""
    with torch.device("meta"):
        decoder = Decoder(config.decoder_config())
    state = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for name in OUTSIDE:
        if name.ours != "lm_head.weight":
            yield Target(f"model.{name.ours}", (name.theirs,), state[name.ours])
        elif not config.tie_word_embeddings:
            yield Target(name.ours, (name.theirs,), state[name.ours])
    reads = [f"model.layers.{i}.{read.theirs}" for i in range(config.num_hidden_layers) for read in READS]
    reads.append(OUTPUT_READ.theirs)
    for ours, part in (("pseudo_query", "proj"), ("key_norm", "norm")):
        names = tuple(f"{read}_{part}.weight" for read in reads)
        yield Target(f"model.residual.{ours}", names, (config.hidden_size,), many=True)
    for layer in range(config.num_layers):
        block, prefix = layer // 2, f"layers.{layer}."
        kind = config.attention_kinds[block]
        feed_forward = "experts" if config.has_experts(block) else "swiglu"
        table = FEED_FORWARD[feed_forward] if layer % 2 else (*ATTENTION[kind], *LOW_RANK_GATE)
        for name in table:
            if prefix + name.ours in state:
                shape, many = state[prefix + name.ours], name.form == "experts"
                theirs = tuple(name.theirs.format(expert=expert) for expert in range(shape[0] if many else 1))
                whole = tuple(f"model.layers.{block}.{one}" for one in theirs)
                yield Target(f"model.{prefix}{name.ours}", whole, shape[1:] if many else shape, many)


def _plain(shape: Any) -> list[int]:
    return [size for size in shape if size != 1]
