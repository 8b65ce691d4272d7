"""Has vLLM answer prompts with one model after another: python vllm_answers.py job.json answers.json

In a process of its own, because vLLM changes the model classes that it serves. The job: options of `vllm.LLM`; models,
by name their folders; tokens to generate; prompts, lists of token ids; again, prompts to ask for twice. The answers, by
name: of every prompt the generated tokens, and the log-probabilities of its own tokens but the first and of these;
what "again" gave both times; how many tokens came from the prefix cache then. Or why a model was "refused".
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answers(llm: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[Any]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def hits(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")


def serve(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    try:
        llm = LLM(folder, **job["options"])
    except Exception as error:
        return {"refused": str(error)}
    found = []
    for ids, request in zip(
        job["prompts"], answers(llm, job["prompts"], job["tokens"], prompt_logprobs=0, logprobs=0), strict=True
    ):
        (completion,) = request.outputs
        new = list(completion.token_ids)
        rows = zip(ids + new, request.prompt_logprobs + completion.logprobs, strict=True)
        found.append({"tokens": new, "logprobs": [row[token].logprob for token, row in rows if row is not None]})
    before = hits(llm)
    again = [
        [list(request.outputs[0].token_ids) for request in answers(llm, job["again"], job["tokens"])] for _ in range(2)
    ]
    return {"answers": found, "again": again, "hits": hits(llm) - before}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {name: serve(folder, job) for name, folder in job["models"].items()}
    Path(sys.argv[2]).write_text(json.dumps(result))
