"""The page of `attnres inspect`: one HTML file that makes no request, and the numbers behind it as JSON.

The page holds the numbers of `numbers`, weights as 16-bit integers in base64; inspect.js draws, inspect.css styles.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import __version__, files
from ...data.tokenizer import Tokenizer
from ...errors import Failure, UsageError
from ...model.decoder import backbone_of
from ...model.layer import layers_of
from ..measure.inspect import PARTIAL, Inspection, depth_attention_of, entropies, focus, members
from ..measure.mixing import semiseparable_rank
from .mixing_plot import VISIBLE
from .page import document

MOST_SKIPS = 12
FINEST = 65535


def check_place(out: Path) -> None:
    """Raises UsageError if `out` cannot name a page, Failure if it cannot be written."""
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out must name an HTML file, such as inspect.html; it is {out}")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise Failure(f"cannot write {out}: {nearest} is not a folder that you may write to; choose another --out")


def numbers(
    found: Inspection,
    model: nn.Module,
    ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    residual: str,
    name: str,
    command: str,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, for JSON. Losses are in nats; indices count layers and sources from 0.

    columns: what can be read, the embedding first, each with its label and the layers that it adds up. reads: one for
    every layer and, last, the output; of each source its column (for a block's own sum so far, partial, the column that
    the block will have; none for a layer without a read), its mean weight and, where measured, read_change, the change
    of the mean loss without it there. weights: of every read [sources, tokens]. measured: sources left out of every
    read, of how many, and sources left out of single reads, of how many; what is missing has None. minutes: the time
    that was given to it, None while it is not over.
    """
    mechanism = depth_attention_of(model)
    kinds, layers = _kinds(model, mechanism.num_layers), mechanism.num_layers
    whole = [n for n in {s for read in found.reads for s in read.sources} if n != PARTIAL]
    columns = [_column(mechanism, n, kinds) for n in range(max(whole) + 1)]
    reads = []
    for layer, read in enumerate(found.reads):
        entropy = entropies(read).mean().item()
        change = found.read_change[layer] if found.read_change is not None else None
        reads.append(
            {
                "layer": layer,
                "kind": kinds[layer] if layer < layers else "output",
                "columns": [len(read.sources) - 1 if n == PARTIAL else n for n in read.sources],
                "partial": PARTIAL in read.sources,
                "mean": _rounded(read.weights.mean(1)),
                "read_change": _rounded(change),
                "entropy": round(entropy, 5),
                "effective_sources": round(math.exp(entropy), 4) if read.sources else 0.0,
            }
        )
    loss = [*_rounded(found.loss), None]
    return {
        "version": __version__,
        "command": command,
        "model": name,
        "residual": residual,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "layers": layers,
        "tokens": [tokenizer.spell(token) for token in ids],
        "ids": list(ids),
        "loss": loss,
        "mean_loss": found.loss.mean().item(),
        "focus": _rounded(focus(found.reads)),
        "columns": columns,
        "reads": reads,
        "measured": list(found.measured),
        "minutes": minutes,
        "ablation": _ablation(found),
        "skips": _skips(reads),
        "mixing": [_rounded(row) for row in found.mixing],
        "semiseparable_rank": int(semiseparable_rank(found.mixing, VISIBLE)),
        "weights": [[_rounded(row) for row in read.weights] for read in found.reads],
    }


def write_inspection(values: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Writes the page and, beside it, the numbers; returns both paths. Raises Failure if one cannot be written."""
    data = out.with_suffix(".json")
    for path, content in ((data, json.dumps(values, allow_nan=False) + "\n"), (out, page(values))):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, content.encode(errors="replace").decode())
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    return out, data


def page(values: dict[str, Any]) -> str:
    """The HTML page that shows the result of `numbers`."""
    weights, span = _packed(values["weights"])
    body = (
        f'<main id="app" aria-label="{escape(values["model"])}"><noscript>This page needs JavaScript, its own: '
        "nothing is fetched.</noscript></main>"
    )
    title = f"Where each layer listens: {values['model']}"
    return document("inspect", title, body, data={**values, "weights": weights, "range": span})


def _kinds(model: nn.Module, layers: int) -> list[str]:
    """What each layer is called: the words of a decoder's layers, attention and MLP in turn for converted models."""
    backbone = backbone_of(model)
    if backbone is None:
        return ["attention" if layer % 2 == 0 else "MLP" for layer in range(layers)]
    return [layer.word for layer in layers_of(backbone)]


def _column(mechanism: Any, column: int, kinds: Sequence[str]) -> dict[str, Any]:
    parts = [n - 1 for n in members(mechanism, column, mechanism.num_layers) if n > 0]
    if not parts:
        return {"short": "emb", "label": "the embedding", "layers": []}
    if len(parts) == 1 and column == parts[0] + 1:
        text = f"layer {column} ({kinds[parts[0]]} of Transformer block {parts[0] // 2 + 1})"
        return {"short": str(column), "label": text, "layers": parts}
    text = f"block {column} (layers {parts[0] + 1}\N{EN DASH}{parts[-1] + 1})" if len(parts) > 1 else f"block {column}"
    return {"short": str(column), "label": text, "layers": parts}


def _ablation(found: Inspection) -> list[dict[str, Any]]:
    """Per source that can be left out: its mean weight over the reads that have it beside others, and the change."""
    rows = []
    for source, change in zip(found.sources, found.source_change, strict=True):
        readers = [r for r in found.reads if source in r.sources and len(r.sources) > 1]
        weights = torch.stack([r.weights[r.sources.index(source)] for r in readers])
        equal = torch.tensor([1 / len(r.sources) for r in readers])[:, None]
        rows.append(
            {
                "column": None if source == PARTIAL else source,
                "label": "a block's own sum so far" if source == PARTIAL else None,
                "readers": len(readers),
                "mean_weight": round(weights.mean().item(), 5),
                "relative_weight": round((weights / equal).mean().item(), 4),
                "persistence": round((weights > 2 * equal).double().mean().item(), 4),
                "mean_change": None if math.isnan(mean := change.mean().item()) else round(mean, 6),
                "token_weight": _rounded(weights.mean(0)),
                "change": [*_rounded(change), None],
            }
        )
    return rows


def _skips(reads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reads of neither the embedding nor the newest source with the most weight beyond an equal share of the read's."""
    found = []
    for read in reads:
        equal = sum(read["mean"]) / max(1, len(read["mean"]))
        for n, weight in list(enumerate(read["mean"]))[1:-1]:
            excess = round(weight - equal, 5)
            if excess > 0:
                found.append(
                    {"layer": read["layer"], "column": read["columns"][n], "weight": weight, "beyond_equal": excess}
                )
    return sorted(found, key=lambda skip: -skip["beyond_equal"])[:MOST_SKIPS]


def _packed(weights: Sequence[Sequence[Sequence[float]]]) -> tuple[list[str], list[float]]:
    """([base64 of little-endian uint16, [sources, tokens]] per read, [weight at 0, weight at the largest integer])."""
    arrays = [np.array(read, dtype=np.float64) for read in weights]
    low, high = min(a.min(initial=0.0) for a in arrays), max(a.max(initial=1.0) for a in arrays)
    packed = [np.rint((a - low) / (high - low) * FINEST).astype("<u2") for a in arrays]
    return [base64.b64encode(a.tobytes()).decode() for a in packed], [low, high]


def _rounded(values: Any) -> Any:
    """Numbers of a row with five digits behind the point, None for one that is not finite."""
    if values is None:
        return None
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    return [round(value, 5) if value is not None and math.isfinite(value) else None for value in values]
