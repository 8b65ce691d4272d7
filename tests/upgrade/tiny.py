"""A tiny pretrained model with a tokenizer of bytes, and data for it."""

import json
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnres.data.tokenizer import ByteTokenizer

from ..hf.converted import randomise

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["source", "block", "query", "attends", "over", "depth", "the", "residual", "stream", "a", "layer", "reads"]


def byte_tokenizer(chat_template=CHATML):
    """Bytes, an end of documents and ChatML's two tokens: 259 in all."""
    from tokenizers import Tokenizer

    base = ByteTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base.to_json()), eos_token=base.end_name, chat_template=chat_template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def tiny_model(seed=0):
    config = LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    return randomise(LlamaForCausalLM(config), seed).to(torch.float32).eval()


def write_model(folder, tokenizer=None):
    tiny_model().save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def write_texts(folder, files=40, words=60):
    folder.mkdir()
    for i in range(files):
        text = " ".join(random.Random(i).choices(WORDS, k=words))
        (folder / f"{i}.txt").write_text(text)
    return folder


def write_chats(path, count=40):
    chosen = random.Random(0)
    with open(path, "w") as file:
        for i in range(count):
            turns = [("user", f"{i} a?"), ("assistant", chosen.choice(WORDS)), ("user", "b?"), ("assistant", "yes")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path
