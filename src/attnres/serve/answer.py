"""Answers of the OpenAI protocol, made from tokens: text up to a stop string, log-probabilities, JSON and events."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import torch

from .engine import Engine
from .request import CHAT, Request

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character yet."""
ROWS = 256
"""Positions whose log-probabilities are computed at once, in fp32 over the vocabulary."""

LOWEST = -9999.0
"""Log-probability of what cannot be, as JSON has no infinity."""


class Text:
    """Turns tokens into text as they come, and holds back what may still become part of a character or a stop string.

    Attributes: starts, the place in the text where each token begins; stopped, whether a stop string has come, which
    ends the text in front of it.
    """

    def __init__(self, tokenizer: Any, stops: list[str] | None = None) -> None:
        self.tokenizer, self.stops = tokenizer, stops or []
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.length = 0
        self.stopped = False
        self._held = ""
        self._begin = self._read = 0  # a token's text depends on those before it, so decoding begins a piece earlier

    def push(self, token: int) -> str:
        """The text that can be sent now that `token` has come."""
        self.ids.append(token)
        self.starts.append(self.length)
        piece = self._piece()
        if piece.endswith(UNFINISHED) or not piece:
            return ""
        self._begin, self._read = self._read, len(self.ids)
        return self._send(piece)

    def finish(self) -> str:
        """What was held back and is text after all, once no more tokens come."""
        if self.stopped:
            return ""
        return self._send(self._piece()) + ("" if self.stopped else self._held)

    def _piece(self) -> str:
        before = self.tokenizer.decode(self.ids[self._begin : self._read], skip_special_tokens=True)
        return self.tokenizer.decode(self.ids[self._begin :], skip_special_tokens=True)[len(before) :]

    def _send(self, piece: str) -> str:
        self.length += len(piece)
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            self.length -= len(text) - min(found)
            return text[: min(found)]
        longest = max(map(len, self.stops), default=1) - 1
        kept = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


