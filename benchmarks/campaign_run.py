"""The last part of benchmarks/campaign.py: a training of some size, on Python's source, as a user would start it."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from processes import Answer

SECONDS_TO_STOP = 30  # of a training, its checkpoint included
NAMES = ("prenorm", "block_attnres", "full_attnres", "prenorm, 1.25 times the tokens")
STEPS = 480


def corpus(file: Path, megabytes: float) -> Path:
    """The Python source of site-packages as JSONL, each file once, in an order that depends on the contents alone."""
    if file.exists():
        return file
    texts: dict[str, str] = {}
    for path in Path(torch.__file__).parents[1].rglob("*.py"):
        try:
            text = path.read_text(encoding="utf-8") if 500 < path.stat().st_size < 200_000 else ""
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    file.parent.mkdir(parents=True, exist_ok=True)
    part, size = file.with_suffix(".part"), 0
    with part.open("w", encoding="utf-8") as out:
        for key in sorted(texts):
            out.write(json.dumps({"text": texts[key]}) + "\n")
            size += len(texts[key])
            if size > 1e6 * megabytes:
                break
    part.replace(file)
    return file


def command(names: list[str], out: Path, data: Path, steps: int, quick: bool) -> list[str]:
    """`attnres compare` of those residual connections: 77 M parameters, 65536 bytes of text a step."""
    width, blocks, heads, context, batch = (32, 2, 2, 32, 2) if quick else (512, 24, 8, 1024, 64)
    flags = {
        "residuals": ",".join(names),
        "out": out,
        "data": data,
        "cache-dir": data.parent / "tokens",
        "model.hidden-size": width,
        "model.num-hidden-layers": blocks,
        "model.num-attention-heads": heads,
        "model.max-position-embeddings": context,
        "context": context,
        "batch-size": batch,
        "steps": steps,
        "validate-every": max(1, STEPS // 4) if not quick else 2,
        "validation-tokens": context * batch * (1 if quick else 16),
        "checkpoint-every": steps if quick else 60,
        "keep": 1,
        "optim.lr": 1e-3,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "attnres", "compare", *words, *([] if quick else ["--compile"])]


def train(names: list[str], scratch: Path, quick: bool, until: float) -> Iterator[Answer]:
    """What came of every run in `names`; of one that `until` meets, its curve so far, marked as unfinished.

    Runs live in `scratch` and go on from their checkpoints when called again on the same machine.
    """
    began = time.monotonic()
    data = corpus(scratch / "source.jsonl", 0.3 if quick else 60)
    short = [name for name in NAMES[: 2 if quick else 3] if name in names]
    steps = 2 if quick else STEPS
    folders = {name: scratch / "compare" / "runs" / f"{name}-seed0" for name in short}
    plans = [(command(list(short), scratch / "compare", data, steps, quick), short)] if short else []
    if NAMES[3] in names:
        folders[NAMES[3]] = scratch / "longer" / "runs" / "prenorm-seed0"
        plans.append((command(["prenorm"], scratch / "longer", data, steps * 5 // 4, quick), [NAMES[3]]))
    for words, wanted in plans:
        error = call(words, scratch / "log.txt", until - SECONDS_TO_STOP)
        for name in wanted:
            value = outcome(folders[name])
            if value is None and error is None:
                continue
            yield Answer(name, value, None if value else error, time.monotonic() - began)


def call(words: list[str], log: Path, until: float) -> str | None:
    """Runs a command until it ends, or is asked to at that time. None, or how it failed."""
    if until <= time.monotonic():
        return None
    with log.open("a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(until - time.monotonic())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS_TO_STOP - 5)
            except subprocess.TimeoutExpired:
                process.kill()
            return None
        except BaseException:
            process.kill()
            raise
    tail = log.read_text().strip().splitlines()[-1:] or [""]
    return f"exit code {code}: {tail[0][:200]}" if code else None


def outcome(folder: Path) -> dict[str, Any] | None:
    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    if result.exists():
        found = json.loads(result.read_text())
        names = ("val_loss", "tokens", "tokens_per_second", "peak_memory_bytes", "parameters", "val_curve")
        return {name: found[name] for name in names}
    if not metrics.exists():
        return None
    records = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    curve = [record for record in records if "val_loss" in record]
    last = max((record["step"] for record in records if "step" in record), default=0)
    return {"unfinished": True, "step": last, "val_curve": {k: [r[k] for r in curve] for k in ("step", "val_loss")}}
