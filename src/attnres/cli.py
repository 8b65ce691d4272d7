"""The command line. Exit status 2 for bad usage, 1 for a failure, 0 otherwise."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .errors import Failure, UsageError
from .version import __version__

# command: (module that has `run(argv)`, what the command does)
COMMANDS = {
    "compare": ("attnres.commands.compare", "train residual connections side by side and report on them"),
    "train": ("attnres.commands.train", "train one model, or resume it"),
    "plan": ("attnres.commands.plan", "say what a run on many processes would take: memory, traffic, time"),
    "generate": ("attnres.commands.generate", "continue a text with a trained model"),
    "inspect": ("attnres.commands.inspect", "see where the layers of a trained model listen, and what it is worth"),
    "convert": ("attnres.commands.convert", "turn a pretrained Hugging Face model into an AttnRes model"),
    "export": ("attnres.commands.export", "write a model for engines that know Kimi K3, or for llama.cpp"),
    "upgrade": ("attnres.commands.upgrade", "convert a pretrained model, train on, and say whether it helped"),
    "lab": ("attnres.commands.lab", "repeat the paper's experiments: scaling, ablation, sweep, dynamics"),
    "eval": ("attnres.commands.eval", "measure perplexity on a file, or tasks of lm-eval"),
    "bench": ("attnres.commands.bench", "say what depth attention costs on this machine"),
    "serve": ("attnres.commands.serve", "answer OpenAI-compatible requests with a model"),
}

ENDS = (signal.SIGTERM, signal.SIGHUP)  # Ctrl-C is a KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # it seeks, in vain where a terminal has taken the place of a file
                stream.reconfigure(errors="backslashreplace")  # a terminal may be without the letters of a text
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # its reader has seen enough, such as head
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
            print(f"attnres: cannot write the output: {error.strerror}", file=sys.stderr)
            return 1
        raise


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    logging.getLogger("attnres").setLevel(logging.INFO if first else logging.WARNING)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"attnres {__version__}")
        return 0
    try:
        return _command(arguments[0])(arguments[1:]) or 0
    except Exception as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        status, message = _explain(error)
        print(f"attnres {arguments[0]}{_rank()}: {message}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(f"attnres {arguments[0]}{_rank()}: stopped", file=sys.stderr)
        return 130
    finally:
        for number in ENDS:  # torchrun sends one while the interpreter ends
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)


class _Stderr(logging.Handler):
    """Prints to the sys.stderr of the moment, which a progress bar replaces to stay below what is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _drop_output() -> None:
    """Has what is still to be printed go nowhere, or it fails once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _command(name: str) -> Any:
    if name not in COMMANDS:
        raise UsageError(f"there is no such command; there are {', '.join(COMMANDS)}")
    from .train.signals import outlives_terminal

    for number in ENDS:
        if not outlives_terminal(number):
            signal.signal(number, _end)
    return importlib.import_module(COMMANDS[name][0]).run


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _rank() -> str:
    """Which of the processes that torchrun started speaks, if it started this one."""
    return f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, Failure):
        return 1, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 1, f"needs the package {error.name}, which is not installed; run pip install 'attnres[train]'"
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: attnres COMMAND [--help] [--debug] ...\n\n"
        "Attention Residuals: train, compare and use language models whose layers attend over depth.\n\n"
        f"{rows}\n\nattnres COMMAND --help lists every flag with its type and default."
    )


if __name__ == "__main__":
    sys.exit(main())
