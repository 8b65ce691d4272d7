"""A decoder-only Transformer as a loop over its residual connection.

Choices: pre-normalised attention and MLP layers in turn, of the kinds that the config names (`layers`), RMSNorm with
weights, no biases, tied embeddings by default. The decoder never asks which mechanism its residual is; it hands over
each layer's norm, so that a mechanism can fuse it, and runs the layer on what comes back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..ops.exporting import is_exporting
from ..residual.base import State, gather, release
from .cache import KeyValueCache
from .config import DecoderConfig
from .layer import Layer
from .layers.gqa import Cache, Context, rotary_factors
from .loop import input_norm, run

if TYPE_CHECKING:
    from .token_shards import TokenShards  # torch.distributed is not everywhere


class Backbone(nn.Module):
    """A decoder without its output head: token embedding, layers, residual connection, final norm.

    `add_modules` makes them, and not `__init__`, because a Hugging Face model has an `__init__` of its own.
    """

    config: DecoderConfig
    checkpointing = False
    checkpoint_every = 1
    """With checkpointing, how many blocks there are for each that is recomputed."""
    checkpoint: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))
    """torch's checkpoint, in the form that finds the gradients of a state."""

    def add_modules(self, config: DecoderConfig) -> None:
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.residual = config.build_residual()
        self.layers = nn.ModuleList(
            kind.from_config(config, layer // 2) for layer, kind in enumerate(config.layer_kinds)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not self.residual.pre_norm:
            for module in (self, *self.layers):
                module.norm = nn.Identity()

    def hidden(
        self,
        embedding: Tensor,
        context: Context,
        observe: Callable[[State, int], None] | None = None,
        shards: "TokenShards | None" = None,
    ) -> Tensor:
        """The final norm's output [B, T, D] for token embeddings [B, T, D].

        observe: called before every layer with the state that it reads and its index; of a Transformer block that is
        recomputed, before the first. shards: where tokens lie that processes share, without gradients; None: here.
        """
        gather(self.residual)
        state = self.residual.start(stream_dtype(embedding if shards is None else shards.own(embedding)))
        state = self.run_layers(state, 0, self.depth, context, observe, shards)
        hidden = self.residual.finish(state, self.norm)
        release(self.residual)
        return hidden if shards is None else shards.gather(hidden)

    @property
    def depth(self) -> int:
        """How many layers run: all, or those that a config whose depth has been lowered has."""
        return min(len(self.layers), self.config.num_layers)

    def run_layers(
        self,
        state: State,
        first: int,
        last: int,
        context: Context,
        observe: Callable[[State, int], None] | None = None,
        shards: "TokenShards | None" = None,
    ) -> State:
        """Runs the layers first .. last - 1, one Transformer block (or what lies in the range of it) at a time."""

        def call(layer: nn.Module, x: Tensor) -> Tensor:
            given = context._replace(normalise=True) if gathers_norm(layer) else context
            return layer(x, given) if shards is None else shards.take(layer, layer(shards.gather(x), given))

        block = partial(run, self.residual, self.layers, call=call, norm=_folded_norm)
        while first < last:
            end = min(first + 2 - first % 2, last)
            if self.checkpointing and first // 2 % self.checkpoint_every == 0 and torch.is_grad_enabled():
                if observe is not None:
                    observe(state, first)
                state = self.checkpoint(block, state, first, end)
            else:
                state = block(state, first, end, observe=observe)
            first = end
        return state

    def context(self, tokens: int, device: torch.device, cache: Cache | None = None) -> Context:
        """Positions for `tokens` new tokens after those in the cache.

        Raises UsageError for a cache of another architecture.
        """
        if isinstance(cache, KeyValueCache):
            cache.claim(self.config)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + tokens, device=device)
        assert self.config.head_dim is not None
        cos, sin = rotary_factors(positions[None], self.config.head_dim, self.config.rope_theta)
        mask = None
        if cache is not None and is_exporting():  # one program for any number of earlier and new tokens
            mask = torch.arange(past + tokens, device=device) <= positions[:, None]
        return Context(cos, sin, mask, cache)

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each Transformer block in the backward pass instead of keeping its activations."""
        self.checkpointing = self.residual.lean = enabled


def backbone_of(model: nn.Module) -> Backbone | None:
    """The decoder of this package in a model, native or Hugging Face's; None in a converted one."""
    return next((module for module in model.modules() if isinstance(module, Backbone)), None)


class Decoder(Backbone):
    """Language model: token ids [B, T] -> logits [B, T, vocab_size].

    Args:
        config: the shape; config.residual names the residual connection.
        seed: of the initial weights. Equal seeds give equal weights to everything that two mechanisms share.
    """

    split_tokens: "Callable[[int], TokenShards] | None" = None
    """Where so many tokens lie on processes that share every layer (`parallel.inference`); None: here."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.add_modules(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_weights(self, seed)

    def forward(self, input_ids: Tensor, cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits [B, T, vocab_size] for token ids [B, T]; with a cache the tokens follow those that it holds.

        logits_to_keep: compute them for the last so many tokens only (0: all).
        """
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise UsageError(f"input_ids must be token ids of shape [batch, tokens]; it is {list(input_ids.shape)}")
        context = self.context(input_ids.shape[1], input_ids.device, cache)
        shards = None if self.split_tokens is None else self.split_tokens(input_ids.shape[1])
        hidden = self.hidden(self.embed_tokens(input_ids), context, shards=shards)
        return self.lm_head(hidden[:, -logits_to_keep:])


def gathers_norm(layer: nn.Module) -> bool:
    """Whether the weight of a layer's norm is there while the layer runs, and not before: FSDP has sharded the layer,
    and what did it says nothing else of the norm (`parallel.fsdp`)."""
    return hasattr(layer, "unshard") and not getattr(layer, "norm_is_gathered", False)


def _folded_norm(layer: nn.Module) -> nn.Module | None:
    return None if gathers_norm(layer) else input_norm(layer)


def stream_dtype(embedding: Tensor) -> Tensor:
    """The embedding in the dtype in which layers add to the stream: autocast's, where it is on."""
    device = embedding.device.type
    return embedding.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embedding


def init_weights(decoder: Decoder, seed: int) -> None:
    """Sets every initial value: normal matrices and embeddings, unit norms, the residual's own for its parameters.

    Equal seeds draw equal weights whatever the residual.
    """
    if decoder.embed_tokens.weight.is_meta:
        return
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, value in initial_weights(decoder, seed, decoder.embed_tokens.weight.device):
            parameters[name].copy_(value)
    with seeded(seed, decoder.embed_tokens.weight.device):
        decoder.residual.reset_parameters()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, what is drawn on the CPU or on `device` follows from the seed; afterwards all generators are as before.

    `torch.manual_seed` would seed every device for good.
    """
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=others[0].type if others else "cuda"):
        torch.default_generator.manual_seed(seed)
        for other in others:
            with torch.get_device_module(other).device(other):
                torch.get_device_module(other).manual_seed(seed)
        yield


def initial_weights(decoder: Decoder, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and initial value of every parameter but the residual's, drawn one after the other on `device`.

    The decoder may be on the meta device, for a model that no device holds as a whole.
    """
    generator = torch.Generator(device).manual_seed(seed)
    own = [("embed_tokens", decoder.embed_tokens), *decoder.layers.named_modules(prefix="layers")]
    own.append(("norm", decoder.norm))
    if not decoder.config.tie_word_embeddings:
        own.append(("lm_head", decoder.lm_head))
    for name, module in own:
        if isinstance(module, nn.Linear | nn.Embedding):
            value = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=device)
            yield f"{name}.weight", value.normal_(std=initial_std(decoder, name), generator=generator)
        elif isinstance(module, nn.RMSNorm):
            yield f"{name}.weight", torch.ones(module.weight.shape, dtype=module.weight.dtype, device=device)
        elif isinstance(module, Layer):
            for own_name, value in module.initial_values(partial(expert_std, decoder), generator, device):
                yield f"{name}.{own_name}", value


def initial_std(decoder: Backbone, name: str) -> float:
    """Standard deviation of the initial values of the module `name`, a matrix or embedding.

    The residual connection has its say on the matrices of layers.
    """
    if not name.startswith("layers."):
        return decoder.config.initializer_range
    shape, path = decoder.get_parameter(f"{name}.weight").shape, name.split(".")
    layer = cast(Layer, decoder.layers[int(path[1])])
    return _layer_std(decoder, layer.roles.get(path[-1], "value"), sum(shape))


def expert_std(decoder: Backbone, role: str) -> float:
    """Standard deviation of the initial values of the experts' matrices of a role, "value" or "output"."""
    config = decoder.config
    assert config.moe_intermediate_size is not None
    width = config.hidden_size if config.routed_expert_hidden_size is None else config.routed_expert_hidden_size
    return _layer_std(decoder, role, config.moe_intermediate_size + width)


def _layer_std(decoder: Backbone, role: str, inputs_and_outputs: int) -> float:
    xavier = (2 / inputs_and_outputs) ** 0.5
    std = xavier if decoder.residual.xavier_init else decoder.config.initializer_range
    return std * decoder.residual.init_scale(role)
