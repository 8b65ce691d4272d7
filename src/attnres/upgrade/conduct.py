"""The whole of an upgrade: tokens, proof, arms, verdict, and what is left in the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..analysis.draw.report import write_report
from ..analysis.draw.style import require_matplotlib
from ..errors import Failure, UsageError
from ..hf.convert.door import kind_of
from ..hf.convert.folder import read_causal_config
from ..lab.grid import IMPORTED_BEFORE, Cell, made_here, run_grid, write_json
from ..parallel.mesh import launched_processes
from ..run.folder import held, settled
from ..train.shortage import telling_shortage
from .arm import Arm, train_arm
from .config import PLAIN, UpgradeConfig, claimed
from .corpus import Corpus
from .models import check_packages
from .proof import Proof, prove
from .summary import finding, summarise

PRELOAD = (*IMPORTED_BEFORE, "attnres.upgrade.arm")


class _Cell(Cell):
    """A run of an upgrade: each is as long as the others, and the folder around them all is checked."""

    @property
    def work(self) -> float:
        return 1.0

    def check_folder(self) -> None:
        pass


def upgrade(config: UpgradeConfig, command: str = "") -> dict[str, Any]:
    """Converts a pretrained model, trains it and the model as it was on the same rows, and says whether it helped.

    Every arm and seed is a run of transformers' Trainer in a process of its own. A run that is finished is not
    repeated, one that was cut off goes on from its checkpoint: calling again after a kill continues. Writes under
    config.out: upgraded/, the first converted model of the first seed; results.json; report.html; runs/ and rows/.

    Returns the contents of results.json. Raises UsageError for bad input, and Failure where a run fails.
    """
    require_matplotlib()
    check_packages(config.train)
    if launched_processes() > 1:
        raise UsageError("an upgrade starts its own processes, one after the other; call it without torchrun")
    model = read_causal_config(config.model)
    if (kind := kind_of(model)) != "pretrained":
        raise UsageError(f"the model in {config.model} is {kind}: it has Attention Residuals already; give a plain one")
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise UsageError(f"context must be at most the model's {longest} tokens; it is {config.context}")
    config = settled(config)
    with held(config.out, wait=False):
        with claimed(config):
            corpus = Corpus(config)
            corpus.make(model)  # whatever is wrong with the data is told first
            cell = _Cell("the same function?", Proof(config))
            [proof] = run_grid([cell], measure=prove, preload=PRELOAD)
            for entry, same in proof["conversions"].items():
                _say(f"{entry}: logits differ by {same['relative_difference']:.3g} of the largest, in float32")
            corpus.settle(proof["packed"])
        arms = [
            _Cell(f"{arm}, seed {seed}", Arm(config, arm, seed, proof["packed"], _is_kept(config, arm, seed)))
            for seed in config.seeds
            for arm in config.arms
        ]
        with telling_shortage(_too_large):
            found = run_grid(arms, measure=train_arm, preload=PRELOAD, keep_checkpoints=False)
        _hand_over(next(cell.config.out for cell in arms if cell.config.keep_model), config.out / "upgraded")
        summary = summarise(found, config.arms)
        told = finding(summary, config, len(found[0]["window_losses"]))
        results = {
            **made_here(command, config.device, config.precision),
            "corpus": corpus.about,
            "model": _shape(model),
            "train": config.to_dict() | {"lr": config.rate, "query_lr": config.query_rate},
            "proof": proof,
            "baseline": PLAIN,
            "runs": found,
            "summary": summary,
            "finding": told,
            "words": {
                "title": "A pretrained model, upgraded to Attention Residuals",
                "command": "attnres upgrade",
                "finding": told,
                "note": "Differences are taken row by row of the held-out part, and seed by seed, as is their error.",
            },
        }
        write_json(config.out / "results.json", results)
        write_report(results, config.out)
    return results


def _too_large(asked: str) -> str:
    return (
        f"a run does not fit memory{asked}; lower --batch-size (a larger --accumulate keeps a step's rows) or "
        "--context, with another --out, or try --train lora"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_kept(config: UpgradeConfig, arm: str, seed: int) -> bool:
    return (arm, seed) == (config.residual[0], config.seeds[0])


def _hand_over(made: Path, place: Path) -> None:
    """Gives the model its place, unless an earlier call has."""
    if (made / "model").is_dir():
        (made / "model").rename(place)
    elif not place.is_dir():
        raise Failure(f"{place} is gone; remove {made}, and its run is done again")


def _shape(model: Any) -> dict[str, Any]:
    """What the report says of the model."""
    text = model.get_text_config()
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return {name: getattr(text, name) for name in names if hasattr(text, name)}