class Answers:
    """Answers requests with one model.

    Args:
        name: what the model is called.
    """

    def __init__(self, name: str, tokenizer: Any, engine: Engine) -> None:
        self.name, self.tokenizer, self.engine = name, tokenizer, engine

    async def whole(self, path: str, request: Request) -> dict[str, Any]:
        """The JSON of a request that does not stream."""
        choices = [asyncio.ensure_future(self._choice(path, request, i)) for i in range(_count(request))]
        try:
            answers = await asyncio.gather(*choices)
        finally:
            for choice in choices:
                choice.cancel()
        usage = _usage(request, sum(tokens for _, tokens in answers))
        return {**self._head(path, ""), "choices": [choice for choice, _ in answers], "usage": usage}

    async def stream(self, path: str, request: Request) -> AsyncGenerator[dict[str, Any]]:
        """The events of a request that streams, in the order in which their text comes."""
        head, queue = self._head(path, ".chunk"), asyncio.Queue[Any]()

        async def feed(index: int) -> None:
            try:
                async with contextlib.aclosing(self._pieces(request, index)) as pieces:
                    async for text, _, reason in pieces:
                        queue.put_nowait((index, text, reason))
            except Exception as error:
                queue.put_nowait(error)

        feeds = [asyncio.ensure_future(feed(i)) for i in range(_count(request))]
        tokens, running = 0, len(feeds)
        try:
            if path == CHAT:
                for i in range(len(feeds)):
                    yield {**head, "choices": [_chunk(path, i, {"role": "assistant", "content": ""}, None)]}
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                index, text, reason = item
                tokens += reason is None
                running -= reason is not None
                if text or reason:
                    body = ({"content": text} if text else {}) if path == CHAT else text
                    yield {**head, "choices": [_chunk(path, index, body, reason)]}
            if request.usage:
                yield {**head, "choices": [], "usage": _usage(request, tokens)}
        finally:
            for task in feeds:
                task.cancel()

    async def _pieces(self, request: Request, index: int) -> AsyncGenerator[tuple[str, Text, str | None]]:
        """(text, all so far, None) for each token of an answer, at last (text, all, why it ended)."""
        which = index // request.n
        sampling = request.sampling
        if sampling.seed is not None:  # further answers to a prompt must differ
            sampling = sampling._replace(seed=(sampling.seed + index % request.n) % 2**63)
        text = Text(self.tokenizer, request.stop)
        if request.room[which]:
            tokens = self.engine.generate(request.prompts[which], request.room[which], sampling)
            async with contextlib.aclosing(tokens):
                async for token in tokens:
                    piece = text.push(token)
                    yield piece, text, None
                    if text.stopped:
                        break
        rest = text.finish()
        ended = text.stopped or (bool(text.ids) and text.ids[-1] in self.engine.ends)
        yield rest, text, "stop" if ended else "length"

    async def _choice(self, path: str, request: Request, index: int) -> tuple[dict[str, Any], int]:
        """(a whole answer, its number of tokens)."""
        async with contextlib.aclosing(self._pieces(request, index)) as parts:
            pieces = [part async for part in parts]
        _, text, reason = pieces[-1]
        prompt, answer = request.texts[index // request.n], "".join(piece for piece, _, _ in pieces)
        if path == CHAT:
            message = {"role": "assistant", "content": answer}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}, len(text.ids)
        logprobs = None
        if request.logprobs is not None:
            logprobs = await self._logprobs(request, request.prompts[index // request.n], text)
        choice = {"index": index, "text": (prompt if request.echo else "") + answer, "logprobs": logprobs}
        return {**choice, "finish_reason": reason}, len(text.ids)

    async def _logprobs(self, request: Request, prompt: list[int], text: Text) -> dict[str, Any]:
        """The log-probabilities of an answer's tokens, and with echo of its prompt's, from one forward pass."""
        first = 0 if request.echo else len(prompt)
        kept = [t for t, start in zip(text.ids, text.starts, strict=True) if not text.stopped or start < text.length]
        ids = [*prompt, *kept]
        starts = text.starts[: len(kept)]
        if request.echo:
            spelt = Text(self.tokenizer)
            for token in prompt:
                spelt.push(token)
            spelt.finish()
            starts = [*spelt.starts, *(spelt.length + start for start in starts)]
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": starts}
        if len(ids) == first:
            return out
        logits = await self.engine.logits(ids)
        rows = await asyncio.to_thread(_rows, logits, ids, first, request.logprobs or 0)
        for token, own, top in rows:
            out["tokens"].append(self.tokenizer.decode([token]))
            out["token_logprobs"].append(own)
            names: dict[str, float] | None = None if own is None else {}
            for other, value in top:
                names.setdefault(self.tokenizer.decode([other]), value)  # type: ignore[union-attr]
            out["top_logprobs"].append(names)
        return out

    def _head(self, path: str, chunk: str) -> dict[str, Any]:
        kind = ("chatcmpl", f"chat.completion{chunk}") if path == CHAT else ("cmpl", "text_completion")
        return {
            "id": f"{kind[0]}-{uuid.uuid4().hex}",
            "object": kind[1],
            "created": int(time.time()),
            "model": self.name,
        }


def _chunk(path: str, index: int, body: Any, reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta" if path == CHAT else "text": body, "logprobs": None, "finish_reason": reason}


def _count(request: Request) -> int:
    return len(request.prompts) * request.n


def _usage(request: Request, answered: int) -> dict[str, int]:
    asked = sum(map(len, request.prompts))
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def _rows(
    logits: torch.Tensor, ids: list[int], first: int, top: int
) -> list[tuple[int, float | None, list[tuple[int, float]]]]:
    """(token, its log-probability, [(token, log-probability)] of the `top` likeliest and itself) from `first` on.

    logits: [tokens, vocabulary], those behind each of `ids`. The first token of all has nothing in front of it.
    """
    out: list[tuple[int, float | None, list[tuple[int, float]]]] = [(ids[0], None, [])] if first == 0 else []
    for at in range(max(first, 1), len(ids), ROWS):
        targets = torch.tensor(ids[at : at + ROWS], device=logits.device)
        scores = logits[at - 1 : at - 1 + len(targets)].float().log_softmax(-1).clamp(min=LOWEST)
        own = scores.gather(1, targets[:, None])
        best = scores.topk(min(top, scores.shape[1]), dim=-1)
        for token, value, others, values in zip(
            targets.tolist(), own[:, 0].tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            out.append((token, value, [*zip(others, values, strict=True), (token, value)]))
    return out
