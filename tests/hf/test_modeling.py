"""The native model among Hugging Face's: what it computes, saves, generates and trains like."""

import copy
import importlib
import json
import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import Failure, UsageError
from attnres.model import Decoder, DecoderConfig
from attnres.run import checkpoint

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, StaticCache

import attnres.hf
from attnres.hf import AttnResConfig, AttnResForCausalLM, AttnResModel, attention
from attnres.run.find import find_run, is_run
from attnres.run.opening import open as open_model

from .converted import build

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # wide enough for greedy text that does not repeat itself
)
VARIANTS = [
    ("prenorm", {}),
    ("full_attnres", {}),
    ("block_attnres", {"num_blocks": 2}),
    ("block_attnres", {"num_blocks": 2, "schedule": "two_phase"}),
]
IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
GREEDY = dict(do_sample=False, max_new_tokens=8, pad_token_id=0)  # 0 is not in IDS: generate masks padding by itself


def make(name="block_attnres", options=None, **changes):
    """A tiny model whose queries are not zero, as after training."""
    torch.manual_seed(0)
    options = {"num_blocks": 2} if options is None and name == "block_attnres" else options or {}
    model = AttnResForCausalLM(AttnResConfig(**{**SHAPE, **changes}, residual=name, residual_options=options))
    for p in model.model.residual.parameters():
        torch.nn.init.normal_(p)
    return model.eval()


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def gradients(model):
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_is_the_decoder(name, options):
    model = make(name, options)
    decoder = model.to_decoder()
    with torch.no_grad():
        assert torch.equal(logits(model), decoder(IDS))
    assert torch.equal(logits(AttnResForCausalLM.from_decoder(decoder)), logits(model))


def test_export_keeps_dtype_and_shares_nothing():
    model = make(tie_word_embeddings=False).double()
    decoder = model.to_decoder()
    assert decoder.norm.weight.dtype == torch.float64
    before = logits(model)
    with torch.no_grad():
        decoder.lm_head.weight.zero_()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [True, False])
def test_saves_and_loads_through_the_auto_classes(tmp_path, tied):
    model = make(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in files and "model-00002-of" in " ".join(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py"))]

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AttnResForCausalLM and not any(report.values())
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is AttnResConfig and config.decoder_config() == model.config.decoder_config()

    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is AttnResModel
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
    torch.testing.assert_close(F.linear(hidden, model.lm_head.weight), logits(model))


def test_from_config_starts_like_the_decoder():
    torch.manual_seed(0)
    config = AttnResConfig(**{**SHAPE, "initializer_range": 0.05, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config)
    assert not model.model.residual.pseudo_query.any() and (model.model.residual.key_norm == 1).all()
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))
    drawn = {n.removeprefix("model."): p.std().item() for n, p in model.named_parameters() if p.std() > 0}
    want = {name: p.std().item() for name, p in Decoder(config.decoder_config()).named_parameters() if p.std() > 0}
    assert drawn == pytest.approx(want, rel=0.1) and len(drawn) == 2 * 7 + 2


def test_a_prenorm_model_loads_as_attnres_and_computes_the_same(tmp_path):
    plain = make("prenorm")
    plain.save_pretrained(tmp_path)
    for name in ("full_attnres", "block_attnres"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, residual=name)
        assert model.config.residual == name and not model.model.residual.pseudo_query.any()
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_config_refuses_what_does_not_fit():
    for values, message in [
        ({"hidden_size": 30}, "num_attention_heads must divide hidden_size"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"residual": "blok_attnres"}, "did you mean 'block_attnres'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta alone"),
    ]:
        with pytest.raises(UsageError, match=message):
            AttnResConfig(**{**SHAPE, **values})
    with pytest.raises(UsageError, match="num_blocks"):
        make(options={"num_blocks": 99})
    assert AttnResConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_greedy_text_does_not_depend_on_the_cache(name, options):
    model = make(name, options)
    dynamic = model.generate(IDS, **GREEDY)
    assert len(dynamic[:, 9:].unique()) > 4, "the text is not all the same token"
    assert torch.equal(model.generate(IDS, **GREEDY, use_cache=False), dynamic)
    assert torch.equal(model.generate(IDS, **GREEDY, cache_implementation="static"), dynamic)


