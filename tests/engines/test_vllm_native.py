"""vLLM's own model of native folders against transformers: tokens, logprobs, what it takes and what it refuses.

The engines run on this processor. One takes a minute to start, so each test of one asks it several things.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-engines has it")
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

import attnres.vllm
from attnres import residual as residuals
from attnres.errors import UsageError
from attnres.hf import AttnResConfig, AttnResForCausalLM
from attnres.vllm.config import check

from ..hf.converted import VOCAB
from ..hf.letters import LETTERS, letter_tokenizer

SHAPE = dict(  # vLLM's attention on a CPU wants heads of a multiple of 32 channels
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.1,
)
LENGTHS = (5, 100, 33, 1, 61)
ANSWER = 12


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # functions go to the workers by pickle


def write(folder, **changes):
    """A folder in transformers' layout, and the model in it."""
    torch.manual_seed(0)
    model = AttnResForCausalLM(AttnResConfig(**{**SHAPE, "residual_options": {}, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".residual." in name or name.endswith("norm.weight"):  # at their start many say nothing
                parameter.add_(torch.randn(parameter.shape) / 4)
    model.save_pretrained(folder)
    letter_tokenizer("").save_pretrained(folder)
    return model


def prompts(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def engine(folder, **options):
    settings = dict(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=1 << 27, seed=0)
    return LLM(model=str(folder), **{**settings, **options})


def answers(llm, given, **settings):
    settings = SamplingParams(max_tokens=ANSWER, temperature=0, logprobs=1, ignore_eos=True, **settings)
    return llm.generate([{"prompt_token_ids": ids} for ids in given], settings, use_tqdm=False)


@torch.no_grad()
def assert_equal(model, prompt, result):
    """Every token is transformers' greedy one but for ties, and every logprob transformers'."""
    tokens, logprobs = list(result.outputs[0].token_ids), result.outputs[0].logprobs
    assert len(tokens) == ANSWER
    ids = torch.tensor([[*prompt, *tokens]])
    want = model(ids).logits[0].log_softmax(-1)
    assert result.prompt_logprobs is None or len(result.prompt_logprobs) == len(prompt)
    for i, found in enumerate(result.prompt_logprobs or ()):
        assert found is None or abs(found[prompt[i]].logprob - want[i - 1, prompt[i]]) < 1e-3
    for i, (token, found) in enumerate(zip(tokens, logprobs, strict=True), len(prompt) - 1):
        assert want[i].max() - want[i, token] < 1e-4
        assert abs(found[token].logprob - want[i, token]) < 1e-3


def inside(worker):
    """Of the model in a worker: where its class is from, and the backends that have served its reads."""
    from attnres.ops import dispatch

    return type(worker.model_runner.model).__module__, sorted(dispatch._announced)


class Sequence(nn.Module):
    """In the place of vLLM's attention outside an engine: the tokens are one sequence, and nothing is cached."""

    def __init__(self, heads, width, scale, *, num_kv_heads, per_layer_sliding_window=None, **_):
        super().__init__()
        self.heads, self.key_heads, self.window = heads, num_kv_heads, per_layer_sliding_window

    def forward(self, q, k, v):
        q, k, v = (
            x.unflatten(-1, (n, -1)).transpose(0, 1)
            for x, n in ((q, self.heads), (k, self.key_heads), (v, self.key_heads))
        )
        age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (age >= 0) & (age < (self.window or q.shape[1]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(0, 1).flatten(1)


@torch.no_grad()
def alone(folder, monkeypatch, ids, dtype="float32"):
    """vLLM's model of a folder without an engine, and its logits for one sequence."""
    monkeypatch.setattr("attnres.vllm.layers.CachedAttention", Sequence)
    attnres.vllm.register()
    served = ModelConfig(model=str(folder), dtype=dtype, enforce_eager=True)
    config = VllmConfig(model_config=served, cache_config=CacheConfig())
    with set_current_vllm_config(config), set_default_torch_dtype(served.dtype):
        model = initialize_model(vllm_config=config)
        model.load_weights(load_file(folder / "model.safetensors").items())
        process_weights_after_loading(model, served, torch.device("cpu"))
        hidden = model(ids, torch.arange(len(ids)))
        return model, model.lm_head.quant_method.apply(model.lm_head, hidden)[:, :VOCAB]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """vLLM's groups of processes, of this one alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.mark.parametrize(
    "changes",
    [
        *({"residual": name} for name in residuals.names()),
        {"tie_word_embeddings": False, "residual_options": {"block_size": 3}},
        {"attention_pattern": ("gqa", "sliding_window"), "sliding_window": 4, "num_key_value_heads": 1},
        {"hidden_act": "situ", "activation_situ_beta": 0.5, "activation_situ_linear_beta": 0.5},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@torch.no_grad()
def test_the_model_alone_computes_what_transformers_does(tmp_path, monkeypatch, one_process, changes):
    """Whatever the residual connection: the loop hands it layers, and asks nothing else of it."""
    model = write(tmp_path, **changes)
    native, found = alone(tmp_path, monkeypatch, ids := torch.tensor(prompts()[2]))
    want = model(ids[None]).logits[0]
    assert type(native).__module__ == "attnres.vllm.model"
    assert torch.allclose(found, want, atol=1e-4 * want.abs().max().item())


@torch.no_grad()
def test_quantised_matrices_reach_its_layers(tmp_path, monkeypatch, one_process):
    """Eight-bit integers in the layout of compressed-tensors, a scale for every row and for every token."""
    model = write(tmp_path, tie_word_embeddings=False)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_scale"], integers = scale, (weight / scale).round()
            tensors[name] = integers.to(torch.int8)
            weight.copy_(integers * scale)
        else:
            tensors[name] = weight
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    rows, tokens = {"strategy": "channel", "dynamic": False}, {"strategy": "token", "dynamic": True}
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {"targets": ["Linear"], "weights": integers | rows, "input_activations": integers | tokens}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    native, found = alone(tmp_path, monkeypatch, ids := torch.tensor(prompts()[2]), dtype="bfloat16")
    layers = native.model.layers
    for matrix in (layers[0].qkv_proj, layers[0].o_proj, layers[1].gate_up_proj, layers[1].down_proj):
        assert type(matrix.quant_method).__name__ == "CompressedTensorsLinearMethod"
    want = model(ids[None]).logits[0]
    assert (found.float() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_pattern": ("kda", "gqa")}, "no KDA layers.*attnres serve"),
        ({"attention_pattern": ("mla",)}, "no MLA layers.*attnres serve"),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "no MoE layers.*--model-impl transformers"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "attention_pattern": ("kda", "mla")},
            "no KDA and no MoE and no MLA layers.*attnres serve",
        ),
    ],
)
def test_layers_that_it_does_not_have_are_refused_by_name(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        check(AttnResConfig(**SHAPE, **changes))


def test_a_folder_is_refused_before_any_process_starts(tmp_path):
    attnres.vllm.register()
    write(tmp_path, attention_pattern=("kda", "gqa"))
    with pytest.raises(ValueError, match="attnres serve"):
        ModelConfig(model=str(tmp_path))


def test_a_window_that_no_layer_has_is_not_taken_for_all(tmp_path):
    attnres.vllm.register()
    write(tmp_path, sliding_window=8)
    assert ModelConfig(model=str(tmp_path)).get_sliding_window() is None


def test_who_asks_for_the_transformers_backend_gets_it(tmp_path):
    attnres.vllm.register()
    write(tmp_path)
    names = ["AttnResForCausalLM"]
    chosen = {
        impl: ModelRegistry.resolve_model_cls(names, ModelConfig(model=str(tmp_path), model_impl=impl))[0].__module__
        for impl in ("auto", "transformers")
    }
    assert chosen["auto"] == "attnres.vllm.model"
    assert chosen["transformers"].startswith("vllm.")


def test_pipelines_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(NotImplementedError, match="Pipeline parallelism is not supported for this model"):
        engine(tmp_path, pipeline_parallel_size=2)


def test_block_in_chunks_and_with_a_cached_prefix(tmp_path):
    model = write(tmp_path, residual="block_attnres", tie_word_embeddings=False, residual_options={"num_blocks": 3})
    llm = engine(tmp_path, enforce_eager=True, max_num_batched_tokens=48, block_size=32, enable_prefix_caching=True)
    assert llm.collective_rpc(inside)[0][0] == "attnres.vllm.model"
    given = prompts()
    for prompt, result in zip(given, answers(llm, given, prompt_logprobs=0), strict=True):
        assert_equal(model, prompt, result)
    assert llm.collective_rpc(inside)[0][1] == ["native"]
    again = [*given[1][:70], *prompts(2)[0]]  # begins as a prompt that the cache holds
    (result,) = answers(llm, [again])
    assert result.num_cached_tokens == 64
    assert_equal(model, again, result)


def test_full_compiled(tmp_path):
    model = write(tmp_path, residual="full_attnres")
    llm = engine(tmp_path)
    assert llm.collective_rpc(inside)[0][0] == "attnres.vllm.model"
    given = prompts()
    for prompt, result in zip(given, answers(llm, given, prompt_logprobs=0), strict=True):
        assert_equal(model, prompt, result)


def test_two_processes_with_windows(tmp_path):
    changes = {"attention_pattern": ("gqa", "sliding_window"), "sliding_window": 16}
    model = write(tmp_path, residual="block_attnres", **changes)
    llm = engine(tmp_path, enforce_eager=True, tensor_parallel_size=2)
    assert [module for module, _ in llm.collective_rpc(inside)] == ["attnres.vllm.model"] * 2
    given = prompts()
    for prompt, result in zip(given, answers(llm, given, prompt_logprobs=0), strict=True):
        assert_equal(model, prompt, result)


def test_the_server_answers_an_openai_client(tmp_path):
    openai = pytest.importorskip("openai")
    model = write(tmp_path / "served", residual="full_attnres", tie_word_embeddings=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # not the command `vllm`, which looks for a package of that name and in vllm-cpu finds none
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "served")]
    command += ["--served-model-name", "mine", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(1 << 27)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            prompt = prompts()[2]
            result = client.completions.create(model="mine", prompt=prompt, max_tokens=ANSWER, temperature=0)
        finally:
            server.terminate()
            server.wait(60)
    ids = torch.tensor([prompt])
    want = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    assert result.choices[0].text == "".join(LETTERS[i] for i in want)


def wait_for(url, server, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-2000:])
