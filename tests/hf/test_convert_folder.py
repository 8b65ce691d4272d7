"""Folders: `attnres convert`, and loading what it and save_pretrained wrote."""

import errno
import importlib
import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel, PreTrainedTokenizerFast

from attnres import hf
from attnres.errors import Failure, UsageError
from attnres.hf.convert.folder import convert_folder
from attnres.hf.convert.proof import sample_tokens

from .converted import VOCAB, build, move_queries, tokens

folders = importlib.import_module("attnres.hf.convert.folder")


@pytest.fixture
def source(tmp_path):
    """A Llama in bfloat16 with its tokenizer, and files that are neither."""
    folder = tmp_path / "source"
    model = build("llama", torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("a Llama")
    (folder / "LICENSE").write_text("its licence")
    (folder / "consolidated.pth").write_text("weights in another form")
    return folder


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@torch.no_grad()
def test_convert_folder(source, tmp_path):
    lines = []
    target = tmp_path / "new" / "converted"
    result = convert_folder(source, target, "block_attnres", 3, report=lines.append)
    assert result["architecture"] == "llama" and result["model_class"] == "AttnResLlamaForCausalLM"
    assert result["residual_options"] == {"num_blocks": 3} and result["num_layers"] == 6
    assert result["parameters_added"] == 2 * 7 * 32 and result["dtype"] == "bfloat16"
    assert result["largest_difference"] <= result["relative_difference"] * result["largest_logit"] * 1.001 < 1e-4
    assert "largest difference" in lines[0] and "wrote" in lines[-1]
    json.dumps(result)

    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert after.keys() - before.keys() == {"model.residual.pseudo_query", "model.residual.key_norm"}
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    present = left_in(target)
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} < set(present)
    assert {"README.md", "LICENSE"} < set(present)
    assert not {"modeling_llama.py", "consolidated.pth"} & set(present)
    assert AutoTokenizer.from_pretrained(target)("w5 w7")["input_ids"]
    assert left_in(target.parent) == ["converted"]
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    converted = hf.load(target, dtype=torch.float32)
    assert torch.allclose(converted(tokens()).logits, original(tokens()).logits, atol=1e-5)
    assert converted.generation_config.max_new_tokens == 3


def test_a_tokenizers_own_code_is_kept(source, tmp_path):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom .words_own import NAME\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    name = NAME\n"
    )
    (source / "words_own.py").write_text('NAME = "own"\n')
    convert_folder(source, tmp_path / "converted", "block_attnres", 3)
    assert not (tmp_path / "converted" / "modeling_llama.py").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted", trust_remote_code=True)
    assert tokenizer.name == "own" and tokenizer("w5")["input_ids"] == [5]


@pytest.mark.parametrize("named", [None, "LlamaTokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi3", "gemma2", "granite"])
def test_the_tokenizer_stays_the_same(name, named, tmp_path):
    """transformers picks the tokenizer's class by the model type and by what the folder names, in turns."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.decoder = decoders.ByteLevel()
    text = "Attention over depth, 2026!"
    bytes_too = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<unk>"]}
    words.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=300, **bytes_too))
    for kind in ("original", "converted"):
        folder = tmp_path / kind
        model = build(name, torch.float32)
        (hf.convert(model) if kind == "converted" else model).config.save_pretrained(folder)
        words.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named} if named else {}))
    original, converted = (AutoTokenizer.from_pretrained(tmp_path / kind) for kind in ("original", "converted"))
    assert type(converted) is type(original)
    assert converted(text)["input_ids"] == original(text)["input_ids"]


def test_an_empty_destination_is_taken_and_a_full_one_refused(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    convert_folder(source, target, "full_attnres")
    assert hf.load(target).config.residual == "full_attnres"
    with pytest.raises(UsageError, match="exists already"):
        convert_folder(source, target)


def test_a_different_function_is_not_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "convert", lambda *args, **sizes: move_queries(hf.convert(*args, **sizes)))
    lines = []
    with pytest.raises(Failure, match=r"computes something else.*nothing was written"):
        convert_folder(source, tmp_path / "target", report=lines.append)
    assert "largest difference" in lines[0]
    assert left_in(tmp_path) == ["source"]


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def save_pretrained(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.convert(build("llama")).__class__, "save_pretrained", save_pretrained)
    with pytest.raises(Failure, match=r"cannot write .*target: No space left on device"):
        convert_folder(source, tmp_path / "target")
    assert left_in(tmp_path) == ["source"]


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder):
    LlamaModel(build("llama").config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), UsageError, "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), UsageError, "no config that can be read"),
        (lambda folder: edit_config(folder, model_type="unheard_of"), UsageError, "no config that can be read"),
        (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), UsageError, "quantised"),
        (lambda folder: edit_config(folder, intermediate_size=40), UsageError, "do not fit.*: mismatched model"),
        (lambda folder: rewrite(folder, lambda w: w.pop("model.norm.weight")), UsageError, "missing model.norm"),
        (lambda folder: hf.convert(build("llama")).save_pretrained(folder), UsageError, "Attention Residuals already"),
        (headless, UsageError, "holds a LlamaModel, no causal language model"),
        (pickled, UsageError, "cannot be loaded"),
        (cut, Failure, "damaged"),
    ],
)
def test_sources_that_cannot_be_converted(source, tmp_path, spoil, error, reason):
    spoil(source)
    with pytest.raises(error, match=reason) as caught:
        convert_folder(source, tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["source"]


def test_a_source_that_is_no_folder(tmp_path):
    with pytest.raises(UsageError, match="is neither a folder nor a GGUF file"):
        convert_folder("somebody/a-model", tmp_path / "target")


def test_sample_tokens_have_padding():
    sample = sample_tokens(VOCAB, 8)
    assert sample.input_ids.shape == (2, 8) and sample.input_ids.max() < VOCAB
    assert sample.attention_mask.tolist() == [[1] * 8, [0] * 2 + [1] * 6]


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (lambda folder: build("llama").save_pretrained(folder), UsageError, "'llama' model without Attention"),
        (lambda folder: rewrite(folder, lambda w: w.pop("model.residual.key_norm")), UsageError, "missing .*key_norm"),
        (lambda folder: rewrite(folder, lambda w: w.update(x=torch.zeros(1))), UsageError, "unexpected x"),
        (lambda folder: edit_config(folder, num_hidden_layers=2), UsageError, "do not fit.*: mismatched model"),
        (lambda folder: edit_config(folder, residual="prenorm"), UsageError, "residual must be one of"),
        (lambda folder: edit_config(folder, residual_options={"num_blocks": 9}), UsageError, "num_blocks"),
        (lambda folder: edit_config(folder, architectures=["LlamaForCausalLM"]), UsageError, "'LlamaForCausalLM'"),
        (lambda folder: edit_config(folder, architectures=["AttnResos"]), UsageError, "'AttnResos'"),
        (cut, Failure, "damaged"),
    ],
)
def test_folders_that_cannot_be_loaded(tmp_path, spoil, error, reason):
    hf.convert(build("llama"), num_blocks=2).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=reason) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_loading_runs_no_code(tmp_path):
    with pytest.raises(UsageError, match="trust_remote_code"):
        hf.load(tmp_path, trust_remote_code=True)


def test_load_takes_native_models_too(tmp_path):
    config = hf.AttnResConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    hf.AttnResForCausalLM(config).save_pretrained(tmp_path)
    assert isinstance(hf.load(tmp_path), hf.AttnResForCausalLM)