def test_beam_search_does_not_depend_on_the_cache():
    model = make()
    beams = model.generate(IDS, **GREEDY, num_beams=3)
    assert not torch.equal(beams, model.generate(IDS, **GREEDY))
    assert torch.equal(beams, model.generate(IDS, **GREEDY, num_beams=3, use_cache=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding_changes_nothing(attention, cache):
    model = make(attn_implementation=attention)
    alone = [model.generate(ids, **GREEDY)[0, -8:] for ids in (IDS[:1, :5], IDS[1:])]
    batch, mask = IDS.clone(), torch.ones_like(IDS)
    batch[0] = torch.cat([torch.zeros(4, dtype=torch.long), IDS[0, :5]])
    mask[0, :4] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY, cache_implementation=cache)
    assert torch.equal(together[:, -8:], torch.stack(alone))


def test_masked_tokens_are_not_seen():
    model = make()
    mask = torch.ones_like(IDS)
    mask[:, 3] = 0
    other = IDS.clone()
    other[:, 3] = (IDS[:, 3] + 1) % 61
    seen = logits(model, IDS, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(logits(model, other, attention_mask=mask)[:, 4:], seen)
    assert (logits(model, other)[:, 4:] - logits(model)[:, 4:]).abs().max() > 0.1


def test_positions_are_taken_from_position_ids():
    model = make().double()
    ids = IDS[:, [0, 1, 2, 4]]  # without token 3, whose place stays empty
    mask = torch.ones_like(IDS[:, :5])
    mask[:, 3] = 0
    want = logits(model, IDS[:, :5], attention_mask=mask)[:, -1]
    torch.testing.assert_close(logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 4]]))[:, -1], want)
    assert (logits(model, ids)[:, -1] - want).abs().max() > 0.01


def test_chunks_through_a_cache_equal_one_pass():
    model = make().double()
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [logits(model, part, past_key_values=cache) for part in IDS.split([4, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model))


def test_loss_is_the_mean_over_labels():
    model = make()
    labels = IDS.clone()
    labels[0, :5] = -100
    want = F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(IDS, labels=labels).loss.detach(), want)


