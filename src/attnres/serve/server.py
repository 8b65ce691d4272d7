"""Loads a model and runs the server."""

import importlib.util
import logging
import re
import sys
from pathlib import Path
from typing import Any

from transformers import ContinuousBatchingConfig
from transformers.utils import logging as transformers_logging

from ..errors import UsageError
from ..run.opening import open as open_model
from .answer import Answers
from .app import App, Hosts
from .engine import Batched, Engine, OneByOne
from .request import Reader, Sampling

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

    Raises UsageError if uvicorn is not installed or the folder holds no model that can be served, Failure if a file of
    it is damaged.
    """
    if importlib.util.find_spec("uvicorn") is None:
        raise UsageError("the server needs uvicorn; run: pip install 'attnres[serve]'")
    import uvicorn

    from .connection import Connection

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    loaded, tokenizer, _ = open_model(model, device=device, dtype=dtype, transformers=True, pretrained=True)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    cache = _cache(cache_tokens, context, loaded.device.type == "cpu")
    if continuous_batching and cache.num_blocks is not None:
        # transformers stops altogether, for all requests, at one that is longer than its cache
        context = min(context or sys.maxsize, cache.num_blocks * PAGE)
    name = re.sub(r"[^\w.-]", "-", Path(model).resolve().name)
    vocabulary = loaded.get_input_embeddings().weight.shape[0]
    reader = Reader(
        name,
        tokenizer,
        vocabulary,
        max_tokens=max_tokens,
        context=context,
        sampling=_own_sampling(loaded),
        seeded=not continuous_batching,
    )
    engine: Engine = Batched(loaded, cache) if continuous_batching else OneByOne(loaded)
    config = uvicorn.Config(
        App(reader, Answers(name, tokenizer, engine), Hosts(host)),
        host=host,
        port=port,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level=logging.ERROR,
        access_log=False,
        limit_concurrency=max_connections + 1,  # uvicorn counts the connection that asks
        timeout_graceful_shutdown=GRACE,
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"model {name} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(config).run()
    finally:
        engine.close()


def _cache(tokens: int | None, context: int | None, on_cpu: bool) -> ContinuousBatchingConfig:
    if on_cpu and tokens is None:
        tokens = 16 * (context or 2048)
    return ContinuousBatchingConfig(
        num_blocks=None if tokens is None else -(-tokens // PAGE),
        max_batch_tokens=CPU_BATCH_TOKENS if on_cpu else None,
    )


def _own_sampling(model: Any) -> Sampling:
    """How the model chooses where a request does not say: drawn if its generation_config.json says do_sample."""
    settings = model.generation_config
    temperature = 1.0 if settings.temperature is None else settings.temperature
    return Sampling(temperature if settings.do_sample else 0.0, settings.top_p or 1.0, None)
