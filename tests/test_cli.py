"""The command line: bad input, settings from files and flags, signals, terminals, and what it costs to start."""

import json
import os
import subprocess
import sys
import time

import pytest

from attnres.train.run_folder import read_config

from .command_line import AT_STEP


def said(end):
    """What a command that failed said, which is one sentence."""
    lines = [line for line in end.err.splitlines() if not line.startswith(("INFO: ", "block_attnres"))]
    assert len(lines) == 1, end.err
    return lines[0]


@pytest.fixture(scope="module")
def run(server, tiny, tmp_path_factory):
    """A finished run, with a BPE of 270 entries."""
    out = tmp_path_factory.mktemp("run")
    end = server.run("train", *tiny, "--steps", 4, "--tokenizer", "train:270", "--out", out)
    assert end.status == 0, end.err
    return out


# ---- bad input -----------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--residual.name blok_attnres": "residual 'blok_attnres' is unknown; did you mean 'block_attnres'?",
    "--residual.block-size 2 --residual.num-blocks 2": "give block_size or num_blocks, not both; they are 2 and 2",
    "--residual.num-blocks 0": "num_blocks must be a positive whole number; it is 0",
    "--residual.block-size -1": "block_size must be a positive whole number; it is -1",
    "--residual.num-blocks 9": "num_blocks must be at most the number of layers, 4; it is 9",
    "--residual.name prenorm --residual.num-blocks 2": "'prenorm' has no option 'num_blocks'; it takes none",
    "--steps 0": "steps must be a positive whole number; it is 0",
    "--steps abc": "--steps: invalid literal for int() with base 10: 'abc'; Argument helptext: --steps INT",
    "--stesp 3": "Unrecognized options: --stesp, 3; Perhaps you meant: --steps INT",
    "--steps": "Missing value for argument '--steps'",
    "3": "Unrecognized options: 3",
    "--precision fp8": "invalid choice 'fp8' for argument '--precision'",
    "--optim.lr 0": "lr must be a positive number such as 3e-3; it is 0.0",
    "--optim.warmup-steps 10": "warmup_steps must be fewer than the 10 steps of the run; it is 10",
    "--validation-tokens 8": "validation_tokens must be at least context, 32; it is 8",
    "--seed -1": "seed must be zero or more; it is -1",
    "--device nowhere": "device 'nowhere' cannot be used here; try auto or cpu",
    "--model.num-attention-heads 3": "num_attention_heads must divide hidden_size",
    "--model.max-position-embeddings 16": "context must be at most the model's max_position_embeddings, 16; it is 32",
    "--preset huge": "preset 'huge' is unknown; known: tiny",
    "--tokenizer train:5": "VOCAB in train:VOCAB must be a whole number of at least 257",
    "--data missing.txt": "--data 'missing.txt' does not exist",
    "--config missing.yaml": "--config missing.yaml cannot be read: No such file or directory",
    "--resume": "it has no config.json",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_sentence_and_leave_nothing(server, tiny, tmp_path, flags):
    end = server.run("train", *tiny, "--out", tmp_path / "run", *flags.split())
    assert (end.status, end.out) == (2, "")
    assert said(end).startswith("attnres train: ")
    assert BAD_FLAGS[flags] in said(end)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a corpus with text"),
        (b"\x00\xff\x80 binary", "is binary (NUL bytes or not UTF-8); convert it to UTF-8 text"),
        (b"too short for a context", "fewer than context + 1 = 33; give a larger corpus, a smaller context"),
    ],
)
def test_bad_corpus(server, tiny, tmp_path, content, message):
    (tmp_path / "corpus.txt").write_bytes(content)
    end = server.run("train", *tiny, "--data", tmp_path / "corpus.txt", "--out", tmp_path / "run")
    assert end.status == 2
    assert message in said(end)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("steps: [1", "is not YAML: while parsing a flow sequence"),
        ("- steps", "must be a mapping of flag names to values"),
        ("optim: {lrr: 1}", "settings.yaml: Unrecognized options: --optim.lrr=1; Perhaps you meant: --optim.lr"),
        ("optim: 3", "settings.yaml: Unrecognized options: --optim=3"),
        ("steps: many", "settings.yaml: --steps: invalid literal for int() with base 10: 'many'"),
        ("residual: {num_blocks: 2, nmae: prenorm}", "settings.yaml: Unrecognized options: --residual.nmae=prenorm"),
        ("steps: 0", "settings.yaml: steps must be a positive whole number; it is 0"),
    ],
)
def test_bad_yaml(server, tiny, tmp_path, yaml, message):
    (tmp_path / "settings.yaml").write_text(yaml)
    end = server.run("train", "--out", tmp_path / "run", "--config", tmp_path / "settings.yaml")
    assert end.status == 2
    assert message in said(end)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run(server, tiny, run):
    before = (run / "metrics.jsonl").read_bytes()
    end = server.run("train", *tiny, "--out", run)
    assert end.status == 2
    assert f"out holds a run already: {run}; pass --resume to go on with it, or another --out" in said(end)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_configuration(server, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    end = server.run("train", "--resume", "--out", run, "--optim.lr", "0.1", "--model.hidden-size", 64)
    assert end.status == 2
    assert "optim.lr (0.003 in the checkpoint, 0.1 now)" in said(end)
    assert "model.hidden_size (32 in the checkpoint, 64 now)" in said(end)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("folder", ["/proc/attnres", "{corpus}/run", "{corpus}"])
def test_a_folder_that_cannot_be_written(server, tiny, corpus_file, folder):
    end = server.run("train", *tiny, "--out", folder.format(corpus=corpus_file))
    assert end.status == 1
    assert "cannot write" in said(end)
    assert "choose another --out" in said(end)


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoints(server, tiny, tmp_path):
    out = tmp_path / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    end = server.run("train", *tiny, "--out", out, patch=AT_STEP.format(step=5, action=limit))
    assert end.status == 1
    assert f"cannot save step 6 under {out}/checkpoints: " in said(end)
    assert "MB free (earlier checkpoints are untouched)" in said(end)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    end = server.run("train", "--resume", "--out", out)
    assert end.status == 0, end.err


def test_a_disk_that_was_full_from_the_start(server, tiny, tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    end = server.run("train", *tiny, "--out", tmp_path)
    assert end.status == 1
    assert f"cannot write {tmp_path}/config.json: No space left on device; choose another --out" in said(end)
    assert list(tmp_path.iterdir()) == []


def test_commands_that_do_not_exist(server):
    end = server.run("trian")
    assert end.status == 2
    assert said(end).startswith("attnres trian: there is no such command; there are compare, train, generate")
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
    assert "unexpected ZeroDivisionError: division by zero; run again with --debug" in said(end)


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


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(monkeypatch):
    """configured(*argv) -> the run that `attnres train` would start."""
    from attnres.commands import train as command

    class Started(Exception):
        pass

    def start(config, resume):
        raise Started(config)

    monkeypatch.setattr(command, "train", start)

    def configured(*argv):
        with pytest.raises(Started) as started:
            command.run([str(a) for a in argv])
        return started.value.args[0]

    return configured


def test_flags_win_over_the_file(configured, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("""
        steps: 7
        batch_size: 3
        out: elsewhere
        compile: true
        cache-dir: null
        optim: {lr: 1e-2, betas: [0.8, 0.9], warmup-steps: 0, muon_lr: 0.5, optimizer: muon}
        model: {hidden_size: 64, tie_word_embeddings: false}
        residual: {name: full_attnres, stream_scale: false, eps: 1.0e-5}
    """)
    config = configured("--config", file, "--batch-size", 5, "--optim.lr", 0.25, "--model.tie-word-embeddings")
    assert (config.steps, config.batch_size, str(config.out), config.compile) == (7, 5, "elsewhere", True)
    assert (config.optim.lr, config.optim.betas, config.optim.muon_lr) == (0.25, (0.8, 0.9), 0.5)
    assert (config.model.hidden_size, config.model.tie_word_embeddings, config.cache_dir) == (64, True, None)
    assert config.model.residual == "full_attnres"
    assert config.model.residual_options == {"stream_scale": False, "eps": 1e-5}


def test_sizes_that_follow_from_others_follow(configured, tmp_path):
    model = configured("--model.hidden-size", 96, "--model.num-attention-heads", 6).model
    assert (model.head_dim, model.num_key_value_heads, model.intermediate_size) == (16, 6, 256)
    model = configured("--preset", "small", "--model.hidden-size", 256).model
    assert (model.head_dim, model.num_attention_heads, model.num_key_value_heads) == (32, 8, 4)
    file = tmp_path / "settings.yaml"
    file.write_text("preset: small\nmodel: {head_dim: 64}")
    model = configured("--config", file, "--model.hidden-size", 256).model
    assert (model.head_dim, model.num_hidden_layers, model.intermediate_size) == (64, 12, 704)


def test_options_of_the_residual_reach_the_model(configured):
    config = configured("--residual.block-size", 6, "--residual.schedule", "two_phase")
    built = config.model.build_residual()
    assert (built.block_starts, built.schedule, built.stream_scale) == ((0, 6, 12, 18), "two_phase", True)


def test_resuming_takes_the_saved_settings(configured, run, tiny, tmp_path):
    saved = read_config(run)
    assert configured("--resume", "--out", run) == saved
    assert saved.model.vocab_size == 270
    file = tmp_path / "settings.yaml"
    file.write_text(f"resume: true\nout: {run}\nmodel: {{num_hidden_layers: 2}}\nkeep: 9")
    config = configured("--config", file, "--log-every", 2)
    assert (config.model, config.keep, config.log_every) == (saved.model, 9, 2)


def test_resuming_a_shape_whose_heads_do_not_fill_the_width(configured, server, tiny, tmp_path):
    shape = ["--model.hidden-size", 30, "--model.num-attention-heads", 4, "--model.head-dim", 8, "--steps", 3]
    assert server.run("train", *tiny, *shape, "--out", tmp_path / "run").status == 0
    assert configured("--resume", "--out", tmp_path / "run") == read_config(tmp_path / "run")


def test_peeking_does_not_mistake_values_for_flags(configured):
    assert configured("--data=--preset", "--preset=tiny").data == "--preset"


# ---- generate ------------------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt(server, run):
    greedy = ["generate", run, "--prompt", "the source ", "--tokens", 12, "--temperature", 0]
    end = server.run(*greedy)
    assert end.status == 0, end.err
    assert end.out.startswith("the source ") and len(end.out) > len("the source \n")
    assert server.run(*greedy, "--seed", 3).out == end.out
    texts = {server.run("generate", run, "--prompt", "a", "--tokens", 20, "--seed", s).out for s in (1, 1, 2)}
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty; give at least one token"),
        (["--tokens", 512], "fit the model's context of 512 tokens; they are 4 and 512: shorten the prompt or ask for"),
        (["--top-k", 0], "top_k and the number of new tokens positive"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
    ],
)
def test_generate_refuses(server, run, flags, message):
    end = server.run("generate", run, *flags)
    assert end.status == 2
    assert message in said(end)


def test_generate_needs_a_run_with_a_checkpoint(server, tiny, tmp_path, run):
    end = server.run("generate", tmp_path)
    assert end.status == 2
    assert f"{tmp_path} is not a run: it has no config.json; give the --out of an `attnres train`" in said(end)
    end = server.run("generate")
    assert (end.status, "run" in said(end).lower()) == (2, True)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    end = server.run("generate", tmp_path)
    assert end.status == 1
    assert "has no checkpoint yet; train on with --resume first" in said(end)
    (tmp_path / "config.json").write_text("{")
    assert (server.run("generate", tmp_path)).status == 1


def test_weights_of_another_configuration_are_refused(server, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["model"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.symlink(run / "checkpoints", tmp_path / "checkpoints")
    end = server.run("generate", tmp_path)
    assert end.status == 2
    assert "model.num_hidden_layers (2 in the checkpoint, 3 now)" in said(end)


# ---- terminals, help, imports --------------------------------------------------------------------------------------


class Terminal:
    def __init__(self):
        self.master, self.slave = os.openpty()
        self.name, self.shown = os.ttyname(self.slave), ""
        os.set_blocking(self.master, False)

    def read(self):
        try:
            self.shown += os.read(self.master, 65536).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.01)
        return self.shown


def test_a_terminal_shows_a_bar_and_takes_ctrl_c(server, tiny, tmp_path):
    terminal = Terminal()
    slow = AT_STEP.format(step=5, action="time.sleep(1)")
    process = server.start("train", *tiny, "--out", tmp_path / "run", patch=slow, terminal=terminal.name)
    process.wait_for(lambda: "4/10" in terminal.read())
    os.write(terminal.master, b"\x03")
    process.wait_for(lambda: "go on with --resume" in terminal.read(), ended=True)
    assert process.wait().status == 0
    assert "stopped at step 5, saved as" in terminal.read()
    assert "━" in terminal.shown and "step  1/10" not in terminal.shown
    terminal = Terminal()
    process = server.start("train", "--resume", "--out", tmp_path / "run", terminal=terminal.name)
    process.wait_for(lambda: "next: attnres generate" in terminal.read(), ended=True)
    assert process.wait().status == 0
    assert "10/10" in terminal.shown


def test_a_terminal_gets_the_same_sentence(server):
    terminal = Terminal()
    process = server.start("train", "--stesp", 3, terminal=terminal.name)
    process.wait_for(lambda: "\n" in terminal.read(), ended=True)
    assert process.wait().status == 2
    assert terminal.shown.startswith("attnres train: Unrecognized options: --stesp, 3; Perhaps you meant: --steps INT")
    assert "\x1b" not in terminal.shown and "│" not in terminal.shown


def plain(help_text):
    return " ".join(help_text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "train",
            [
                "--steps INT Optimizer steps of the whole run. (default: ",
                "--optim.lr FLOAT",
                "--residual.num-blocks",
                "--model.head-dim",
            ],
        ),
        ("compare", ["--residuals STR", "(default: prenorm,", "--seeds", "--residual.eps"]),
        ("generate", ["--temperature FLOAT", "(default: 0.8)", "--top-k"]),
    ],
)
def test_help_shows_flags_and_defaults(server, command, flags):
    end = server.run(command, "--help")
    assert (end.status, end.err) == (0, "")
    assert end.out.startswith(f"usage: attnres {command}")
    assert all(flag in plain(end.out) for flag in flags)


def test_options_have_a_help_text_of_their_own(server):
    """It comes from the docstrings of the mechanisms."""
    shown = plain(server.run("train", "--help").out)
    assert "--residual.block-size {None}|INT S, layers in a block; the last block is shorter" in shown


FRESH = """
import contextlib, io, sys
def loaded(*names):
    return [name for name in names if name in sys.modules]
import attnres
assert not loaded("attnres.train", "attnres.analysis", "attnres.lab", "transformers", "triton", "matplotlib", "tyro")
from attnres.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown:
    assert main(["--help"]) == main(["--version"]) == 0
assert "compare" in shown.getvalue() and attnres.__version__ in shown.getvalue()
assert not loaded("attnres.train", "tyro")
sys.modules["tyro"] = None  # as if it were not installed
assert main(["train"]) == 1
del sys.modules["tyro"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["train", "--help"])
assert not loaded("transformers", "datasets", "matplotlib", "tensorboard", "tokenizers", "torch._dynamo", "triton")
"""


def test_starting_imports_little_and_names_a_missing_extra():
    end = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert end.stderr == (
        "attnres train: needs the package tyro, which is not installed; run pip install 'attnres[train]'\n"
    )
