"""The command line: generate, terminals, help, and what it costs to start."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from .command_line import AT_STEP, needs_full_device


def test_generate_continues_the_prompt(server, finished_run):
    greedy = ["generate", finished_run, "--prompt", "the source ", "--tokens", 12, "--temperature", 0]
    end = server.run(*greedy)
    assert end.status == 0, end.err
    assert end.out.startswith("the source ") and len(end.out) > len("the source \n")
    assert server.run(*greedy, "--seed", 3).out == end.out
    texts = {server.run("generate", finished_run, "--prompt", "a", "--tokens", 20, "--seed", s).out for s in (1, 1, 2)}
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty; give at least one token"),
        (["--tokens", 512], "fit the model's context of 512 tokens; they are 4 and 512: shorten the prompt or ask for"),
        (["--top-k", 0], "top_k and the number of new tokens positive"),
        (["--seed", 2**80], "seed must fit 64 bits; it is 1208925819614629174706176"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
    ],
)
def test_generate_refuses(server, finished_run, flags, message):
    end = server.run("generate", finished_run, *flags)
    assert end.status == 2
    assert message in end.said


def test_generate_refuses_a_tokenizer_that_knows_more_tokens_than_the_model(server, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    spelled = json.loads((run / "tokenizer.json").read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    spelled["added_tokens"].append({"id": 270, "content": "more", **flags})
    (run / "tokenizer.json").write_text(json.dumps(spelled))
    end = server.run("generate", run, "--prompt", "none of them")
    assert end.status == 2 and "tokenizer.json knows 271 tokens and the model 270; put the run's own" in end.said


def test_generate_needs_a_run_with_a_checkpoint(server, tiny, tmp_path, finished_run):
    end = server.run("generate", tmp_path)
    assert end.status == 2
    assert f"{tmp_path} is not a run: it has no config.json; give the --out of an `attnres train`" in end.said
    end = server.run("generate")
    assert (end.status, "run" in end.said.lower()) == (2, True)
    (tmp_path / "config.json").write_text((finished_run / "config.json").read_text())
    end = server.run("generate", tmp_path)
    assert end.status == 1
    assert "has no checkpoint yet; train on with --resume first" in end.said
    (tmp_path / "config.json").write_text("{")
    assert (server.run("generate", tmp_path)).status == 1


def test_weights_of_another_configuration_are_refused(server, finished_run, tmp_path):
    config = json.loads((finished_run / "config.json").read_text())
    config["model"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.symlink(finished_run / "checkpoints", tmp_path / "checkpoints")
    end = server.run("generate", tmp_path)
    assert end.status == 2
    assert "model.num_hidden_layers (2 in the checkpoint, 3 now)" in end.said


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
    terminal, inside = Terminal(), tmp_path / "inside step 5"
    slow = AT_STEP.format(step=5, action=f"open({str(inside)!r}, 'w').close(); until_stopped()")
    process = server.start("train", *tiny, "--out", tmp_path / "run", patch=slow, terminal=terminal.name)
    process.wait_for(lambda: "4/10" in terminal.read() and inside.exists())
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
        ("compare", ["--residuals [STR ...]", "(default: prenorm,", "--seeds", "--residual.eps"]),
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
assert not loaded("attnres.train", "attnres.analysis", "attnres.lab", "transformers", "triton", "matplotlib", "yaml")
from attnres.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown:
    assert main(["--help"]) == main(["--version"]) == 0
assert "compare" in shown.getvalue() and attnres.__version__ in shown.getvalue()
assert not loaded("attnres.train", "yaml")
sys.modules["yaml"] = None  # as if it were not installed
assert main(["train"]) == 1
del sys.modules["yaml"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["train", "--help"])
assert not loaded("transformers", "datasets", "matplotlib", "tensorboard", "tokenizers", "torch._dynamo", "triton")
"""


def test_starting_imports_little_and_names_a_missing_extra():
    end = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert end.stderr == (
        "attnres train: needs the package yaml, which is not installed; run pip install 'attnres[train]'\n"
    )


def test_a_terminal_without_the_letters_of_a_text(server, finished_run):
    ascii_only = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')"
    end = server.run("generate", finished_run, "--prompt", "Größe ∑", "--tokens", 2, patch=ascii_only)
    assert end.status == 0 and end.out.startswith(r"Gr\xf6\xdfe \u2211"), end.err


def test_a_prompt_that_is_no_text(server, finished_run):
    end = server.run("generate", finished_run, "--prompt", os.fsdecode(b"a\xffb"), "--tokens", 2)
    assert end.status == 0 and end.out.startswith("a\ufffdb"), end.err


def printing_into(stdout, *argv):
    command = [sys.executable, "-m", "attnres", *map(str, argv)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    end = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=buffered)
    return end.returncode, "".join(line for line in end.stderr.splitlines() if not line.startswith("INFO: "))


@pytest.mark.parametrize("argv", [["generate", "{run}", "--tokens", "2"], ["--help"], ["train", "--help"]])
def test_a_reader_who_has_seen_enough(finished_run, argv):
    read, write = os.pipe()
    os.close(read)
    assert printing_into(write, *[part.format(run=finished_run) for part in argv]) == (141, "")
    os.close(write)


@needs_full_device
def test_output_that_cannot_be_written(finished_run):
    with open("/dev/full", "w") as full:
        status, err = printing_into(full, "generate", finished_run, "--tokens", 2)
    assert (status, err) == (1, "attnres: cannot write the output: No space left on device")
