"""attnres serve"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Failure, UsageError
from ..files import is_gguf
from . import flags
from .fields import POSITIONAL


@dataclass
class ServeFlags:
    """Answer OpenAI-compatible requests with a model: /v1/completions and /v1/chat/completions."""

    model: Path = field(metadata=POSITIONAL)
    """Folder of a run, of a Hugging Face model or of a converted one."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = 8000
    """Port to listen on."""
    max_tokens: int = 1024
    """Most tokens that one request may generate, and what a request gets that does not say."""
    max_connections: int = 128
    """Connections at once; more are answered with status 503."""
    continuous_batching: bool = False
    """Compute requests together that are there together; all then share the model's sampling settings."""
    cache_tokens: int | None = None
    """Tokens of keys and values that continuous batching keeps; the default is what GPU memory allows, 16 contexts on
    a CPU."""
    device: str = "auto"
    """Device: auto, cpu, cuda, ..."""
    dtype: str = "auto"
    """Dtype of the weights: float32, bfloat16, ...; auto is what they were saved in."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_connections", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be positive; it is {value}")
        if not 0 < self.port < 65536:
            raise UsageError(f"--port must lie between 1 and 65535; it is {self.port}")


def run(argv: Sequence[str]) -> int:
    given = flags.parse("serve", argv, ServeFlags).make(ServeFlags)
    if not given.model.is_dir() and not is_gguf(given.model):
        raise UsageError(
            f"there is no folder {given.model}; give that of a run or of a Hugging Face model, or a GGUF file"
        )
    _check_free(given.host, given.port)
    from ..serve import serve

    serve(**vars(given))
    return 0


def _check_free(host: str, port: int) -> None:
    """Raises before the model is loaded what the server would find out afterwards."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host} is no address: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except OSError as error:
            raise Failure(f"cannot listen on {host} port {port}: {error.strerror}; give another --port") from error
