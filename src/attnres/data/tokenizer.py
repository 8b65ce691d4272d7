"""Text to token ids and back: bytes, a `tokenizer.json`, a Hub name, or byte-level BPE learned from the corpus.

Design choices
- Bytes are the default: no package, no training, no unknown symbols. Ids 0..255 are the bytes, id 256 ends a document.
- Every tokenizer saves itself as the `tokenizer.json` of the library `tokenizers`, bytes too (a BPE without merges), so
  a run folder's tokenizer also opens with `transformers`. Reading bytes back still needs no package.
- Text is encoded as plain text: a document that spells out "<|endoftext|>" cannot forge the end of a document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import json_text
from ..errors import UsageError, first_line
from ..files import user_path, write_whole
from .cache import cached, write_text, writing
from .pieces import cut, cut_words

LOGGER = logging.getLogger(__name__)
END_OF_DOCUMENT = "<|endoftext|>"
# The end-of-text tokens of common public vocabularies, for a tokenizer.json that comes without a tokenizer_config.json.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")
BPE_SAMPLE_BYTES = 256 * 2**20
# Texts that end a token, whatever follows, in one tokenizer or another: a line, a sentence, a word, a number.
BEFORE = ("\n", ".", "a", "1", "\u6f22")


def load_tokenizer(
    spec: str, documents: Callable[[], Iterable[str | bytes]] | None, cache_dir: Path | str
) -> Tokenizer:
    """Tokenizer that `spec` names.

    "bytes"; "train:VOCAB", a byte-level BPE with VOCAB entries (the 256 bytes and the end of a document included)
    learned from the first 256 MiB of `documents` and kept in `cache_dir`; a `tokenizer.json` or a folder that holds
    one; else a name on the Hugging Face Hub. Raises UsageError for a spec that is none of these, a file that is
    damaged or a package that is missing.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("train:"):
        size = spec.removeprefix("train:")
        if not (size.isascii() and size.isdigit()) or int(size) < ByteTokenizer.vocab_size:
            raise UsageError(f"tokenizer {spec!r}: VOCAB in train:VOCAB must be a whole number of at least 257")
        if documents is None:
            raise UsageError(f"tokenizer {spec!r} needs a corpus to learn from; give a tokenizer.json instead")
        return _learned_bpe(int(size), documents, Path(cache_dir))
    path = user_path(spec)
    if spec and path.is_dir():
        return load_tokenizer_from(path)
    if path.is_file():
        return _from_file(path)
    if path.suffix == ".json" or path.is_absolute() or spec.startswith((".", "~")) or not spec:
        raise UsageError(f"tokenizer {spec!r} does not exist; give bytes, train:VOCAB, a tokenizer.json or a Hub name")
    return _from_hub(spec)


def load_tokenizer_from(run_dir: Path | str) -> Tokenizer:
    """Tokenizer that `save` left in `run_dir`. Raises UsageError where there is none or it cannot be read."""
    path = Path(run_dir, "tokenizer.json")
    if not path.is_file():
        raise UsageError(f"{run_dir} holds no tokenizer.json; give the output folder of a training run")
    return _from_file(path)


