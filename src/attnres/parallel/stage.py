"""One stage of torch's pipeline that keeps the history it has seen (paper section 5, cross-stage caching).

The chunk in it is a function of the residual state and knows nothing of ranks. Tensors that a later chunk of the rank
will read lie in the rank's store. To that chunk they are leaves, as if they had been received; the gradients of those
leaves go back into the store, and the chunk that had brought or made the tensors takes them as gradients of further
outputs. Autograd forms every sum. A micro-batch runs backward from the last chunk to the first, so a deposit is always
complete when it is collected.

Everything here overrides public methods of PipelineStage, present since torch 2.11.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.pipelining import PipelineStage

from .part import ModelPart
from .routing import Route


class Store:
    """What the chunks of one rank share: tensors and gradients, by micro-batch and name.

    The most blocks that lay in it at once is `peak`.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._gradients: dict[int, dict[str, Tensor]] = {}
        self.peak = 0

    def put(self, micro_batch: int, name: str, tensor: Tensor) -> None:
        self._tensors.setdefault(micro_batch, {})[name] = tensor.detach()  # an alias: the data has one copy
        self.peak = max(self.peak, sum(map(len, self._tensors.values())))

    def get(self, micro_batch: int, name: str) -> Tensor:
        return self._tensors[micro_batch][name]

    def release(self, micro_batch: int) -> None:
        self._tensors.pop(micro_batch, None)

    def deposit(self, micro_batch: int, name: str, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        waiting = self._gradients.setdefault(micro_batch, {})
        waiting[name] = waiting[name] + gradient if name in waiting else gradient

    def collect(self, micro_batch: int, name: str) -> Tensor | None:
        waiting = self._gradients.get(micro_batch, {})
        gradient = waiting.pop(name, None)
        if not waiting:
            self._gradients.pop(micro_batch, None)
        return gradient

    def clear(self) -> None:
        assert not self._gradients, "gradients of cached tensors were not collected"
        self._tensors.clear()

    def __len__(self) -> int:
        return sum(map(len, self._tensors.values())) + sum(map(len, self._gradients.values()))


class CachingStage(PipelineStage):
    """A stage that runs `chunk` and sends what `route` says.

    Args:
        like: examples without data of every tensor that a route names, by name; of the token ids under "tokens"; of
            the logits under "logits".
        store: one for all stages of the rank.
        sends_itself: for schedules that give every send a place of its own (all but GPipe and 1F1B, which pair it with
            a receive): the stage starts its sends and ends each as soon as it must be through, so that a tensor does
            not wait for the end of the step to be freed.

    `sent_bytes` counts, since it was last cleared, what went "forward" to the next rank and "backward" to the one
    before.
    """

    def __init__(
        self,
        chunk: ModelPart,
        index: int,
        num_stages: int,
        device: torch.device,
        group: distributed.ProcessGroup,
        *,
        route: Route,
        store: Store,
        like: dict[str, Tensor],
        sends_itself: bool,
    ) -> None:
        self.received_like = [like[name] for name in route.received]
        self.sent_like = [like[name] for name in route.sent]
        received = self.received_like if index > 0 else [like["tokens"]]
        sent = self.sent_like if index < num_stages - 1 else [like["logits"]]
        super().__init__(
            chunk,
            index,
            num_stages,
            device,
            input_args=tuple(_example(tensor) for tensor in received),
            output_args=tuple(_example(tensor) for tensor in sent),
            group=group,
        )
        self.chunk, self.route, self.store = chunk, route, store
        self.sends_itself = sends_itself
        self.sent_bytes: Counter[str] = Counter()
        self._micro_batch = -1
        self._kept: dict[int, list[tuple[str, Tensor]]] = {}
        self._sends: dict[tuple[str, int], list[distributed.Work]] = {}

    # forward

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._micro_batch = fwd_chunk_id
        needs_grad = self.has_backward and torch.is_grad_enabled()
        if not self.is_first:
            for info in self.args_recv_info[fwd_chunk_id]:
                info.buffer.requires_grad_(needs_grad)  # type: ignore[union-attr]
        cached = [self.store.get(fwd_chunk_id, name).detach() for name in self.route.cached]
        # torch differentiates keyword arguments with the rest, and sends only the gradients of the others
        kwargs["kwargs"] = {"cached": [tensor.requires_grad_(needs_grad) for tensor in cached]}
        output = super().forward_one_chunk(fwd_chunk_id, *args[:1], **kwargs)
        if self.route.last:
            self.store.release(fwd_chunk_id)
        if not self.has_backward:
            self._kept.pop(fwd_chunk_id, None)
        if not self.is_first:
            _drop_buffers(self.args_recv_info[fwd_chunk_id])
        return output

    def forward_maybe_with_nosync(self, *received: Tensor, cached: Sequence[Tensor] = ()) -> Any:
        if self.is_first:
            known: dict[str, Tensor] = {}
            output = super().forward_maybe_with_nosync(*received)
        else:
            known = dict(zip(self.route.received, received, strict=True))
            known |= dict(zip(self.route.cached, cached, strict=True))
            assert self.chunk.before is not None
            output = super().forward_maybe_with_nosync(*(known[name] for name in self.chunk.before.names))
        if self.is_last:
            return output
        known |= dict(zip(self.route.made, output, strict=True))
        leaving = {name: _alias(known[name]) for name in {*self.route.sent, *self.route.kept}}
        for name in self.route.kept:
            self.store.put(self._micro_batch, name, known[name])
        self._kept[self._micro_batch] = [(name, leaving[name]) for name in self.route.kept]
        outputs = tuple(leaving[name] for name in self.route.sent)
        for tensor, like in zip(outputs, self.sent_like, strict=True):
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), (tensor.shape, tensor.dtype, like)
        return outputs

    # backward

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if not self.has_backward:
            return
        self._micro_batch = bwd_chunk_id
        self._finish_sends("forward", bwd_chunk_id)  # its gradient is back, so it has arrived
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            _drop_buffers(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._micro_batch = bwd_chunk_id
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if backward_type == "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, *args, **kwargs)
        kept = self._kept.pop(self._micro_batch, [])
        deposits = [(tensor, self.store.collect(self._micro_batch, name)) for name, tensor in kept]
        if deposits := [(tensor, gradient) for tensor, gradient in deposits if gradient is not None]:
            tensors, gradients = zip(*deposits, strict=True)
            bwd_kwargs["stage_output"] = (*bwd_kwargs["stage_output"], *tensors)
            bwd_kwargs["output_grads"] = (*bwd_kwargs["output_grads"], *gradients)
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, *args, **kwargs)
        if self.is_first:
            return gradients, groups
        for name, gradient in zip(self.route.cached, gradients[len(self.route.received) :], strict=True):
            self.store.deposit(self._micro_batch, name, gradient)
        received = zip(gradients, self.received_like, strict=False)
        return tuple(self._sendable(gradient, like) for gradient, like in received), groups

    def _sendable(self, gradient: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, device=self.device) if gradient is None else gradient.contiguous()

    # torch asks for these even where nothing runs backward, as in an evaluation through a schedule in V shape

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # what is sent, and the memory of what is received

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[distributed.P2POp]:
        if not self.is_first:
            self._new_buffers(self.args_recv_info[fwd_chunk_id], self.received_like)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[distributed.P2POp]:
        if self.has_backward and not self.is_last:
            self._new_buffers(self.grad_recv_info[bwd_chunk_id], self.sent_like)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[distributed.P2POp]:
        return self._send("forward", fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[distributed.P2POp]:
        for direction, micro_batch in list(self._sends):
            if direction == "backward":
                self._finish_sends(direction, micro_batch)
        return self._send("backward", bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def finish_sends(self) -> None:
        """Waits for the sends that the stage started itself; to be called at the end of a step."""
        for key in list(self._sends):
            self._finish_sends(*key)

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self.store.clear()
        self._kept.clear()

    def _send(self, direction: str, micro_batch: int, ops: list[distributed.P2POp]) -> list[distributed.P2POp]:
        self.sent_bytes[direction] += sum(op.tensor.nbytes for op in ops)
        if not (self.sends_itself and self.has_backward and ops):
            return ops
        self._sends[direction, micro_batch] = distributed.batch_isend_irecv(ops)
        return []

    def _finish_sends(self, direction: str, micro_batch: int) -> None:
        for work in self._sends.pop((direction, micro_batch), ()):
            work.wait()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_buffers(super()._prepare_backward_infra, *args, **kwargs)

    def _without_buffers(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        """torch would allocate the receive buffers of all micro-batches; these are made when a receive begins."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def _new_buffers(self, infos: Sequence[Any], like: Sequence[Tensor]) -> None:
        for info, example in zip(infos, like, strict=True):
            info.buffer = torch.empty(example.shape, dtype=example.dtype, device=self.device)


def _drop_buffers(infos: Sequence[Any]) -> None:
    for info in infos:
        info.buffer = torch.empty(0, device="meta")


def _alias(tensor: Tensor) -> Tensor:
    """The same data under a grad_fn of its own, neither a view nor a leaf.

    A split backward pass detaches every output of a stage in place, which a view refuses and which would turn off the
    gradient of an input that is passed on.
    """
    tensor = tensor.contiguous()
    return torch.ops.aten._unsafe_view(tensor, tensor.shape)


def _example(tensor: Tensor) -> Tensor:
    """An example of a tensor that has a gradient, if its dtype can: without that torch opens no way back for one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.is_floating_point())
