"""A tokenizer.json as the tokenizer of a GGUF file: what llama.cpp's byte-level BPE can do of it.

llama.cpp has no pre-tokenizers as data, it has names for those that it knows; so a tokenizer's is looked up by what it
does (`PRE_TOKENIZERS`). Sources: llama.cpp's `src/llama-vocab.cpp` and `conversion/base.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import json_text
from ..data.tokenizer import Tokenizer
from ..errors import UsageError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PRE_TOKENIZERS = {
    ("gpt-2",): "gpt-2",
    ("each digit", "gpt-2"): "smollm",
    (CONTRACTIONS + "\\p{N}" + REST, "bytes"): "qwen2",
    (CONTRACTIONS + "\\p{N}{1,3}" + REST, "bytes"): "llama-bpe",
}
"""llama.cpp's names of the steps in which a text is cut into words: "gpt-2" stands for a ByteLevel with its regex,
"bytes" for one without, "each digit" for Digits, and others for a Split by that regex."""
IGNORE_MERGES = ("llama-bpe",)
"""Those that take a word that is a token as it is, without asking the merges; the others do not."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


class Vocabulary(NamedTuple):
    """tokens: their spellings by id; types: llama.cpp's, of each; merges: "left right", first things first; pre: the
    name of the pre-tokenizer; special: ids by the key's name ("eos", "bos", ...); chat_template: Jinja, or None."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    chat_template: str | None

    def add_to(self, writer: Any, size: int) -> None:
        """Writes its keys; ids up to `size`, the model's, are filled up with unused tokens."""
        missing = range(len(self.tokens), size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([*self.tokens, *(f"[PAD{i}]" for i in missing)])
        writer.add_token_types([*self.types, *[UNUSED] * len(missing)])
        writer.add_token_merges(self.merges)
        for key, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
        writer.add_add_bos_token(False)  # as this package encodes prompts
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Tokenizer, special: dict[str, int], chat_template: str | None) -> Vocabulary:
    """What a GGUF file says of a tokenizer. Raises UsageError, which names what llama.cpp cannot do of it."""
    fields = json_text.parse_object(tokenizer.to_json())
    model = fields["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"is of the kind {model['type']}")
    for name in ("unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _refused(f"has {name} {model[name]!r}")
    if fields.get("normalizer") is not None:
        raise _refused(f"normalises texts ({fields['normalizer'].get('type')})")
    pre = _pre_tokenizer(fields.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != (pre in IGNORE_MERGES):
        state = "with" if model.get("ignore_merges") else "without"
        raise _refused(f"cuts texts as {pre}'s does, but {state} ignore_merges")
    spelt = {token: (name, NORMAL) for name, token in model["vocab"].items()}
    for added in fields.get("added_tokens", []):
        for name in ("single_word", "lstrip", "rstrip"):
            if added.get(name):
                raise _refused(f"has the token {added['content']!r} with {name}")
        spelt[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    rows = [spelt.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(spelt) + 1)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:  # an array may not be empty; no text has these two as symbols
        merges = [f"{tokenizer.end_name} {tokenizer.end_name}"]
    special = {"eos": tokenizer.end_of_document, **special}
    return Vocabulary([name for name, _ in rows], [kind for _, kind in rows], merges, pre, special, chat_template)


def _pre_tokenizer(fields: dict[str, Any] | None) -> str:
    steps = [] if fields is None else fields["pretokenizers"] if fields["type"] == "Sequence" else [fields]
    name = PRE_TOKENIZERS.get(tuple(map(_step, steps)))
    if name is None:
        shown = ", ".join(_step(step)[:60] for step in steps) or "nothing"
        raise _refused(f"cuts texts into words in a way that has no name there ({shown})")
    return name


def _step(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "gpt-2" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "each digit"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", kind)
    return kind


def _refused(what: str) -> UsageError:
    return UsageError(
        f"llama.cpp cannot do what the model's tokenizer does, which {what}; export --to kimi-k3, or a model with a "
        "byte-level BPE such as that of --tokenizer train:VOCAB"
    )
