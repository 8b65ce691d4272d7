"""One model behind transformers' own OpenAI-compatible server (`transformers serve`), with our defaults and limits."""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import Modality
from transformers.utils.import_utils import is_serve_available

from ..errors import UsageError
from .convert import first_line, read_config
from .modeling import AttnResForCausalLM
from .request_limits import COMPLETIONS, Gate, Limits
from .runs import is_run, open_run
from .vocabulary import check_vocabulary, open_tokenizer

LLM = Modality.LLM
PAGE = 256
"""Tokens in a page of transformers' paged cache."""
CPU_BATCH_TOKENS = 256
"""Tokens in one step of continuous batching on a CPU, where transformers would size it by free memory."""
GRACE = 5
"""Seconds that open streams have to end once the server is told to stop."""


def serve(
    model: str | Path,
    *,
    host: str,
    port: int,
    max_tokens: int,
    max_connections: int,
    continuous_batching: bool,
    cache_tokens: int | None,
    device: str,
    dtype: str,
) -> None:
    """Loads a model and answers requests until SIGINT or SIGTERM. The arguments are the flags of `attnres serve`.

    Raises UsageError if transformers' server is not installed or the folder holds no model that can be served.
    """
    if not is_serve_available():
        raise UsageError("the server of transformers is not installed; run: pip install 'attnres[serve]'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _by_short_name(model) as name:
        on_cpu = device == "cpu"
        if on_cpu and cache_tokens is None:
            cache_tokens = 16 * (_context(read_config(name)) or 2048)
        server = Server(max_tokens, max_connections)
        try:
            server.load(
                force_model=name,
                continuous_batching=continuous_batching,
                cb_num_blocks=None if cache_tokens is None else -(-cache_tokens // PAGE),
                cb_max_batch_tokens=CPU_BATCH_TOKENS if on_cpu else None,
                device=device,
                dtype=dtype,
                host=host,
                port=port,
                log_level="error",
            )
        except (AttributeError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise UsageError(f"{model} cannot be served: {first_line(error)}") from error
        server.run()


class Server(Serve):
    """transformers' server with a gate in front of it, loaded first and run then."""

    def __init__(self, max_tokens: int, max_connections: int) -> None:
        self.max_tokens, self.max_connections = max_tokens, max_connections

    def load(self, **options: Any) -> None:
        """Loads the model and builds the server. Takes the options of `transformers serve`."""
        super().__init__(**options, non_blocking=True)

    def start_server(self) -> None:
        """What transformers calls once all is built; `run` does it here."""

    def run(self) -> None:
        """Answers requests until SIGINT or SIGTERM."""
        (loaded,) = self._model_manager.loaded_models.values()
        model: Any = loaded.model
        settings, shared = model.generation_config, self._generation_state.use_continuous_batching(model, LLM)
        limits = Limits(self.max_tokens, _context(model.config), bool(settings.do_sample), shared, self._count)
        if not shared:
            settings.do_sample = True  # or a request's temperature is ignored; the gate asks for 0 where none is given
        config = self.server.config
        config.app = Gate(config.app, limits)
        config.limit_concurrency, config.timeout_graceful_shutdown = self.max_connections, GRACE
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"model {self._model_manager.force_model} at http://{host}:{config.port}/v1", file=sys.stderr, flush=True)
        try:
            self.server.run()
        finally:
            self._generation_state.shutdown()

    def _count(self, path: str, body: dict[str, Any]) -> int:
        """Tokens in the prompt of a request."""
        (loaded,) = self._model_manager.loaded_models.values()
        tokenizer: Any = loaded.processor
        if path == COMPLETIONS:
            prompt = body.get("prompt")
            if not isinstance(prompt, str) or not prompt:
                raise UsageError("prompt must be a text that is not empty")
            return len(tokenizer(prompt)["input_ids"])
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"this model has no chat template; use {COMPLETIONS}")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise UsageError("messages must be a list of messages that is not empty")
        try:
            messages = self._chat_handler.get_processor_inputs_from_messages(body["messages"], LLM)
            ids = tokenizer.apply_chat_template(
                messages, tools=body.get("tools"), add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template is a program of the model's authors
            raise UsageError(
                f"messages must be of the form {{'role': 'user', 'content': 'text'}} and suit the model's chat "
                f"template ({type(error).__name__}: {first_line(error)})"
            ) from error
        return len(ids["input_ids"])


@contextlib.contextmanager
def _by_short_name(folder: str | Path) -> Iterator[str]:
    """A name that transformers loads the model of `folder` by, from the current directory, a temporary one meanwhile.

    The server wants each request to name the model exactly as it was told, and takes an @ in it for a revision.
    """
    path = Path(folder).resolve()
    name = re.sub(r"[^\w.-]", "-", path.name)
    with tempfile.TemporaryDirectory(prefix="attnres-serve-") as place:
        link = Path(place) / name
        if is_run(path):
            AttnResForCausalLM.from_run(path).save_pretrained(link)
            run = open_run(path)
            tokenizer = AutoTokenizer.from_pretrained(run.folder)
            check_vocabulary(tokenizer, run.config.vocab_size, path)
            tokenizer.save_pretrained(link)
        else:
            size = read_config(path).get_text_config().vocab_size
            try:
                check_vocabulary(open_tokenizer(path), size, path)
            except UsageError as error:
                raise UsageError(f"{folder} cannot be served: {error}") from error
            link.symlink_to(path)
        with contextlib.chdir(place):
            yield name


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
