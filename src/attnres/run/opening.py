"""The one door to a trained model: a run, a step of it, a native or converted folder, or a pretrained one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..data.tokenizer import load_tokenizer, load_tokenizer_from
from ..errors import Failure, UsageError
from ..files import is_gguf
from ..model import Decoder
from . import hardware
from .find import is_run, root_of
from .folder import newest_checkpoint, open_checkpoint, read_config

Kind = Literal["run", "native", "converted", "pretrained"]


class Opened(NamedTuple):
    """A trained model.

    model: in evaluation mode, on its device: the Decoder of a run, else a transformers model. tokenizer: an
    `attnres.data.tokenizer.Tokenizer`. With `transformers` both are transformers' own, also for a run.
    kind: what the folder was: "run" (or a step of one), "native", "converted", or "pretrained" (without Attention
    Residuals).
    """

    model: Any
    tokenizer: Any
    kind: Kind


def open(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
    transformers: bool = False,
    pretrained: bool = False,
) -> Opened:
    """Opens the output of `attnres train`, a checkpoint in it, or a folder that `save_pretrained` wrote.

    Args:
        path: the folder; of transformers models also a GGUF file, which is dequantised, or a name on the Hub.
        device: "auto" (CUDA where there is one), "cpu", "cuda:1", ...
        dtype: of the weights, "float32", "bfloat16", ...; "auto" is what they were saved in.
        tokenizer: another than the model's own, as `attnres train --tokenizer` takes it; not with `transformers`.
        transformers: whether model and tokenizer are to be transformers' own, also for a run.
        pretrained: whether any causal language model of transformers will do.

    Raises UsageError for a folder that holds none of these, for what does not fit together and for an unknown device or
    dtype; Failure for a damaged file and a run that has saved nothing yet.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"dtype must be auto or a torch dtype such as bfloat16; it is {dtype!r}")
    where = hardware.find_device(device)
    if transformers or is_gguf(path) or not is_run(path):
        model, kind = _in_transformers(path, dtype, transformers, pretrained)
    else:
        model, kind = _decoder(Path(path), dtype), "run"
    spelling = _tokenizer(root_of(path) if kind == "run" else path, model, kind, tokenizer, transformers)
    return Opened(model.to(where).eval(), spelling, kind)


def _decoder(path: Path, dtype: str) -> Decoder:
    root = root_of(path)
    config = read_config(root)
    chosen = path if path != root else newest_checkpoint(root)
    if chosen is None:
        raise Failure(f"{root} has no checkpoint yet; train on with --resume first")
    model = Decoder(config.model)
    model.load_state_dict(open_checkpoint(chosen, config).model("cpu"))
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _in_transformers(path: str | Path, dtype: str, of_run: bool, pretrained: bool) -> tuple[nn.Module, Kind]:
    if not of_run and not os.path.exists(Path(path) / "config.json") and not is_gguf(path):
        raise UsageError(
            f"{path} is not a run: it has no config.json; give the --out of an `attnres train`, or the folder of a "
            "native or converted model"
        )
    from ..hf import AttnResForCausalLM, load
    from ..hf.convert import door

    if not is_gguf(path) and is_run(path):
        return AttnResForCausalLM.from_run(path, dtype=dtype), "run"
    kind = door.kind_of(door.read_config(path))
    if kind == "pretrained" and pretrained:
        return door.load_pretrained(path, dtype=dtype), kind
    return load(path, dtype=dtype), kind


def _tokenizer(folder: str | Path, model: Any, kind: Kind, spec: str | None, transformers: bool) -> Any:
    if transformers:
        from ..hf.vocabulary import check_vocabulary, open_tokenizer

        opened = open_tokenizer(folder)
        check_vocabulary(opened, model.get_input_embeddings().num_embeddings, folder)
        return opened
    if spec is not None:
        return load_tokenizer(spec, None, folder)
    found = _of_gguf(folder) if is_gguf(folder) else load_tokenizer_from(folder)
    if found.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"{Path(folder, 'tokenizer.json')} knows {found.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; put the {kind if kind == 'run' else 'model'}'s own tokenizer.json back"
        )
    return found


def _of_gguf(path: str | Path) -> Any:
    from ..hf.vocabulary import open_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        open_tokenizer(path).save_pretrained(folder)
        return load_tokenizer_from(folder)
