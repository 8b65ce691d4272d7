"""onnxruntime computes what the models compute: docs/onnx.md, run as a reader would run it."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnxscript", reason="needs onnxscript, which `make test-engines` installs")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, which `make test-engines` installs")
import numpy as np
import onnxruntime
from torch.export import export

from attnres.model.cache import KeyValueCache

from ..hf.test_export import IDS, make
from ..model.test_export import BATCH, BLOCK, PAST, TOKENS, decoder, snippets, with_cache

STEPS = 8


def greedy(session, model, prompt):
    """Prompt and steps in onnxruntime; the largest difference of the logits from the model's without a cache."""
    names = [given.name for given in session.get_inputs()]
    kept = [np.zeros((len(prompt), i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[1:]]
    ids, new, largest = prompt, prompt, 0.0
    for _ in range(1 + STEPS):
        logits, *kept = session.run(None, dict(zip(names, [new.numpy(), *kept], strict=True)))
        with torch.no_grad():
            whole = model(ids)
        expected = getattr(whole, "logits", whole)[:, -new.shape[1] :]
        largest = max(largest, (torch.from_numpy(logits) - expected).abs().max().item())
        new = torch.from_numpy(logits)[:, -1:].argmax(-1)
        assert torch.equal(new, expected[:, -1:].argmax(-1))
        ids = torch.cat([ids, new], 1)
    return largest


@pytest.mark.parametrize("name", ["block_attnres", "full_attnres", "llama"])
def test_a_hugging_face_model_generates_in_onnxruntime(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make(name, torch.float32)
    model.save_pretrained("upgraded-model")
    names: dict = {}
    for snippet in snippets()[:3]:
        exec(snippet, names)
    prompt = torch.tensor([[5, 17, 2]])
    model.generation_config.eos_token_id = None
    assert names["answer"] == model.generate(prompt, max_new_tokens=STEPS, do_sample=False)[0, 3:].tolist()
    largest = max(greedy(names["session"], model, ids) for ids in (IDS[:, :9], IDS[:1, :1]))
    print(f"largest difference {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        dict(BLOCK, attention_pattern=("sliding_window", "gqa"), sliding_window=5),
        dict(residual="full_attnres", attention_pattern=("mla",)),
    ],
    ids=["window", "latent"],
)
def test_a_decoder_generates_in_onnxruntime(options, tmp_path):
    model, cache = decoder(**options).float(), KeyValueCache()
    with torch.no_grad():
        model(IDS[:2, :4].clone(), cache)
    past, each = [list(side.values()) for side in (cache.keys, cache.values)], [{0: BATCH, 2: PAST}] * 2
    shapes = ({0: BATCH, 1: TOKENS}, each, each)
    program = export(with_cache(model), (IDS[:2, :3].clone(), *past), dynamic_shapes=shapes)
    torch.onnx.export(program, dynamo=True).save(tmp_path / "model.onnx")
    largest = greedy(onnxruntime.InferenceSession(tmp_path / "model.onnx"), model, IDS[:, :9])
    print(f"largest difference {largest:.1e}")
    assert largest < 1e-4
