"""A model folder in, a converted one out: what `attnres convert SRC DST` runs."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from ... import json_text
from ...errors import Failure, UsageError
from ...files import is_gguf
from ..card import write_card
from ..kimi_k3 import door as kimi_k3
from ..vocabulary import open_tokenizer
from .door import convert, load, load_pretrained, read_config
from .proof import Sample, sample_tokens

TOLERANCE = 1e-4
"""Largest difference of logits in single precision that counts as the same function, relative to the largest logit."""

_NOT_KEPT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt*", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.npz"),
    *("*.tflite", "*.index.json", "adapter_config.json", "*.py", ".*"),
)
"""Weights in other forms and code, both of the original model. All other files of a folder are kept."""
_KEPT_FOLDERS = ("*chat_template*", "tokenizer*", "vocab*")
_log = logging.getLogger("attnres")


def convert_folder(
    src: str | Path,
    dst: str | Path,
    residual: str = "block_attnres",
    num_blocks: int | None = None,
    *,
    block_size: int | None = None,
    report: Callable[[str], None] = _log.info,
    **options: Any,
) -> dict[str, Any]:
    """Converts the causal language model in folder or GGUF file `src` and writes it to the new folder `dst`.

    A model in Kimi K3's layout has Attention Residuals already: it is written as a native one, with the same weights.

    What else is in the folder comes along: the tokenizer and its code, and the licence; a model card says what was
    done, above the original's.

    The weights are written as they are stored, in their dtype. Before that the original and the converted model run
    on the same sample tokens in single precision, and `report` gets one line with the largest difference of their
    logits.

    Args:
        src: a folder with config.json and safetensors weights; or a GGUF file, whose weights are dequantised.
        dst: a folder that does not exist yet, or is empty. It appears complete or not at all.
        residual, num_blocks, block_size, options: as in `attnres.hf.convert`.
        report: called with each line of progress.

    Returns {"source", "destination", "architecture", "model_class", "residual", "residual_options", "num_layers",
    "parameters_before", "parameters_added", "dtype", "sample_tokens", "largest_difference", "largest_logit",
    "relative_difference"}, where differences are absolute unless said otherwise, and None where nothing was compared.

    Raises UsageError for folders and models that cannot be converted; Failure if the converted model computes
    something else, in which case nothing is written, or if writing fails.
    """
    source, destination = Path(src), Path(dst)
    config = _check_folders(source, destination)
    sizes: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size, **options}
    result: dict[str, Any] = {"source": str(source), "destination": str(destination), "architecture": config.model_type}
    if kimi_k3.is_kimi_k3(source):
        return {**result, "architecture": "kimi_k3", **_rewrite(source, destination, residual, sizes, report)}
    result |= convert_and_compare(load_pretrained(source, dtype=torch.float32).eval(), residual, sizes)
    report(
        f"largest difference of logits {result['largest_difference']:.3g}, relative to the largest logit "
        f"{result['relative_difference']:.3g}, over {result['sample_tokens']} sample tokens in float32"
    )
    if not result["relative_difference"] <= TOLERANCE:
        raise Failure(
            f"the converted model computes something else (relative difference {result['relative_difference']:.3g}, "
            f"allowed {TOLERANCE:g}); nothing was written"
        )
    model = load_pretrained(source, dtype="auto")
    before = model.num_parameters()
    convert(model, residual, **sizes)
    write_folder(model, source, destination)
    report(f"wrote {destination}")
    return result | _described(model, before)


def _rewrite(
    source: Path, destination: Path, residual: str, sizes: dict[str, Any], report: Callable[[str], None]
) -> dict[str, Any]:
    if residual != "block_attnres" or any(value is not None for value in sizes.values()):
        raise UsageError(
            f"the model in {source} has Block AttnRes already, with blocks of its own; leave out --residual, "
            "--num-blocks and --block-size"
        )
    model = load(source, dtype="auto")
    report(
        "the model has Attention Residuals already, in Kimi K3's layout: its weights go as they are into the native one"
    )
    write_folder(model, source, destination)
    report(f"wrote {destination}")
    compared = ("sample_tokens", "largest_difference", "largest_logit", "relative_difference")
    return dict.fromkeys(compared) | _described(model, model.num_parameters())


def _described(model: Any, before: int) -> dict[str, Any]:
    return {
        "model_class": type(model).__name__,
        "residual": model.config.residual,
        "residual_options": dict(model.config.residual_options),
        "num_layers": model.base_model.residual.num_layers,
        "parameters_before": before,
        "parameters_added": model.num_parameters() - before,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _check_folders(source: Path, destination: Path) -> Any:
    """The config of the model in `source`, if both folders are fit for a conversion."""
    if not source.is_dir() and not is_gguf(source):
        raise UsageError(f"{source} is neither a folder nor a GGUF file; download the model first and give its folder")
    config = read_causal_config(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists already; name a folder that does not, or remove it")
    return config


def read_causal_config(source: str | Path) -> Any:
    """The config of a causal language model in full precision: a folder, a GGUF file or a Hub name.

    Raises UsageError for another model, and a quantised one.
    """
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None and not is_gguf(source):
        raise UsageError(f"the model in {source} is quantised; convert the original, then quantise the result")
    classes = config.architectures or []
    if classes and not any(name.endswith(("CausalLM", "LMHeadModel")) for name in classes):
        raise UsageError(f"{source} holds a {classes[0]}, no causal language model; convert it with attnres.hf.convert")
    return config


@torch.no_grad()
def convert_and_compare(model: Any, residual: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Converts a model in evaluation mode, in place, and says how far its logits on sample tokens moved."""
    length = min(64, getattr(model.config, "max_position_embeddings", None) or 64)
    sample = Sample(*(t.to(model.device) for t in sample_tokens(model.config.vocab_size, length)))
    before = model(**sample._asdict(), use_cache=False).logits
    after = convert(model, residual, verify=False, **sizes)(**sample._asdict(), use_cache=False).logits
    real = sample.attention_mask.bool()
    difference = float((after - before)[real].abs().max())
    largest = float(before[real].abs().max())
    return {
        "sample_tokens": int(real.sum()),
        "largest_difference": difference,
        "largest_logit": largest,
        "relative_difference": difference / largest if largest else difference,
    }


