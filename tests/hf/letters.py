"""A tokenizer of the tiny models with one token a letter, so that a list of tokens is the text."""

from transformers import PreTrainedTokenizerFast

from .converted import VOCAB

LETTERS = "+abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:?!-"  # the first is padding
assert len(LETTERS) == VOCAB


def letter_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=chat_template
    )
