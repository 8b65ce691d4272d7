"""Tokens from a model: one request after another, or those that are there together in one batch."""

import asyncio
import contextlib
import copy
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from ..errors import UsageError
from .request import Sampling

ANY = 0.5
"""A placeholder: each request of a batch brings its own value, and transformers prepares for that unless it reads 1."""


class Stopped(RuntimeError):
    """The engine has failed for good; only a new process answers again."""


class Engine(ABC):
    """What generates for the server. A forward pass of one request must not run beside another, hence one thread."""

    def __init__(self, model: Any) -> None:
        self.model = self.scorer = model
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        ends = model.generation_config.eos_token_id
        self.ends: frozenset[int] = frozenset([ends] if isinstance(ends, int) else ends or [])

    @abstractmethod
    def generate(self, prompt: list[int], tokens: int, sampling: Sampling) -> AsyncGenerator[int]:
        """Yields up to `tokens` ids, the last of them one of `ends` if the model ends there. Closing it stops the work.

        Raises Stopped if the engine is of no more use.
        """

    async def logits(self, ids: list[int]) -> torch.Tensor:
        """The logits [len(ids), vocabulary] behind each token, on the model's device."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._logits, ids)

    @property
    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    @torch.no_grad()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        return self.scorer(input_ids=torch.tensor([ids], device=self.scorer.device), use_cache=False).logits[0]


class OneByOne(Engine):
    """Requests wait for each other."""

    async def generate(self, prompt: list[int], tokens: int, sampling: Sampling) -> AsyncGenerator[int]:
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def send(item: Any) -> None:
            with contextlib.suppress(RuntimeError):  # where the server has closed its loop
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            try:
                if not gone.is_set():
                    self._generate(prompt, tokens, sampling, _Streamer(send), gone)
                send(None)
            except Exception as error:
                send(error)

        self.thread.submit(work)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            gone.set()

    def _generate(
        self, prompt: list[int], tokens: int, sampling: Sampling, streamer: Any, gone: threading.Event
    ) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        settings = _settings(self.model, sampling)
        settings.max_new_tokens = tokens
        stop = [lambda ids, scores, **_: torch.full(ids.shape[:1], gone.is_set(), device=ids.device)]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.default_generator.manual_seed(sampling.seed)
                for device in devices:
                    torch.cuda.default_generators[device.index or 0].manual_seed(sampling.seed)
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=streamer,
                stopping_criteria=stop,
            )


class Batched(Engine):
    """Requests that are there together are computed in one step, each with its own sampling settings.

    Args:
        config: of transformers' continuous batching.

    Raises UsageError for a model that transformers cannot batch.
    """

    def __init__(self, model: Any, config: ContinuousBatchingConfig) -> None:
        super().__init__(model)
        config.per_request_processors = True
        # Continuous batching leaves paged attention in the model, so another module with its weights scores.
        self.scorer = copy.deepcopy(model, {id(weight): weight for weight in (*model.parameters(), *model.buffers())})
        try:
            self.manager = model.init_continuous_batching(_settings(model, Sampling(ANY, ANY, None)), config)
        except ValueError as error:
            raise UsageError(f"this model cannot be served with continuous batching: {error}") from error
        processors = self.manager.logit_processor
        processors.logits_processor.append(_Greedy())
        processors.tensors_required += 1
        processors.supported_keys |= _Greedy.supported_kwargs
        self.manager.start()

    @property
    def healthy(self) -> bool:
        return self.manager.background_thread_status.can_accept_new_requests() is None

    async def generate(self, prompt: list[int], tokens: int, sampling: Sampling) -> AsyncGenerator[int]:
        queue, name, sent = asyncio.Queue[Any](), uuid.uuid4().hex, 0
        self.manager.register_result_handler(name, queue.put_nowait)
        ended = False
        try:
            self._add(prompt, name, tokens, sampling)
            while not ended:
                try:
                    output = await asyncio.wait_for(queue.get(), timeout=1)
                except TimeoutError:
                    if self.healthy:
                        continue
                    raise self._stopped() from None
                ended = output.is_finished() or output.error is not None
                if output.error is not None:
                    raise RuntimeError(output.error) if self.healthy else self._stopped()
                for token in output.generated_tokens[sent:]:
                    yield token
                sent = len(output.generated_tokens)
        finally:
            if not ended:
                self.manager.cancel_request(name)
            self.manager.output_router.result_handlers.pop(name, None)  # a cancelled request's stays there otherwise

    def _add(self, prompt: list[int], name: str, tokens: int, sampling: Sampling) -> None:
        greedy = sampling.temperature == 0
        accepted = self.manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=tokens,
            streaming=True,
            eos_token_id=list(self.ends),
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            greedy=greedy,
        )
        if accepted is None:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        error = self.manager.background_thread_status.fatal_error
        return Stopped(f"continuous batching has ended ({error}); start the server anew")

    def close(self) -> None:
        self.manager.stop(block=True, timeout=2, hard_stop=True)
        super().close()


class _Streamer:
    """Hands tokens on as `generate` makes them."""

    def __init__(self, send: Any) -> None:
        self.send, self.prompt_is_past = send, False

    def put(self, ids: torch.Tensor) -> None:
        for token in ids.tolist() if self.prompt_is_past else ():
            self.send(token)
        self.prompt_is_past = True

    def end(self) -> None:
        pass


class _Greedy(ContinuousBatchingLogitsProcessor):
    """Leaves the likeliest token alone to the requests of a batch that want it, where the others draw."""

    supported_kwargs: dict[str, type] = {"greedy": bool}
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Any) -> torch.Tensor:
        wanted = [request.state.logit_processor_kwargs.get("greedy", False) for request in requests_with_new_token]
        return torch.tensor(wanted, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        best = torch.full_like(scores, float("-inf")).scatter(-1, scores.argmax(-1, keepdim=True), 0.0)
        return torch.where(tensor_arg[: scores.size(0), None] == 1, best, scores)


def _settings(model: Any, sampling: Sampling) -> GenerationConfig:
    """The model's own generation settings with those of a request."""
    settings: GenerationConfig = copy.deepcopy(model.generation_config)
    settings.num_beams = settings.num_return_sequences = 1
    settings.max_length = None
    settings.do_sample = sampling.temperature > 0
    if settings.do_sample:
        settings.temperature, settings.top_p = sampling.temperature, sampling.top_p
    else:
        settings.temperature = settings.top_p = settings.top_k = None
    if settings.pad_token_id is None:
        settings.pad_token_id = 0  # nothing is padded, but transformers warns without one
    return settings
