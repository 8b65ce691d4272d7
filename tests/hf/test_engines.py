"""What vLLM's and SGLang's Transformers backends ask of a model, one test a requirement, without either engine.

tests/engines has vLLM itself.

Sources: vLLM, docs/models/supported_models.md, "Writing custom models"; SGLang, docs/supported_models/
transformers_fallback.md; and what their backends do to a model: build it from its config with parameters on the meta
device, put their own classes in the place of linear layers, norms and the embedding, load the weights by name, and run
the base model on the tokens of all sequences in one row, with their own attention.
"""

import ast
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnres.errors import UsageError

pytest.importorskip("transformers")
import transformers
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnres.hf
import attnres.vllm
from attnres.hf import AttnResConfig, AttnResForCausalLM

from .converted import COMMON, VOCAB, build, move_queries

SEQUENCES = (5, 3, 1)
IDS = torch.randint(1, VOCAB, (1, sum(SEQUENCES)), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(n) for n in SEQUENCES])[None]
NATIVE = ("full_attnres", "block_attnres")
CONVERTED = ("llama", "gpt_neox_parallel", "mixtral")


def make(name):
    if name in NATIVE:
        torch.manual_seed(0)
        model = AttnResForCausalLM(AttnResConfig(**COMMON, initializer_range=0.3, residual=name)).double().eval()
        for p in model.model.residual.parameters():
            nn.init.normal_(p)
        return model
    return move_queries(attnres.hf.convert(build(name), num_blocks=3))


@pytest.fixture(scope="module", params=[*NATIVE, *CONVERTED])
def model(request):
    return make(request.param)


@pytest.fixture(params=["block_attnres", "llama"])
def saved(request, tmp_path):
    model = make(request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


class EngineLinear(nn.Linear):
    pass


class EngineNorm(nn.Module):
    """An engine's RMSNorm: neither torch's class nor its attributes."""

    def __init__(self, norm):
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach())
        self.variance_epsilon = next(getattr(norm, a) for a in ("eps", "variance_epsilon") if hasattr(norm, a))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class EngineAttention:
    """One layer's attention; it knows where sequences begin, and answers [tokens, heads * width]."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, scaling):
        self.calls += 1
        tokens, outputs = query.shape[2], []
        for q, k, v in zip(*(x.split(SEQUENCES, 2) for x in (query, key, value)), strict=True):
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        return torch.cat(outputs, 2).transpose(1, 2).reshape(tokens, -1)


def engine_attention(module, query, key, value, mask, scaling=None, attention_instances=None, **kwargs):
    assert mask is None
    return attention_instances[module.layer_idx](query, key, value, scaling), None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "engine", engine_attention)


def as_engine(model):
    """The base model as an engine builds and fills it."""
    config = pickle.loads(pickle.dumps(model.config))  # it travels to the engine's workers
    config._attn_implementation = "engine"
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=torch.float64).eval()
    for name, module in list(base.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear):
            new = EngineLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
        elif type(module).__name__.endswith("RMSNorm"):
            new = EngineNorm(module)
        elif isinstance(module, nn.Embedding):
            new = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        else:
            continue
        setattr(base.get_submodule(parent), child, new)
    weights = {name.removeprefix("model."): w for name, w in model.state_dict().items() if "lm_head" not in name}
    weights = {name.removeprefix(f"{model.base_model_prefix}."): w for name, w in weights.items()}
    weights = {name: w for name, w in weights.items() if name in dict(base.named_parameters())}
    base.load_state_dict(weights, assign=True, strict=False)
    assert not [name for name, p in base.named_parameters() if p.is_meta]
    for (name, buffer), (_, whole) in zip(base.named_buffers(), model.base_model.named_buffers(), strict=True):
        parent, _, child = name.rpartition(".")
        base.get_submodule(parent)._buffers[child] = whole if buffer.is_meta else buffer  # engines leave them alone
    return base


def run(base, instances):
    return base(
        input_ids=IDS, position_ids=POSITIONS, use_cache=False, return_dict=False, attention_instances=instances
    )[0]


def test_the_base_model_runs_inside_an_engine(model, engine):
    layers = model.config.num_hidden_layers
    instances = {i: EngineAttention() for i in range(layers)}
    with torch.no_grad():
        found = run(as_engine(model), instances)
        alone = [model.base_model(ids, use_cache=False)[0] for ids in IDS.split(SEQUENCES, 1)]
    assert [a.calls for a in instances.values()] == [1] * layers
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-6, atol=1e-6)  # rotary factors are fp32


def test_attention_goes_through_the_table_with_every_keyword(model, monkeypatch):
    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append((module.layer_idx, kwargs["cu_seq_lens_q"], kwargs["anything"], module.is_causal))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "watched", attention)
    monkeypatch.setattr(model.config, "_attn_implementation", "watched")
    with torch.no_grad():
        model(IDS, use_cache=False, cu_seq_lens_q="lengths", anything=1)
    assert seen == [(i, "lengths", 1, True) for i in range(model.config.num_hidden_layers)]


def attention_call(module):
    """What vLLM looks for in the source of a `forward`: the one call of a variable from ALL_ATTENTION_FUNCTIONS."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    names = {
        target.id
        for node in assigned
        if ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
        for target in node.targets
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("name", NATIVE)
def test_each_layer_has_one_module_whose_source_calls_attention(name):
    base = make(name).base_model
    found = {module: call for module in base.modules() if (call := attention_call(module)) is not None}
    assert sorted(module.layer_idx for module in found) == list(range(base.config.num_hidden_layers))
    for module, call in found.items():
        scaling = next(keyword.value for keyword in call.keywords if keyword.arg == "scaling")
        assert ast.unparse(scaling) == "self.scaling" and module.scaling == 8**-0.5
        assert module.config is base.config


