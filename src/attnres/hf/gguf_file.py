"""Models in one GGUF file, which transformers reads into full precision: how its loaders are told."""

from pathlib import Path
from typing import Any

from transformers.utils import is_gguf_available

from ..errors import UsageError
from ..files import is_gguf


def place_of(path: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """(what `from_pretrained` takes for a folder, a name on the Hub or a GGUF file; its further options).

    Raises UsageError where a GGUF file cannot be read.
    """
    if not is_gguf(path):
        return path, {}
    if not is_gguf_available():
        raise UsageError(f"{path} is a GGUF file, for which gguf is needed; run: pip install gguf")
    return Path(path).parent, {"gguf_file": Path(path).name}


def forget_quantisation(model: Any) -> None:
    """Has a model that came from a GGUF file say what it is: whatever its file held, its weights are dequantised."""
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    model.is_quantized = False
