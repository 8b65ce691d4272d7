"""Exported models in stock llama.cpp: its logprobs, greedy tokens and token ids are ours."""

import json
import random
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from attnres.data.tokenizer import load_tokenizer, load_tokenizer_from
from attnres.export import export_model
from attnres.export.vocabulary import CONTRACTIONS, PRE_TOKENIZERS, REST

from ..export.k3_models import MODELS, model

llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed here; run make test-engines")
TOKENS = 16
TEXTS = ["def f(x):\n    return x + 1\n", "It's 2026, they'll say: 12345!", "Zoë  λόγος 日本語 🚀\t\t\r\n\r\n  end "]
FILES = sorted(Path(__file__).parents[1].rglob("*.py"))


def text():
    return [file.read_text() for file in FILES[:40]]


class Llama:
    """A model in llama.cpp. exact: with keys and values in f32 and without flash attention, which rounds."""

    def __init__(self, path, exact=False):
        params = llama_cpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        if exact:
            params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama_cpp.Server(params)

    def ask(self, place, **values):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + place, json.dumps(values).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, prompt, vocab):
        """The next tokens [N], and {position in them: logprobs [V]}; it says none where a character is unfinished."""
        said = self.ask(
            "/completion", prompt=prompt, n_predict=TOKENS, temperature=0, n_probs=vocab, return_tokens=True,
            cache_prompt=False,
        )  # fmt: skip
        tokens, found, at = said["tokens"], {}, 0
        for entry in said["completion_probabilities"]:
            at = tokens.index(entry["id"], at)
            row = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
            found[at] = np.array([row.get(token, np.nan) for token in range(vocab)])
            at += 1
        return tokens, found


class Compared:
    """differences: per prompt, of every token's logprobs from ours, the largest over the vocabulary; margins: per
    prompt, by how much the best token of ours is above the one that llama.cpp took, 0 where they are one."""

    @torch.no_grad()
    def __init__(self, llama, ours, prompts=8):
        draw, vocab = random.Random(0), ours.config.vocab_size
        self.differences, self.margins = [], []
        for _ in range(prompts):
            prompt = [draw.randrange(vocab) for _ in range(draw.randrange(3, 40))]
            tokens, found = llama.greedy(prompt, vocab)
            assert tokens and found
            logits = ours(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            expected = logits.log_softmax(-1).double().numpy()
            self.margins.append(max(expected[at].max() - expected[at][token] for at, token in enumerate(tokens)))
            self.differences.append([np.abs(row - expected[at]).max() for at, row in found.items()])

    def assert_equal(self, median, largest, flips=0):
        """All but `flips` prompts, where a router may choose another expert at a near tie, are within these bounds, and
        greedy tokens are ours but for ties within them."""
        pairs = zip(self.differences, self.margins, strict=True)
        within = [max(row) <= largest and margin <= 2 * largest for row, margin in pairs]
        found = float(np.median(np.concatenate(self.differences)))
        said = (
            f"median {found:.1e}, largest by prompt {[f'{max(row):.1e}' for row in self.differences]}, {self.margins}"
        )
        assert found <= median and len(within) - sum(within) <= flips, said
        print(said)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name, **changes) -> (our model, its native folder, with a tokenizer)."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer("train:512", text, root)

    def make(name, half=False, **changes):
        ours = model(name, **changes)
        if half:
            with torch.no_grad():
                for parameter in ours.parameters():
                    parameter.copy_(parameter.half().float())
        folder = root / f"{name}{len(list(root.iterdir()))}"
        ours.save_pretrained(folder)
        tokenizer.save(folder)
        return ours, folder

    return make


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_we_do(folders, tmp_path, name):
    ours, folder = folders(name)
    export_model(folder, path := tmp_path / "model.gguf", "gguf", outtype="f32")
    # where reads are scaled, rms_norm_eps stands beside a mean of n sources there and beside their sum here
    median, largest = (5e-3, 2e-2) if name == "scaled" else (1e-4, 1e-3)
    Compared(Llama(path, exact=True), ours).assert_equal(median, largest)
    flips = 2 if name in ("experts", "kimi_k3") else 0
    Compared(Llama(path), ours).assert_equal(5e-3, 5e-2, flips)


@pytest.mark.parametrize(
    ("outtype", "median", "largest"), [("f16", 5e-3, 5e-2), ("bf16", 5e-2, 0.2), ("q8_0", 0.2, 0.8)]
)
def test_smaller_types(folders, tmp_path, outtype, median, largest):
    """Whose products round the activations too, in llama.cpp; the weights are exact in f16."""
    ours, folder = folders("dense", half=True, initializer_range=0.03)
    export_model(folder, path := tmp_path / "model.gguf", "gguf", outtype=outtype)
    Compared(Llama(path), ours).assert_equal(median, largest)


def bpe(*steps, ignore_merges=False):
    """A byte-level BPE with a pre-tokenizer of these steps."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(text(), trainer)
    return backend


def kinds():
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    whole, raw = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    qwen, llama = (Split(Regex(f"{CONTRACTIONS}\\p{{N}}{count}{REST}"), behavior="isolated") for count in ("", "{1,3}"))
    return {
        "gpt-2": lambda: bpe(whole),
        "smollm": lambda: bpe(Digits(individual_digits=True), whole),
        "qwen2": lambda: bpe(qwen, raw),
        "llama-bpe": lambda: bpe(llama, raw, ignore_merges=True),
    }


@pytest.mark.parametrize("kind", ["bytes", *PRE_TOKENIZERS.values()])
def test_texts_are_the_same_tokens(folders, tmp_path, kind):
    ours, folder = folders("dense")
    if kind == "bytes":
        load_tokenizer("bytes", None, tmp_path).save(folder)
    else:
        (folder / "tokenizer.json").write_text(kinds()[kind]().to_str())
    export_model(folder, path := tmp_path / "model.gguf", "gguf")
    tokenizer, llama = load_tokenizer_from(folder), Llama(path)
    for written in (*TEXTS, *text()[:3]):
        expected = tokenizer.encode(written).tolist()
        assert llama.ask("/tokenize", content=written)["tokens"] == expected
        assert llama.ask("/detokenize", tokens=expected)["content"] == written
    said = llama.ask("/completion", prompt=TEXTS[0], n_predict=4, temperature=0, return_tokens=True, ignore_eos=True)
    with torch.no_grad():
        prompt = torch.tensor([tokenizer.encode(TEXTS[0]).tolist()])
        assert (
            said["tokens"]
            == ours.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0][
                prompt.shape[1] :
            ].tolist()
        )