def test_the_first_parameter_of_a_model_is_of_the_class_that_it_names(model):
    # vLLM compares them when it builds the base model
    annotations = [p.annotation for p in inspect.signature(type(model.base_model).__init__).parameters.values()]
    for argument, annotation in zip((model.base_model, model.config), annotations, strict=False):
        assert annotation is inspect.Parameter.empty or isinstance(argument, annotation)


@pytest.mark.parametrize("pattern", [("gqa",), ("sliding_window", "gqa"), ("kda", "gqa"), ("mla",)])
def test_sizes_of_latent_attention_are_in_the_config_where_there_is_some(pattern, tmp_path):
    # engines take a model for one of latent attention by kv_lora_rank
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    earlier = dict(zip(names, (32, 8, 4, 8), strict=True))
    config = AttnResConfig(**COMMON, attention_pattern=pattern, sliding_window=4, **earlier)  # as once saved
    config.save_pretrained(tmp_path)
    for found in (config, AttnResConfig.from_pretrained(tmp_path)):
        assert {name: getattr(found, name) for name in names} == (
            earlier if "mla" in pattern else dict.fromkeys(names, None)
        )
        assert found.decoder_config().kv_lora_rank == 32


@pytest.mark.parametrize("kind", ["kda", "mla"])
def test_vllm_is_told_of_layers_that_its_cache_has_no_place_for(kind, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", engine_attention)
    config = AttnResConfig(**COMMON, attention_pattern=("gqa", kind))
    config._attn_implementation = "vllm"
    with pytest.raises(UsageError, match=f"the {kind} layers of this model need something else; serve it with"):
        AutoModel.from_config(config)
    config = AttnResConfig(**COMMON, attention_pattern=("gqa", "sliding_window"), sliding_window=4)
    config._attn_implementation = "vllm"
    AutoModel.from_config(config)


def test_classes_say_that_they_take_an_attention_backend(model):
    assert type(model).is_backend_compatible() and type(model.base_model).is_backend_compatible()


def test_no_state_stays_in_a_module(model):
    def state():
        return {
            name: {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
            for name, module in model.named_modules()
        }

    before = {name: dict(values) for name, values in state().items()}
    with torch.no_grad():
        whole, other = model(IDS).logits, model(IDS.flip(1)).logits
        assert torch.equal(model(IDS).logits, whole) and not torch.equal(whole, other)
    assert {name: values.keys() for name, values in state().items()} == {n: v.keys() for n, v in before.items()}
    for name, values in state().items():
        assert all(value is before[name][key] for key, value in values.items()), name


def test_the_head_is_apart_from_the_base_model(model):
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear) and model.base_model is not model
    assert not any(module is head for module in model.base_model.modules())
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.base_model.residual, nn.Module)  # our parameters are the base model's, which engines load