def test_embeddings_and_kept_logits():
    model = make()
    assert torch.equal(logits(model, None, inputs_embeds=model.model.embed_tokens(IDS)), logits(model))
    torch.testing.assert_close(logits(model, logits_to_keep=2), logits(model)[:, -2:])
    torch.testing.assert_close(logits(model, logits_to_keep=torch.tensor([1, 5])), logits(model)[:, [1, 5]])
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": model.model.embed_tokens(IDS)}):
        with pytest.raises(UsageError, match="either input_ids or inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradient_checkpointing_gives_identical_gradients(name, options):
    model = make(name, options).double()  # a lean state is read layer by layer, whatever the schedule
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.model.residual.lean
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    recomputed = gradients(model)
    assert len(calls) == 2, "the layer ran again in the backward pass"
    for parameter, gradient in plain.items():
        torch.testing.assert_close(recomputed[parameter], gradient, rtol=1e-9, atol=1e-12)
    assert all(gradient.any() for gradient in recomputed.values())
    assert model(IDS).past_key_values is None, "a cache would be filled a second time in the backward pass"
    assert torch.equal(model.generate(IDS, **GREEDY)[:, :9], IDS)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not model.model.residual.lean


def test_loading_options_are_honoured(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager"
    )
    assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    near = logits(loaded).float()
    assert F.cosine_similarity(near, logits(model), -1).median() > 0.999


def test_layers_may_be_offloaded_to_disk(tmp_path):
    pytest.importorskip("accelerate")
    model = make()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.residual": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 3 else "cpu" for i in range(4)}
    options = dict(offload_folder=tmp_path / "offload")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, **options)
    assert loaded.model.layers[1].norm.weight.is_meta and loaded.model.layers[2].q_proj.weight.is_meta
    # norms with hooks are called and not folded in, which rounds elsewhere
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))

    places["model.residual"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, **options)
    assert loaded.model.residual.pseudo_query.is_meta
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["full_attnres", "denseformer"])
def test_accelerates_offloading(residual, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make(residual)
    expected = model(IDS, output_hidden_states=True)
    for offloaded in (
        accelerate.cpu_offload(copy.deepcopy(model), "cpu"),
        accelerate.disk_offload(copy.deepcopy(model), tmp_path, "cpu"),
    ):
        assert all(p.is_meta for p in offloaded.model.residual.parameters())
        with torch.no_grad():
            found = offloaded(IDS, output_hidden_states=True)
        for a, b in zip((found.logits, *found.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["native", "converted"])
def test_parameters_of_the_residual_connection_have_no_low_rank_form(kind):
    peft = pytest.importorskip("peft")
    model = make() if kind == "native" else attnres.hf.convert(build("llama", torch.float32))
    options = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["residual.pseudo_query"])
    adapted = peft.get_peft_model(model, options)
    with pytest.raises(UsageError, match=r"inside a ParamWrapper.*modules_to_save=\['residual'\]"):
        adapted(input_ids=IDS)


def test_eager_attention_equals_sdpa_and_returns_weights(monkeypatch):
    eager, sdpa = make(attn_implementation="eager").double(), make(attn_implementation="sdpa").double()
    outputs = eager(IDS, output_attentions=True)
    torch.testing.assert_close(outputs.logits.detach(), logits(sdpa))
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    assert not outputs.attentions[0].triu(1).any()
    said = mock.Mock()
    monkeypatch.setattr(attention.logger, "warning_once", said)
    without = sdpa(IDS, output_attentions=True)  # as transformers' own models
    assert torch.equal(without.logits, sdpa(IDS).logits) and without.attentions == ()
    assert "attn_implementation='eager'" in said.call_args.args[0]


def test_hidden_states_are_what_each_block_reads():
    model = make("full_attnres")
    got = {}
    for i in (0, 2):
        model.model.layers[i].register_forward_hook(lambda m, args, out, i=i: got.__setitem__(i, args[0]))
    outputs = model(IDS, output_hidden_states=True)
    first, second, last = outputs.hidden_states
    assert torch.equal(first, model.model.embed_tokens(IDS))
    for i, read in ((0, first), (2, second)):
        torch.testing.assert_close(model.model.layers[i].norm(read), got[i])
    torch.testing.assert_close(model.lm_head(last), outputs.logits)


def test_return_dict_false_gives_a_tuple():
    plain = make()(IDS, labels=IDS, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple) and plain[0].dim() == 0 and plain[1].shape == (2, 9, 61)


def test_compiles_in_one_graph():
    model = make("full_attnres", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, use_cache=False), logits(model), rtol=1e-4, atol=1e-4)


def test_continuous_batching_gives_the_same_text():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = make()
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist()]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)  # or it takes most of the memory
    results = model.generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=room, warmup=False
    )
    want = [model.generate(torch.tensor([prompt]), **GREEDY)[0, -8:].tolist() for prompt in prompts]
    assert [result.generated_tokens for result in results.values()] == want


def test_plans_name_modules_that_exist():
    model = make()
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.model.named_modules()}
    assert set(AttnResConfig.base_model_tp_plan) <= names
    assert set(AttnResConfig.base_model_fsdp_plan) - {"layers.*"} <= names


def test_new_tokens_grow_embedding_and_head_together():
    model = make()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert logits(model).shape == (2, 9, 70) and model.config.vocab_size == 70
    assert model.lm_head.weight is model.model.embed_tokens.weight


def rows(count):
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 61, (count, 1), generator=generator)
    ids = (starts + torch.arange(12)) % 61  # counting, which a tiny model learns in a few steps
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]


