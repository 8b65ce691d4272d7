"""A small corpus, a tiny model and the command line, for the tests of what trains."""

import os
import random

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they give

from attnres import ops

from .command_line import Server
from .device import DEVICE


@pytest.fixture(scope="session")
def device():
    """The GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture
def interpreted():
    """Skips a test that gives CPU tensors to Triton's kernels where these are compiled for a GPU."""
    pytest.importorskip("triton")
    if DEVICE.type != "cpu":
        pytest.skip("needs Triton's interpreter, which serves without a GPU only; try CUDA_VISIBLE_DEVICES=")


@pytest.fixture(autouse=True)
def backend_as_it_was():
    """No test leaves another backend behind: the next one, in another file, would fail or test something else."""
    before = ops.backend()
    yield
    after = ops.backend()
    ops.set_backend(before)
    assert after == before, f"the test left the backend {after!r} behind; put {before!r} back"


hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one takes its time
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """server.run(*argv) -> how that command ended."""
    server = Server(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A text file of 12 kB that a model can learn something from."""
    words = ["source", "block", "query", "attends", "over", "depth", "the", "residual", "stream", "a", "layer", "reads"]
    text = " ".join(random.Random(0).choices(words, k=2000))
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def tiny(corpus_file):
    """Flags of a run that takes a second: 2 Transformer blocks of width 32, 10 steps, a checkpoint every third."""
    flags = f"""
        --data {corpus_file} --device cpu --precision float32 --context 32 --batch-size 4 --steps 10
        --checkpoint-every 3 --validate-every 4 --validation-tokens 160 --log-every 1 --optim.warmup-steps 2
        --model.hidden-size 32 --model.num-hidden-layers 2 --model.num-attention-heads 2
    """
    return flags.split()


@pytest.fixture(scope="session")
def finished_run(server, tiny, tmp_path_factory):
    """The folder of a run of four steps, with a BPE of 270 entries."""
    out = tmp_path_factory.mktemp("run")
    end = server.run("train", *tiny, "--steps", 4, "--tokenizer", "train:270", "--out", out)
    assert end.status == 0, end.err
    return out