def test_the_config_has_what_engines_size_their_caches_by(model):
    config = model.config.get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    assert all(isinstance(getattr(config, name), int) for name in sizes)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert config.num_attention_heads % heads == 0
    assert model.config.model_type.startswith("attnres") and hasattr(config, "tie_word_embeddings")


def test_the_tensor_parallel_plan_names_all_projections(model):
    plan = model.base_model.tp_plan
    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    patterns = {pattern: style for pattern, style in plan.items() if style.startswith(("colwise", "rowwise"))}
    styles = {name: next((s for p, s in patterns.items() if re.match(p, name)), None) for name in linear}
    replicated = {name.rpartition(".")[2] for name, style in styles.items() if style is None}
    assert replicated <= {"gate"}  # of a mixture of experts
    assert all(
        s.startswith("rowwise") == n.endswith(("o_proj", "down_proj", "dense", "dense_4h_to_h"))
        for n, s in styles.items()
        if s
    )


def test_a_pipeline_is_refused(model, engine):
    # engines hand on one hidden state a token between stages, which cannot carry the sources of a depth attention
    base = as_engine(model)
    assert not base.supports_pp_plan
    layers = next(module for module in base.children() if isinstance(module, nn.ModuleList))
    instances = {i: EngineAttention() for i in range(model.config.num_hidden_layers)}
    layers[0] = Missing()
    with pytest.raises(UsageError, match="state"):
        run(base, instances)


def test_vllm_is_refused_a_pipeline_before_it_splits_a_model(model, monkeypatch):
    monkeypatch.setattr(model.config, "_attn_implementation", "vllm")
    for part in (model, model.base_model):
        with pytest.raises(UsageError, match="pipeline_parallel_size must be 1"):
            _ = part.supports_pp_plan


def test_experts_have_a_plan_by_names_where_vllm_builds_them(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", engine_attention)
    config = AttnResConfig(**COMMON, num_experts=4, num_experts_per_tok=2)
    assert "layers.*.q_proj" not in AutoModel.from_config(config).tp_plan  # transformers' own is not by names
    config._attn_implementation = "vllm"
    assert AutoModel.from_config(config).tp_plan["layers.*.q_proj"] == "colwise"


def test_classes_are_where_engines_look(saved):
    model, folder = saved
    (name,) = AutoConfig.from_pretrained(folder).architectures
    assert getattr(transformers, name) is type(model)
    assert type(AutoModel.from_pretrained(folder)) is type(model.base_model)


def test_a_fresh_process_knows_the_models_through_the_plug_in_alone(tmp_path):
    model, folder = make("llama"), tmp_path
    model.save_pretrained(folder)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(model.config))
    code = f"""
        import pickle, sys, transformers
        from importlib.metadata import EntryPoint
        EntryPoint("attnres", "attnres.hf:register", "sglang.srt.plugins").load()()
        import transformers.processing_utils  # puts a new module in the place of transformers when it comes first
        for module in (transformers, sys.modules["transformers"]):
            assert module.AttnResForCausalLM.is_backend_compatible()
        assert not [m for m in ("datasets", "matplotlib", "lm_eval", "attnres.train") if m in sys.modules]
        pickled = pickle.load(open({str(tmp_path / "config.pickle")!r}, "rb"))  # a worker gets the config like this
        assert type(transformers.AutoModel.from_config(pickled)).__name__ == "AttnResLlamaModel"
        config = transformers.AutoConfig.from_pretrained({str(folder)!r})
        assert getattr(transformers, config.architectures[0]).is_backend_compatible()
        assert type(pickled) is type(config)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class Missing(nn.Identity):
    """What an engine puts in the place of another stage's layer."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize(
    ("group", "plug_in_of"), [("vllm.general_plugins", attnres.vllm), ("sglang.srt.plugins", attnres.hf)]
)
def test_the_package_announces_its_plug_in(group, plug_in_of):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (plug_in,) = project["entry-points"][group].items()
    assert EntryPoint(*plug_in, group).load() is plug_in_of.register
