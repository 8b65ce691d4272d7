"""Whether a converted model computes what it computed before: outputs and gradients at its embeddings on sample tokens.

A decoder layer's sum is looked at before a conversion (`layer_sum`); what a base model does between its layers shows
here. A model that does not pass is put back as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UsageError, first_line

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Differences that count as the same, relative to the largest value; 0.1 in half precision."""
LENGTH = 16


class Sample(NamedTuple):
    """Token ids [B, T] and their attention mask; the second row has padding on its left."""

    input_ids: Tensor
    attention_mask: Tensor


def sample_tokens(vocab_size: int, length: int, seed: int = 0) -> Sample:
    """Two rows of random token ids, the second with a quarter of padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 4] = 0
    return Sample(torch.randint(vocab_size, (2, length), generator=generator), mask)


class Proof:
    """What a model computes, taken when this is made, to `hold` against what it has become."""

    def __init__(self, model: Any) -> None:
        """Raises UsageError if the model does not run on token ids and their mask alone."""
        self._before = {module: (type(module), dict(vars(module))) for module in model.modules()}
        self._children = {module: dict(module._modules) for module in model.modules()}
        try:
            self._expected = _computed(model)
        except Exception as error:
            raise UsageError(
                f"the {type(model).__name__} cannot be run on sample tokens ({type(error).__name__}: "
                f"{first_line(error)}), so the conversion cannot be verified; verify=False leaves that out"
            ) from error

    def hold(self, model: Any) -> None:
        """Raises UsageError, after putting the model back as it was, if it computes something else now."""
        try:
            found = _computed(model)
        except Exception as error:
            self._restore()
            raise UsageError(
                f"the converted {type(model).__name__} cannot be run ({type(error).__name__}: {first_line(error)}): "
                f"its residual stream is no plain sum of what its decoder layers add; it was not converted"
            ) from error
        for what, before, after in zip(("outputs", "gradients"), self._expected, found, strict=True):
            difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE.get(before.dtype, 0.1):
                self._restore()
                raise UsageError(
                    f"a {type(model).__name__} with Attention Residuals computes other {what} (relative difference "
                    f"{difference:.2g}), so its residual stream is no plain sum of what its decoder layers add; it was "
                    f"not converted"
                )

    def _restore(self) -> None:
        for module, (kind, attributes) in self._before.items():
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(self._children[module])


def _computed(model: Any) -> tuple[Tensor, Tensor]:
    """(what the model makes of sample tokens that are no padding, the gradient of its sum at their embeddings)."""
    embeddings: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    length = min(LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)
    sample = sample_tokens(model.config.get_text_config().vocab_size, length)
    sample = Sample(*(tensor.to(model.device) for tensor in sample))
    real = sample.attention_mask.bool()
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with _evaluating(model), torch.enable_grad():
            output = model(**sample._asdict(), use_cache=False)[0]
            output = output[real] if output.shape[:2] == real.shape else output
            # weights that differ, so that gradients do not cancel
            weights = torch.cos(torch.arange(output.numel(), device=output.device, dtype=torch.float64))
            total = (output * weights.view(output.shape).to(output.dtype)).sum()
            (gradient,) = torch.autograd.grad(total, embeddings[0])
    finally:
        hook.remove()
    return output.detach(), gradient[real]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is afterwards in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
