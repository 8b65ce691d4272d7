"""One door to every trained model: a run, a step of it, a native, a converted and a pretrained folder."""

import pytest
import torch

import attnres.run
from attnres.cli import main
from attnres.data.tokenizer import ByteTokenizer
from attnres.errors import UsageError
from attnres.model import Decoder

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(finished_run, tmp_path_factory):
    """What `attnres.run.open` takes, by kind."""
    from attnres import hf

    root = tmp_path_factory.mktemp("models")
    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    llama.save_pretrained(root / "pretrained")
    hf.convert(llama, num_blocks=2).save_pretrained(root / "converted")
    hf.AttnResForCausalLM(hf.AttnResConfig(**sizes)).save_pretrained(root / "native")
    for kind in ("pretrained", "converted", "native"):
        ByteTokenizer().save(root / kind)
    return {"run": finished_run, **{kind: root / kind for kind in ("native", "converted", "pretrained")}}


@pytest.mark.parametrize("kind", ["run", "native", "converted", "pretrained"])
def test_every_kind_opens(folders, kind):
    opened = attnres.run.open(folders[kind], device="cpu", dtype="bfloat16", pretrained=kind == "pretrained")
    assert opened.kind == kind and not opened.model.training
    assert isinstance(opened.model, Decoder) == (kind == "run")
    assert next(opened.model.parameters()).dtype == torch.bfloat16
    assert opened.tokenizer.decode(opened.tokenizer.encode("a source")) == "a source"
    in_transformers = attnres.run.open(folders[kind], device="cpu", transformers=True, pretrained=True)
    assert isinstance(in_transformers.model, transformers.PreTrainedModel)
    assert in_transformers.tokenizer("a source").input_ids == opened.tokenizer.encode("a source").tolist()


def test_a_step_of_a_run_opens(folders):
    newest = attnres.run.open(folders["run"], device="cpu")
    step = attnres.run.open(folders["run"] / "checkpoints/step-00000004", device="cpu")
    earlier = attnres.run.open(folders["run"] / "checkpoints/step-00000003", device="cpu")
    weights = [opened.model.embed_tokens.weight for opened in (newest, step, earlier)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", ["run", "native", "converted"])
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_generate_continues_with_every_kind(folders, kind, temperature, capsys):
    argv = ["generate", str(folders[kind]), "--prompt", "a source", "--tokens", "3", "--temperature", temperature]
    said = []
    for _ in range(2):
        assert main([*argv, "--device", "cpu"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("a source") and said[0] == said[1]
    assert main([*argv, "--prompt", "", "--device", "cpu"]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_what_is_no_model_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match=r"holds a 'llama' model without Attention Residuals; convert it first"):
        attnres.run.open(folders["pretrained"])
    with pytest.raises(UsageError, match=r"is not a run: it has no config\.json; give the --out"):
        attnres.run.open(tmp_path)
    with pytest.raises(UsageError, match="dtype must be auto or a torch dtype such as bfloat16; it is 'float17'"):
        attnres.run.open(folders["run"], dtype="float17")
    with pytest.raises(UsageError, match="device 'nowhere' cannot be used here"):
        attnres.run.open(folders["run"], device="nowhere")
