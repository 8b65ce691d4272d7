"""Evaluation of a model on disk: tasks of lm-eval, and perplexity of a local file, which downloads nothing.

Models are native ones, converted ones, runs of `attnres train`, and any other causal language model that transformers
loads, so that a model can be compared with what it was before its conversion.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Failure, UsageError, first_line
from ..run.opening import open as open_model
from ..text_table import columns
from .perplexity import perplexity, read_text

TASK_KEYS = ("results", "groups", "versions", "n-shot", "n-samples")


def evaluate(
    model: str,
    *,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    out: str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """What `attnres eval` does: opens `model`, runs the tasks and reads the file, returns and writes the results.

    Args:
        model: a folder or Hub name, as `attnres.run.open` takes it.
        tasks: names of lm-eval tasks; needs attnres[eval].
        data: a text file to compute the perplexity of.
        out: a folder for results.json.
        context, stride: of `perplexity`, in tokens.
        limit, num_fewshot, include_path: of `run_tasks`.
        device: "cpu", "cuda", ...; the default is CUDA where there is one.
        dtype: of the weights, "float32", "bfloat16", ...; "auto" is what they were saved in.

    Returns {"model", "version", "dtype", "data": result of `perplexity` or None, "tasks": that of `run_tasks` or None}.
    Raises UsageError for bad input, Failure if task data cannot be loaded or results cannot be written.
    """
    if not tasks and data is None:
        raise UsageError("nothing to evaluate; give --tasks, --data or both")
    if data is not None:
        read_text(data)  # before minutes are spent on loading
    if tasks:
        _lm_eval()
    opened, tokenizer, _ = open_model(model, device=device or "auto", dtype=dtype, transformers=True, pretrained=True)
    results: dict[str, Any] = {"model": str(model), "version": __version__, "dtype": str(opened.dtype).split(".")[-1]}
    results["data"] = None
    if data is not None:
        results["data"] = perplexity(opened, tokenizer, data, context=context, stride=stride, batch_size=batch_size)
    results["tasks"] = None
    if tasks:
        results["tasks"] = run_tasks(
            opened,
            tokenizer,
            tasks,
            batch_size=batch_size,
            limit=limit,
            num_fewshot=num_fewshot,
            include_path=include_path,
        )
    if out is not None:
        path = Path(out, "results.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise Failure(f"cannot write {path}: {error.strerror or error}") from error
    return results


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Runs tasks of lm-eval, which downloads their data unless a task names local files.

    Args:
        tasks: names of tasks, groups or tags, * and ? allowed, as `lm_eval ls tasks` lists them.
        limit: use the first so many documents of each task only (for a trial run).
        num_fewshot: examples in each prompt; the default is the task's own.
        include_path: a folder of further task definitions (YAML).

    Returns lm-eval's own result, its keys "results", "groups", "versions", "n-shot" and "n-samples". Raises UsageError
    for an unknown task or where lm-eval is missing, Failure if a task's data cannot be loaded.
    """
    lm_eval, wrapper, manager_class = _lm_eval()
    manager = _task_manager(manager_class, tasks, include_path)
    known = list(dict.fromkeys(name for task in tasks for name in _matching(manager, task)))
    try:
        result = lm_eval.simple_evaluate(
            model=wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=known,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # no network, no such data set, no such file
        raise Failure(f"the data of {', '.join(known)} cannot be loaded: {first_line(error)}") from error
    return {key: result[key] for key in TASK_KEYS if key in result}


def table(results: dict[str, Any]) -> str:
    """The results of `evaluate` as lines of text for a terminal."""
    rows = []
    if results["data"]:
        data = results["data"]
        names = ("perplexity", "loss", "bits_per_byte")
        rows += [(data["file"], name, f"{data[name]:.4f}") for name in names]
    for task, metrics in (results["tasks"] or {"results": {}})["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,"))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                rows.append((task, name.removesuffix(",none"), f"{value:.4f}{spread}"))
    return "\n".join(columns(rows, left=3))


def _lm_eval() -> tuple[Any, Any, Any]:
    """(lm_eval, its wrapper of transformers models, its task manager)."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"tasks need lm-eval ({error}); run: pip install 'attnres[eval]'") from error
    return lm_eval, HFLM, TaskManager


def _task_manager(manager_class: Any, tasks: Sequence[str], include_path: str | Path | None) -> Any:
    if include_path is None:
        return manager_class()
    if not Path(include_path).is_dir():
        raise UsageError(f"include_path must be a folder of task definitions; there is none at {include_path}")
    own = manager_class(include_path=str(include_path), include_defaults=False)
    # reading lm-eval's own thousands of definitions takes a while
    complete = all(own.match_tasks([task]) for task in tasks)
    return own if complete else manager_class(include_path=str(include_path))


def _matching(manager: Any, task: str) -> list[str]:
    names = manager.match_tasks([task])
    if not names:
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see lm_eval ls tasks"
        raise UsageError(f"task {task!r} is unknown to lm-eval; {hint}")
    return names
