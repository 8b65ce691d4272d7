"""A model's tokenizer, and whether the model has a row for every token that it knows: asked once, when both are opened.

Otherwise the first text with a token too many would end whatever is running, hours later.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import UsageError, first_line
from .gguf_file import place_of


def open_tokenizer(name: str | Path) -> Any:
    """The transformers tokenizer of a folder, GGUF file or Hub name. Raises UsageError for none, or a damaged one."""
    place, more = place_of(name)
    try:
        return AutoTokenizer.from_pretrained(place, **more)
    except Exception as error:  # whatever a damaged file leads transformers and tokenizers to
        if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
            raise UsageError(f"{name} has no tokenizer; save it there with tokenizer.save_pretrained") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"the tokenizer of {name} cannot be opened ({reason}); save it there anew") from error


def check_vocabulary(tokenizer: Any, size: int, name: object) -> None:
    """Raises UsageError if a transformers tokenizer gives ids of `size` or more, the tokens of the model `name`."""
    known = max(tokenizer.get_vocab().values(), default=-1) + 1
    if known > size:
        raise UsageError(
            f"the tokenizer of {name} knows {known} tokens and the model {size}; give it the tokenizer that it was "
            f"trained with, or enlarge it with resize_token_embeddings({known})"
        )
