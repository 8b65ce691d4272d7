"""A program that kills saves, at every call that changes the disk and at random moments, and looks at what is left.

Usage: python killed_saves.py FOLDER SEED. It runs on its own, since it forks often and pytest's process is large.
"""

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from attnres.run import nested
from attnres.run.checkpoint import latest, load, save


def write(root, step, keep):
    tensor = torch.full((64,), float(step))
    save(root, step, {"w": tensor}, {"w": {"exp_avg": tensor.clone()}}, {"number": step}, keep)


def newest(root):
    for path in root.glob("step-*"):
        model, optimizer, state, step = load(path)
        assert state == {"number": step} and model["w"].eq(step).all() and optimizer["w"]["exp_avg"].eq(step).all()
    path = latest(root)
    return None if path is None else load(path).step


def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def kill_at_call(number):
    """Ends this process, without any cleaning up, in front of its n-th call that changes the disk."""
    calls = count()

    def guard(function):
        def guarded(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return guarded

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, guard(getattr(os, name)))
    nested.save_file = guard(nested.save_file)
    Path.write_text = guard(Path.write_text)


def kill_at_every_call(root, same_step):
    write(root, 1, keep=1)
    for number in range(200):
        before = newest(root)
        step = before if same_step else before + 1

        def once(number=number, step=step):
            kill_at_call(number)
            write(root, step, keep=1)

        _, status = os.waitpid(child(once), 0)
        after = newest(root)
        assert after is not None and before <= after <= step, (number, before, after)
        if not os.WIFSIGNALED(status):
            break
    assert 10 < number < 199, number
    write(root, before + 2, keep=1)
    assert len(os.listdir(root)) == 1, os.listdir(root)


def kill_at_random(root, kills):
    start = time.monotonic()
    for step in range(3):
        write(root.with_name("timing"), step, keep=1)
    seconds_per_save = (time.monotonic() - start) / 3
    reached = None

    def forever():
        for step in count(1 + (reached or 0)):
            write(root, step, keep=2)

    for kill in count(1):
        pid = child(forever)
        time.sleep(random.uniform(0.0, 4 * seconds_per_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = newest(root)
        assert step is not None or reached is None, f"after step {reached} nothing is left"
        assert step is None or reached is None or step >= reached, f"fell back from {reached} to {step}"
        assert not root.exists() or len(os.listdir(root)) <= 5, "leftovers pile up"
        reached = step
        if kill >= kills and reached:
            break


if __name__ == "__main__":
    root = Path(sys.argv[1])
    random.seed(int(sys.argv[2]))
    kill_at_every_call(root / "new step", same_step=False)
    kill_at_every_call(root / "same step", same_step=True)
    kill_at_random(root / "random", kills=12)
