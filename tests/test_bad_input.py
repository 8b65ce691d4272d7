"""Bad input and full disks on the command line: one sentence, the right exit status, nothing half-written."""

import pytest

from .command_line import AT_STEP, needs_full_device

BAD_FLAGS = {
    "--residual.name blok_attnres": "residual 'blok_attnres' is unknown; did you mean 'block_attnres'?",
    "--residual.block-size 2 --residual.num-blocks 2": "give block_size or num_blocks, not both; they are 2 and 2",
    "--residual.num-blocks 0": "num_blocks must be a positive whole number; it is 0",
    "--residual.block-size -1": "block_size must be a positive whole number; it is -1",
    "--residual.num-blocks 9": "num_blocks must be at most the number of layers, 4; it is 9",
    "--residual.name prenorm --residual.num-blocks 2": "'prenorm' has no option 'num_blocks'; it takes none",
    "--steps 0": "steps must be a positive whole number; it is 0",
    "--steps abc": "--steps must be a whole number; it is 'abc'",
    "--stesp 3": "Unrecognized options: --stesp, 3; Perhaps you meant: --steps INT",
    "--steps": "--steps: expected one argument",
    "3": "Unrecognized options: 3",
    "--precision fp8": "--precision must be one of auto, float32, bfloat16; it is 'fp8'",
    "--optim.betas 0.9": "--optim.betas: expected 2 arguments",
    "--optim.clip x": "--optim.clip must be a number or None; it is 'x'",
    "--residual.stream-scale yes": "--residual.stream-scale must be one of True, False or None; it is 'yes'",
    "--optim.lr 0": "lr must be a positive number such as 3e-3; it is 0.0",
    "--optim.warmup-steps 10": "warmup_steps must be fewer than the 10 steps of the run; it is 10",
    "--validation-tokens 8": "validation_tokens must be at least context, 32; it is 8",
    "--seed -1": "seed must be zero or more; it is -1",
    "--device nowhere": "device 'nowhere' cannot be used here; try auto or cpu",
    "--model.num-attention-heads 3": "num_attention_heads must divide hidden_size",
    "--model.max-position-embeddings 16": "context must be at most the model's max_position_embeddings, 16; it is 32",
    "--model.initializer-range nan": "initializer_range must be zero or positive; it is nan",
    "--preset huge": "preset 'huge' is unknown; known: tiny",
    "--tokenizer train:5": "VOCAB in train:VOCAB must be a whole number of at least 257",
    "--data missing.txt": "--data 'missing.txt' does not exist",
    "--config missing.yaml": "--config missing.yaml cannot be read: No such file or directory",
    "--seed 1208925819614629174706176": "seed must be at most 9223372036854775807; it is 12089258196146",
    "--steps 1000000000000000000000000000000": "steps must be at most 9007199254740992; it is 1000000000",
    "--model.hidden-size 1000000000000": "hidden_size must be at most 2147483647; it is 1000000000000",
    "--model.num-hidden-layers 1000000": "num_hidden_layers must be at most 65536; it is 1000000",
    "--model.hidden-size 200000000": "intermediate_size x hidden_size must be at most",
    "--model.hidden-size 1000000": "(24,000,400,000,000 parameters take 288,004.8 GB, and there are",
    "--batch-size 2000000000": "the logits of 2,000,000,000 sequences of 32 tokens take 65,792.0 GB, and there are",
    "--resume": "it has no config.json",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_sentence_and_leave_nothing(server, tiny, tmp_path, flags):
    end = server.run("train", *tiny, "--out", tmp_path / "run", *flags.split())
    assert (end.status, end.out) == (2, "")
    assert end.said.startswith("attnres train: ")
    assert BAD_FLAGS[flags] in end.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a corpus with text"),
        (b"\x00\xff\x80 binary", "is binary (it holds NUL bytes); give a text"),
        (b"too short for a context", "fewer than context + 1 = 33; give a larger corpus, a smaller context"),
    ],
)
def test_bad_corpus(server, tiny, tmp_path, content, message):
    (tmp_path / "corpus.txt").write_bytes(content)
    end = server.run("train", *tiny, "--data", tmp_path / "corpus.txt", "--out", tmp_path / "run")
    assert end.status == 2
    assert message in end.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("steps: [1", "is not YAML: while parsing a flow sequence"),
        ("- steps", "must be a mapping of flag names to values"),
        ("[" * 5000, "is not YAML: maximum recursion depth exceeded"),
        ("optim: {lrr: 1}", "settings.yaml: Unrecognized options: --optim.lrr=1; Perhaps you meant: --optim.lr"),
        ("optim: 3", "settings.yaml: Unrecognized options: --optim=3"),
        ("steps: many", "settings.yaml: --steps must be a whole number; it is 'many'"),
        ("residual: {num_blocks: 2, nmae: prenorm}", "settings.yaml: Unrecognized options: --residual.nmae=prenorm"),
        ("steps: 0", "settings.yaml: steps must be a positive whole number; it is 0"),
    ],
)
def test_bad_yaml(server, tiny, tmp_path, yaml, message):
    (tmp_path / "settings.yaml").write_text(yaml)
    end = server.run("train", "--out", tmp_path / "run", "--config", tmp_path / "settings.yaml")
    assert end.status == 2
    assert message in end.said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run(server, tiny, finished_run):
    before = (finished_run / "metrics.jsonl").read_bytes()
    end = server.run("train", *tiny, "--out", finished_run)
    assert end.status == 2
    assert f"out holds a run already: {finished_run}; pass --resume to go on with it, or another --out" in end.said
    assert (finished_run / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_configuration(server, finished_run):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    end = server.run("train", "--resume", "--out", finished_run, "--optim.lr", "0.1", "--model.hidden-size", 64)
    assert end.status == 2
    assert "optim.lr (0.003 in the checkpoint, 0.1 now)" in end.said
    assert "model.hidden_size (32 in the checkpoint, 64 now)" in end.said
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("folder", ["/proc/attnres", "{corpus}/run", "{corpus}"])
def test_a_folder_that_cannot_be_written(server, tiny, corpus_file, folder):
    end = server.run("train", *tiny, "--out", folder.format(corpus=corpus_file))
    assert end.status == 1
    assert "cannot write" in end.said
    assert "choose another --out" in end.said


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoints(server, tiny, tmp_path):
    out = tmp_path / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    end = server.run("train", *tiny, "--out", out, patch=AT_STEP.format(step=5, action=limit))
    assert end.status == 1
    assert f"cannot save step 6 under {out}/checkpoints: " in end.said
    assert "MB free (earlier checkpoints are untouched)" in end.said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    end = server.run("train", "--resume", "--out", out)
    assert end.status == 0, end.err


@needs_full_device
def test_a_disk_that_was_full_from_the_start(server, tiny, tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    end = server.run("train", *tiny, "--out", tmp_path)
    assert end.status == 1
    assert f"cannot write {tmp_path}/config.json: No space left on device; choose another --out" in end.said
    assert list(tmp_path.iterdir()) == []


def test_commands_that_do_not_exist(server):
    end = server.run("trian")
    assert end.status == 2
    assert end.said.startswith("attnres trian: there is no such command; there are compare, train, ")
    end = server.run()
    assert end.status == 2
    assert "usage: attnres COMMAND" in end.out


def test_debug_shows_the_traceback(server, tmp_path):
    end = server.run("train", "--resume", "--out", tmp_path, "--debug")
    assert "Traceback" in end.err
    assert "nothing to resume" in end.err or "is not a run" in end.err


def test_what_nobody_thought_of_is_one_sentence_too(server, tiny, tmp_path):
    end = server.run("train", *tiny, "--out", tmp_path / "run", patch=AT_STEP.format(step=2, action="1 / 0"))
    assert end.status == 1
    assert "unexpected ZeroDivisionError: division by zero; run again with --debug" in end.said


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopping_before_the_first_step(server, tiny, tmp_path, name, status):
    patch = f"""
import os, signal
from attnres.train import trainer
trainer.load_corpus = lambda *args, **options: os.kill(os.getpid(), signal.{name})
"""
    end = server.run("train", *tiny, "--out", tmp_path / "run", patch=patch)
    assert end.status == status
    assert end.err.strip() == ("attnres train: stopped" if status == 130 else "")
    assert not (tmp_path / "run").exists()
