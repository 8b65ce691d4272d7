"""Does a pretrained model gain from being upgraded to Attention Residuals and trained on?

    python examples/upgrade.py [--seeds 0,1,2] [--pretrain 200] [--steps 200] [--out runs/upgrade]

For each seed a PreNorm model is pretrained, then continued three times from the same weights, on the same further
tokens, with the same fresh optimizer and schedule: as it is, as Block AttnRes and as Full AttnRes (zero queries, so all
three start as one function). Prints the validation losses with their spread and writes results.json. A finished run is
not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import mean
from typing import Any

import attnres
from attnres.data.corpus import load_corpus
from attnres.model import Decoder, preset
from attnres.run import folder as run_folder
from attnres.run.config import TrainConfig
from attnres.train.loop import Trainer
from attnres.train.optim import OptimConfig

CONTINUED = {
    "prenorm": ("prenorm", {}),
    "block_attnres": ("block_attnres", {}),
    "full_attnres": ("full_attnres", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the pretrained model and of the data order")
    parser.add_argument("--pretrain", type=int, default=200, help="steps of the PreNorm model")
    parser.add_argument("--steps", type=int, default=200, help="steps of each continuation")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the continuations")
    parser.add_argument("--blocks", type=int, default=8, help="Transformer blocks of the model")
    parser.add_argument("--out", type=Path, default=Path("runs/upgrade"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        shape = dataclasses.replace(preset("tiny"), num_hidden_layers=arguments.blocks, residual="prenorm")
        base = TrainConfig(
            model=shape,
            steps=arguments.pretrain,
            seed=seed,
            out=arguments.out / f"pretrained-{seed}",
            context=128,
            validate_every=10**6,
            checkpoint_every=10**6,
            log_every=50,
        )
        row = {"seed": seed, "pretrained": run(base, None)}
        for name, (residual, options) in CONTINUED.items():
            config = dataclasses.replace(
                base,
                model=dataclasses.replace(shape, residual=residual, residual_options=options),
                optim=OptimConfig(lr=arguments.lr),
                steps=arguments.steps,
                seed=seed + 1000,  # another order of the same corpus
                out=arguments.out / f"{name}-{seed}",
            )
            row[name] = run(config, base.out)
        rows.append(row)
        (arguments.out / "results.json").write_text(
            json.dumps({"arguments": vars(arguments), "rows": rows}, default=str)
        )
    report(rows)


def run(config: TrainConfig, weights_of: Path | None) -> float:
    """Validation loss of a run, from the weights of another one where given."""
    done = config.out / "val_loss.json"
    if done.exists():
        return json.loads(done.read_text())
    corpus = load_corpus(config.data, config.tokenizer)
    trainer = Trainer(config, corpus)
    if weights_of is not None:
        upgrade(trainer.model, attnres.run.open(weights_of).model)
    config.out.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(config)
    corpus.tokenizer.save(config.out)
    loss = trainer.run().val_loss
    done.write_text(json.dumps(loss))
    return loss


def upgrade(model: Decoder, pretrained: Decoder) -> None:
    """Takes over every weight; pseudo-queries stay zero and key norms one, so the function is the same."""
    missing, unexpected = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("residual.") for name in missing)


def report(rows: list[dict[str, Any]]) -> None:
    print("| | validation loss, mean | lowest | highest | difference to prenorm, mean | lowest | highest |")
    print("|---|---|---|---|---|---|---|")
    for name in ("pretrained", *CONTINUED):
        losses = [row[name] for row in rows]
        gaps = [row[name] - row["prenorm"] for row in rows]
        cells = [mean(losses), min(losses), max(losses)]
        signed = [mean(gaps), min(gaps), max(gaps)]
        print(f"| {name} | " + " | ".join([f"{x:.4f}" for x in cells] + [f"{x:+.4f}" for x in signed]) + " |")


if __name__ == "__main__":
    main()
