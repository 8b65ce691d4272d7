"""How a run is optimised, and the learning rate over its steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UsageError

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class OptimConfig:
    """How a run is optimised. Values outside their range are refused with a UsageError."""

    optimizer: OptimizerName = "adamw"
    """adamw: all parameters under AdamW. muon: Muon for the matrices of hidden layers, AdamW for the rest."""

    lr: float = 3e-3
    """Highest learning rate, reached at the end of the warm-up; > 0, per optimizer step."""

    muon_lr: float | None = None
    """Highest learning rate of Muon's matrices, > 0; None: the same as lr. Only with the muon optimizer."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the running mean and mean square of the gradient, per step; each in [0, 1)."""

    eps: float = 1e-8
    """Added to the denominator of AdamW's update; > 0."""

    weight_decay: float = 0.1
    """Decoupled weight decay of linear layers' matrices and embeddings, times the learning rate per step; >= 0."""

    schedule: ScheduleName = "cosine"
    """After the warm-up: cosine falls all along, wsd stays and falls linearly in the last part, constant stays."""

    warmup_steps: int | None = None
    """Steps of linear warm-up, >= 0 and fewer than the run has; None: a tenth of the run, at most 100 steps."""

    final_lr_fraction: float = 0.1
    """Learning rate at the end of the cosine or wsd schedule, as a fraction of the highest; 0 to 1."""

    decay_fraction: float = 0.2
    """Length of the decay of the wsd schedule, as a fraction of all steps; above 0, to 1."""

    clip: float | None = 1.0
    """Largest global L2 norm of the gradient, > 0; longer ones are scaled down to it. None: no clipping."""

    def __post_init__(self) -> None:
        _require(self, "optimizer", _one_of(OptimizerName), f"one of {', '.join(get_args(OptimizerName))}")
        _require(self, "schedule", _one_of(ScheduleName), f"one of {', '.join(get_args(ScheduleName))}")
        _require(self, "lr", _positive, "a positive number such as 3e-3")
        _require(self, "muon_lr", lambda x: x is None or _positive(x), "a positive number, or None for that of lr")
        _require(self, "betas", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers in [0, 1)")
        _require(self, "eps", _positive, "a positive number such as 1e-8")
        _require(self, "weight_decay", lambda x: 0 <= x < math.inf, "zero or positive")
        _require(self, "warmup_steps", lambda x: x is None or _count(x), "a whole number of steps, or None")
        _require(self, "final_lr_fraction", lambda x: 0 <= x <= 1, "between 0 and 1")
        _require(self, "decay_fraction", lambda x: 0 < x <= 1, "above 0 and at most 1")
        _require(self, "clip", lambda x: x is None or _positive(x), "a positive number, or None for no clipping")
        if self.muon_lr is not None and self.optimizer != "muon":
            raise UsageError(f"muon_lr is for the muon optimizer, not for {self.optimizer}; leave it out or use muon")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list if the configuration comes from a JSON file


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of the update number `step`, counted from 0, of a run of `total_steps`.

    The warm-up is linear and ends at `config.lr`. The decay would reach `final_lr_fraction` at `step == total_steps`,
    one past the last, and stays there; so no step of the run has rate zero. Raises UsageError for a warm-up that is not
    shorter than the run.
    """
    return config.lr * rate_fraction(step, total_steps, config)


def rate_fraction(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate as a fraction of its highest value."""
    warmup = min(100, total_steps // 10) if config.warmup_steps is None else config.warmup_steps
    if warmup >= total_steps:
        raise UsageError(f"warmup_steps must be fewer than the {total_steps} steps of the run; it is {warmup}")
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, total_steps)))
    else:
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        remaining = 1 - _progress(step, max(warmup, total_steps - decay_steps), total_steps)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * remaining


def same_rates(steps: int, total: int, other_total: int, config: OptimConfig) -> bool:
    """Whether the first `steps` updates have the same learning rates in runs of two lengths."""
    return all(rate_fraction(s, total, config) == rate_fraction(s, other_total, config) for s in range(steps))


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / (end - start)))


def _require(config: OptimConfig, name: str, valid: Callable[[Any], bool], expected: str) -> None:
    value = getattr(config, name)
    try:
        accepted = valid(value)
    except TypeError:
        accepted = False
    if not accepted:
        raise UsageError(f"{name} must be {expected}; it is {value!r}")


def _one_of(names: Any) -> Callable[[Any], bool]:
    return lambda value: value in get_args(names)


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _count(value: int) -> bool:
    return isinstance(value, int) and value >= 0
