"""What the forms of `reads.py` cost: processor time of a step, and passes through memory by design.

Passes are counted as in `byte_model.py`, of kernels that do not exist: one for a read that also writes what it has
read, for the layers that add to it, and prenorm's own add + norm for those layers. A block's partial sum is not kept
beside the stream: it is what the stream has gained since the last read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import byte_model
import timing
import torch
from byte_model import ADD, AUTOGRAD, CHAINED, Passes, add_norm, inter_block, norm, read
from mechanisms import processor_seconds
from reads_grid import BLOCKS_OF_LAYERS, FORMS, Run
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig

NAME = "reads_cost_cpu"
WIDTHS = (128, 512)
BLOCKS = 12
SHAPES = ((24, 4), (32, 8), (48, 8))
"""(layers, layers in a block) for which passes are counted."""


# Passes


def sparse(L: int, S: int, every: int) -> Passes:
    """Block AttnRes with a read every so many layers, fewer than S, each seen by the layers up to the next.

    A block's first read is phase 1's, written beside its norm. A later one has the stream, the last output, the last
    read, the partial sum of the read before (but for the first) and phase 1's read in; partial sum, read and norm out;
    back: gradients of norm, stream and later partial sum, phase 1's read and the partial sum in, two gradients out.
    """
    forward = backward = 0.0
    parts = byte_model.blocks(L, S)
    for n, layers in parts:
        reads = -(-layers // every)
        first = Passes(norm().forward, norm().backward + AUTOGRAD)
        if n > 1:
            first = inter_block(n, reads, CHAINED, normed=True)
            first = Passes(first.forward + 1, first.backward + 2)  # its gradients: the stream's and a partial sum's
        forward += first.forward + sum(7 + (j > 1) for j in range(1, reads)) + (layers - reads) * add_norm().forward
        backward += first.backward + (7 + (n == 1)) * (reads - 1) + (layers - reads) * add_norm().backward
        forward += 5  # the finished block, of the same four as a read's partial sum
    last = read(len(parts) + 1)
    return Passes(forward + last.forward, backward + last.backward)


def borders(L: int, S: int) -> Passes:
    """One read a block. The stream, the last output, the last read and older blocks in; the finished block, read and
    norm out; back: gradients of norm, stream and of the block before, sources and their later gradients in, gradients
    out."""
    reads = range(2, len(byte_model.blocks(L, S)) + 1)
    others = L - len(reads) - 1
    last = len(reads) + 2
    forward = norm().forward + sum(m + 5 for m in reads) + others * add_norm().forward + last + 4
    backward = norm().backward + sum(3 * m + 3 for m in reads) + others * add_norm().backward + 2 * last + 1
    return Passes(forward, backward)


def beside_the_sum(L: int, S: int) -> Passes:
    """Every second layer reads, the others see the plain sum: the stream, the last output, the stream at the block's
    start and phase 1's read in, stream and norm out; back: gradients of both, phase 1's read, both streams in, three
    gradients out, one of them added to."""
    forward = backward = 0.0
    parts = byte_model.blocks(L, S)
    for n, layers in parts:
        reads = layers // 2
        first = inter_block(n, reads, CHAINED, normed=True) if n > 1 else norm()
        forward += first.forward + 2 + 6 * (reads - 1) + reads * add_norm().forward + ADD  # the finished block
        backward += first.backward + 2 + 9 * (reads - 1) + reads * add_norm().backward
    last = read(len(parts) + 1)
    return Passes(forward + last.forward, backward + last.backward)


def full_sparse(L: int) -> Passes:
    """Full AttnRes with a read a Transformer block, in two phases of groups of layers."""
    steps = [read(L + 1)]
    for n, layers in byte_model.groups(L):
        reads = range(2, layers, 2)
        steps.append(norm() if n == 1 else inter_block(n, layers // 2, CHAINED, normed=True))
        steps += [read(j + 1, CHAINED) if n == 1 else read(j, CHAINED, prior=True) for j in reads]
        steps += [Passes(1, 1)] * (len(reads) + (n > 1))  # the read itself and its gradient
        steps += [add_norm()] * (layers - len(reads) - 1)
    return Passes(sum(step.forward for step in steps), AUTOGRAD + sum(step.backward for step in steps))


def denseformer(L: int, period: int) -> Passes:
    """An average of m outputs: stream, last output and older ones in; the newest, average and norm out; back: gradients
    of norm and average, the average, outputs and their later gradients in, gradients out."""
    mixed = [m for m in range(2, L // 2 + 2) if (m - 1) % period == 0]
    others = L + 1 - len(mixed)
    forward = sum(m + 4 for m in mixed) + others * add_norm().forward
    backward = sum(3 * m + 3 for m in mixed) + others * add_norm().backward + (L // 2 - len(mixed))
    return Passes(forward, backward)


PASSES: dict[str, Callable[[int, int], Passes]] = {
    "prenorm": byte_model.standard,
    "block": byte_model.two_phase_rows,
    "block, Transformer blocks": lambda L, S: sparse(L, S, 2),
    "block, borders": borders,
    # stream, output and embedding in, stream and norm out; back: gradients of both, stream and embedding in, the
    # stream's gradient out, the embedding's added to
    "x0_lambdas": lambda L, S: Passes(5 * L, 7 * L),
    "full": lambda L, S: byte_model.full_two_phase_rows(L),
    "full, Transformer blocks": lambda L, S: full_sparse(L),
    "block, MLPs": lambda L, S: sparse(L, S, 2),
    "block, attentions, MLPs the sum": beside_the_sum,
    "block, MLPs, attentions the sum": beside_the_sum,
    "denseformer": lambda L, S: denseformer(L, 1),
    "denseformer, period 2": lambda L, S: denseformer(L, 2),
}


# Time


def measure(folder: Path, widths: Sequence[int], repeats: int) -> None:
    """Measures every form in turns with PreNorm, prints the table and saves it after every form."""
    torch.set_num_threads(1)
    document = {**timing.facts(torch.device("cpu"), dtype="bfloat16 autocast"), "repeats": repeats, "widths": {}}
    for width in widths:
        rows = document["widths"].setdefault(str(width), {})
        base = step("prenorm", width)
        for form in FORMS:
            own = step(form, width)
            rounds = [(processor_seconds(base), processor_seconds(own)) for _ in range(repeats + 1)][1:]
            rows[form] = {
                "ratio": timing.spread([mine / theirs for theirs, mine in rounds]),
                "milliseconds": 1e3 * median(mine for _, mine in rounds),
            }
            timing.save(folder, NAME, document, page(document))
    print("\n".join(page(document)))


def step(form: str, width: int) -> Callable[[], None]:
    """Forward and backward of a training step of the experiment, at another width."""
    config = Run(form, BLOCKS, BLOCKS_OF_LAYERS[BLOCKS], 1, 3e-3, 0).cell(Path()).config
    shape = config.model.to_dict() | {
        "hidden_size": width,
        "num_attention_heads": width // 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": None,
        "initializer_range": 0.7 * width**-0.5,
    }
    model = Decoder(DecoderConfig.from_dict(shape))
    ids = torch.randint(0, 256, (config.batch_size, config.context + 1), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad()

    return call


def by_width(folder: Path) -> dict[str, dict[str, float]]:
    """Saved costs of a step by width and form, as multiples of PreNorm's."""
    widths = json.loads((folder / f"{NAME}.json").read_text())["widths"]
    return {width: {form: row["ratio"]["median"] for form, row in rows.items()} for width, rows in widths.items()}


