"""What the processes of the pipeline tests run: a decoder in a pipeline against the same decoder in one piece."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from attnres.model import Decoder, DecoderConfig
from attnres.parallel import experts, pipeline, tensor, weights
from attnres.parallel import mesh as meshes
from attnres.parallel.build import build_parts
from attnres.parallel.config import ParallelConfig
from attnres.parallel.stage import Store

CPU = torch.device("cpu")
VOCABULARY, CONTEXT, WIDTH = 19, 6, 8


HYBRID = {
    "attention_pattern": ("kda", "mla"),
    "linear_chunk_size": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "first_k_dense_replace": 1,
}


def shape(
    residual: str = "block_attnres", blocks: int = 6, tied: bool = False, hybrid: bool = False, **options: Any
) -> DecoderConfig:
    return DecoderConfig(
        **(HYBRID if hybrid else {}),
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=12,
        residual=residual,
        residual_options=options,
        tie_word_embeddings=tied,
    )


def whole(config: DecoderConfig) -> Decoder:
    """A decoder in fp64 whose residual parameters are random, so that all of them have gradients."""
    torch.manual_seed(7)
    decoder = Decoder(config, seed=1).double()
    for parameter in decoder.residual.parameters():
        nn.init.normal_(parameter, std=0.5)
    for parameter in decoder.layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def reference(config: DecoderConfig, rows: int, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and the last one's gradients, in one piece and with one batch."""
    decoder = whole(config)
    losses = []
    for step in range(steps):
        decoder.zero_grad()
        inputs, targets = batch(rows, step)
        loss = loss_sum(decoder(inputs), targets)
        loss.backward()
        losses.append(loss.item())
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    return losses, {name: gradient for name, gradient in gradients.items() if gradient is not None}


def build(config: DecoderConfig, parallel: ParallelConfig, rows: int, case: dict[str, Any]) -> pipeline.Pipeline:
    mesh = meshes.build(parallel, CPU)
    rows //= parallel.dp * parallel.shard
    stream = (rows // parallel.microbatch_count, CONTEXT // parallel.tp, WIDTH)
    layout = pipeline.Layout(config, parallel, stream, torch.float64, case.get("cuts"))
    parts = build_parts(
        config,
        layout,
        mesh,
        CPU,
        CONTEXT,
        0,
        case.get("checkpointing", False),
        torch.float64,
        meshes.of_experts(parallel, mesh),
    )
    for part in parts:
        weights.place(part, whole(config).named_parameters())
    line = pipeline.Pipeline(parts, layout, parallel, mesh, CPU, rows, CONTEXT, loss_sum)
    line.mesh, line.ep = mesh, parallel.ep
    return line


def train(line: pipeline.Pipeline, inputs: Tensor, targets: Tensor) -> float:
    """The gradients of a step, in the parameters, and the loss of this replica; 0 on ranks before the last."""
    for part in line.parts:
        part.zero_grad()
    loss = line.train(inputs, targets).item()
    for part in line.parts:
        experts.average_gradients(part, line.ep)
    if line.mesh["tp"].size() > 1:
        for part in line.parts:
            tensor.reduce_replicated_gradients(part, line.mesh["tp"])
    line.sum_tied_gradients()
    return loss


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """The largest differences between the pipeline and one process, on this rank; and what was sent and stored."""
    config = shape(**case.get("model", {}))
    parallel = ParallelConfig(**case["parallel"])
    replicas = parallel.dp * parallel.shard
    rows, steps = case.get("rows", parallel.microbatch_count * replicas), case.get("steps", 2)
    line = build(config, parallel, rows, case)
    places = watch_places(line)
    losses, gradients = reference(config, rows, steps)
    replica = line.mesh.get_local_rank("dp") * parallel.shard + line.mesh.get_local_rank("shard")
    own = slice(replica * line.rows, (replica + 1) * line.rows)
    loss_error, most = 0.0, 1
    for step in range(steps):
        places.clear()
        inputs, targets = (tokens[own] for tokens in batch(rows, step))
        values = [line.evaluate(inputs, targets).item()] if case.get("evaluate") else []
        values.append(train(line, inputs, targets))
        most = max([most, *map(len, places.values())])
        for value in values:
            total = torch.tensor(value, dtype=torch.float64)
            distributed.all_reduce(total)
            loss_error = max(loss_error, abs(total.item() / parallel.tp / losses[step] - 1))
    error, lost = 0.0, []
    for part in line.parts:
        for name, parameter in part.named_parameters():
            whole_name, _ = weights.own_piece(part, name, parameter)
            row = name.removeprefix(f"{whole_name}.")
            want = (gradients[whole_name][int(row)] if row.isdigit() else gradients[whole_name]) / replicas
            if parameter.grad is not None:
                gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                error = max(error, (gradient - want).abs().max().item())
            elif want.any():
                lost.append(name)
    return {
        "loss": loss_error,
        "gradient": error,
        "lost": lost,
        "bytes": {index: dict(sent) for index, sent in line.sent_bytes().items()},
        "hops": line.layout.hop_bytes(),
        "runs": parallel.microbatch_count * steps,
        "store": len(line.store),
        "peak": line.store.peak,
        "places": most,
        "buffers": sum(buffer.nbytes for buffer in buffers(line) if not buffer.is_meta),
    }


def watch_places(line: pipeline.Pipeline) -> dict[tuple[int, str], set[int]]:
    """Micro-batch and name of every tensor that a chunk of this rank is given -> the memory that it was seen in."""
    found: dict[tuple[int, str], set[int]] = {}
    for stage in line.stages:

        def note(part: Any, inputs: tuple[Tensor, ...], stage: Any = stage) -> None:
            for name, given in zip(part.before.names if part.before else (), inputs, strict=part.before is not None):
                key = (stage._micro_batch, name)
                if torch.is_grad_enabled():
                    found.setdefault(key, set()).add(given.untyped_storage().data_ptr())

        stage.chunk.register_forward_pre_hook(note)
    return found


def buffers(line: pipeline.Pipeline) -> list[Tensor]:
    """What waits to be received into."""
    infos = [
        info
        for stage in line.stages
        for table in (stage.args_recv_info, stage.grad_recv_info)
        for info in table.values()
    ]
    return [buffer for group in infos for info in group if (buffer := getattr(info, "buffer", None)) is not None]


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [compare(case) for case in cases]


def mutated(mutation: str, case: dict[str, Any]) -> dict[str, Any]:
    """`compare` with one thing about the store done wrong."""
    right = {name: getattr(Store, name) for name in ("collect", "deposit")}

    def twice(self: Store, micro_batch: int, name: str, gradient: Tensor | None) -> None:
        right["deposit"](self, micro_batch, name, gradient)
        right["deposit"](self, micro_batch, name, gradient)

    wrong: dict[str, Any] = {
        "deposits are dropped": ("collect", lambda *where: (right["collect"](*where), None)[1]),
        "deposits are counted twice": ("deposit", twice),
        "the last deposit replaces the others": (
            "deposit",
            lambda self, micro_batch, name, gradient: self._gradients.setdefault(micro_batch, {}).update(
                {name: gradient}
            ),
        ),
    }
    name, function = wrong[mutation]
    setattr(Store, name, function)
    try:
        return compare(case)
    finally:
        setattr(Store, name, right[name])
