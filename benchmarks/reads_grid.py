"""The runs of `reads.py` as data: forms, queue, and what is kept of each run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import reads_forms  # noqa: F401  registers them
import torch
from torch import Tensor
from torch.nn import functional as F

from attnres.analysis.measure.mixing import mixing_matrix
from attnres.analysis.measure.probe import evaluating
from attnres.errors import Failure
from attnres.lab.grid import Cell
from attnres.lab.worker import probe_batches
from attnres.model import Decoder, DecoderConfig
from attnres.model.decoder import stream_dtype
from attnres.residual.base import normed
from attnres.run import hardware
from attnres.run.config import TrainConfig
from attnres.train.journal import read_metrics
from attnres.train.optim import OptimConfig
from attnres.train.trainer import train

STEPS = 180
"""Of a run of length 1, each of 1,024 tokens."""
SEEDS = (0, 1, 2)
BLOCKS_OF_LAYERS = {8: 4, 12: 6, 24: 6}
"""N by the number of Transformer blocks."""
RATES = (1.5e-3, 3e-3, 6e-3)
RATE_SEEDS = (0, 1)

Options = Callable[[int, int], dict[str, Any]]


def sparse(*, full: bool = False, **options: Any) -> tuple[str, Options]:
    """Every second layer reads, in a form that the library does not have."""
    return "sparse_reads", lambda L, N: {"num_blocks": L if full else N, "every": 2, **options}


FORMS: dict[str, tuple[str, Options]] = {
    "prenorm": ("prenorm", lambda L, N: {}),
    "block": ("block_attnres", lambda L, N: {"num_blocks": N}),
    "block, Transformer blocks": ("block_attnres", lambda L, N: {"num_blocks": N, "reads": "transformer_block"}),
    "block, borders": ("block_attnres", lambda L, N: {"num_blocks": N, "reads": "block"}),
    "x0_lambdas": ("x0_lambdas", lambda L, N: {}),
    "full": ("full_attnres", lambda L, N: {}),
    "full, Transformer blocks": sparse(full=True),
    "block, MLPs": sparse(offset=1),
    "block, attentions, MLPs the sum": sparse(others="sum"),
    "block, MLPs, attentions the sum": ("block_attnres", lambda L, N: {"num_blocks": N, "reads": "mlp"}),
    "denseformer": ("denseformer", lambda L, N: {}),
    "denseformer, period 2": ("denseformer", lambda L, N: {"period": 2}),
}
"""By name: the mechanism and its options for L layers in N blocks."""
WITH_BLOCKS = ("block", "block, Transformer blocks", "block, borders")
LONGEST = ("prenorm", *WITH_BLOCKS, "x0_lambdas", "full", "denseformer")
"""The forms that train for nine times the tokens."""


@dataclass(frozen=True)
class Run:
    """One training: a form, its number of Transformer blocks, N, length (1 is STEPS steps), learning rate and seed."""

    form: str
    blocks: int
    num_blocks: int
    length: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        form = self.form.lower().replace(",", "").replace(" ", "-")
        blocks = f"-n{self.num_blocks}" if self.form.startswith("block") else ""
        return f"d{self.blocks}-x{self.length:g}-{form}{blocks}-lr{self.rate:g}-seed{self.seed}"

    def cell(self, out: Path) -> Cell:
        residual, options = FORMS[self.form]
        model = DecoderConfig(
            vocab_size=257,
            hidden_size=128,
            num_hidden_layers=self.blocks,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.06,
            residual=residual,
            residual_options=options(2 * self.blocks, self.num_blocks),
        )
        steps = round(STEPS * self.length)
        config = TrainConfig(
            model=model,
            steps=steps,
            seed=self.seed,
            optim=OptimConfig(lr=self.rate),
            precision="bfloat16",
            validate_every=max(1, steps // 3),
            keep=1,
            out=out / "runs" / self.name,
        )
        return Cell(self.name, config)


def queue(done: Callable[[Sequence[Run]], dict[Run, float]]) -> Iterator[Sequence[Run]]:
    """All runs, the ones that say most first, in lots that do not wait for one another but for a learning rate.

    done: trains the runs and returns their validation losses.
    """
    rates = {12: chosen_rate(12, done)}

    def lot(blocks: int, length: float, forms: Sequence[str], seeds: Sequence[int], N: int | None = None) -> list[Run]:
        N = N or BLOCKS_OF_LAYERS[blocks]
        return [Run(form, blocks, N, length, rates[blocks], seed) for seed in seeds for form in forms]

    yield [run for seed in SEEDS for run in (*lot(12, 1, tuple(FORMS), [seed]), *lot(12, 1.25, ["prenorm"], [seed]))]
    yield [run for seed in SEEDS for run in (*lot(12, 3, tuple(FORMS), [seed]), *lot(12, 3.75, ["prenorm"], [seed]))]
    for blocks in (8, 24):
        rates[blocks] = chosen_rate(blocks, done)
        lots = [(*lot(blocks, 1, tuple(FORMS), [s]), *lot(blocks, 1.25, ["prenorm"], [s])) for s in SEEDS]
        yield [run for one in lots for run in one]
    # with N = 12 a border is a Transformer block's
    yield [*lot(12, 1, WITH_BLOCKS, SEEDS, 4), *lot(12, 1, WITH_BLOCKS[:2], SEEDS, 12)]
    yield [*lot(12, 9, LONGEST, [0]), *lot(12, 11.25, ["prenorm"], [0])]


def chosen_rate(blocks: int, done: Callable[[Sequence[Run]], dict[Run, float]]) -> float:
    """The learning rate with the lowest mean loss of PreNorm, by factors of two; one within those that were tried."""
    rates = list(RATES)
    while True:
        runs = {
            rate: [Run("prenorm", blocks, BLOCKS_OF_LAYERS[blocks], 1, rate, s) for s in RATE_SEEDS] for rate in rates
        }
        losses = done([run for own in runs.values() for run in own])
        best = min(rates, key=lambda rate: mean(losses[run] for run in runs[rate]))
        if best == rates[-1]:
            rates.append(2 * best)
        elif best == rates[0]:
            rates.insert(0, best / 2)
        else:
            return best


def train_and_look(config: TrainConfig) -> dict[str, Any]:
    """Trains to the end, from the checkpoint if there is one: the losses, and what travels over depth afterwards."""
    outcome = train(config, resume=(config.out / "config.json").exists())
    if not outcome.finished:
        raise Failure(f"the run in {config.out} was stopped at step {outcome.step}; call again to continue")
    batches = list(probe_batches(config))
    with hardware.autocast(hardware.find_device("cpu"), torch.bfloat16):
        inside = look(outcome.model, batches)
    mixing = mixing_matrix(outcome.model, batches[0][0])
    curve = [[record["step"], record["val_loss"]] for record in read_metrics(config.out) if "val_loss" in record]
    return {
        "val_loss": outcome.val_loss,
        "val_curve": curve,
        "parameters": config.model.parameter_counts()["total"],
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        **inside,
        "mixing": [[round(weight, 4) for weight in row] for row in mixing.tolist()],
    }


def look(model: Decoder, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """RMS over tokens and channels of what every layer sees before its norm, of what it adds, and of the gradient of a
    token's loss (summed over tokens) at what it adds: the last is comparable whatever reads it."""
    squares: dict[str, list[Tensor]] = {"input_rms": [], "output_rms": [], "gradient_rms": []}
    with evaluating(model), torch.enable_grad():
        for ids, targets in batches:
            context = model.context(ids.shape[1], ids.device)
            state = model.residual.start(stream_dtype(model.embed_tokens(ids)))
            inputs, outputs = [], []
            for i, layer in enumerate(model.layers):
                h, state = model.residual.read(state, i)
                inputs.append(h)
                outputs.append(layer(normed(h, layer.norm), context))
                state = model.residual.write(state, i, outputs[-1])
            logits = model.lm_head(model.residual.finish(state, model.norm))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, outputs)
            for kept, tensors in zip(squares.values(), (inputs, outputs, gradients), strict=True):
                kept.append(torch.stack([tensor.detach().float().square().mean() for tensor in tensors]))
    return {name: torch.stack(found).mean(0).sqrt().tolist() for name, found in squares.items()}
