"""The command line for torchrun, with a process that gets a signal: FAULT="RANK SIGNAL STEP".

The signal comes in the middle of that step, in the forward pass of a micro-batch, and only before the first restart.
With FAULT="RANK SIGNAL STEP save" it comes while the process writes its part of that step's checkpoint.
"""

import os
import signal
import sys
from typing import Any

from attnres.cli import main
from attnres.parallel.part import ModelPart
from attnres.run import checkpoint, hardware
from attnres.train.loop import Trainer


def strike(rank: int, number: signal.Signals, step: int, owner: Any, method: str) -> None:
    right, take_step = getattr(owner, method), Trainer._train_step
    steps: list[int] = []

    def noting(self: Trainer, *args: object) -> object:
        steps.append(self.step + 1)
        return take_step(self, *args)

    def struck(*args: object) -> object:
        if steps[-1:] == [step] and rank == int(os.environ["RANK"]):
            steps.append(0)  # once
            os.kill(os.getpid(), number)
        return right(*args)

    setattr(owner, method, struck)
    Trainer._train_step = noting


if __name__ == "__main__":
    hardware.peak_flops = lambda device, precision: 1e11  # measuring it takes as long as the run
    if "FAULT" in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        rank, name, step, *place = os.environ["FAULT"].split()
        owner = (checkpoint, "_write") if place else (ModelPart, "forward")
        strike(int(rank), signal.Signals[name], int(step), *owner)
    sys.exit(main())