def test_trains_under_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make(initializer_range=0.05).train()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=12,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(64))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0]) - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


def test_trains_with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    before = logits(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(
        r=2, target_modules=targets, modules_to_save=["residual"], task_type="CAUSAL_LM", init_lora_weights=True
    )
    adapted = peft.get_peft_model(model, settings)
    torch.testing.assert_close(logits(adapted), before)
    adapted.gradient_checkpointing_enable()
    adapted(IDS, labels=IDS).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    # two layers, seven targets in all Transformer blocks, two matrices each, and the queries and key norms
    assert len(trained) == 2 * 7 * 2 + 2 and any("pseudo_query" in name for name in trained)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    after = logits(adapted)
    assert (after - before).abs().max() > 0.01
    adapted.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(make(), tmp_path).merge_and_unload()
    assert type(merged) is AttnResForCausalLM
    torch.testing.assert_close(logits(merged), after, rtol=1e-3, atol=1e-3)


@pytest.fixture
def run(tmp_path):
    """A run folder as `attnres train` leaves it, with two checkpoints, and the decoders in them."""
    config = DecoderConfig(**{**SHAPE, "vocab_size": 257}, residual="full_attnres")
    decoders = {step: Decoder(config, seed=step) for step in (1, 2)}
    (tmp_path / "config.json").write_text(json.dumps({"model": config.to_dict(), "steps": 2}))
    ByteTokenizer().save(tmp_path)
    for step, decoder in decoders.items():
        torch.nn.init.normal_(decoder.residual.pseudo_query)
        checkpoint.save(tmp_path / "checkpoints", step, decoder.state_dict(), {}, {}, keep=2)
    return tmp_path, decoders


def test_a_training_run_loads(run):
    folder, decoders = run
    model = AttnResForCausalLM.from_run(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), decoders[2](IDS), rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "eager" and model.generation_config.eos_token_id == 256
    first = AttnResForCausalLM.from_run(folder / "checkpoints" / "step-00000001", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(logits(first), decoders[1].double()(IDS))
    assert all(torch.equal(p, first.to_decoder().state_dict()[name]) for name, p in decoders[1].state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("né").input_ids == [110, 195, 169] and tokenizer.eos_token_id == 256


@pytest.mark.parametrize("place", ["checkpoints/mine", "mine/checkpoints", "checkpoints/checkpoints"])
def test_a_run_may_lie_in_a_folder_called_checkpoints(run, tmp_path_factory, place):
    folder, decoders = run
    moved = tmp_path_factory.mktemp("elsewhere") / place
    shutil.copytree(folder, moved)
    for name, step in ((moved, 2), (moved / "checkpoints" / "step-00000001", 1)):
        assert is_run(name) and find_run(name).folder == moved
        model, _, _ = open_model(name, device="cpu", transformers=True)
        with torch.no_grad():
            torch.testing.assert_close(logits(model), decoders[step](IDS), rtol=1e-4, atol=1e-4)


def test_a_run_that_does_not_fit_is_refused(run, tmp_path_factory):
    folder, _ = run
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UsageError, match="not a training run"):
        AttnResForCausalLM.from_run(empty)
    with pytest.raises(UsageError, match="holds no whole checkpoint"):
        AttnResForCausalLM.from_run(folder / "checkpoints" / "step-00000007")
    settings = json.loads((folder / "config.json").read_text())
    for change, problem in [({"num_hidden_layers": 3}, "missing"), ({"vocab_size": 200}, "mismatched")]:
        (folder / "config.json").write_text(json.dumps({"model": settings["model"] | change}))
        with pytest.raises(UsageError, match=f"do not fit .*{problem}"):
            AttnResForCausalLM.from_run(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = folder / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(Failure, match="damaged"):
        AttnResForCausalLM.from_run(weights.parent)
    AttnResForCausalLM.from_run(folder)  # falls back to the whole one


def test_without_transformers_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'attnres\[hf\]'"):
        importlib.reload(attnres.hf)
