"""What people do with a converted model, on a few architectures."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from attnres import hf
from attnres.errors import UsageError
from attnres.hf.convert import classes as convert_classes
from attnres.hf.convert import table
from attnres.hf.convert.table import Architecture

from .converted import PAD, SHAPE, build, move_queries, padded, randomise, tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3", "gpt_neox_parallel"])
def test_recorded_outputs_are_those_of_the_original(name):
    original = build(name, attn_implementation="eager")
    model = hf.convert(copy.deepcopy(original), num_blocks=2)
    ask = {"output_hidden_states": True, "output_attentions": True}
    if name == "mixtral":
        ask["output_router_logits"] = True
    expected, found = original(tokens(), **ask), model(tokens(), **ask)
    for field in ("hidden_states", "attentions", *(("router_logits",) if name == "mixtral" else ())):
        assert len(expected[field]) == len(found[field]) == 3 + (field == "hidden_states")
        for a, b in zip(expected[field], found[field], strict=True):
            assert torch.allclose(a, b, atol=1e-6), field
    recorded = model(tokens(), return_dict=False, output_hidden_states=True)[-1]
    assert all(torch.equal(a, b) for a, b in zip(recorded, found.hidden_states, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("residual", ["block_attnres", "full_attnres"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_two_phase_schedule_is_the_same_function(name, residual):
    original = build(name)
    model = hf.convert(copy.deepcopy(original), residual, schedule="two_phase")
    assert torch.allclose(model(tokens()).logits, original(tokens()).logits, rtol=0, atol=1e-9)
    layerwise = move_queries(hf.convert(original, residual))
    found = move_queries(model)(tokens(), output_hidden_states=True)
    expected = layerwise(tokens(), output_hidden_states=True)
    for a, b in zip((found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"num_blocks": 2}, {"block_size": 1}, {"residual": "full_attnres"}])
@pytest.mark.parametrize("name", ["llama", "gpt_neox_parallel", "cohere", "phi"])
def test_the_automatic_schedule_is_the_same_function(name, sizes, tmp_path):
    original = build(name)
    model = hf.convert(copy.deepcopy(original), **sizes, schedule="auto")
    assert torch.allclose(model(tokens()).logits, original(tokens()).logits, rtol=0, atol=1e-9)
    moved = move_queries(hf.convert(original, **sizes))(tokens()).logits
    assert torch.allclose(move_queries(model)(tokens()).logits, moved, rtol=0, atol=1e-9)
    model.save_pretrained(tmp_path)
    assert torch.allclose(hf.load(tmp_path)(tokens()).logits, moved, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(
    "switches", [{"query": "input"}, {"mixing": "sigmoid"}, {"mixing": "static"}, {"null_source": True}, {"heads": 2}]
)
def test_every_switch_of_the_weights_starts_as_the_same_function(switches):
    original = build("gpt2")
    model = hf.convert(copy.deepcopy(original), num_blocks=3, **switches)
    assert torch.allclose(model(tokens()).logits, original(tokens()).logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_copy_stands_on_its_own():
    model = hf.convert(build("llama"))
    before = model(tokens()).logits
    other = move_queries(copy.deepcopy(model))
    assert torch.equal(model(tokens()).logits, before)
    assert not torch.allclose(other(tokens()).logits, before)


FRESH = """
import pickle, sys, torch
sys.modules["fla"] = sys.modules["causal_conv1d"] = None  # as in `converted`
model = pickle.load(open(sys.argv[1] + "/model.pickle", "rb"))
ids, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    assert torch.allclose(model(ids).logits, expected, atol=1e-5), type(model)
"""


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_pickled_for_a_process_that_knows_nothing_of_it(name, tmp_path):
    model = move_queries(hf.convert(build(name, torch.float32)))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save((tokens(), model(tokens()).logits), tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True)
    with pytest.raises(AttributeError, match="AttnResNothing"):
        convert_classes.AttnResNothing  # noqa: B018


@torch.no_grad()
def test_a_layer_that_is_copied_alone_stays_with_its_model():
    model = hf.convert(build("llama"))
    layer = copy.deepcopy(model.model.layers[2])
    assert layer.owner.model is model.model
    other = copy.deepcopy(model)
    assert all(layer.owner.model is other.model for layer in other.model.layers)
    expected = move_queries(model)(tokens()).logits
    model.model.layers[2] = layer
    assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
def test_layers_that_are_taken_out_are_noticed():
    model = hf.convert(build("llama", num_hidden_layers=4))
    model.model.layers[1], model.model.layers[2] = model.model.layers[2], model.model.layers[1]
    with pytest.raises(UsageError, match="removed nor reordered"):
        model(tokens())
    for i in (1, 2):
        model = hf.convert(build("llama"))
        del model.model.layers[i]
        with pytest.raises(UsageError, match="2 decoder layers and a residual connection for 3"):
            model(tokens())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_peft_finds_the_model_of_an_adapter(task, tmp_path):
    peft = pytest.importorskip("peft")
    move_queries(hf.convert(build("llama", torch.float32))).save_pretrained(tmp_path / "model")
    options = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["residual"], task_type=task)
    adapted = peft.get_peft_model(hf.load(tmp_path / "model"), options).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    allowed = {} if task else {"import_allowlist": ["attnres"]}
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **allowed)
    assert torch.allclose(loaded(tokens()).logits, adapted(tokens()).logits, atol=1e-6)


def test_the_config_becomes_its_own():
    original = build("llama")
    sharing = type(original)(original.config)
    hf.convert(original)
    assert sharing.config.model_type == "llama" and not hasattr(sharing.config, "residual")
    assert original.config.model_type == "attnres_llama"
    assert original.config.residual == "block_attnres" and original.config.residual_options == {"num_blocks": 6}
    assert all(module.config is original.config for module in original.modules() if hasattr(module, "config"))
    hf.convert(sharing, "full_attnres")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "olmo2", "gpt2"])
def test_autocast_keeps_the_stream_in_its_own_precision(name):
    original = build(name, torch.float32)
    model = hf.convert(copy.deepcopy(original))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = original(tokens()), model(tokens(), output_hidden_states=True)
    assert found.hidden_states[2].dtype == torch.float32
    assert torch.allclose(found.logits.float(), expected.logits.float(), atol=0.1)


def test_new_parameters_have_the_embeddings_dtype_and_device():
    residual = hf.convert(build("llama", torch.bfloat16)).model.residual
    assert {p.dtype for p in residual.parameters()} == {torch.bfloat16}
    assert residual.pseudo_query.shape == residual.key_norm.shape == (7, 32)
    assert not residual.pseudo_query.any() and (residual.key_norm == 1).all()
    with torch.device("meta"):
        assert all(p.is_meta for p in hf.convert(LlamaModel(build("llama").config)).residual.parameters())


@torch.no_grad()
def test_models_without_a_head_and_with_another(tmp_path):
    config = build("llama").config
    for original, auto in (
        (LlamaModel(config), AutoModel),
        (LlamaForSequenceClassification(config), AutoModelForSequenceClassification),
    ):
        randomise(original).eval()
        ids, mask = padded("left")
        expected = original(ids, attention_mask=mask)[0]
        model = hf.convert(original, num_blocks=2)
        assert torch.allclose(model(ids, attention_mask=mask)[0], expected, atol=1e-5)
        move_queries(model).save_pretrained(tmp_path / auto.__name__)
        for loaded in (hf.load(tmp_path / auto.__name__), auto.from_pretrained(tmp_path / auto.__name__)):
            assert type(loaded) is type(model)
            assert torch.equal(loaded(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])


def test_the_inside_of_a_model_with_a_head_is_refused():
    whole = build("llama")
    with pytest.raises(UsageError, match=r"LlamaModel is part of a LlamaForCausalLM.*; convert the LlamaForCausalLM"):
        hf.convert(whole.model)
    assert type(whole.model) is LlamaModel and whole.config.model_type == "llama"
    base = whole.model
    whole.itself = [whole]  # a cycle, which only the garbage collector takes
    del whole
    hf.convert(base)


@torch.no_grad()
def test_the_language_model_of_a_model_for_images(tmp_path):
    text = build("llama", torch.float32).config.to_dict()
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    whole = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    expected = whole(tokens()).logits
    inner = hf.convert(whole.model.language_model, "full_attnres")
    assert torch.allclose(whole(tokens()).logits, expected, atol=1e-5)
    move_queries(inner)
    expected = whole(tokens()).logits
    whole.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.model.language_model) is type(inner)
    assert torch.equal(loaded(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_to_disk(place, tmp_path):
    pytest.importorskip("accelerate")
    model = move_queries(hf.convert(build("llama", torch.float32)))
    model.save_pretrained(tmp_path / "model")
    resident = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
    places = {**dict.fromkeys(resident, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = hf.load(
        tmp_path / "model", device_map={**places, "model.residual": place}, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.residual.pseudo_query.is_meta == (place == "disk")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_fresh_model_from_a_converted_config():
    model = hf.convert(build("gemma3"), "full_attnres")
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    assert not fresh.model.residual.pseudo_query.any() and (fresh.model.residual.key_norm == 1).all()
    assert fresh(tokens(), labels=tokens()).loss.isfinite()


def test_parameters_that_a_folder_lacks_start_as_those_of_a_conversion(tmp_path):
    model = move_queries(hf.convert(build("llama")))
    old = {key: value for key, value in model.state_dict().items() if "residual" not in key}
    model.save_pretrained(tmp_path, state_dict=old)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.model.residual.pseudo_query.any() and (loaded.model.residual.key_norm == 1).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"num_blocks": 2}),
        ("qwen3_moe", {"residual": "full_attnres", "schedule": "two_phase"}),
        ("gpt2", {}),
        ("gpt_neox_parallel", {"num_blocks": 2}),
        ("native", {}),
    ],
)
def test_generation_with_drafts_of_the_models_own_first_layers(name, options):
    if name == "native":
        model = hf.AttnResForCausalLM(hf.AttnResConfig(**SHAPE)).eval()
    else:
        model = hf.convert(build(name, torch.float32), **options)
    move_queries(randomise(model))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected, runs = model.generate(tokens(1), **greedy), []
    last = list(model.base_model.sublayers())[-1]
    last.register_forward_pre_hook(lambda *_: runs.append(1))
    for layers in (1, 2):
        runs.clear()
        assert torch.equal(model.generate(tokens(1), assistant_early_exit=layers, **greedy), expected)
        assert model.config.num_hidden_layers == 3 and 0 < len(runs) <= 6

    def fail_in_drafts(*_):
        if model.config.num_hidden_layers == 2:
            raise MemoryError

    model.base_model.sublayers()[0].register_forward_pre_hook(fail_in_drafts)
    with pytest.raises(MemoryError):
        model.generate(tokens(1), assistant_early_exit=2, **greedy)
    assert model.config.num_hidden_layers == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_draft_is_the_first_layers_read_by_the_head(name):
    original = build(name)
    model = hf.convert(copy.deepcopy(original), num_blocks=2)
    shorter = build(name, num_hidden_layers=2)
    shorter.load_state_dict(original.state_dict(), strict=False)
    model.config.num_hidden_layers = 2
    assert torch.allclose(model(tokens(), use_cache=False).logits, shorter(tokens()).logits, rtol=0, atol=1e-9)


def test_compiles_into_one_graph():
    model = move_queries(hf.convert(build("llama", torch.float32, num_hidden_layers=2), num_blocks=3))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(tokens()).logits, model(tokens()).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*deprecated:FutureWarning")
def test_checkpointing_keeps_the_state_lean_and_refuses_the_reentrant_form():
    model = hf.convert(build("llama"))
    model.gradient_checkpointing_enable()
    assert model.model.residual.lean
    model.gradient_checkpointing_disable()
    assert not model.model.residual.lean
    with pytest.raises(UsageError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_the_trainer_trains_queries(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = hf.convert(build("qwen3", torch.float32)).train()
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(8)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=data).train()
    assert (model.model.residual.pseudo_query[1:].abs().amax(1) > 1e-3).all()
    saved = hf.load(tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert torch.allclose(saved(tokens()).logits, model.eval()(tokens()).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*deprecated:FutureWarning")
def test_lora_with_trainable_queries(tmp_path):
    peft = pytest.importorskip("peft")
    model = hf.convert(build("llama", torch.float32))
    start = copy.deepcopy(model)
    options = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["residual"], r=2)
    adapted = peft.get_peft_model(model, options)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sum("pseudo_query" in name or "key_norm" in name for name in trainable) == 2
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    before = adapted(tokens(), labels=tokens()).loss
    before.backward()
    optimizer.step()
    queries = next(p for name, p in adapted.named_parameters() if p.requires_grad and "pseudo_query" in name)
    assert (queries[1:].abs().amax(1) > 1e-6).all()  # it is the trainable copy that layers read with
    after = adapted(tokens(), labels=tokens()).loss
    assert after < before
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(start, tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens(), labels=tokens()).loss, after, atol=1e-6)
        with loaded.disable_adapter():
            assert torch.allclose(loaded(tokens(), labels=tokens()).loss, before, atol=1e-6)
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(tokens(), labels=tokens()).loss, after, atol=1e-5)


def doubles(module, args, output):
    """What a base model might do between its layers, and does with a tensor alone."""
    return 2 * output if isinstance(output, torch.Tensor) else output


def halves(module, args, output):
    """The same for a gradient alone."""
    return output + (output.detach() - output) / 2 if isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (halves, "computes other gradients .* no plain sum"),
        (doubles, "computes other outputs .* no plain sum of what its decoder layers add; it was not converted"),
        (lambda module, args, output: 2 * output, "cannot be run .*TypeError"),
    ],
)
def test_a_conversion_that_is_verified_is_taken_back(hook, reason):
    model = build("llama").train()
    model.model.layers[1].register_forward_hook(hook)
    ids, config = tokens(), model.config
    with torch.no_grad():
        expected = model(ids).logits
    before = dict(model.state_dict())
    with pytest.raises(UsageError, match=reason) as caught:
        hf.convert(model, verify=True)
    assert "\n" not in str(caught.value)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config is config and model.model.layers[0].training
    assert {*model.state_dict()} == {*before}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    model.model.layers[1]._forward_hooks.clear()
    with torch.no_grad():
        assert torch.allclose(hf.convert(model, verify=True)(ids).logits, model(ids).logits)


def test_what_cannot_be_run_cannot_be_verified():
    model = build("llama")
    model.lm_head = None
    with pytest.raises(UsageError, match=r"cannot be run on sample tokens .*verify=False leaves that out"):
        hf.convert(model, verify=True)


def test_verifying_holds_for_models_without_a_head_and_in_half_precision():
    for dtype in (torch.float64, torch.bfloat16):
        model = build("gpt2", dtype).base_model
        assert hf.convert(model, verify=True) is model and model.residual is not None


@pytest.mark.parametrize("registered", [True, False])
def test_an_architecture_is_one_entry_more(monkeypatch, tmp_path, registered):
    """Or none: what the entry of another type describes takes that, and is verified."""
    from transformers import HeliumConfig, HeliumForCausalLM

    config = HeliumConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    original = randomise(HeliumForCausalLM(config)).eval()
    others = {key: entries for key, entries in table.ARCHITECTURES.items() if key != "helium"}
    monkeypatch.setattr(table, "ARCHITECTURES", others)
    if registered:
        table.register(Architecture("helium"))
        with pytest.raises(ValueError, match="already registered"):
            table.register(Architecture("helium"))
    with torch.no_grad():
        expected = original(tokens()).logits
        model = hf.convert(original)
        assert torch.allclose(model(tokens()).logits, expected, atol=1e-5)
        model.save_pretrained(tmp_path)
        assert torch.equal(hf.load(tmp_path)(tokens()).logits, model(tokens()).logits)
