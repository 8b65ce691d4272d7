"""vLLM's Transformers backend on the CPU, for real: its greedy tokens and log-probabilities are those of transformers.

One process serves the models one after another; another is the server behind `vllm serve`, where the config travels to
a worker.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

import attnres.hf
from attnres.hf import AttnResConfig, AttnResForCausalLM

from ..hf.converted import VOCAB, build, move_queries
from ..hf.letters import LETTERS, letter_tokenizer

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run: make test-engines"
)

TIE, CLOSE = 1e-4, 1e-3
"""Of logits, within which greedy choices may differ; of log-probabilities in float32."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,  # four heads of 32, the smallest that vLLM's attention on CPUs has
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
# experts first: vLLM sets up what it needs for them with the first model of a process
NATIVE = {
    "experts": {"num_experts": 4, "num_experts_per_tok": 2},
    "block": {},
    "full": {"residual": "full_attnres", "residual_options": {}},
    "windows": {"attention_pattern": ("sliding_window", "gqa"), "sliding_window": 5},
}
CONVERTED = [(name, residual) for name in ("llama", "qwen3") for residual in ("block_attnres", "full_attnres")]
SERVED = [*NATIVE, *(f"{name}-{residual}" for name, residual in CONVERTED)]
REFUSED = {"kda": ("kda", "gqa"), "mla": ("mla",)}

BATCH, PAGE, TOKENS = 32, 32, 12
"""The most tokens of a step, so that longer prompts go in chunks; tokens of a page; tokens to generate."""
OPTIONS = {
    "model_impl": "transformers",
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 160,
    "max_num_batched_tokens": BATCH,
    "max_num_seqs": 6,
    "block_size": PAGE,
    "disable_log_stats": False,
}
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(attnres.__file__).parents[1]), os.environ.get("PYTHONPATH")])),
}


def prompt(length, seed=0):
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, length) for length in (3, 17, 100, 1, 29, 8, 64, 33)]
SHARED = [prompt(2 * PAGE) + prompt(length, length) for length in (3, 9)]


def native(**changes):
    options = {"residual": "block_attnres", "residual_options": {"num_blocks": 3}, **changes}
    torch.manual_seed(0)
    return move_queries(AttnResForCausalLM(AttnResConfig(**SHAPE, initializer_range=0.1, **options)).eval())


def converted(name, residual):
    changes = {**SHAPE, "head_dim": 32, "bos_token_id": None, "eos_token_id": None}
    options = {"num_blocks": 3} if residual == "block_attnres" else {}
    return move_queries(attnres.hf.convert(build(name, torch.float32, **changes), residual=residual, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {name: native(**changes) for name, changes in NATIVE.items()}
    models |= {f"{name}-{residual}": converted(name, residual) for name, residual in CONVERTED}
    models |= {name: native(attention_pattern=pattern) for name, pattern in REFUSED.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    letter_tokenizer("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}").save_pretrained(
        root / "llama-block_attnres"
    )
    return {name: str(root / name) for name in models}


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    place = tmp_path_factory.mktemp("answers")
    job = {"options": OPTIONS, "models": folders, "tokens": TOKENS, "prompts": PROMPTS, "again": SHARED}
    (place / "job.json").write_text(json.dumps(job))
    command = [sys.executable, Path(__file__).with_name("vllm_answers.py"), place / "job.json", place / "answers.json"]
    with (place / "log").open("w") as log:
        environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        end = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=1800)
    assert end.returncode == 0, (place / "log").read_text()[-5000:]
    return json.loads((place / "answers.json").read_text())


def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_greedy(model, ids, new, logprobs=None):
    """`new` are tokens of the greatest logits after `ids`, and `logprobs` those of all tokens but the first."""
    row = torch.tensor([[*ids, *new]])
    with torch.no_grad():
        logits = model(row, use_cache=False).logits[0, :-1]
    found = logits.gather(1, row[0, 1:, None])[:, 0]
    assert (logits.max(-1).values - found)[len(ids) - 1 :].max() <= TIE
    if logprobs is not None:
        expected = found - logits.logsumexp(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_and_logprobs_are_those_of_transformers(name, folders, answers):
    assert max(map(len, PROMPTS)) > BATCH  # in chunks
    model, found = reference(folders[name]), answers[name]
    assert "refused" not in found, found
    for ids, answer in zip(PROMPTS, found["answers"], strict=True):
        assert len(answer["tokens"]) == TOKENS
        assert_greedy(model, ids, answer["tokens"], answer["logprobs"])


@pytest.mark.parametrize("name", SERVED)
def test_a_prefix_that_is_asked_for_again_comes_from_the_cache(name, folders, answers):
    model, found = reference(folders[name]), answers[name]
    assert found["hits"] >= 2 * len(SHARED[0][: 2 * PAGE])  # the whole second time
    for tokens in found["again"]:
        for ids, new in zip(SHARED, tokens, strict=True):
            assert_greedy(model, ids, new)


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_keep_something_else_are_refused_in_one_sentence(name, answers):
    assert answers[name]["refused"] == (
        f"vLLM's Transformers backend keeps keys and values alone, and the {name} layers of this model need something "
        "else; serve it with: attnres serve"
    )


class Served:
    """What `vllm serve` runs, for a folder, on a port of the loopback address: that command itself asks for a package
    named vllm, which vllm-cpu is not."""

    def __init__(self, folder, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        flags = "--model-impl transformers --dtype float32 --enforce-eager --max-model-len 160 --host 127.0.0.1"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *flags.split()]
        command += ["--served-model-name", "ours", "--port", str(self.port)]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=ENVIRONMENT, start_new_session=True, cwd=log.parent
            )

    def wait_until_up(self, seconds=900):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-5000:])

    def close(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def client(folders, tmp_path_factory):
    served = Served(folders["llama-block_attnres"], tmp_path_factory.mktemp("served") / "log")
    try:
        served.wait_until_up()
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", timeout=300)
    finally:
        served.close()


def as_ids(text):
    return [LETTERS.index(letter) for letter in text]


def test_vllm_serve_completes(client, folders):
    texts = ["The quick brown fox", "a", "Depth attention reads every earlier layer, not their sum."]
    answer = client.completions.create(
        model="ours", prompt=texts, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    model = reference(folders["llama-block_attnres"])
    for text, choice in zip(texts, answer.choices, strict=True):
        assert len(choice.text) == TOKENS
        assert_greedy(model, as_ids(text), as_ids(choice.text))


def test_vllm_serve_chats(client, folders):
    answer = client.chat.completions.create(
        model="ours",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    text = answer.choices[0].message.content
    assert len(text) == TOKENS
    assert_greedy(reference(folders["llama-block_attnres"]), as_ids("user:Hello"), as_ids(text))
