"""`train`: from a configuration to a finished run, in the one process or as one of those that torchrun started."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from ..data.corpus import Corpus, load_corpus
from ..errors import UsageError
from ..parallel import agreement, mesh
from ..parallel.agreement import on_first
from ..parallel.contact import telling_lost_contact
from ..run import folder as run_folder
from ..run import hardware
from ..run.config import OF_THE_CORPUS, TrainConfig, flat
from ..version import __version__
from .loop import Result, Trainer, Watch
from .shortage import check_size, model_too_large, telling_shortage

OF_THE_MACHINE = ("device", "cache_dir", "workers")
"""Settings that may differ between the machines of a job."""


def train(config: TrainConfig, resume: bool = False, watch: Watch | None = None) -> Result:
    """Runs `config` to its last step, or to a SIGTERM, SIGHUP or Ctrl-C, which saves a checkpoint first.

    With `resume` it goes on from the newest whole checkpoint in config.out (from the start if there is none); on a CPU
    the loss curve is then bit-identical to an uninterrupted run's. Raises UsageError for bad input, with nothing
    written, and Failure for a full disk, a damaged checkpoint, too little memory or a loss that is not finite.

    `watch(model, step)` is called after each validation of a run in one process.

    With `config.parallel` this is what every process of the job calls, and every one returns the same result; after a
    restart by torchrun it resumes by itself.
    """
    processes = mesh.launched_processes()
    config.parallel.check(processes, config.model, config.batch_size, config.context, config.checkpointing)
    if config.compile and processes > 1:
        raise UsageError("compile works in a single process only; leave it out, or leave out parallel")
    device = hardware.find_device(config.device)
    if processes == 1:
        run_folder.check_folder(config.out, resume)
    config.model.check_residual()  # refuses bad options before the corpus is read
    # Before the processes wait for each other: one builds the cache, the others wait for its lock as long as it takes.
    corpus = load_corpus(config.data, config.tokenizer, config.cache_dir, text_column=config.text_column)
    config = config.with_vocabulary(corpus.tokenizer.vocab_size)
    with ExitStack() as stack:
        if processes > 1:
            stack.enter_context(telling_lost_contact(config.parallel.timeout))
            stack.enter_context(mesh.connected(config.parallel, device))
            agreement.require_same(_of_the_job(run_folder.settled(config), corpus))
            # an agent of torchrun counts only the restarts that a process of its own node caused
            restarted = agreement.summed(float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), device) > 0
            resume = on_first(lambda: resume or (restarted and (config.out / "config.json").exists()))
            on_first(lambda: run_folder.check_folder(config.out, resume))
        if resume:
            config = run_folder.continued(on_first(lambda: run_folder.read_config(config.out)), config)
        config = run_folder.settled(config)
        check_size(config)
        with telling_shortage(model_too_large):
            trainer = Trainer(config, corpus)
        trainer.watch = watch
        if agreement.rank() == 0:
            stack.enter_context(run_folder.held(config.out))
        on_first(lambda: run_folder.check_folder(config.out, resume))
        if resume:
            with telling_shortage(model_too_large):
                trainer.restore(run_folder.newest_checkpoint(config.out))
        on_first(lambda: run_folder.write_config(config))
        on_first(lambda: corpus.tokenizer.save(config.out))
        if blind := agreement.summed(float(not (config.out / "config.json").exists()), device):
            raise UsageError(
                f"out must be a folder that all processes see: {blind:.0f} of {processes} do not find "
                f"{config.out / 'config.json'}, which the first has written; put --out on a shared disk"
            )
        return trainer.run()


def _of_the_job(config: TrainConfig, corpus: Corpus) -> dict[str, str]:
    """What must be the same in all processes; machines may keep the same text in different places."""
    fields = {name: value for name, value in config.to_dict().items() if name not in (*OF_THE_CORPUS, *OF_THE_MACHINE)}
    data = {"fingerprint": corpus.fingerprint, "train": len(corpus.train), "validation": len(corpus.validation)}
    return flat({**fields, "data": data, "version": __version__, "torch": torch.__version__})