class Tokenizer(ABC):
    """Turns text into ids in 0..vocab_size-1 and back.

    `end_of_document` is the id that ends every document of a corpus, `end_name` its spelling; `fingerprint` is equal
    for equal tokenizers, on every machine.
    """

    vocab_size: int
    end_of_document: int
    end_name: str
    fingerprint: str

    @abstractmethod
    def encode(self, text: bytes | str) -> np.ndarray:
        """Ids [N] of the text, without the end of a document; bytes need not be UTF-8.

        Raises UsageError for text that the vocabulary cannot spell, which no byte-level one knows.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids, never fails: bytes that are not UTF-8 become U+FFFD; ends and unknown ids become nothing."""

    @abstractmethod
    def to_json(self) -> str:
        """Content of the `tokenizer.json` that defines this tokenizer."""

    def spell(self, token: int) -> str:
        """What one token stands for, to be shown: its text, or \\xNN for each byte that is part of a character."""
        if token == self.end_of_document:
            return self.end_name
        return self.decode([token])

    @property
    def marks_starts(self) -> bool:
        """Whether a text's first token tells that it stands first, as SentencePiece's leading space does."""
        return False

    def encode_batch(self, texts: Sequence[bytes | str], goes_on: Sequence[bool] = ()) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the tokenizer can.

        goes_on: which texts go on where a document was cut; those get no mark of a start.
        """
        return [self.encode(text) for text in texts]

    def save(self, path_dir: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder. Raises Failure where that fails."""
        config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end_name}, indent=2)
        for name, text in {"tokenizer_config.json": config, "tokenizer.json": self.to_json()}.items():
            path = Path(path_dir, name)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, partial(write_text, text=text))


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens: 256 bytes and the end of a document, so `vocab_size` is 257."""

    vocab_size = 257
    end_of_document = 256
    end_name = END_OF_DOCUMENT

    def __init__(self) -> None:
        self.fingerprint = _digest(self.to_json(), self.end_name)

    def encode(self, text: bytes | str) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        wanted = _int_array(ids)
        return wanted[(wanted >= 0) & (wanted < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def spell(self, token: int) -> str:
        return f"\\x{token:02x}" if 128 <= token < 256 else super().spell(token)

    def to_json(self) -> str:
        spelling = _byte_spelling()
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        fields = {
            "version": "1.0",
            "added_tokens": [{"id": self.end_of_document, "content": self.end_name, **flags}],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": spelling, "merges": []},
        }
        return json.dumps(fields)


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`; `end` names its end-of-document token, added where it has none."""

    def __init__(self, backend: Any, end: str | None = None) -> None:
        # Files of published models may carry truncation and padding, which would cut documents silently.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        names = [name for name in (end, *KNOWN_ENDS) if name and name in backend.get_vocab()]
        if not names:
            names = [END_OF_DOCUMENT]
            backend.add_special_tokens(names)
        vocabulary = backend.get_vocab()
        self._backend = backend
        self.end_name = names[0]
        self.end_of_document = vocabulary[names[0]]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = _digest(self.to_json(), self.end_name)

    def encode(self, text: bytes | str) -> np.ndarray:
        return self.encode_batch([text])[0]

    @cached_property
    def marks_starts(self) -> bool:
        for text in BEFORE:
            try:
                line, again, both = self._ids([f"{text}\n", text, f"{text}\n{text}"])
            except UsageError:  # the vocabulary cannot spell it
                continue
            if not np.array_equal(both, np.concatenate([line, again])):
                return True
        return False

    def encode_batch(self, texts: Sequence[bytes | str], goes_on: Sequence[bool] = ()) -> list[np.ndarray]:
        spelled = [_as_text(text) for text in texts]
        if not (any(goes_on) and self.marks_starts):
            return self._ids(spelled)
        first = iter(self._ids([text for text, later in zip(spelled, goes_on, strict=True) if not later]))
        rest = iter(self._inside([text for text, later in zip(spelled, goes_on, strict=True) if later]))
        return [next(rest if later else first) for later in goes_on]

    def _inside(self, texts: list[str]) -> list[np.ndarray]:
        """Ids [N] of texts as they are inside a document: behind a text that none of their tokens reaches into."""
        found: dict[int, np.ndarray] = {}
        for before in BEFORE:
            left = [i for i in range(len(texts)) if i not in found]
            try:
                known, *encoded = self._ids([before, *(before + texts[i] for i in left)])
            except UsageError:  # it cannot spell `before`, or the texts, which the last call below tells
                continue
            if self.decode(known).endswith(before):  # else it became an unknown symbol, which may swallow what follows
                cut = len(known)
                found |= {
                    i: ids[cut:] for i, ids in zip(left, encoded, strict=True) if np.array_equal(ids[:cut], known)
                }
        if left := [i for i in range(len(texts)) if i not in found]:
            LOGGER.warning(
                "the tokenizer marks the start of a text, and %d pieces of long documents with it", len(left)
            )
            found |= dict(zip(left, self._ids([texts[i] for i in left]), strict=True))
        return [found[i] for i in range(len(texts))]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception where a token for unknown symbols is missing
            raise UsageError(f"the tokenizer cannot encode this text, give another: {error}") from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        wanted = _int_array(ids)
        known = wanted[(wanted >= 0) & (wanted < self.vocab_size) & (wanted != self.end_of_document)]
        return self._backend.decode(known.tolist(), skip_special_tokens=False)

    def spell(self, token: int) -> str:
        name = self._backend.id_to_token(token)
        if name is None or token in self._backend.get_added_tokens_decoder():
            return name or ""
        text = self.decode([token])
        if "\ufffd" in text and all(character in _byte_spelling() for character in name):
            raw = bytes(_byte_spelling()[character] for character in name)
            return raw.decode("utf-8", errors="backslashreplace")
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece's spelling of a byte
            byte = int(name[3:5], 16)
            return chr(byte) if byte < 128 else f"\\x{byte:02x}"
        return name.replace("\u2581", " ") if "\u2581" in name else text  # decoding drops the first word's space

    def to_json(self) -> str:
        return self._backend.to_str()