def ratios(document: dict[str, Any]) -> dict[str, float]:
    """Cost by form at the width of the experiment."""
    return {form: row["ratio"]["median"] for form, row in document["widths"].get("128", {}).items()}


def page(document: dict[str, Any]) -> list[str]:
    header = ["form"]
    for width in document["widths"]:
        header += [f"step, D={width}", "of what Block adds"]
    rows = []
    for form in FORMS:
        cells = [form]
        for found in document["widths"].values():
            cells += time_cells(found, form)
        rows.append([*cells, *passes_cells(form)])
    facts = ", ".join(f"{name} {value}" for name, value in document.items() if name != "widths")
    header += [f"passes a layer, L={L}, S={S}" for L, S in SHAPES]
    return [
        "# What reading depth less often costs",
        "",
        facts,
        "",
        f"{BLOCKS} Transformer blocks, 1,024 tokens, forward and backward on one thread. Step: processor time to",
        "prenorm's, turn by turn, median (range). Passes: forward + backward, by design.",
        "",
        *timing.markdown_table(header, rows),
    ]


def time_cells(found: dict[str, Any], form: str) -> list[str]:
    if form not in found:
        return ["", ""]
    ratio = found[form]["ratio"]
    share = ""
    if form != "prenorm" and found.get("block", ratio) is not ratio:
        share = f"{(ratio['median'] - 1) / (found['block']['ratio']['median'] - 1):.2f}"
    return [f"{ratio['median']:.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})", share]


def passes_cells(form: str) -> list[str]:
    counted = [(PASSES[form](L, S), L) for L, S in SHAPES]
    return [f"{passes.forward / L:.1f} + {passes.backward / L:.1f}" for passes, L in counted]
