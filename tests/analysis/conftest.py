"""A made-up results.json of `attnres compare`, shaped like a real one, for the figures and the report."""

import math
import random

import pytest

TRANSFORMER_BLOCKS, BLOCKS, STEPS, TOKENS_PER_STEP = 12, 8, 300, 2048
GAIN = {"prenorm": 0.0, "block_attnres": -0.028, "full_attnres": -0.034}


def _source_counts(residual: str) -> list[int]:
    layers = 2 * TRANSFORMER_BLOCKS
    size = 1 if residual == "full_attnres" else layers // BLOCKS
    return [1 + i // size + (i % size > 0) for i in range(layers + 1)]


def _depth_weights(residual: str, noise: random.Random) -> list[list[float]]:
    rows = []
    for i, count in enumerate(_source_counts(residual)):
        sharpness = 1.6 if i % 2 else 0.9
        logits = [sharpness * math.exp((j - count + 1) / 1.5) * 2 + noise.gauss(0, 0.35) for j in range(count)]
        logits[0] += 1.1
        total = sum(map(math.exp, logits))
        rows.append([math.exp(value) / total for value in logits])
    return rows


def _run(residual: str, seed: int) -> dict:
    noise = random.Random(f"{residual} {seed}")

    def loss(step: int) -> float:
        return 2.1 + 3.4 * math.exp(-step / 45) + GAIN[residual] * min(1, step / 200) + 0.01 * seed

    steps, evaluations = list(range(1, STEPS + 1)), list(range(0, STEPS + 1, 25))
    depth = range(1, TRANSFORMER_BLOCKS + 1)
    magnitude, gradient = {
        "prenorm": ([0.3 * 1.35**b for b in depth], [3e-5 * 1.4**-b for b in depth]),
        "block_attnres": ([0.5 + 0.4 * (b % 1.5) for b in depth], [6e-6 * (1 + 0.1 * (b % 3)) for b in depth]),
        "full_attnres": ([0.6 + 0.05 * b for b in depth], [5e-6 * (1 + 0.02 * b) for b in depth]),
    }[residual]
    held_out = [loss(s) + noise.gauss(0, 0.004) for s in evaluations]
    return {
        "residual": residual, "seed": seed, "parameters": 9_445_632 + (0 if residual == "prenorm" else 12_800),
        "tokens": STEPS * TOKENS_PER_STEP, "val_loss": held_out[-1],
        "tokens_per_second": {"prenorm": 9800, "block_attnres": 9300, "full_attnres": 8650}[residual] + 60 * seed,
        "peak_memory_bytes": {"prenorm": 812, "block_attnres": 871, "full_attnres": 1034}[residual] * 2**20,
        "curve": {"step": steps, "tokens": [s * TOKENS_PER_STEP for s in steps],
                  "loss": [loss(step) + noise.gauss(0, 0.06) for step in steps]},
        "val_curve": {"step": evaluations, "tokens": [s * TOKENS_PER_STEP for s in evaluations], "val_loss": held_out},
        "output_magnitude": [m * noise.uniform(0.93, 1.07) for m in magnitude],
        "gradient_magnitude": [g * noise.uniform(0.85, 1.15) for g in gradient],
        "depth_weights": None if residual == "prenorm" else _depth_weights(residual, noise),
    }  # fmt: skip


def _summary(runs: list[dict]) -> list[dict]:
    def mean(name: str, key: str) -> float:
        values = [run[key] for run in runs if run["residual"] == name]
        return sum(values) / len(values)

    def spread(values: list[float]) -> float | None:
        return max(values) - min(values) if len(values) > 1 else None

    losses = {name: [run["val_loss"] for run in runs if run["residual"] == name] for name in GAIN}
    pairs = {name: [a - b for a, b in zip(losses[name], losses["prenorm"], strict=True)] for name in GAIN}
    return [
        {"residual": name, "seeds": len(losses[name]), "parameters": int(mean(name, "parameters")),
         "tokens": int(mean(name, "tokens")),
         "val_loss": mean(name, "val_loss"), "val_loss_spread": spread(losses[name]),
         "difference": sum(pairs[name]) / len(pairs[name]), "difference_spread": spread(pairs[name]),
         "throughput_ratio": mean(name, "tokens_per_second") / mean("prenorm", "tokens_per_second"),
         "peak_memory_bytes": int(mean(name, "peak_memory_bytes"))}
        for name in GAIN
    ]  # fmt: skip


@pytest.fixture(scope="session")
def make_results():
    """make_results(seeds=3) -> a fresh results dictionary."""

    def make(seeds: int = 3) -> dict:
        runs = [_run(name, seed) for name in GAIN for seed in range(seeds)]
        return {
            "command": "attnres compare --residuals prenorm block_attnres full_attnres --steps 300 --out runs/compare",
            "version": "0.1.0", "commit": "3f9c2ab", "torch": "2.13.0+cpu", "python": "3.11.9",
            "device": "cpu (2 cores)", "dtype": "bfloat16", "date": "2026-03-20T10:11:12+00:00",
            "corpus": {"name": "Python standard library (bytes)", "train_tokens": 11_200_000, "val_tokens": 262_144},
            "model": {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": TRANSFORMER_BLOCKS,
                      "num_attention_heads": 4, "residual": "block_attnres",
                      "residual_options": {"num_blocks": BLOCKS}},
            "train": {"steps": STEPS, "batch_size": 8, "sequence_length": 256, "learning_rate": 3e-3},
            "baseline": "prenorm", "runs": runs, "summary": _summary(runs),
        }  # fmt: skip

    return make
