"""What a client asks for: the body of a request to the OpenAI protocol, checked, as a value.

A field that asks for what happens anyway is accepted. One that would have to be ignored is refused: every answer is
what was asked for.
"""

import inspect
import json
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import json_text
from ..errors import UsageError, first_line

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 64, 20
HOTTEST = 100.0
COLDEST = 1e-4
"""A temperature below takes the likeliest token: dividing by it would leave the range of fp32."""

SHARED = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "stream"}
SERVED = {
    COMPLETIONS: SHARED | {"stream_options", "prompt", "echo", "logprobs"},
    CHAT: SHARED | {"stream_options", "messages", "tools", "chat_template_kwargs"},
}
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
WITHOUT_EFFECT |= {"prompt_cache_key", "prompt_cache_retention"}
"""Fields that change no answer here, whatever they say."""
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Fields that are not served, with the values that ask for nothing."""


class Sampling(NamedTuple):
    """How the next token is chosen. A temperature of 0 takes the likeliest; a seed makes the draws repeatable."""

    temperature: float
    top_p: float
    seed: int | None


class Request(NamedTuple):
    """One checked request.

    prompts: the ids of each prompt; texts: what each spells; room: most tokens of the answer to each. n: answers to
    each prompt. usage: whether a stream ends with the token counts. echo: whether answers begin with their prompts.
    logprobs: alternatives to report at each token, None for no log-probabilities.
    """

    prompts: list[list[int]]
    texts: list[str]
    room: list[int]
    n: int
    sampling: Sampling
    stop: list[str]
    stream: bool
    usage: bool
    echo: bool
    logprobs: int | None


class Reader:
    """Reads requests for one model.

    Args:
        name: what the model is called; an answer's "model" is accepted too.
        tokenizer: of transformers.
        vocabulary: number of token ids that the model knows.
        max_tokens: most tokens that one answer may have.
        context: tokens that prompt and answer may have together, None for no limit.
        sampling: how the model chooses where a request does not say.
        seeded: whether a request may bring a seed for its draws.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        vocabulary: int,
        *,
        max_tokens: int,
        context: int | None,
        sampling: Sampling,
        seeded: bool,
    ) -> None:
        self.name, self.tokenizer, self.vocabulary = name, tokenizer, vocabulary
        self.max_tokens, self.context, self.sampling, self.seeded = max_tokens, context, sampling, seeded

    def read(self, path: str, data: bytes) -> Request:
        """The request in the body `data` sent to `path`. Raises UsageError for what is not served."""
        body = _parse(data)
        self._check_fields(path, body)
        stream = _flag(body, "stream")
        echo = _flag(body, "echo")
        logprobs = body.get("logprobs")
        if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MOST_LOGPROBS):
            raise UsageError(f"logprobs must be a whole number from 0 to {MOST_LOGPROBS}; it is {_shown(logprobs)}")
        if stream and (echo or logprobs is not None):
            raise UsageError("echo and logprobs are not streamed; leave out stream")
        n = _whole(body, "n", 1, 1)
        tokens = self._max_tokens(body, least=0 if echo else 1)
        prompts, texts = self._chat(body) if path == CHAT else self._prompts(body)
        if len(prompts) * n > MOST_CHOICES:
            raise UsageError(f"prompts times n must be at most {MOST_CHOICES}; it is {len(prompts) * n}")
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise UsageError(f"stream_options must be an object; it is {_shown(options)}")
        return Request(
            prompts=prompts,
            texts=texts,
            room=[self._room(len(prompt), tokens) for prompt in prompts],
            n=n,
            sampling=self._sampling(body),
            stop=_stop(body.get("stop")),
            stream=stream,
            usage=_flag(options, "include_usage"),
            echo=echo,
            logprobs=logprobs,
        )

    def _check_fields(self, path: str, body: dict[str, Any]) -> None:
        if path == CHAT and body.get("logprobs") is False:
            del body["logprobs"]
        for name, value in body.items():
            if name in DEFAULTS:
                if value not in DEFAULTS[name]:
                    raise UsageError(f"{name} is not served; leave it out")
            elif name not in SERVED[path] | WITHOUT_EFFECT:
                where = next((other for other, names in SERVED.items() if name in names), None)
                hint = f"use {where}" if where else "leave it out"
                raise UsageError(f"{_shown(name)} is no field of {path} that is served; {hint}")
        if body.get("model", self.name) != self.name:
            raise UsageError(f"model must be {self.name!r}; it is {_shown(body['model'])}")

    def _max_tokens(self, body: dict[str, Any], least: int) -> int:
        """Most tokens that the request wants; more than the server gives are cut, and the answer says "length"."""
        given = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        return min(_whole(body, given, self.max_tokens, least), self.max_tokens)

    def _room(self, prompt: int, tokens: int) -> int:
        """Most tokens of the answer to a prompt of so many tokens."""
        room = tokens if self.context is None else min(tokens, self.context - prompt)
        if room < min(tokens, 1):
            raise UsageError(
                f"the prompt has {prompt} tokens; the model's context is {self.context} tokens, prompt and answer "
                f"together"
            )
        return room

    def _sampling(self, body: dict[str, Any]) -> Sampling:
        temperature = _number(body, "temperature", self.sampling.temperature)
        if not 0 <= temperature <= HOTTEST:
            raise UsageError(f"temperature must be from 0 to {HOTTEST:g}; it is {_shown(body['temperature'])}")
        top_p = _number(body, "top_p", self.sampling.top_p)
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p must lie above 0 and not above 1; it is {_shown(body['top_p'])}")
        seed = body.get("seed")
        if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
            raise UsageError(f"seed must be a whole number of 64 bits; it is {_shown(seed)}")
        if temperature < COLDEST:
            return Sampling(0.0, 1.0, None)
        if seed is not None and not self.seeded:
            raise UsageError(
                "seed must be left out, or temperature be 0: with continuous batching requests draw from one generator"
            )
        return Sampling(temperature, top_p, seed)

    def _prompts(self, body: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
        given = body.get("prompt")
        several: list[Any] = given if isinstance(given, list) and not _are_ids(given) else [given]
        prompts, texts = [], []
        for prompt in several:
            if isinstance(prompt, str) and prompt:
                ids, text = self.tokenizer(prompt, verbose=False)["input_ids"], prompt
            elif _are_ids(prompt):
                if wrong := [token for token in prompt if not 0 <= token < self.vocabulary]:
                    raise UsageError(f"prompt must have ids from 0 to {self.vocabulary - 1}; one is {_shown(wrong[0])}")
                ids, text = prompt, self.tokenizer.decode(prompt)
            else:
                raise UsageError("prompt must be a text that is not empty, a list of token ids, or a list of such")
            if not ids:
                raise UsageError(f"prompt must have a token; the model's tokenizer finds none in {_shown(prompt)}")
            prompts.append(ids)
            texts.append(text)
        if not prompts:
            raise UsageError("prompt must be a text that is not empty, a list of token ids, or a list of such")
        return prompts, texts

    def _chat(self, body: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(f"this model has no chat template; use {COMPLETIONS}")
        render: Callable[..., Any] = self.tokenizer.apply_chat_template
        variables = body.get("chat_template_kwargs", {})
        if not isinstance(variables, dict) or variables.keys() & inspect.signature(render).parameters.keys():
            raise UsageError("chat_template_kwargs must be an object with variables of the model's chat template")
        tools = None if body.get("tool_choice") == "none" else body.get("tools")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise UsageError("messages must be a list of messages that is not empty")
        try:
            options = {**variables, "tools": tools or None, "add_generation_prompt": True, "return_dict": True}
            ids = render([_message(m) for m in messages], **options)["input_ids"]
        except Exception as error:  # a template is a program of the model's authors
            raise UsageError(
                f"messages must be of the form {{'role': 'user', 'content': 'text'}} and suit the model's chat "
                f"template ({type(error).__name__}: {first_line(error)})"
            ) from error
        if not ids:
            raise UsageError("messages must have a token; the model's chat template makes an empty prompt of these")
        return [ids], [""]


def _parse(data: bytes) -> dict[str, Any]:
    """The fields of a body that say something: null stands for what is left out."""
    try:
        body = json_text.parse(data)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError("the request must be text; it has half of a surrogate pair, which is no character") from error
    except ValueError as error:
        raise UsageError(f"the request must be a JSON object ({first_line(error)})") from error
    if not isinstance(body, dict):
        raise UsageError("the request must be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _message(message: Any) -> dict[str, Any]:
    """A message of the protocol as chat templates expect it: its content one text, arguments of calls as mappings."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise TypeError("a message needs a role")
    content = message.get("content")
    if isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise TypeError("a part of a message must be text")
        content = " ".join(part["text"] for part in content)
    out = {**message, "content": content or ""}
    if not isinstance(out["content"], str):
        raise TypeError("the content of a message must be text")
    if message.get("tool_calls"):
        out["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return out


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json_text.parse(function["arguments"])}}


def _stop(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise UsageError(f"stop must be a text or at most {MOST_STOPS} texts, none empty; it is {_shown(given)}")
    return stops


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false; it is {_shown(value)}")
    return value


def _whole(body: dict[str, Any], name: str, default: int, least: int) -> int:
    value = body.get(name, default)
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be a whole number from {least}; it is {_shown(value)}")
    return value


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if type(value) not in (int, float) or abs(value) > 1e300:
        raise UsageError(f"{name} must be a number; it is {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    return reprlib.repr(value)
