"""Limits in front of transformers' server: a request that it would choke on gets one sentence and status 400.

One empty prompt ends continuous batching for every later request, and sampling settings that are no numbers come back
as status 500, so both are turned away here. What the server refuses by itself is left to it.
"""

import json
from collections.abc import Callable
from typing import Any

from .. import json_text
from ..errors import UsageError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPEN = (COMPLETIONS, CHAT, "/v1/models", "/health")
"""Paths that are served; the server's others unload the model or load any other one."""
MAX_BODY = 4 << 20
"""Bytes of the largest request."""
SAMPLING = ("temperature", "top_p", "seed", "stop", "frequency_penalty", "logit_bias")


class Limits:
    """What a request may ask for.

    Args:
        max_tokens: most tokens that one request may generate.
        context: tokens that prompt and answer may have together, None for no limit.
        samples: whether the model samples where a request does not say.
        shared_sampling: whether all requests share the model's own sampling settings.
        count: token count of the prompt of a request to a path; raises UsageError if there is no such prompt.
    """

    def __init__(
        self,
        max_tokens: int,
        context: int | None,
        samples: bool,
        shared_sampling: bool,
        count: Callable[[str, dict[str, Any]], int],
    ) -> None:
        self.max_tokens, self.context, self.count = max_tokens, context, count
        self.samples, self.shared_sampling = samples, shared_sampling

    def apply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request to `path`, with defaults filled in. Raises UsageError for what is not served."""
        if body.get("generation_config") is not None:
            raise UsageError("generation_config is not accepted; give max_tokens, temperature and top_p instead")
        body = {**body, **self._sampling(body)}
        name = next((name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
        if name and (type(body[name]) is not int or not 1 <= body[name] <= self.max_tokens):
            raise UsageError(f"{name} must be a whole number from 1 to {self.max_tokens}; it is {body[name]!r}")
        prompt = self.count(path, body)
        room = self.max_tokens if self.context is None else self.context - prompt
        if room < (body[name] if name else 1):
            asked = f" and {name} is {body[name]}" if name else ""
            raise UsageError(
                f"the prompt has {prompt} tokens{asked}; the model's context is {self.context} tokens, prompt and "
                f"answer together"
            )
        return body if name else {**body, "max_tokens": min(self.max_tokens, room)}

    def _sampling(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sampling settings to add to a request."""
        given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        if self.shared_sampling:
            if not self.samples and given.get("temperature") == 0:
                del given["temperature"]
            if given:
                raise UsageError(
                    f"{min(given)} must be left out: with continuous batching all requests share the sampling "
                    f"settings of the model's generation_config.json"
                )
            return {}
        for name in ("temperature", "top_p", "frequency_penalty", "seed"):
            if name in given and type(given[name]) not in ((int,) if name == "seed" else (int, float)):
                raise UsageError(f"{name} must be a number; it is {given[name]!r}")
        if not 0 <= given.get("temperature", 0) < float("inf"):
            raise UsageError(f"temperature must be zero or positive; it is {given['temperature']}")
        if not 0 < given.get("top_p", 1) <= 1:
            raise UsageError(f"top_p must lie above 0 and not above 1; it is {given['top_p']}")
        if given.get("temperature") == 0 and given.get("top_p", 1) < 1:
            raise UsageError(
                "temperature 0 takes the likeliest token and leaves nothing for top_p; leave one of them out"
            )
        stop = given.get("stop", [])
        if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)):
            raise UsageError(f"stop must be a text or a list of texts; it is {stop!r}")
        return {} if "temperature" in given or self.samples else {"temperature": 0}


class Gate:
    """ASGI middleware that applies limits to what reaches `app`."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path not in OPEN:
            return await _refuse(send, 404, f"there is no {path} here; there are {', '.join(OPEN)}")
        if path not in (COMPLETIONS, CHAT):
            return await self.app(scope, receive, send)
        data, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            data, more = data + message.get("body", b""), message.get("more_body", False)
            if len(data) > MAX_BODY:
                return await _refuse(send, 413, f"the request must not exceed {MAX_BODY} bytes")
        try:
            body = json_text.parse(data)
            if isinstance(body, dict):
                data = json.dumps(self.limits.apply(path, body)).encode()
        except UsageError as error:
            return await _refuse(send, 400, str(error))
        except ValueError:
            pass  # the server says what is wrong with the JSON
        unread = [{"type": "http.request", "body": data, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        return await self.app(scope, replay, send)


async def _refuse(send: Any, status: int, message: str) -> None:
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
