"""Whether torch.export is at work, whose programs run without this package."""

import torch


def is_exporting() -> bool:
    """True while torch.export traces, False in torch.compile and else."""
    # torch.compiler.is_exporting() is True in torch.compile too before torch 2.13
    return torch.compiler._is_exporting_flag
