"""The server as an ASGI application: which paths there are, who may ask, how errors read."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UsageError
from .answer import Answers
from .engine import Stopped
from .request import CHAT, COMPLETIONS, Reader

MODELS, HEALTH = "/v1/models", "/health"
OPEN = (COMPLETIONS, CHAT, MODELS, HEALTH)
MAX_BODY = 4 << 20
"""Bytes of the largest request."""
PATIENCE = 20.0
"""Seconds that a client may take to receive what is sent to it."""

FAILED = "the server failed on this request; its log says why"

log = logging.getLogger(__name__)
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Gone(Exception):
    """The client does not take its answer."""


class Hosts:
    """Which values of the Host header are answered.

    A web page can give its own name the address of this machine, so a name that is not ours is not answered.

    Args:
        host: what the server listens on. On all addresses at once it answers to any address, which is no name, and to
            the machine's name.
    """

    def __init__(self, host: str) -> None:
        self.names = {"localhost", host.lower()}
        address = _address(host)
        self.any_address = address is not None and address.is_unspecified
        if self.any_address:
            self.names.add(socket.gethostname().lower())

    def allow(self, header: str) -> bool:
        """Whether a request with this Host header is answered."""
        name = header.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")
        address = _address(name)
        return name in self.names or (address is not None and (self.any_address or address.is_loopback))


class App:
    """Answers HTTP requests with one model."""

    def __init__(self, reader: Reader, answers: Answers, hosts: Hosts) -> None:
        self.reader, self.answers, self.hosts = reader, answers, hosts
        self.reading = ThreadPoolExecutor(1, thread_name_prefix="reader")
        name = reader.name
        self.model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "attnres"}

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        with contextlib.suppress(Gone):
            await self._answer(scope, receive, _patient(send))

    async def _answer(self, scope: Any, receive: Any, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if not self.hosts.allow(host):
            return await _refuse(send, 403, "the Host header must name the host that the server was started with")
        model = path.removeprefix(f"{MODELS}/") if path.startswith(f"{MODELS}/") else None
        if path not in OPEN and model is None:
            return await _refuse(send, 404, f"there is no {path} here; there are {', '.join(OPEN)}")
        wanted = "POST" if path in (COMPLETIONS, CHAT) else "GET"
        if method != wanted:
            return await _refuse(send, 405, f"{path} must be asked with {wanted}; this is {method}")
        if path == HEALTH:
            if not self.answers.engine.healthy:
                return await _refuse(send, 503, "the engine has stopped; start the server anew")
            return await _json(send, 200, {"status": "ok"})
        if path == MODELS:
            return await _json(send, 200, {"object": "list", "data": [self.model]})
        if model is not None:
            if model != self.reader.name:
                return await _refuse(send, 404, f"there is no model of this name; there is {self.reader.name}")
            return await _json(send, 200, self.model)
        data = await _body(receive)
        if data is None:
            return await _refuse(send, 413, f"the request must not exceed {MAX_BODY} bytes")
        await _while_there(receive, self._complete(path, data, send))

    async def _complete(self, path: str, data: bytes, send: Send) -> None:
        try:
            request = await asyncio.get_running_loop().run_in_executor(self.reading, self.reader.read, path, data)
            if not request.stream:
                return await _json(send, 200, await self.answers.whole(path, request))
        except UsageError as error:
            return await _refuse(send, 400, str(error))
        except Stopped as error:
            return await _refuse(send, 503, str(error))
        except Gone:
            raise
        except Exception:
            log.exception("a request failed")
            return await _refuse(send, 500, FAILED)
        await self._stream(path, request, send)

    async def _stream(self, path: str, request: Any, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with contextlib.aclosing(self.answers.stream(path, request)) as events:
                async for event in events:
                    await _event(send, json.dumps(event))
        except Gone:
            raise
        except Exception as error:
            if not isinstance(error, Stopped):
                log.exception("a stream failed")
            await _event(send, json.dumps(_error(500, str(error) if isinstance(error, Stopped) else FAILED)))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})


async def _body(receive: Any) -> bytes | None:
    """The body of a request, None if it is too long. Raises Gone if the client is."""
    data, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        data += message.get("body", b"")
        more = message.get("more_body", False)
        if len(data) > MAX_BODY:
            return None
    return bytes(data)


async def _while_there(receive: Any, work: Any) -> None:
    """Awaits `work`, and cancels it if the client hangs up."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hung_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _patient(send: Send) -> Send:
    async def within_patience(message: dict[str, Any]) -> None:
        try:
            await asyncio.wait_for(send(message), PATIENCE)
        except TimeoutError:
            raise Gone from None

    return within_patience


async def _json(send: Send, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body, allow_nan=False).encode()})


async def _refuse(send: Send, status: int, message: str) -> None:
    await _json(send, status, _error(status, message))


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
