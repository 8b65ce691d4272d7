"""The rows of an upgrade, made once: they lie in its folder, and every arm reads the same."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from .. import files, json_text
from ..errors import UsageError
from ..hf.vocabulary import check_vocabulary, open_tokenizer
from ..lab.grid import write_json
from .chat import conversations, has_conversations
from .config import UpgradeConfig
from .documents import cut, documents
from .rows import Rows, Tokens, pack, save

LOGGER = logging.getLogger(__name__)
TRAIN, HELD_OUT = Path("rows", "train"), Path("rows", "held_out")


class Corpus:
    """`make`, then `settle`: then the rows are in TRAIN and HELD_OUT of the folder, and `about` describes them."""

    def __init__(self, config: UpgradeConfig) -> None:
        self.config = config
        self.file = config.out / "rows" / "about.json"
        self.about: dict[str, Any] = json_text.parse_object(files.read(self.file)) if self.file.exists() else {}
        self.sides: list[list[Tokens]] = []
        self.padding = 0
        self.packed: tuple[Rows, Rows] | None = None

    def make(self, model: Any) -> None:
        """Finds and tokenises the data, unless the rows are there. model: the model's config.

        Raises UsageError for data that cannot be had, and too little of it.
        """
        if self.about:
            return
        config = self.config
        tokenizer = open_tokenizer(config.model)
        check_vocabulary(tokenizer, model.get_text_config().vocab_size, config.model)
        if has_conversations(config.data):
            name, chat = Path(config.data).name, True
            train, held_out = conversations(config.data, tokenizer, config.context)
        else:
            name, *texts = documents(config.data, tokenizer, config.text_column)
            train, held_out = ([piece for text in side for piece in cut(text, config.context)] for side in texts)
            chat = False
        self.sides, self.padding = [train, held_out], tokenizer.eos_token_id or 0
        self.about = {"name": name, "conversations": chat}
        self.packed = self._rows(packed=True)

    def settle(self, packed: bool) -> None:
        """Writes the rows, packed or not, unless they are there."""
        if self.packed is None:
            return
        if not packed:
            LOGGER.warning(
                "a row holds one sequence only: this model does not keep apart what positions that start anew separate"
            )
        train, held_out = self.packed if packed else self._rows(packed=False)
        config = self.config
        held_out = held_out.spread(config.validation_tokens // config.context)
        passes = config.steps * config.rows_per_step / len(train)
        self.about |= {"train_rows": len(train), "val_rows": len(held_out), "passes": round(passes, 3)}
        self.about |= {"train_tokens": train.targets, "val_tokens": held_out.targets}
        save(train, config.out / TRAIN)
        save(held_out, config.out / HELD_OUT)
        write_json(self.file, self.about)
        print(
            f"{self.about['name']}: {len(train):,} rows of {config.context} tokens to train on, {passes:.2f} times; "
            f"{len(held_out):,} held out",
            file=sys.stderr,
            flush=True,
        )

    def _rows(self, packed: bool) -> tuple[Rows, Rows]:
        """(to train on, held out). Raises UsageError for too few."""
        config = self.config
        train, held_out = (pack(side, config.context, self.padding, packed) for side in self.sides)
        for rows, least, use in ((train, config.rows_per_step, "to train on"), (held_out, 2, "held out")):
            if len(rows) < least:
                raise UsageError(
                    f"--data {config.data} is too little: it makes {len(rows)} rows of {config.context} tokens {use}, "
                    f"and at least {least} are needed; give more of it, or a smaller context or batch_size"
                )
        return train, held_out