def write_folder(model: Any, source: str | Path, destination: Path) -> None:
    """Writes a converted model with its card and what else `source`, its original, has: the tokenizer, the licence.

    It goes beside the destination, which takes its name at the end: a crash leaves no half a model there. source: a
    folder, a GGUF file or a Hub name. Raises Failure if it cannot be written.
    """
    source = Path(source) if Path(source).exists() else source
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        beside = None if isinstance(source, str) else source.parent if is_gguf(source) else source
        write_card(model, partial, beside)
        model.save_pretrained(partial)
        if isinstance(source, str) or is_gguf(source):
            open_tokenizer(source).save_pretrained(partial)
        else:
            _keep_others(source, partial)
        if destination.is_dir():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        raise Failure(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _keep_others(source: Path, destination: Path) -> None:
    """Copies what is beside the weights in `source` and not in `destination`: tokenizer, licence, model card."""
    code = _tokenizer_code(source)
    for path in sorted(source.iterdir()):
        if (destination / path.name).exists():
            continue
        if path.is_dir():
            if any(path.match(pattern) for pattern in _KEPT_FOLDERS):
                shutil.copytree(path, destination / path.name)
        elif path in code or (path.is_file() and not any(path.match(pattern) for pattern in _NOT_KEPT)):
            shutil.copyfile(path, destination / path.name)


def _tokenizer_code(folder: Path) -> set[Path]:
    """The files of code that the tokenizer's or processor's settings name, and what those import beside them."""
    found: set[Path] = set()
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        try:
            named = json_text.parse_object((folder / name).read_bytes()).get("auto_map")
        except (OSError, ValueError):  # the conversion does not need it
            continue
        named = list(named.values()) if isinstance(named, dict) else []
        classes = [c for value in named for c in (value if isinstance(value, list) else [value])]
        files = [folder / f"{c.split('.')[0]}.py" for c in classes if isinstance(c, str)]
        for file in (file for file in files if file.is_file()):
            found |= {file, *map(Path, get_relative_import_files(file))}
    return found
