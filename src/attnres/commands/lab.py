"""attnres lab: the paper's experiments, one sub-command each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..errors import UsageError

# sub-command: (module that has `run(argv)`, what it does)
EXPERIMENTS = {
    "scaling": ("attnres.commands.lab_scaling", "scaling laws over sizes, and the compute that AttnRes saves"),
    "ablation": ("attnres.commands.lab_ablation", "every row of the paper's ablation, over seeds"),
    "sweep": (
        "attnres.commands.lab_sweep",
        "which width and heads per block are best, at equal parameters and compute",
    ),
    "dynamics": ("attnres.commands.lab_dynamics", "loss and magnitudes per block over a training, with a slider"),
}


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in EXPERIMENTS.items())
        print(f"usage: attnres lab EXPERIMENT [--help] ...\n\n{rows}")
        return 0 if argv else 2
    if argv[0] not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {argv[0]!r}; there are {', '.join(EXPERIMENTS)}")
    return importlib.import_module(EXPERIMENTS[argv[0]][0]).run(argv[1:])