@cache
def _byte_spelling() -> dict[str, int]:
    # Byte-level vocabularies spell each byte as one visible character, a convention of GPT-2: printable Latin-1 stands
    # for itself, the other bytes take the code points from 256 on, in order.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte if byte in visible else 256 + hidden.index(byte)): byte for byte in range(256)}


def _from_file(path: Path) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        config_path = path.with_name("tokenizer_config.json")
        config = json_text.parse_object(config_path.read_bytes()) if config_path.is_file() else {}
        end = config.get("eos_token")
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer {path} cannot be read, give another: {error}") from error
    if text == ByteTokenizer().to_json():
        return ByteTokenizer()
    library = _library(f"the tokenizer {path}")
    try:
        backend = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for any defect of the file
        raise UsageError(f"{path} is not a tokenizer.json of the library tokenizers, give another: {error}") from error
    return LibraryTokenizer(backend, end.get("content") if isinstance(end, dict) else end)


def _from_hub(name: str) -> Tokenizer:
    _library(f"tokenizer {name!r}")
    import huggingface_hub  # a dependency of tokenizers

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"])
    except Exception as error:  # no network, no such name, gated, malformed: each has its own class there
        raise UsageError(
            f"tokenizer {name!r} is neither bytes, train:VOCAB nor a tokenizer.json, and the Hugging Face Hub did not "
            f"give it: {first_line(error)}"
        ) from error
    return load_tokenizer_from(folder)


def _learned_bpe(vocab_size: int, documents: Callable[[], Iterable[str | bytes]], cache_dir: Path) -> Tokenizer:
    library = _library(f"tokenizer 'train:{vocab_size}'")

    def sample() -> Iterator[bytes]:
        left = BPE_SAMPLE_BYTES
        for document in documents():
            yield (text := _as_bytes(document))
            left -= len(text)
            if left <= 0:
                return

    digest, size = hashlib.blake2b(f"{vocab_size} {library.__version__}".encode(), digest_size=16), 0
    for text in sample():
        digest.update(len(text).to_bytes(8, "little") + text)
        size += len(text)
    if not size:
        raise UsageError(f"tokenizer 'train:{vocab_size}' finds no text to learn from; give a corpus with text")

    def load(path: Path) -> Tokenizer | None:
        try:
            return _from_file(path) if path.is_file() else None
        except UsageError:
            return None

    def write(file: BinaryIO) -> None:
        from tokenizers import decoders, models, pre_tokenizers, trainers

        terminal = sys.stderr.isatty()
        if not terminal:
            print(f"learning {vocab_size} BPE tokens from {size / 1e6:.1f} MB of text", file=sys.stderr, flush=True)
        backend = library.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=terminal,
        )
        texts = itertools.chain.from_iterable(map(cut_words, cut(sample())))
        backend.train_from_iterator(texts, trainer)
        write_text(file, backend.to_str())

    tokenizer = cached(cache_dir / "tokenizers" / f"{digest.hexdigest()}.json", load, write)
    if tokenizer.vocab_size < vocab_size:
        LOGGER.warning("the corpus is too small for %d BPE tokens: there are %d", vocab_size, tokenizer.vocab_size)
    return tokenizer


def _library(wanted_by: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(f"{wanted_by} needs the package tokenizers: pip install 'attnres[train]'") from error
    return tokenizers


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _int_array(ids: Any) -> np.ndarray:
    return np.array(ids.tolist() if hasattr(ids, "tolist") else list(ids), dtype=np.int64)


def _as_bytes(text: bytes | str) -> bytes:
    # JSON may spell lone surrogates, which have no UTF-8 form.
    return text.encode("utf-8", errors="replace") if isinstance(text, str) else text


def _as_text(text: bytes | str) -> str:
    return _as_bytes(text).decode("utf-8", errors="replace")
