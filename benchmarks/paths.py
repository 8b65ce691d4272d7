"""What benchmarks/ops.py times: the residual path of a whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import byte_model
import timing
import torch
from cases import EPS, TOLERANCE, Bench, Case, Variant, truth
from torch import Tensor, nn
from torch.func import functional_call

from attnres.bench import rivals
from attnres.residual import BlockAttnRes, PreNorm

PATH_TOLERANCE = 3  # times that of one op, for dozens in a row: the reference itself in bf16 is at one


class Path(nn.Module):
    """A network whose layers are their norms: what is left is its residual path. The norms' weights differ widely, or
    all sources would be parallel and the queries without effect."""

    def __init__(self, residual: nn.Module, width: int, num_layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.residual = residual
        self.norms = nn.ModuleList(nn.RMSNorm(width, EPS, dtype=dtype) for _ in range(num_layers + 1))
        for norm in self.norms:
            nn.init.normal_(norm.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        state = self.residual.start(embedding)
        for i, norm in enumerate(self.norms[:-1]):
            x, state = self.residual.read(state, i, norm)
            state = self.residual.write(state, i, x)
        return self.residual.finish(state, self.norms[-1])


def residual_path(bench: Bench, tokens: int, width: int, L: int, S: int, contenders: Sequence[str]) -> Case:
    """Norms included, embedding to the output head's norm; the sublayers between are left out."""
    block = BlockAttnRes(width, L, block_size=S).to(bench.device)
    with torch.no_grad():
        for row in range(L + 1):
            block.pseudo_query[row], block.key_norm[row] = bench.vectors(width)
    prenorm = Path(PreNorm(width, L), width, L, bench.dtype).to(bench.device)
    ours = Path(block, width, L, bench.dtype).to(bench.device)
    (embedding,), (direction,) = bench.leaves(bench.rows(tokens, width)), bench.rows(tokens, width)

    @cache
    def expected() -> list[Tensor]:
        exact = copy.deepcopy(ours).double()
        exact.residual.schedule = "layerwise"
        names, values = zip(*ours.named_parameters(), strict=True)

        def function(shared: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
            return [functional_call(exact, dict(zip(names, shared, strict=True)), (rows[0],))]

        return truth(function, values, [embedding], [direction])

    def variant(path: nn.Module, passes: byte_model.Passes | None, call: Any = None, check: bool = True) -> Variant:
        moved = None if passes is None else bench.moved(passes, tokens, width)
        forward = path if call is None else call
        leaves = [*path.parameters(), embedding]
        return Variant(lambda: [forward(embedding)], leaves, [direction], moved, expected if check else None)

    def plugged(rival: rivals.Rival) -> Path:
        path = copy.deepcopy(ours)
        path.residual = rivals.plug(ours.residual, rival)
        return path

    two_phase = byte_model.two_phase(L, S, width) if bench.device.type == "cuda" else None
    standard = byte_model.standard(L, S)
    variants = {"attnres": variant(ours, two_phase), "prenorm": variant(prenorm, standard, check=False)}
    models = {
        "straightforward": byte_model.straightforward(L, S),
        "fla Triton": byte_model.per_read(L, S),
        "fla Gluon": byte_model.per_read(L, S, partials=0.25),
        "fast-attnres": byte_model.per_read(L, S),
    }
    for name in contenders:
        rival = bench.rivals.get(name.removesuffix(", compiled").removesuffix(", one function"))
        if name == "attnres, compiled":
            variants[name] = variant(ours, two_phase, timing.compiled(ours))
        elif name == "prenorm, compiled":
            variants[name] = variant(prenorm, standard, timing.compiled(prenorm), check=False)
        elif rival is None:
            continue
        elif name.endswith(", one function"):
            path = copy.deepcopy(ours)
            variants[name] = variant(
                path, byte_model.two_phase_recomputed(L, S), lambda e, path=path, run=rival.path: whole(path, run, S, e)
            )
        else:
            path = plugged(rival)
            variants[name] = variant(path, models.get(name), timing.compiled(path) if "compiled" in name else None)
    return Case(f"residual path, T={tokens} D={width} L={L} S={S}", variants, PATH_TOLERANCE * TOLERANCE[bench.dtype])


def whole(path: Path, run: Callable[..., Tensor], block_size: int, embedding: Tensor) -> Tensor:
    """A path by a rival's own loop over the layers."""
    queries = path.residual.pseudo_query * path.residual.key_norm
    return path.norms[-1](run(embedding, queries, list(path.norms[:-1]), block_size, EPS))
